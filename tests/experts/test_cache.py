"""Cached tokens equal live ones, are computed once, and are never mistaken for another encoder's or other images'."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.experts.helpers import MemoryImages, NoisyExpert
from visexpert.errors import DataError
from visexpert.experts import ExpertHub, FeatureCache
from visexpert.grids import resample_tokens
from visexpert.names import EncoderName, Role
from visexpert.store import StoreDtype
from visexpert.types import Batch

TRAIN, VAL = MemoryImages(7, seed=1), MemoryImages(3, seed=2)


def hub() -> ExpertHub:
    torch.manual_seed(4)
    return ExpertHub({"a": NoisyExpert(grid=4), "b": NoisyExpert(grid=2, width=3)})


def batch_of(rows: Sequence[int], *, pixels: int | None = None) -> Batch:
    """Training images, or what is none of them."""
    images = TRAIN.read(list(rows))
    return Batch(images if pixels is None else torch.full_like(images, pixels), torch.tensor(list(rows)), "train")


def calls(experts: ExpertHub) -> list[int]:
    return [int(getattr(experts[name], "calls", -1)) for name in experts.names]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 1.6e-2)])
def test_cached_tokens_equal_live_ones(tmp_path: Path, dtype: StoreDtype, tolerance: float) -> None:
    """float16 keeps eleven bits: a token of size 4 is off by at most 2e-3; bfloat16 keeps eight."""
    experts, rows = hub(), [5, 0, 6]
    batch = batch_of(rows)
    live = experts(replace(batch, split=""))
    experts.use_cache(FeatureCache(tmp_path, dtype=dtype), {"train": TRAIN, "val": VAL}, resample={}, batch_size=2)
    before = calls(experts)
    cached = experts(batch)
    assert calls(experts) == before
    for name in experts.names:
        assert cached[name].grid_hw == live[name].grid_hw
        assert live[name].tokens_BSE.abs().max() < 4
        torch.testing.assert_close(cached[name].tokens_BSE, live[name].tokens_BSE, atol=tolerance, rtol=0)
    other = experts(Batch(VAL.read([0]), torch.tensor([0]), split="val"))
    assert not torch.allclose(other["a"].tokens_BSE, cached["a"].tokens_BSE[1:2], atol=0.01)


def test_tokens_are_stored_on_the_grid_that_was_asked_for(tmp_path: Path) -> None:
    experts = hub()
    live = experts(replace(batch_of([3]), split=""))
    cache = FeatureCache(tmp_path, dtype="float32")
    experts.use_cache(cache, {"train": TRAIN}, resample={"a": (3, 3)})
    cached = experts(batch_of([3], pixels=0))
    assert cached["a"].grid_hw == (3, 3) and cached["b"].grid_hw == (2, 2)
    expected = resample_tokens(live["a"].tokens_BSE, (4, 4), (3, 3))
    torch.testing.assert_close(cached["a"].tokens_BSE, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(cached["b"].tokens_BSE, live["b"].tokens_BSE, atol=1e-6, rtol=0)


def test_what_is_not_cached_runs_live(tmp_path: Path) -> None:
    experts = hub()
    batch = Batch(VAL.read([1]), torch.tensor([1]), split="")
    live = experts(batch)
    experts.use_cache(FeatureCache(tmp_path, dtype="float32"), {"train": TRAIN}, resample={"a": (3, 3)})
    other_split = experts(replace(batch, split="val"))
    no_index = experts(batch)
    for name in experts.names:
        for tokens in (other_split[name], no_index[name]):
            assert tokens.grid_hw == live[name].grid_hw
            assert torch.equal(tokens.tokens_BSE, live[name].tokens_BSE)


def test_a_second_run_reads_what_the_first_one_wrote(tmp_path: Path) -> None:
    first = hub()
    first.use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={}, batch_size=2)
    assert calls(first) == [4, 4]  # batches of two
    second = hub()
    second.use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={}, batch_size=2)
    assert calls(second) == [0, 0]
    batch = batch_of(range(7), pixels=0)
    for name in first.names:
        one = first(batch)[name].tokens_BSE
        assert torch.equal(one, second(batch)[name].tokens_BSE)


def test_other_weights_images_or_precision_are_computed_anew(tmp_path: Path) -> None:
    hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})
    assert len(list(tmp_path.glob("*"))) == 2
    changed = hub()
    with torch.no_grad():
        next(changed["a"].parameters()).add_(1.0)
    changed.use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})
    assert len(list(tmp_path.glob("*"))) == 3  # b is as it was
    hub().use_cache(FeatureCache(tmp_path), {"train": VAL}, resample={})
    assert len(list(tmp_path.glob("*"))) == 5
    hub().use_cache(FeatureCache(tmp_path, dtype="float32"), {"train": TRAIN}, resample={})
    assert len(list(tmp_path.glob("*"))) == 7


def test_a_detached_expert_is_not_encoded(tmp_path: Path) -> None:
    experts = hub()
    experts.detach("b")
    experts.use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})
    assert calls(experts)[1] == 0 and len(list(tmp_path.glob("*"))) == 1


def test_an_expert_that_fails_while_filling_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = hub()
    encode = experts["a"].encode

    def failing(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if calls(experts)[0] == 3:
            raise RuntimeError("out of memory")
        return encode(pixels_BCHW)

    monkeypatch.setattr(experts["a"], "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        experts.use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={}, batch_size=2)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})
    for path in tmp_path.glob("*/shard-*"):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="is damaged .*; delete it"):
        hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    with pytest.raises(DataError, match="0 MB are free; free some space, or set store.folder to null"):
        hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})


def test_encoders_of_one_name_and_two_roles_stay_apart(tmp_path: Path) -> None:
    """Also on disk, where both have the same fingerprint."""
    cache, batch = FeatureCache(tmp_path, dtype="float32"), batch_of(range(7))
    names = [EncoderName(role, "it") for role in get_args(Role)]
    for value, name in enumerate(names):
        encode = partial(_filled, value=value)
        cache.prepare(
            name,
            "train",
            TRAIN,
            fingerprint="same",
            encode=encode,
            grid_hw=(1, 1),
            width=2,
            device=torch.device("cpu"),
        )
    for value, name in enumerate(names):
        tokens_BSE = cache.read(name, batch)
        assert tokens_BSE is not None and torch.equal(tokens_BSE, _filled(batch.index_B, value))
    assert len(names) == 3 == len(list(tmp_path.glob("*")))
    assert {json.loads(path.read_text(encoding="utf-8"))["role"] for path in tmp_path.glob("*/card.json")} == set(
        get_args(Role)
    )


def _filled(images: torch.Tensor, value: int) -> torch.Tensor:
    return torch.full((len(images), 1, 2), float(value))


def test_files_of_an_earlier_version_are_named_when_tokens_are_computed_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0123.json").write_text('{"data": "d", "role": "expert"}', encoding="utf-8")
    (tmp_path / "0123.npy").write_bytes(b"0" * 3_000_000)
    with caplog.at_level("WARNING"):
        hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN, "val": VAL}, resample={})
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path) in said and "3 MB" in said and "delete" in said and "0123.npy" in said
    caplog.clear()
    with caplog.at_level("WARNING"):  # all is there
        hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN, "val": VAL}, resample={})
    assert not caplog.records


def test_missing_tokens_are_refused_by_name_where_they_may_not_be_computed(tmp_path: Path) -> None:
    def refusal(cache: FeatureCache, experts: ExpertHub, images: MemoryImages) -> str:
        with pytest.raises(DataError) as error:
            experts.use_cache(cache, {"train": images}, resample={})
        assert calls(experts) == [0, 0] and str(tmp_path) in str(error.value)
        return str(error.value)

    assert "none are there" in refusal(FeatureCache(tmp_path, fill=False), hub(), TRAIN)
    hub().use_cache(FeatureCache(tmp_path), {"train": TRAIN}, resample={})
    ready = hub()
    ready.use_cache(FeatureCache(tmp_path, fill=False), {"train": TRAIN}, resample={})
    assert calls(ready) == [0, 0]
    told = refusal(FeatureCache(tmp_path, fill=False, dtype="int8"), hub(), TRAIN)
    assert "expert a" in told and "dtype is float16, not int8" in told and "fingerprint" not in told
    told = refusal(FeatureCache(tmp_path, fill=False), hub(), VAL)
    assert VAL.fingerprint in told and TRAIN.fingerprint in told and "crop" in told and "is 7, not 3" in told
    changed = hub()
    with torch.no_grad():
        next(changed["a"].parameters()).add_(1.0)
    told = refusal(FeatureCache(tmp_path, fill=False), changed, TRAIN)
    assert (
        changed["a"].fingerprint() in told and "weights, preprocessing" in told and "images" not in told.split(": ")[-1]
    )


def test_a_store_that_is_half_filled_is_refused_by_number(tmp_path: Path) -> None:
    hub().use_cache(FeatureCache(tmp_path, shard_mb=1e-9), {"train": TRAIN}, resample={})
    for path in sorted(tmp_path.glob("*/shard-*"))[:3]:
        path.unlink()
    with pytest.raises(DataError, match="only [0-6] of them are there"):
        hub().use_cache(FeatureCache(tmp_path, fill=False), {"train": TRAIN}, resample={})
