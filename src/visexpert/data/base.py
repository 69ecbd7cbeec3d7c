"""What all data modules share: they print in one line, without reading anything, and divide steps alike."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from visexpert.data.division import Division, StepSize, convert_progress
from visexpert.data.loader import StepLoader, TrainingLoader
from visexpert.errors import ConfigError
from visexpert.precision import convert_records

log = logging.getLogger(__name__)


class DataModule(LightningDataModule):
    """A data module whose ``global_batch_size`` holds on any number of processes, also if a fit goes on with another.

    It prints in one line: Lightning's own text opens every loader.
    """

    _training: tuple[TrainingLoader, Division] | None = None
    """The loader of the current fit, and the division of a step that it was made for."""
    _interrupted: dict[str, Any] | None = None
    """State of the loader of an interrupted fit that goes on, until the current one is there."""

    @abstractmethod
    def described(self) -> Sequence[str]:
        """Return what its line says, from settings alone."""

    @abstractmethod
    def step_size(self) -> StepSize:
        """Return what the settings say about the size of an optimizer step."""

    def setup(self, stage: str | None = None) -> None:
        """Fit trainer and data to each other; subclasses then read what ``stage`` needs."""
        convert_records(self.trainer)
        if self.trainer is not None and stage == "fit":
            self._training = self._interrupted = None  # those of an earlier fit
            self.settle_accumulation(self.trainer)

    def settle_accumulation(self, trainer: L.Trainer) -> None:
        """Set the trainer's ``accumulate_grad_batches`` to what follows from ``global_batch_size``.

        Raises:
            ConfigError: ``global_batch_size`` does not fit the number of processes, or module, trainer or a callback
                accumulate otherwise.
        """
        images = self.step_size().global_batch_size
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if images is not None and isinstance(callback, GradientAccumulationScheduler):
                raise ConfigError(
                    f"global_batch_size is {images}, but {type(callback).__name__} changes the images of a step from "
                    f"epoch to epoch ({callback.scheduling}); leave out one of the two."
                )
        division = self.division(processes=trainer.world_size, accumulate=trainer.accumulate_grad_batches)
        if division.accumulate == trainer.accumulate_grad_batches:
            return
        module = trainer.lightning_module
        if module is not None and not module.automatic_optimization:
            raise ConfigError(
                f"global_batch_size is {division.step_size}, but {type(module).__name__} takes its steps itself and "
                f"accumulates nothing; set batch_size to {division.batch_size * division.accumulate}."
            )
        trainer.accumulate_grad_batches = division.accumulate
        if trainer.is_global_zero:
            log.info("global_batch_size %d: %s", division.step_size, division)

    def division(self, *, processes: int | None = None, accumulate: int | None = None) -> Division:
        """Return how an optimizer step is divided.

        Args:
            processes: Their number; None for the trainer's.
            accumulate: ``accumulate_grad_batches``; None for the trainer's.

        Raises:
            ConfigError: ``global_batch_size`` cannot be divided so.
        """
        if processes is None:
            processes = self.process[1]
        if accumulate is None:
            accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self.step_size().divided(processes=processes, accumulate=accumulate)

    def in_steps(self, loader: TrainingLoader) -> StepLoader:
        """Return a loader of training batches, in the order of an interrupted fit, as ``train_dataloader`` does."""
        self._training = (loader, self.division())
        self._take_up()
        return StepLoader(loader, trainer=self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return, in a fit, how its steps are divided and what its loader remembers."""
        if self._training is None:
            return {}
        loader, division = self._training
        return {"division": asdict(division), "whole": loader.has_whole_steps, "loader": loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, in a fit, with the images after those of the interrupted one, whatever its number of processes.

        Raises:
            ConfigError: They cannot be told.
        """
        trainer = self.trainer
        if trainer is None or trainer.state.fn != "fit":
            return
        # Lightning restores the loops after this, and a loader's state only if the loader is made after that.
        checkpoint, old = trainer._checkpoint_connector._loaded_checkpoint, Division(**state_dict["division"])
        if "loops" in checkpoint:
            fit_loop = checkpoint["loops"]["fit_loop"]
            convert_progress(fit_loop, old, self.division(), whole=state_dict["whole"])
        self._interrupted = state_dict["loader"]
        self._take_up()

    def _take_up(self) -> None:
        """Hand the interrupted fit's state to the loader, once both are there."""
        if self._training is not None and self._interrupted is not None:
            self._training[0].load_state_dict(self._interrupted)
            self._interrupted = None

    def batches_done(self) -> Callable[[], int] | None:
        """Return a function that counts the trainer's finished training batches over all epochs; None without one."""
        trainer = self.trainer
        if trainer is None:
            return None

        def done() -> int:
            # With overfit_batches each epoch starts again with the same few batches.
            if not trainer.training or getattr(trainer, "overfit_batches", False):
                return 0
            return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)

        return done

    @property
    def process(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.described())})"

    def __str__(self) -> str:
        return repr(self)
