"""How the images of an optimizer step are divided among processes, batches and accumulated gradients."""

from __future__ import annotations

from dataclasses import dataclass

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


def _product(processes: int, batch: int | None, accumulate: int) -> str:
    factors = ["1 process" if processes == 1 else f"{processes} processes"]
    factors += [] if batch is None else [f"batch_size {batch}"]
    factors += [f"accumulate_grad_batches {accumulate}"] if accumulate > 1 else []
    return " x ".join(factors)
