"""Measure what Lightning's trainer costs per step: its fit loop against a bare loop over the same ToVE and batches.

Run ``python benchmarks/lightning_overhead.py``, about a minute; add ``--clock cpu`` if others use the machine. Both
loops call the module's own ``training_step`` and optimizer; the trainer has the logger and the callbacks of a real run.
The two alternate, and their medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import itertools
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
from torch.utils.data import DataLoader

from visexpert.callbacks import RunLogger, ThroughputMonitor, TrainingProgress
from visexpert.experts import FeatureCache, VisionExpert
from visexpert.io.weights import cache_root
from visexpert.language import CrossAttentionDecoder
from visexpert.methods import ToVE
from visexpert.optim import make_groups
from visexpert.report.machine import describe_machine
from visexpert.tabletop import TabletopData, TinyExpert
from visexpert.vision import ClipEncoder

Clock = Callable[[], float]
EXPERTS = ("semantic", "depth", "normals", "edges", "segmentation")
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class _TimedToVE(ToVE):
    """ToVE with an optimizer for a bare loop, without a schedule, which would need a trainer."""

    def on_fit_start(self) -> None:
        """Do nothing: the features are already there, and both loops read the same ones."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(make_groups(self.trained_groups(), weight_decay=0.02), lr=1e-3, fused=True)


def make_module_and_batches(count: int) -> tuple[LightningModule, list[Any]]:
    """Return ToVE of configs/tove/tabletop.yaml with stored features, and ``count`` of its training batches."""
    data = TabletopData(num_train=24 * count, num_val=8, num_test=8, batch_size=24)
    data.setup("fit")
    torch.manual_seed(0)
    experts: dict[str, VisionExpert] = {name: TinyExpert(source=f"zoo:{name}") for name in EXPERTS}
    language = CrossAttentionDecoder(vocab_size=96, width=64, depth=2, heads=4, mlp_ratio=2)
    module = _TimedToVE(clip=ClipEncoder(source="zoo:clip"), experts=experts, language=language)
    module.setup("fit")
    module.read_features(FeatureCache(cache_root() / "features"), data.image_sources())
    return module, list(itertools.islice(data.train_dataloader(), count))


@dataclass(frozen=True)
class Overhead:
    """Result of :func:`compare`: seconds per step, one value per repeat."""

    bare: tuple[float, ...]
    trainer: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median time of the trainer's step divided by that of the bare loop's."""
        return statistics.median(self.trainer) / statistics.median(self.bare)


def compare(module: LightningModule, batches: Sequence[Any], *, repeats: int, clock: Clock) -> Overhead:
    """Time both loops in turn, ``repeats`` times each and always from the same weights, after one untimed turn."""
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
    """Return the seconds per step of a bare loop."""
    optimizer: Any = module.configure_optimizers()
    module.train()
    start = clock()
    for index, batch in enumerate(DataLoader(batches, batch_size=None)):  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss: Any = module.training_step(batch, index)
        loss.backward()
        optimizer.step()
    return (clock() - start) / len(batches)


def time_trainer(module: LightningModule, batches: Sequence[Any], clock: Clock) -> float:
    """Return the seconds per step of ``Trainer.fit``, without setup and teardown."""
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
    """Measure the time from the start of the first epoch to the end of training."""

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
    parser.add_argument("--steps", type=int, default=40, help="steps per turn (default: 40)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each loop (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default), or cpu for a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # a bare loop has no trainer to log to, and Lightning says so
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    clock = CLOCKS[arguments.clock]
    module, batches = make_module_and_batches(arguments.steps)
    result = compare(module, batches, repeats=arguments.repeats, clock=clock)
    difference = statistics.median(result.trainer) - statistics.median(result.bare)
    print(f"{describe_machine()}; {arguments.clock} clock, {arguments.repeats} x {arguments.steps} steps")
    print(f"bare loop  {1e3 * statistics.median(result.bare):7.2f} ms a step {_range(result.bare)}")
    print(f"trainer    {1e3 * statistics.median(result.trainer):7.2f} ms a step {_range(result.trainer)}")
    print(f"overhead   {1e3 * difference:7.2f} ms a step, {100 * (result.ratio - 1):+.1f} % (budget: 5 %)")


def _range(seconds: Sequence[float]) -> str:
    return f"({1e3 * min(seconds):.2f} to {1e3 * max(seconds):.2f})"


if __name__ == "__main__":
    main()
