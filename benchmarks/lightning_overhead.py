"""What does Lightning's trainer cost a step? Its fit loop against a bare loop over the same module and batches.

Run: ``python benchmarks/lightning_overhead.py``, about a minute; with ``--clock cpu`` where others use the machine.
Both sides call the module's own ``training_step`` and optimiser; the trainer has the logger and the callbacks of a
real run. The two alternate, and medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from visexpert.callbacks import RunLogger, ThroughputMonitor, TrainingProgress
from visexpert.report.machine import describe_machine

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class _Reference(LightningModule):
    """A transformer encoder sized to about 100 ms a step on one CPU core."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 4, 384, dropout=0.0, batch_first=True)
        self.network = nn.Sequential(nn.Linear(32, 96), nn.TransformerEncoder(layer, 3), nn.Linear(96, 32))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.network(batch), batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make_module() -> LightningModule:
    """The module whose steps are timed; ``configure_optimizers`` must return one optimiser."""
    torch.manual_seed(0)
    return _Reference()


def make_batches(count: int) -> list[Any]:
    """``count`` batches that :func:`make_module`'s module can step on."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 65, 32, generator=generator) for _ in range(count)]


@dataclass(frozen=True)
class Overhead:
    """Result of :func:`compare`: seconds per step, one value for each repeat."""

    bare: tuple[float, ...]
    trainer: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of the trainer's step over that of the bare one."""
        return statistics.median(self.trainer) / statistics.median(self.bare)


def compare(module: LightningModule, batches: Sequence[Any], *, repeats: int, clock: Clock) -> Overhead:
    """Time both loops ``repeats`` times in turn, each from the same weights, after one untimed turn."""
    bare: list[float] = []
    trainer: list[float] = []
    for repeat in range(repeats + 1):
        turns = [(bare, time_bare), (trainer, time_trainer)]
        for seconds, timed in turns if repeat % 2 else reversed(turns):
            taken = timed(copy.deepcopy(module), batches, clock)
            if repeat:
                seconds.append(taken)
    return Overhead(bare=tuple(bare), trainer=tuple(trainer))


def time_bare(module: LightningModule, batches: Sequence[Any], clock: Clock) -> float:
    """Seconds per step of a plain loop."""
    optimiser: Any = module.configure_optimizers()
    module.train()
    start = clock()
    for index, batch in enumerate(DataLoader(batches, batch_size=None)):  # type: ignore[arg-type]
        optimiser.zero_grad()
        loss: Any = module.training_step(batch, index)
        loss.backward()
        optimiser.step()
    return (clock() - start) / len(batches)


def time_trainer(module: LightningModule, batches: Sequence[Any], clock: Clock) -> float:
    """Seconds per step of ``Trainer.fit``, set-up and tear-down left out."""
    watch = _Stopwatch(clock)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=RunLogger(folder),
            callbacks=[watch, TrainingProgress(interactive=False), ThroughputMonitor()],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return watch.seconds / len(batches)


class _Stopwatch(Callback):
    """Times from the start of the first epoch to the end of training."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._clock()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self._clock() - self._start


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=40, help="steps in each turn")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each loop")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # a bare loop has no trainer to log to, and Lightning says so
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    clock = CLOCKS[arguments.clock]
    result = compare(make_module(), make_batches(arguments.steps), repeats=arguments.repeats, clock=clock)
    difference = statistics.median(result.trainer) - statistics.median(result.bare)
    print(f"{describe_machine()}; {arguments.clock} clock, {arguments.repeats} x {arguments.steps} steps")
    print(f"bare loop  {1e3 * statistics.median(result.bare):7.2f} ms a step {_range(result.bare)}")
    print(f"trainer    {1e3 * statistics.median(result.trainer):7.2f} ms a step {_range(result.trainer)}")
    print(f"overhead   {1e3 * difference:7.2f} ms a step, {100 * (result.ratio - 1):+.1f} % (budget: 5 %)")


def _range(seconds: Sequence[float]) -> str:
    return f"({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})"


if __name__ == "__main__":
    main()
