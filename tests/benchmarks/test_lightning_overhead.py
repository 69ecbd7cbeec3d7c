"""The overhead benchmark: both loops do the same work, and the ratio is that of the medians."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch

from benchmarks.lightning_overhead import Overhead, compare, time_bare, time_trainer
from tests.callbacks.tiny import TinyModule, loader

# The bare loop has no trainer to log to, and Lightning says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*reference is not registered on the model yet.*")


def test_both_loops_end_with_the_same_weights() -> None:
    torch.manual_seed(0)
    bare = TinyModule()
    trained = copy.deepcopy(bare)
    batches = list(loader())
    clock = map(float, itertools.count()).__next__
    time_bare(bare, batches, clock)
    time_trainer(trained, batches, clock)
    assert bare.layer.weight.tolist() == trained.layer.weight.tolist()


def test_the_ratio_is_that_of_the_medians() -> None:
    assert Overhead(bare=(2.0, 9.0, 1.0), trainer=(2.1, 2.2, 50.0)).ratio == pytest.approx(1.1)


def test_the_loops_alternate_and_the_first_turn_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: Iterator[float] = iter([9, 9, 1, 2, 4, 3])  # untimed turn; bare, trainer; trainer, bare
    monkeypatch.setattr("benchmarks.lightning_overhead.time_bare", lambda *_: next(seconds))
    monkeypatch.setattr("benchmarks.lightning_overhead.time_trainer", lambda *_: next(seconds))
    result = compare(TinyModule(), [None], repeats=2, clock=lambda: 0.0)
    assert result == Overhead(bare=(1, 3), trainer=(2, 4))
