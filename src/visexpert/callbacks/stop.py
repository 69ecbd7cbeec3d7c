"""Stop a fit by a signal at the end of a step, and go on from there to the very same weights and metrics."""

from __future__ import annotations

import copy
import logging
import math
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng

from visexpert.callbacks.cost import TrainingBudget
from visexpert.interruption import Interrupted, defer, hint, received, reclaim

log = logging.getLogger(__name__)

KEY = "metrics_so_far"
"""Entry of a checkpoint."""


class StopOnSignal(Callback):
    """End a fit after SIGTERM or Ctrl-C: finish and save the current step, break off validation.

    Validation that was broken off, or was due at that step, is made up for when the fit goes on (see
    :class:`~visexpert.callbacks.MetricsContinuation`). All processes stop at the same step. Works inside
    :func:`visexpert.interruption.stoppable`, as the command line is; elsewhere no signal is ever received.

    Args:
        checkpoint: File to save; None for none.
    """

    def __init__(self, *, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        self._step_loops: dict[str, Any] | None = None
        self._saving_step = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reclaim()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reclaim()
        defer(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        if self._asked(trainer):
            trainer._logger_connector.on_batch_end()  # else the step's row is not written
            trainer._logger_connector.update_train_step_metrics()
            self._stop(trainer)
        # Where a validation follows, a stop inside it saves the state from before it.
        due = validation_is_due(trainer)
        self._step_loops = copy.deepcopy(trainer.fit_loop.state_dict()) if due else None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._asked(trainer):
            self._saving_step = self._step_loops is not None
            self._stop(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._saving_step:
            checkpoint["loops"]["fit_loop"] = self._step_loops

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once what follows (figures, phases, a test); the final weights are saved."""
        defer(False)
        signum = received()
        if signum is not None:
            raise Interrupted(signum, self._sentence(signum, trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, too, where Lightning itself ends the fit between two steps."""
        defer(False)
        if isinstance(exception, SIGTERMException) and trainer.training and self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)

    def _asked(self, trainer: Trainer) -> bool:
        """Whether any process was asked to stop."""
        asked = received() is not None
        if trainer.world_size > 1:
            asked = bool(trainer.strategy.reduce_boolean_decision(asked, all=False))
        return asked

    def _stop(self, trainer: Trainer) -> None:
        signum = received() or signal.SIGTERM  # only another process was asked
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)
        raise Interrupted(signum, self._sentence(signum, trainer))

    def _sentence(self, signum: int, trainer: Trainer) -> str:
        where = f"Stopped by {Interrupted(signum).name} after step {trainer.global_step}"
        if self.checkpoint is None:
            return f"{where}; nothing was saved, since checkpoints are off."
        return f"{where}, saved as {self.checkpoint}{hint()}."


def validation_is_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the training step that has just ended."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return trainer.enable_validation and fetcher is not None and loop._should_check_val_fx(fetcher)


class MetricsContinuation(Callback):
    """Give a continued fit all metrics of an uninterrupted one: each checkpoint stores what was measured.

    Lightning takes a validation that was due at the checkpoint's step for done, though a fit that was killed never
    finished it. This callback runs it before training goes on, or ends. A fit that continues with no step left warns.
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
        if trainer.is_global_zero and (told := _two_ends(trainer)):
            log.warning("%s", told)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where the checkpoint was already at the end."""
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


def _two_ends(trainer: Trainer) -> str | None:
    """Return which of ``max_steps`` and ``max_epochs`` ends the training, if both are given and do not agree."""
    steps, epochs, batches = trainer.max_steps, trainer.max_epochs, trainer.num_training_batches
    if any(isinstance(callback, TrainingBudget) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return None
    if steps < 0 or epochs is None or epochs < 0 or not 0 < batches < math.inf:
        return None
    epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    if steps == epochs * epoch:
        return None
    first = f"max_steps: {steps}" if steps < epochs * epoch else f"max_epochs: {epochs}"
    return (
        f"trainer: max_steps: {steps} are {steps / epoch:.2f} epochs, but max_epochs is {epochs} "
        f"({epochs * epoch} steps); {first} ends the training."
    )


def _limit_of(trainer: Trainer) -> str:
    """Return which setting has ended the training."""
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
