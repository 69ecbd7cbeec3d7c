"""A torchmetrics base for text scores, and how processes share what each has seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

Row: TypeAlias = list[Any]
"""A JSON value: a string, number, boolean, None or a list of these."""
Item = TypeVar("Item")
Key: TypeAlias = tuple[str, int, int]
"""Split, row of the split, and how many times the row was seen before."""


class RecordMetric(Metric):
    """Collects rows of JSON values and passes those of all ranks to :meth:`score`.

    A metric's states must be tensors to survive gathering between ranks, but answers are strings, and their families
    are not known in advance. So each row is one line of ASCII JSON, and the state is a list of uint8 tensors reduced by
    concatenation: the first rank's lines, then the second's.

    ``compute()`` returns a flat dict of floats without prefix. Before the first row it returns an empty dict, because
    nothing has been measured.
    """

    is_differentiable = False
    full_state_update = False
    records: list[Tensor] | Tensor
    """A list of lines while rows come in, one tensor after a sync."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_anywhere, **kwargs})
        self.add_state("records", default=[], dist_reduce_fx="cat")

    @property
    def update_called(self) -> bool:
        """Whether there may be something to compute: always, since a metric without rows has no scores."""
        return True

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Append rows; each becomes one line of the state."""
        lines = b"".join(json.dumps(row).encode("ascii") + b"\n" for row in rows)
        if lines:
            assert isinstance(self.records, list), "rows cannot be added to a metric that is synced"
            self.records.append(torch.frombuffer(bytearray(lines), dtype=torch.uint8).to(self.device))

    def rows(self) -> list[Row]:
        """Return all rows so far in order of arrival (after a sync: rank by rank)."""
        parts = [self.records] if isinstance(self.records, Tensor) else self.records
        data = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return [json.loads(line) for line in data.splitlines()]

    def compute(self) -> dict[str, float]:
        """Score all rows; return an empty dict if there are none."""
        rows = self.rows()
        return self.score(rows) if rows else {}

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Compute flat scores from at least one row."""
        raise NotImplementedError

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks; a rank without rows contributes an empty tensor of the same dtype."""
        if isinstance(self.records, list) and not self.records:
            self.records.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)


def check_lengths(**columns: Sequence[Any]) -> None:
    """Check that all columns have the same length; raise ValueError with the lengths if not."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one entry per item is needed in each argument, got lengths {lengths}")


def mean_by_family(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Average ``(family, value)`` pairs.

    Returns:
        ``accuracy`` over all pairs, and ``family/<name>`` for each named family.
    """
    values: dict[str, list[float]] = {}
    for family, value in rows:
        values.setdefault(family, []).append(float(value))
    scores = {"accuracy": _mean([value for group in values.values() for value in group])}
    scores.update({f"family/{name}": _mean(group) for name, group in sorted(values.items()) if name})
    return scores


def families_or_blank(families: Sequence[str] | None, count: int) -> Sequence[str]:
    """Return ``families``, or ``count`` empty names if it is None."""
    return [""] * count if families is None else families


def gathered(own: Item) -> list[Item]:
    """Gather the objects of all processes, rank by rank; every process must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everything: list[Item] = [own] * dist.get_world_size()
    dist.all_gather_object(everything, own)
    return everything


def first_of_all(own: Mapping[Key, Item], limit: int | None) -> list[Item]:
    """Return the first ``limit`` items over all processes (None: all), in key order; no other items are sent.

    A row seen by two processes, such as one that pads the last batch, counts once.
    """
    keys = sorted({key for keys in gathered(list(own)) for key in keys})[:limit]
    wanted = set(keys)
    parts = gathered({key: item for key, item in own.items() if key in wanted})
    items = {key: item for part in parts for key, item in part.items()}
    return [items[key] for key in keys]


def key_of(known: Mapping[Key, object], split: str, row: int) -> Key:
    """Return a new key for a row, given the keys already in use."""
    times = 0
    while (split, row, times) in known:
        times += 1
    return split, row, times


def gather_anywhere(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a tensor from all ranks, on whatever device it is: NCCL moves GPU tensors only."""
    nccl = "nccl" in str(torch.distributed.get_backend(group))
    gathered: list[Tensor] = gather_all_tensors(tensor.cuda() if nccl else tensor, group)
    return [part.to(tensor.device) for part in gathered]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
