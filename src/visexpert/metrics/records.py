"""A torchmetrics base for scores of text: one row per answer, kept as bytes so that ranks can gather them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

Row: TypeAlias = list[Any]
"""What JSON can hold: strings, numbers, booleans, None and lists of them."""


class RecordMetric(Metric):
    """Keeps rows of JSON values and hands all of them, of all ranks, to :meth:`score`.

    A metric's states must be tensors to survive gathering between ranks, but answers are strings, and their
    families are not known beforehand. So each row is one line of ASCII JSON and the state is a list of uint8 tensors
    that is reduced by concatenation: what two ranks have seen is the first's lines followed by the second's.

    ``compute()`` returns a flat dict of floats without prefix. Before the first row it returns an empty dict:
    nothing was measured, so nothing is reported.
    """

    is_differentiable = False
    full_state_update = False
    records: list[Tensor] | Tensor
    """A list of lines while rows come in, one tensor after a sync."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gather_anywhere, **kwargs})
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Append rows; each becomes one line of the state."""
        lines = b"".join(json.dumps(row).encode("ascii") + b"\n" for row in rows)
        if lines:
            assert isinstance(self.records, list), "rows cannot be added to a metric that is synced"
            self.records.append(torch.frombuffer(bytearray(lines), dtype=torch.uint8).to(self.device))

    def rows(self) -> list[Row]:
        """Return every row so far, in the order of arrival (after a sync: rank by rank)."""
        parts = [self.records] if isinstance(self.records, Tensor) else self.records
        data = b"".join(part.cpu().numpy().tobytes() for part in parts)
        return [json.loads(line) for line in data.splitlines()]

    def compute(self) -> dict[str, float]:
        """Score all rows; an empty dict if there are none."""
        rows = self.rows()
        return self.score(rows) if rows else {}

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Turn at least one row into flat scores."""
        raise NotImplementedError

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks; a rank without a row takes part with an empty tensor of the same dtype."""
        if isinstance(self.records, list) and not self.records:
            self.records.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)


def gather_anywhere(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a tensor of all ranks, wherever it lies: NCCL moves nothing but what is on a GPU."""
    nccl = "nccl" in str(torch.distributed.get_backend(group))
    gathered: list[Tensor] = gather_all_tensors(tensor.cuda() if nccl else tensor, group)
    return [part.to(tensor.device) for part in gathered]


def check_lengths(**columns: Sequence[Any]) -> None:
    """Raise ValueError, naming the lengths, unless all columns are equally long."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one entry per item is needed in each argument, got lengths {lengths}")


def mean_by_family(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Average ``(family, value)`` pairs.

    Returns:
        ``accuracy`` over all pairs, and ``family/<name>`` for each family that has a name.
    """
    values: dict[str, list[float]] = {}
    for family, value in rows:
        values.setdefault(family, []).append(float(value))
    scores = {"accuracy": _mean([value for group in values.values() for value in group])}
    scores.update({f"family/{name}": _mean(group) for name, group in sorted(values.items()) if name})
    return scores


def families_or_blank(families: Sequence[str] | None, count: int) -> Sequence[str]:
    """Return ``families``, or ``count`` empty names where there are none."""
    return [""] * count if families is None else families


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
