"""Worker processes that prefetch; their errors are reported in one sentence, as without workers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from visexpert.errors import DataError, UserError, first_line, told_by_machine

T_co = TypeVar("T_co", covariant=True)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Number of cores that this process may use."""

DEFAULT_WORKERS = min(4, CORES)
"""Default number of worker processes: more workers than cores only slow each other down."""

DEFAULT_TIMEOUT = 600.0
"""Seconds to wait for a batch by default: a disk that takes longer is taken for one that hangs."""


@dataclass(frozen=True)
class _Failure:
    """A user error sent by a worker as an item, because torch would replace its message with a traceback."""

    kind: type[UserError]
    sentence: str


def load(
    dataset: Dataset[T_co], *, num_workers: int, timeout: float = 0, generator: torch.Generator | None = None
) -> Iterator[T_co]:
    """Yield the items of a data set in order, read by workers.

    Args:
        dataset: Map-style or iterable; each item is a whole batch and is yielded as is.
        num_workers: Worker processes; 0 reads in this one.
        timeout: Seconds to wait for an item of the workers; 0 for no end.
        generator: Generator that seeds the workers; None for torch's default.

    Raises:
        UserError: Raised by ``dataset`` in any process.
        DataError: A worker could not be started, died, hung, or ran out of memory or files.
    """
    told: Any = _ToldStream(dataset) if isinstance(dataset, IterableDataset) else _Told(dataset)
    loader: DataLoader[Any] = DataLoader(
        told,
        batch_size=None,
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        collate_fn=_as_is,
        generator=generator,
    )
    others = set(active_children())
    try:
        items = iter(loader)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{num_workers} workers cannot be started ({first_line(error)}); lower num_workers.") from error
    workers = set(active_children()) - others
    del loader  # so that the workers end with the loop, not with the traceback of an error
    try:
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:
                if num_workers:  # the worker's own traceback is in the text; torch's frames would hold the workers
                    error.with_traceback(None)
                told = told_by_machine(error) if isinstance(error, RuntimeError) else None
                raise (told or error) from error.__cause__
            if isinstance(item, _Failure):
                raise item.kind(item.sentence)
            yield item
    finally:
        del items
        _kill(workers)


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End the workers that torch's SIGTERM has not ended: one that hangs would make the whole process hang at exit."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join(1)


class _Told(Dataset[Any]):
    """The items of a map-style data set; an error is returned instead of raised."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.inner[index]
        except Exception as error:
            return _failure(error)


class _ToldStream(IterableDataset[Any]):
    """The items of an iterable data set; an error becomes the last item."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.inner
        except Exception as error:
            yield _failure(error)


def _failure(error: Exception) -> _Failure:
    told = error if isinstance(error, UserError) else told_by_machine(error)
    if told is None:  # a bug, whose traceback is wanted
        raise error
    return _Failure(type(told), str(told))


def _as_is(item: Any) -> Any:
    return item
