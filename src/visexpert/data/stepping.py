"""Training batches that carry the counts of their optimizer step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from visexpert.types import UNITS, Batch, StepCounts, Unit

if TYPE_CHECKING:
    import lightning as L

    from visexpert.data.source import Loader


class StepLoader:
    """Yields the batches of another loader, each with the token and image counts of its whole optimizer step.

    With ``accumulate_grad_batches`` above 1 a step's losses are divided by what all its batches count, so that many
    small batches train like a large one. These counts must be known before the first of them is used: batches are read
    ahead by one step, then one for each that is given, so that workers never wait. The last step of an epoch may be
    shorter. Anything else is asked of the loader itself.

    Args:
        loader: Training batches of this process.
        trainer: Trainer that defines where steps begin; None passes batches on unchanged.
    """

    def __init__(self, loader: Loader, *, trainer: L.Trainer | None) -> None:
        self.loader, self._trainer = loader, trainer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the trainer creates it before it restores its progress.
        if self._trainer is None:
            yield from self.loader
            return
        done, left = self._place(self._trainer)
        size = self._trainer.accumulate_grad_batches
        batches = iter(self.loader) if math.isinf(left) else islice(self.loader, int(left))
        ahead: deque[Batch] = deque()
        due = size - done % size
        while True:
            ahead.extend(islice(batches, due - len(ahead)))
            step = [ahead.popleft() for _ in range(min(due, len(ahead)))]
            if not step:
                return
            for batch in _counted(step):
                yield batch
                ahead.extend(islice(batches, 1))
            due = size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    @staticmethod
    def _place(trainer: L.Trainer) -> tuple[int, float]:
        """Return how many batches of the epoch are done, and how many are left of it."""
        done = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return done, trainer.num_training_batches - done


def _counted(step: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the batches of one optimizer step, with its counts."""
    counts = [batch.counts() for batch in step]
    total: dict[Unit, int] = {unit: sum(own[unit] for own in counts) for unit in UNITS}
    for place, (batch, own) in enumerate(zip(step, counts, strict=True)):
        yield replace(batch, step=StepCounts(batch=own, step=total, place=place))
