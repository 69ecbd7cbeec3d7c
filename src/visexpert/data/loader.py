"""Loaders of whole batches: in an order that depends only on seed and epoch, and with the counts of each step."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from visexpert.data.workers import load
from visexpert.errors import ConfigError, DataError
from visexpert.types import UNITS, Batch, StepCounts, Unit

if TYPE_CHECKING:
    import lightning as L


class Loader(Protocol):
    """Batches of a stage, in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class TrainingLoader(Loader, Protocol):
    """Training batches of a process, in an endless order that another number of processes can take up.

    Where they are in it is counted by the trainer (``position``); the state holds what else determines the order.
    """

    @property
    def has_whole_steps(self) -> bool:
        """Whether an epoch is whole optimizer steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return what determines the order, as plain values."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Keep to the order of an interrupted fit; warn if that cannot be."""


class BatchKey(NamedTuple):
    """Everything that determines a batch.

    Args:
        epoch: Epoch, from 0.
        rows: int64 rows of the split, in batch order.
    """

    epoch: int
    rows: npt.NDArray[np.int64]


class BatchSource(Protocol):
    """What a :class:`BatchLoader` reads: a stateless data set that builds whole batches."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, key: BatchKey, /) -> Batch:
        """Build one batch."""


class BatchLoader:
    """Iterates over the batches of an epoch, shuffled by (seed, epoch), with any number of workers.

    It is not a torch ``DataLoader``, so Lightning does not modify it (no sampler injection, no advice on workers).

    Batches form one endless sequence, epoch after epoch, and a resumed run continues where it stopped. Under Lightning,
    ``position`` reads that position from the trainer's restored progress when the first batch is due. This is exact
    where a count kept here would not be: after a run that died between fetching and finishing a batch, and after one
    stopped by ``max_steps``, whose epoch Lightning considers finished.

    Args:
        source: Builds a batch from a :class:`BatchKey`.
        batch_size: Images per batch and process.
        shuffle: Use a new order each epoch; otherwise rows in order.
        drop_last: Drop what is left over at the end of an epoch, unless it is all there is: less than a step.
        step_size: With ``drop_last``: images per optimizer step over all processes; None for one batch of each.
        seed: Seed of the order.
        rank: Rank of this process, from 0; processes take turns batch by batch.
        world_size: Number of processes.
        num_workers: Worker processes that prefetch batches; 0 builds them in this process.
        worker_timeout: Seconds to wait for a batch of the workers; 0 for no end.
        position: Returns how many batches of the sequence are done; an iteration then yields one epoch's number of
            batches from there. None yields the rest of an epoch, set by :meth:`set_epoch` and :meth:`load_state_dict`.
        order: Returns the rows of an epoch in a custom order.
        inspect: Called with each batch before it is yielded, to record missing samples. With it, an empty batch is
            skipped; if batches are shuffled it is an error, because training counts batches.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        step_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        worker_timeout: float = 0,
        position: Callable[[], int] | None = None,
        order: Callable[[int], npt.NDArray[np.int64]] | None = None,
        inspect: Callable[[Batch], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but must be at least 1; raise it.")
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.step_size = batch_size * world_size if step_size is None else step_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.worker_timeout = worker_timeout
        self.position = position
        self.order = order
        self.inspect = inspect
        self.epoch = 0
        self._next = 0
        self._restored: int | None = None

    def __len__(self) -> int:
        return len(self._rows_of_batches(np.arange(len(self.source))))

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing is read before the first batch is due, because Lightning makes the iterator before it
        # restores its progress.
        length = len(self)
        if not length:  # fewer batches than processes
            return
        first = self._first_batch()
        last = first + length if self.position is not None else (self.epoch + 1) * length
        epochs = range(first // length, -(-last // length))
        keys = [key for epoch in epochs for key in self.keys(epoch)][first % length :][: last - first]
        self._next = first
        for batch in self._batches(keys):
            self._next += 1
            if self._is_fit(batch):
                yield batch

    def keys(self, epoch: int) -> list[BatchKey]:
        """Return this process's batches of an epoch, in order."""
        order = np.arange(len(self.source))
        if self.order is not None:
            order = self.order(epoch)
        elif self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return [BatchKey(epoch, rows) for rows in self._rows_of_batches(order)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, if there is no ``position``."""
        self.epoch = epoch

    @property
    def has_whole_steps(self) -> bool:
        """Whether an epoch is whole optimizer steps."""
        return len(self.source) >= self.step_size

    def state_dict(self) -> dict[str, Any]:
        """Return the number of images done by all processes, and the settings that determine their order."""
        return {"images": self._next * self.batch_size * self.world_size, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; warn if the order of images differs from the interrupted run's."""
        warn_of_other_order(state["order"], self._order())
        self._restored = state.get("images", 0) // (self.batch_size * self.world_size)

    def _is_fit(self, batch: Batch) -> bool:
        if self.inspect is None:
            return True
        self.inspect(batch)
        if not len(batch) and self.shuffle:
            raise DataError(
                f"None of the {self.batch_size} images of a training batch can be read; repair the data "
                f"(the first fault: {batch.skipped[0].reason.rstrip('.')})."
            )
        return len(batch) > 0

    def _first_batch(self) -> int:
        restored, self._restored = self._restored, None
        if self.position is not None:
            return self.position()
        if restored is not None and restored // len(self) == self.epoch:
            return restored
        return self.epoch * len(self)

    def _rows_of_batches(self, order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        step = self.batch_size * self.world_size
        for whole in (self.step_size, step) if self.drop_last else ():
            if len(order) >= whole:
                order = order[: len(order) // whole * whole]
        if self.world_size > 1 and (not self.drop_last or len(order) < step):
            # Each process gets the same number of batches, nearly equal in size: distributed forwards must match.
            batches = np.array_split(order, self.world_size * -(-len(order) // step))
        else:
            batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [rows for rows in batches[self.rank :: self.world_size] if len(rows)]

    def _batches(self, keys: list[BatchKey]) -> Iterator[Batch]:
        if self.num_workers == 0:
            for key in keys:
                yield self.source[key]
            return
        yield from load(_Keyed(self.source, keys), num_workers=self.num_workers, timeout=self.worker_timeout)

    def _order(self) -> dict[str, int]:
        return {"rows": len(self.source), "step_size": self.step_size, "seed": self.seed}


def warn_of_other_order(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Warn if an interrupted run read its images by other settings; those that it did not note are no difference.

    Returns:
        Whether they differ.
    """
    unlike = {name: value for name, value in theirs.items() if name in own and own[name] != value}
    if unlike:
        mine = {name: own[name] for name in unlike}
        warnings.warn(
            f"The interrupted run read its images with {unlike}, this one with {mine}: it continues, but with other "
            "images than the interrupted run would have seen.",
            stacklevel=3,
        )
    return bool(unlike)


class _Keyed(Dataset[Batch]):
    """The batches of some keys as a map-style data set."""

    def __init__(self, source: BatchSource, keys: list[BatchKey]) -> None:
        self.source = source
        self.batch_keys = keys

    def __len__(self) -> int:
        return len(self.batch_keys)

    def __getitem__(self, index: int) -> Batch:
        return self.source[self.batch_keys[index]]


class StepLoader:
    """Yields the batches of another loader, each with the token and image counts of its whole optimizer step.

    With ``accumulate_grad_batches`` above 1, a step's losses are divided by the counts of all its batches, so that many
    small batches train like a large one. These counts must be known before the first batch is used: one step is read
    ahead, then one batch for each that is yielded, so that workers never wait. The last step of an epoch may be
    shorter. All other attributes are those of the wrapped loader.

    Args:
        loader: Training batches of this process.
        trainer: Trainer that defines where steps start; None yields batches unchanged.
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
        """Return how many batches of the epoch are done, and how many are left."""
        done = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        return done, trainer.num_training_batches - done


def _counted(step: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the batches of one optimizer step, with its counts."""
    counts = [batch.counts() for batch in step]
    total: dict[Unit, int] = {unit: sum(own[unit] for own in counts) for unit in UNITS}
    for place, (batch, own) in enumerate(zip(step, counts, strict=True)):
        yield replace(batch, step=StepCounts(batch=own, step=total, place=place))
