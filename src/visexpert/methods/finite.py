"""Losses and gradients that are not finite: noticed before they reach the weights, and written down."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from visexpert.errors import ConfigError, DataError
from visexpert.types import Batch, StepOutput

log = logging.getLogger(__name__)

OnNan = Literal["stop", "skip"]

FILE = "not_finite.jsonl"
"""Of a run's folder: the batches of steps that were not taken, one line each."""

MOST_IN_A_ROW = 10
"""Steps in a row that ``skip`` passes over; one more ends the run."""


@dataclass(frozen=True)
class Noted:
    """A batch of the optimizer step that is under way, still on its device."""

    index_B: Tensor
    split: str
    source: str
    loss: Tensor
    parts: dict[str, Tensor]


class FiniteGuard:
    """Keeps NaN and infinity out of the weights: one look at the device per optimizer step, before it is taken.

    Args:
        on_nan: ``stop`` ends the run, ``skip`` passes over the step.
    """

    def __init__(self, on_nan: OnNan) -> None:
        self.on_nan: OnNan = on_nan
        self.skipped = self.in_a_row = 0
        self._batches: list[Noted] = []

    def note(self, batch: Batch, output: StepOutput) -> None:
        """Keep what a batch gave, until its optimizer step is due."""
        parts = {name: value.detach() for name, value in output.parts.items()}
        self._batches.append(Noted(batch.index_B, batch.split, batch.source, output.loss.detach(), parts))

    def look(self, module: L.LightningModule) -> None:
        """Look at the losses since the last optimizer step and at its gradients; every process decides alike.

        Under float16 the scaler passes over gradients that overflow, and finds its scale by them: they are its own
        business.

        Raises:
            DataError: They are not finite, and the run is to stop.
        """
        batches, self._batches = self._batches, []
        trainer = module.trainer
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        sums = [noted.loss.float() for noted in batches] + ([] if scaled else _norms(module.parameters()))
        if not sums:
            return
        good = torch.stack([value.to(sums[0].device) for value in sums]).isfinite().all()
        wrong = (~good).float()
        if trainer.world_size > 1:
            wrong = trainer.strategy.reduce(wrong, reduce_op="sum")
        if not float(wrong):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        where = _write(trainer, batches)
        what = "a loss" if not all(math.isfinite(float(noted.loss)) for noted in batches) else "a gradient"
        begin = f"Step {trainer.global_step} has {what} that is NaN or infinite on some process (its rows: {where})"
        advice = "lower lr, clip gradients, use bf16-mixed or float32, or look at these rows"
        if self.on_nan == "stop":
            raise DataError(
                f"{begin}; it was not taken, so the weights and checkpoints are those before it: {advice}, then go on "
                "by --ckpt_path last, or pass over such steps by on_nan: skip."
            )
        if self.in_a_row > MOST_IN_A_ROW:
            raise DataError(f"{begin}, as the {MOST_IN_A_ROW} before it, all passed over: {advice}.")
        log.warning("%s; it is passed over, the %d. so far.", begin, self.skipped)
        if not scaled:
            for parameter in module.parameters():
                parameter.grad = None

    def check_weights(self, module: L.LightningModule) -> None:
        """Refuse to save weights that training has made NaN or infinite: the newest checkpoint stays a sound one.

        Raises:
            DataError: They are.
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
        trained = {name: norm for name, p in named for norm in _norms([p], own=True)}
        if not trained:
            return
        good = torch.stack([value.to(next(iter(trained.values())).device) for value in trained.values()]).isfinite()
        wrong = (~good.all()).float()
        trainer = module._trainer
        if trainer is not None and trainer.world_size > 1:
            wrong = trainer.strategy.reduce(wrong, reduce_op="sum")
        if float(wrong):
            names = [name for name, fine in zip(trained, good.tolist(), strict=True) if not fine]
            raise DataError(
                f"Training has made weights NaN or infinite ({', '.join(names[:3]) or 'on another process'}); they are "
                "not saved, the last checkpoint is sound: lower lr or clip gradients, and go on from it."
            )


def refuse_engines(strategy: Any, on_nan: str) -> None:
    """Refuse to pass over steps where an engine takes them by itself.

    Raises:
        ConfigError: ``skip`` under DeepSpeed or FSDP.
    """
    if on_nan == "skip" and isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"on_nan: skip drops gradients, which {type(strategy).__name__} keeps to itself; use on_nan: stop, or "
            "strategy ddp."
        )


def _norms(parameters: Iterable[nn.Parameter], *, own: bool = False) -> list[Tensor]:
    """Sizes of gradients, or of the parameters themselves: finite where all their values are."""
    found = [p.detach() if own else p.grad for p in parameters if own or p.grad is not None]
    tensors = [value for value in found if value is not None and value.numel() and value.is_floating_point()]
    return [] if not tensors else list(torch._foreach_norm(tensors, float("inf")))


def _write(trainer: L.Trainer, batches: Iterable[Noted]) -> Path:
    """Add the batches of a step to the run's list, one of each process; say where it is."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process must ask
    path = folder / (FILE if trainer.global_rank == 0 else FILE.replace(".", f".rank{trainer.global_rank}.", 1))
    lines = []
    for noted in batches:
        parts = {name: str(float(value)) for name, value in noted.parts.items()}
        lines.append(
            {
                "step": trainer.global_step,
                "split": noted.split,
                "source": noted.source,
                "rows": noted.index_B.tolist(),
                "loss": str(float(noted.loss)),
                "parts": parts,
            }
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        log.warning("%s cannot be written (%s).", path, error)
    return path
