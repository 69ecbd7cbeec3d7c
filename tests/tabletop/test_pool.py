"""The text pools: deterministic, cached whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.tabletop.some_graphs import random_graphs
from visexpert.errors import DataError
from visexpert.tabletop import pool
from visexpert.tabletop.pool import Pools, ensure_pools, generate_pools

GRAPHS = random_graphs(40, seed=0)


def ensure(beside: Path, *, seed: int = 0) -> Pools:
    return ensure_pools(GRAPHS, beside=beside, split="train", seed=seed, fingerprint="abc", progress=False)


def test_the_same_split_and_seed_give_the_same_texts() -> None:
    first = generate_pools(GRAPHS, split="train", seed=0, progress=False)
    assert first == generate_pools(GRAPHS, split="train", seed=0, progress=False)
    assert first != generate_pools(GRAPHS, split="test", seed=0, progress=False)
    assert first != generate_pools(GRAPHS, split="train", seed=1, progress=False)


def test_texts_are_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "train-1"
    first = ensure(beside)
    assert [path.name.rsplit(".text-", 1)[0] for path in tmp_path.iterdir()] == ["train-1"]
    monkeypatch.setattr(pool, "generate_pools", None)
    assert ensure(beside) == first


def test_another_seed_has_its_own_file(tmp_path: Path) -> None:
    assert ensure(tmp_path / "train-1") != ensure(tmp_path / "train-1", seed=1)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "[[1]]\n", "{not json", "[]\n"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, damage: str) -> None:
    first = ensure(tmp_path / "train-1")
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    assert ensure(tmp_path / "train-1") == first
    assert path.read_text() == whole


@pytest.mark.parametrize("broken", ["replace", "write"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(json, "dumps", _after_first(json.dumps, full))
    with pytest.raises(DataError, match="No space left on device.*free some space"):
        ensure(tmp_path / "train-1")
    assert list(tmp_path.iterdir()) == []


def _after_first(working: object, failing: object) -> object:
    """Let the first call (the name of the file) through and fail the second (its first line)."""
    calls = iter((working, failing))
    return lambda *args, **kwargs: next(calls)(*args, **kwargs)  # type: ignore[operator]
