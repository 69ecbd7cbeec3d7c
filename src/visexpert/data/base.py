"""What all data modules share: they print in one line, without reading anything, and divide steps alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import lightning as L
from lightning.pytorch import LightningDataModule

from visexpert.data.division import Division, StepSize
from visexpert.errors import ConfigError
from visexpert.precision import convert_records


class DataModule(LightningDataModule):
    """A data module whose ``global_batch_size`` holds on any number of processes.

    It prints in one line: Lightning's own text opens every loader.
    """

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
            self.settle_accumulation(self.trainer)

    def settle_accumulation(self, trainer: L.Trainer) -> None:
        """Set the trainer's ``accumulate_grad_batches`` to what follows from ``global_batch_size``.

        Raises:
            ConfigError: ``global_batch_size`` does not fit the number of processes, or module or trainer accumulate
                otherwise.
        """
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

    def division(self, *, processes: int | None = None, accumulate: int | None = None) -> Division:
        """Return how an optimizer step is divided.

        Args:
            processes: Their number; None for the trainer's.
            accumulate: ``accumulate_grad_batches``; None for the trainer's.

        Raises:
            ConfigError: ``global_batch_size`` cannot be divided so.
        """
        trainer = self.trainer
        if processes is None:
            processes = 1 if trainer is None else trainer.world_size
        if accumulate is None:
            accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        return self.step_size().divided(processes=processes, accumulate=accumulate)

    @property
    def process(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.described())})"

    def __str__(self) -> str:
        return repr(self)
