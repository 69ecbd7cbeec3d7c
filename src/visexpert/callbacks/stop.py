"""Stopping a fit by a signal: at the end of a step, with a checkpoint, so that it goes on to the very same weights."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from visexpert.interruption import Interrupted, defer, hint, received


class StopOnSignal(Callback):
    """Ends a fit after SIGTERM or Ctrl-C: the step under way is finished and saved, validation is broken off.

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        """What follows - figures, phases, a test - is stopped at once; the final weights are saved."""
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
    """Whether a validation follows the training step that has just ended."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return trainer.enable_validation and fetcher is not None and loop._should_check_val_fx(fetcher)
