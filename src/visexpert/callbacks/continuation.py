"""Metrics of a fit that is continued: those of the part before, and a validation that the stop has cut off."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from visexpert.callbacks.budget import TrainingBudget
from visexpert.callbacks.stop import validation_is_due

log = logging.getLogger(__name__)

KEY = "metrics_so_far"
"""Entry of a checkpoint."""


class MetricsContinuation(Callback):
    """Lets a continued fit know all that the whole one would: what is measured goes into each checkpoint.

    Lightning takes a validation that was due at the step of the checkpoint for done, though a fit that was killed
    before its end never finished it. It is made up for here before training goes on, or ends. A fit that goes on where
    no step is left says so.
    """

    def __init__(self) -> None:
        self._validated: int | None = None
        self._before: dict[str, Any] | None = None
        self._trained = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        step = trainer.global_step
        checkpoint[KEY] = {
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "batches": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "validate": self._validated != step and (trainer.validating or validation_is_due(trainer)),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get(KEY)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = False
        self._take_up(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Strategies that shard the model read the checkpoint later than the others."""
        self._take_up(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the checkpoint already was at the end."""
        if trainer.ckpt_path is not None and not self._trained and trainer.is_global_zero:
            log.warning(
                "No step is left: %s is at step %d and %s; raise that to train further.",
                trainer.ckpt_path,
                trainer.global_step,
                _limit_of(trainer),
            )

    def _take_up(self, trainer: Trainer) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        metrics = {name: torch.tensor(value) for name, value in before["metrics"].items()}
        if before["validate"] and trainer.enable_validation:
            _validate(trainer, batches=before["batches"])
        trainer._logger_connector._callback_metrics.update({**metrics, **trainer.callback_metrics})


def _limit_of(trainer: Trainer) -> str:
    """Which setting has ended the training."""
    if any(isinstance(callback, TrainingBudget) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return "the budget of TrainingBudget is spent"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps is {trainer.max_steps}"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"trainer.max_epochs is {trainer.max_epochs}"
    return "what else ends its training (trainer.max_time, early stopping) has come"


def _validate(trainer: Trainer, *, batches: int) -> None:
    """Validate inside a fit that has not begun to train; ``batches`` numbers the row of ``metrics.csv``."""
    loop = trainer.fit_loop.epoch_loop
    stage, before = trainer.state.stage, loop._batches_that_stepped
    loop._batches_that_stepped = batches
    trainer.validating = True
    with isolate_rng():
        loop.val_loop.run()
    trainer.state.stage = stage
    loop._batches_that_stepped = before
