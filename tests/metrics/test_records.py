"""States that survive gathering: two ranks together score as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from visexpert.metrics import (
    CaptionScores,
    JudgedCaptions,
    POPEScores,
    SlotAccuracy,
    TokenNLL,
    VQAAccuracy,
    VSRAccuracy,
)
from visexpert.metrics.records import RecordMetric, Row, check_lengths, mean_by_family

# Each metric with what rank 0 and rank 1 see.
CASES: list[tuple[Callable[..., RecordMetric], tuple[Any, ...], tuple[Any, ...]]] = [
    (
        lambda **sync: CaptionScores(meteor=False, **sync),
        (["a red cube", "caf\u00e9 \U0001f600 dog"], [["a red cube", "the cube"], ["caf\u00e9 dog"]]),
        (["blue sphere on the left"], [["a blue sphere left of a cube"]]),
    ),
    (VQAAccuracy, (["red", "2"], ["red", ["2"] * 5 + ["3"] * 5], ["colour", "count"]), (["no"], ["yes"], ["exist"])),
    (VSRAccuracy, (["yes", "no"], ["yes", "yes"], ["depth", "size"]), (["hm"], ["no"], ["depth"])),
    (POPEScores, (["yes", "no"], ["yes", "yes"], ["random", "popular"]), (["yes"], ["no"], ["popular"])),
    (JudgedCaptions, ([{"object": True, "relation": False}],), ([{"object": False}],)),
    (
        TokenNLL,
        (torch.tensor([2.0, 3.0]), torch.tensor([1, 2]), ["vqa", "dense"]),
        (torch.ones(1), torch.ones(1), ["vqa"]),
    ),
    (SlotAccuracy, (["small red cube near"], ["small red cube far"]), (["a"], ["large blue sphere far"])),
]


@pytest.mark.parametrize(("make", "first", "second"), CASES)
def test_two_synced_ranks_equal_one(
    make: Callable[..., RecordMetric], first: tuple[Any, ...], second: tuple[Any, ...]
) -> None:
    together = make()
    together.update(*first)
    together.update(*second)
    other = make()
    other.update(*second)
    mine = _on_two_ranks(make, other.records)
    mine.update(*first)
    assert mine.compute() == together.compute()
    # The sync is undone, so that an epoch can go on.
    mine.update(*second)
    assert isinstance(mine.records, list)
    assert len(mine.rows()) == len(together.rows())


def test_rank_without_rows_takes_part() -> None:
    other = VQAAccuracy()
    other.update(["red"], ["red"])
    mine = _on_two_ranks(VQAAccuracy, other.records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a split without such items is no mistake
        assert mine.compute() == {"accuracy": 1.0}


@pytest.mark.parametrize("make", [case[0] for case in CASES])
def test_nothing_seen_reports_nothing(make: Callable[..., RecordMetric]) -> None:
    metric = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a split without such items is no mistake
        assert metric.compute() == {}


def test_reset_forgets() -> None:
    metric = VQAAccuracy()
    metric.update(["red"], ["blue"])
    metric.reset()
    metric.update(["red"], ["red"])
    assert metric.compute() == {"accuracy": 1.0}


def test_rows_keep_text_exactly() -> None:
    metric = VQAAccuracy()
    rows: list[Row] = [["caf\u00e9\n\u2028\U0001f600", 0.1, None, True, ["x"]], [""]]
    metric.add_rows(rows)
    metric.add_rows([])
    assert metric.rows() == rows


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\{'predictions': 2, 'references': 1, 'families': 2\}"):
        VQAAccuracy().update(["a", "b"], ["a"])
    check_lengths(a=[1], b=(2,))


def test_families_without_name_count_in_all_only() -> None:
    assert mean_by_family([("", 1.0), ("side", 0.0), ("side", 0.5)]) == {"accuracy": 0.5, "family/side": 0.25}


def _on_two_ranks(make: Callable[..., RecordMetric], other_state: list[Tensor] | Tensor) -> RecordMetric:
    """A metric whose peer, rank 1, holds ``other_state``; gathering goes the way that torchmetrics goes it."""
    theirs = torch.cat(list(other_state))

    def gather(mine: Tensor, group: object = None) -> list[Tensor]:
        assert mine.dtype == theirs.dtype, "ranks must gather tensors of one type"
        return [mine, theirs]

    return make(dist_sync_fn=gather, distributed_available_fn=lambda: True)
