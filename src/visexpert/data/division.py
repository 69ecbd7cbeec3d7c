"""How the images of an optimizer step are divided among processes, batches and accumulated gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visexpert.errors import ConfigError

DEFAULT_BATCH = 32
"""Images per training batch and process, where nothing says how many."""


@dataclass(frozen=True)
class Division:
    """The division of an optimizer step.

    Args:
        batch_size: Images per batch and process.
        processes: Number of processes.
        accumulate: Batches per step and process.
    """

    batch_size: int
    processes: int = 1
    accumulate: int = 1

    @property
    def step_size(self) -> int:
        """Images per step, over all processes."""
        return self.batch_size * self.processes * self.accumulate

    def __str__(self) -> str:
        return _product(self.processes, self.batch_size, self.accumulate)


@dataclass(frozen=True)
class StepSize:
    """What the settings of the data say about the size of a step.

    Args:
        batch_size: Images per batch and process; None if it follows from ``global_batch_size``.
        global_batch_size: Images per optimizer step over all processes; None if it follows from the others.
    """

    batch_size: int | None = None
    global_batch_size: int | None = None

    def __str__(self) -> str:
        if self.batch_size is None and self.global_batch_size is not None:
            return f"steps of {self.global_batch_size}"
        each = f"batches of {DEFAULT_BATCH if self.batch_size is None else self.batch_size}"
        return each if self.global_batch_size is None else f"{each}, steps of {self.global_batch_size}"

    def divided(self, *, processes: int = 1, accumulate: int = 1) -> Division:
        """Divide a step among processes.

        Args:
            processes: Their number.
            accumulate: The trainer's ``accumulate_grad_batches``; with ``global_batch_size``, its default of 1 stands
                for whatever follows.

        Raises:
            ConfigError: ``global_batch_size`` cannot be divided without remainder, or contradicts the others.
        """
        images, batch = self.global_batch_size, self.batch_size
        if images is None:
            return Division(DEFAULT_BATCH if batch is None else batch, processes, accumulate)
        given = _product(processes, batch, accumulate)
        at_once = processes * (batch or 1) * accumulate
        if batch is not None and accumulate > 1 and at_once != images:
            raise ConfigError(
                f"global_batch_size is {images}, but {given} are {at_once}; leave out batch_size or "
                "accumulate_grad_batches, which then follow."
            )
        if images % at_once:
            near = [str(at_once * times) for times in (images // at_once, images // at_once + 1) if times]
            fitting = [size for size in range(1, batch or 1) if images % (processes * size) == 0]
            near += [f"take batch_size {fitting[-1]}"] if fitting else []
            raise ConfigError(
                f"global_batch_size is {images}, but must be a multiple of {at_once} ({given}); set it to "
                f"{', or '.join(near)}."
            )
        if batch is None:
            return Division(images // at_once, processes, accumulate)
        return Division(batch, processes, images // (processes * batch))


def convert_progress(fit_loop: Mapping[str, Any], old: Division, new: Division, *, whole: bool) -> None:
    """Count the batches in a fit's progress as another number of processes would have: by the images they held.

    Args:
        fit_loop: Lightning's state of the fit loop in a checkpoint, changed in place.
        old: The division of the fit that wrote it.
        new: The division of the fit that goes on.
        whole: Whether an epoch of the data is whole steps.

    Raises:
        ConfigError: Steps hold another number of images, or the position is not at the end of a step.
    """
    if old == new:
        return
    if old.step_size != new.step_size:
        raise ConfigError(
            f"The interrupted fit took {old.step_size} images a step ({old}), this one would take {new.step_size} "
            f"({new}), so that images were repeated or lost; set the data's global_batch_size to {old.step_size}."
        )
    progress = fit_loop["epoch_loop.batch_progress"]
    counters = (progress["total"], progress["current"])
    if not whole or any(counts["processed"] % old.accumulate for counts in counters):
        where = "inside an optimizer step" if whole else f"in data of less than a step ({old.step_size} images)"
        raise ConfigError(
            f"The interrupted fit stopped {where}, so that only {old} can go on with the same images; use as many."
        )
    for counts in counters:
        steps = counts["processed"] // old.accumulate
        shift = steps * new.accumulate - counts["processed"]
        counts.update({name: count + shift for name, count in counts.items()})


def _product(processes: int, batch: int | None, accumulate: int) -> str:
    factors = ["1 process" if processes == 1 else f"{processes} processes"]
    factors += [] if batch is None else [f"batch_size {batch}"]
    factors += [f"accumulate_grad_batches {accumulate}"] if accumulate > 1 else []
    return " x ".join(factors)
