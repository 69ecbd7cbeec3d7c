"""The feature store: what is written is what is read; nothing half-written, damaged or foreign is ever read."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from visexpert.errors import DataError
from visexpert.store import FeatureFile, FeatureKey, Filling, StoreDtype, open_features, write_features

FORK = multiprocessing.get_context("fork")
KEY = FeatureKey(role="expert", data="d", encoder="e", rows=5, tokens=4, width=3, grid_hw=(2, 2), dtype="float32")
SMALL = Filling(shard_mb=KEY.row_bytes * 2 / 1e6)
"""Shards of two images of KEY."""


def batches(rows: int = 5) -> list[Tensor]:
    return list(torch.randn(rows, 4, 3).split(2))


def encoder(written: Iterable[Tensor]) -> Callable[[range], Iterator[Tensor]]:
    """Give the tokens of the rows that are asked for, one batch of two after the other."""
    tokens = torch.cat(list(written))

    def encode(rows: range) -> Iterator[Tensor]:
        yield from tokens[rows.start : rows.stop].split(2)

    return encode


def write(root: Path, key: FeatureKey, written: Iterable[Tensor], **options: Any) -> FeatureFile:
    file = write_features(root, key, encoder(written), **options)
    assert file is not None
    return file


def files(root: Path) -> list[str]:
    """Every file of a store, hidden ones too, without the card."""
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.name != "card.json")


@pytest.mark.parametrize("filling", [Filling(), SMALL])
def test_rows_come_back_in_any_order(tmp_path: Path, filling: Filling) -> None:
    written = batches()
    write(tmp_path, KEY, written, filling=filling)
    assert len(files(tmp_path)) == (1 if filling is not SMALL else 3)
    file = open_features(tmp_path, KEY)
    assert file is not None
    for rows in ([4, 0, 0, 2], [1], [], [3, 2, 1, 4, 0]):
        index_B = torch.tensor(rows, dtype=torch.long)
        tokens_BSE = file.read(index_B)
        assert torch.equal(tokens_BSE, torch.cat(written)[index_B])
        assert tokens_BSE.dtype == torch.float32
    for row in (5, -1):
        with pytest.raises(IndexError):
            file.read(torch.tensor([row]))


def test_a_shard_is_a_file_of_safetensors(tmp_path: Path) -> None:
    written = torch.cat(batches())
    write(tmp_path, replace(KEY, dtype="bfloat16"), [written], filling=replace(SMALL, shard_mb=SMALL.shard_mb / 2))
    read = [load_file(path)["tokens"] for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert [len(tokens) for tokens in read] == [2, 2, 1]
    assert torch.equal(torch.cat(read), written.bfloat16())


def test_half_precision_halves_the_space_and_rounds(tmp_path: Path) -> None:
    key = replace(KEY, dtype="float16")
    written = batches()
    tokens_BSE = write(tmp_path, key, written).read(torch.arange(5))
    assert tokens_BSE.dtype == torch.float32
    assert torch.equal(tokens_BSE, torch.cat(written).half().float())
    assert key.num_bytes * 2 == KEY.num_bytes == 5 * 4 * 3 * 4


def test_the_card_holds_provenance_shards_and_error(tmp_path: Path) -> None:
    key = replace(KEY, dtype="float16")
    written = torch.cat(batches())
    write(tmp_path, key, [written], owner="Encoder 'depth'", filling=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [key.name]
    card = json.loads((tmp_path / key.name / "card.json").read_text(encoding="utf-8"))
    expected = {"data": "d", "encoder": "e", "grid_hw": [2, 2], "dtype": "float16", "rows": 5, "role": "expert"}
    assert {name: card[name] for name in expected} == expected
    assert card["name"] == "Encoder 'depth'" and (card["shards"], card["rows_per_shard"]) == (2, 4)
    lost = (written.half().double() - written.double()).square().sum() / written.double().square().sum()
    assert card["error"] == pytest.approx(float(lost.sqrt()), rel=1e-6) and 0 < card["error"] < 1e-3


def test_a_card_of_other_tokens_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, KEY, batches())
    other = replace(KEY, encoder="another", grid_hw=(4, 1))
    (tmp_path / KEY.name).rename(tmp_path / other.name)
    with pytest.raises(DataError) as error:
        open_features(tmp_path, other)
    assert all(part in str(error.value) for part in ("encoder is e, not another", "grid_hw is [2, 2], not [4, 1]"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null"])
def test_a_damaged_card_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, KEY, batches())
    (tmp_path / KEY.name / "card.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="card.json is damaged"):
        open_features(tmp_path, KEY)


def test_every_change_of_the_key_is_another_folder(tmp_path: Path) -> None:
    write(tmp_path, KEY, batches())
    others = [
        replace(KEY, role="clip"),
        replace(KEY, data="other"),
        replace(KEY, encoder="other"),
        replace(KEY, rows=6),
        replace(KEY, tokens=9),
        replace(KEY, width=4),
        replace(KEY, grid_hw=(4, 1)),
        replace(KEY, dtype="float16"),
        replace(KEY, dtype="bfloat16"),
        replace(KEY, dtype="int8"),
    ]
    assert len({KEY.name, *(key.name for key in others)}) == 11
    assert all(open_features(tmp_path, key) is None for key in others)
    assert open_features(tmp_path, KEY) is not None


@pytest.mark.parametrize("whole", [0, 1])
def test_an_error_loses_the_shard_that_is_being_written(tmp_path: Path, whole: int) -> None:
    written = torch.cat(batches())

    def breaking(rows: range) -> Iterator[Tensor]:
        yield written[rows.start : rows.stop][:1]
        if rows.start < 2 * whole:
            yield written[rows.start : rows.stop][1:]
            return
        assert any(name.endswith(".part") for name in files(tmp_path))
        assert open_features(tmp_path, KEY) is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path, KEY, breaking, filling=SMALL)
    assert files(tmp_path) == ["shard-000000.safetensors"][:whole] and len(list(tmp_path.iterdir())) == whole
    asked: list[int] = []

    def recording(rows: range) -> Iterator[Tensor]:
        asked.extend(rows)
        yield written[rows.start : rows.stop]

    file = write_features(tmp_path, KEY, recording, filling=SMALL)
    assert asked == list(range(2 * whole, 5))
    assert file is not None and torch.equal(file.read(torch.arange(5)), written)


@pytest.mark.parametrize("rows", [4, 7])
def test_a_wrong_number_of_rows_is_refused_and_leaves_nothing(tmp_path: Path, rows: int) -> None:
    with pytest.raises(DataError, match=rf"got tokens of {rows} images, but 5 are"):
        write_features(tmp_path, KEY, lambda asked: batches(rows))
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_shape_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Encoder 'a' gave \(3, 4\) tokens per image, but .* \(4, 3\)"):
        write_features(tmp_path, KEY, lambda asked: [torch.randn(5, 3, 4)], owner="Encoder 'a'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("filling", [Filling(), SMALL])
def test_a_truncated_file_is_refused(tmp_path: Path, filling: Filling) -> None:
    write(tmp_path, KEY, batches(), filling=filling)
    path = sorted(tmp_path.rglob("shard-*"))[-1]
    content = path.read_bytes()
    for kept in (len(content) - 8, 60, 0):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match=rf"{path.name} is damaged .*; delete it"):
            open_features(tmp_path, KEY)


def damaged(path: Path, content: bytes) -> str:
    """What reading a store says that has this file in the place of a shard of the same size."""
    size = path.stat().st_size
    path.write_bytes(content.ljust(size, b"\0")[:size])
    file = open_features(path.parents[1], KEY)
    assert file is not None
    with pytest.raises(DataError, match="is damaged .*; delete it") as error:
        file.read(torch.tensor([4]))
    return str(error.value)


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, KEY, batches())
    (path,) = tmp_path.rglob("shard-*")
    damaged(path, b"")
    damaged(path, b"[" * 2000)
    damaged(path, pickle.dumps({"tokens": 1}))
    other = {"tokens": torch.zeros(5, 2, 6)}
    short = path.stat().st_size - len(save(other, {"fill": ""}))
    assert "(5, 2, 6) float32" in damaged(path, save(other, {"fill": "." * short}))


def test_a_shard_of_another_place_or_key_is_refused(tmp_path: Path) -> None:
    write(tmp_path, KEY, batches(), filling=SMALL)
    write(tmp_path, replace(KEY, data="other"), batches())
    shards = sorted((tmp_path / KEY.name).glob("shard-*"))
    shards[1].write_bytes(shards[0].read_bytes())
    file = open_features(tmp_path, KEY)
    assert file is not None and file.read(torch.tensor([0])) is not None
    with pytest.raises(DataError, match=r"shard-000001.* is damaged .*another shard's: first 0"):
        file.read(torch.tensor([2]))
    write(tmp_path, replace(KEY, rows=2), batches(2))
    (foreign,) = (tmp_path / replace(KEY, rows=2).name).glob("shard-*")
    shards[1].write_bytes(foreign.read_bytes())
    file = open_features(tmp_path, KEY)
    assert file is not None
    with pytest.raises(DataError, match="another shard's: key"):
        file.read(torch.tensor([2]))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    key = replace(KEY, rows=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 2 * 10**6, 2 * 10**6))
    with pytest.raises(
        DataError, match=r"needs 480 MB, but 2 MB are free; free some space, or set store.folder to null"
    ):
        write_features(tmp_path, key, lambda rows: [])
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the kernel refuses space, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_space_is_reserved_before_anything_is_computed(tmp_path: Path) -> None:
    asked: list[int] = []

    def never(rows: range) -> Iterator[Tensor]:
        asked.append(1)
        yield torch.randn(1, 4, 3)

    key = replace(KEY, rows=100_000)
    with largest_file(10**6), pytest.raises(DataError, match=r"needs 5 MB.*free some space"):
        write_features(tmp_path, key, never)
    assert not asked and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_disk_that_fills_up_while_writing_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """A file system that cannot reserve, such as NFS before 4.2."""

    def refuse(*given: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if known:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
    key = replace(KEY, rows=100_000)
    with largest_file(10**6), pytest.raises(DataError, match=r"needs 5 MB.*free some space"):
        write_features(tmp_path, key, lambda rows: torch.randn(100_000, 4, 3).split(1000))
    assert list(tmp_path.iterdir()) == []


def writing(
    root: Path, key: FeatureKey, rows_seen: SynchronizedArray[int], started: Event, goes_on: Event, rank: int = 0
) -> BaseProcess:
    """Start a process that fills a store, counts how often it encodes each image, and stops in each shard for a sign.

    Its tokens of image n are all n.
    """

    def encode(rows: range) -> Iterator[Tensor]:
        started.set()
        goes_on.wait(60)
        for row in rows:
            with rows_seen.get_lock():
                rows_seen[row] += 1
            yield torch.full((1, key.tokens, key.width), float(row))

    filling = replace(SMALL, rank=rank, world=2)
    process = FORK.Process(target=lambda: write_features(root, key, encode, filling=filling))
    process.start()
    return process


def numbered(rows: int) -> list[Tensor]:
    return [torch.arange(rows).float()[:, None, None].expand(-1, 4, 3)]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    seen, started, never = FORK.Array("i", 5), FORK.Event(), FORK.Event()
    writer = writing(tmp_path, KEY, seen, started, never)
    try:
        assert started.wait(60)
        (left,) = (name for name in files(tmp_path) if name.startswith("."))
        (tmp_path / KEY.name / ".shard-000002.safetensors.part").write_bytes(b"of a killed writer")
        write(tmp_path, replace(KEY, data="other"), batches())
        assert [name for name in files(tmp_path) if name.startswith(".")] == [left]  # that of the living writer
    finally:
        writer.kill()
        writer.join()
    write(tmp_path, replace(KEY, data="third"), batches())
    assert not [name for name in files(tmp_path) if name.startswith(".")]


def test_a_kill_loses_the_shard_that_was_being_made_alone(tmp_path: Path) -> None:
    """Whoever comes next makes it again, and waits for nobody."""
    seen, started, go_on = FORK.Array("i", 5), FORK.Event(), FORK.Event()
    write_features(tmp_path, KEY, encoder(numbered(5)), filling=replace(SMALL, rank=1, world=2))
    (tmp_path / KEY.name / "shard-000002.safetensors").unlink()
    writer = writing(tmp_path, KEY, seen, started, go_on)
    assert started.wait(60)
    writer.kill()
    writer.join()
    asked: list[int] = []

    def encode(rows: range) -> Iterator[Tensor]:
        asked.extend(rows)
        yield from encoder(numbered(5))(rows)

    file = write_features(tmp_path, KEY, encode, filling=SMALL)
    assert asked == [4] and file is not None
    assert file.read(torch.arange(5))[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_two_processes_make_each_shard_once(tmp_path: Path) -> None:
    """Both stand inside a shard before either goes on, so that neither is alone; the second one helps at the end."""
    key = replace(KEY, rows=12)
    seen, go_on = FORK.Array("i", 12), FORK.Event()
    starts = [FORK.Event(), FORK.Event()]
    writers = [writing(tmp_path, key, seen, started, go_on, rank) for rank, started in enumerate(starts)]
    try:
        assert all(started.wait(60) for started in starts)
        go_on.set()
        for writer in writers:
            writer.join(60)
        assert [writer.exitcode for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
    assert seen[:] == [1] * 12
    file = open_features(tmp_path, key)
    assert file is not None and file.read(torch.arange(12))[:, 0, 0].tolist() == list(range(12))
    assert files(tmp_path) == [f"shard-{number:06}.safetensors" for number in range(6)]


def test_kills_at_random_moments_lose_a_shard_each_and_nothing_else(tmp_path: Path) -> None:
    """Two processes at a time, killed and started again; shards that were there are not made again."""
    key, kills, seen = replace(KEY, rows=30, dtype="int8"), 0, FORK.Array("i", 30)
    filling = Filling(shard_mb=key.row_bytes * 2 / 1e6)

    def encode(rows: range) -> Iterator[Tensor]:
        for row in rows:
            with seen.get_lock():
                seen[row] += 1
            time.sleep(0.01)
            yield torch.full((1, key.tokens, key.width), float(row))

    def fill(rank: int) -> None:
        write_features(tmp_path, key, encode, filling=replace(filling, rank=rank, world=2))

    moments = random.Random(7)
    for _ in range(4):
        before = {path: path.stat().st_ino for path in tmp_path.glob("*/shard-*")}
        workers = [FORK.Process(target=fill, args=(rank,)) for rank in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(moments.uniform(0.05, 0.25))
        for worker in workers:
            worker.kill()
            worker.join()
            kills += 1
        assert {path: path.stat().st_ino for path in before} == before
    file = write_features(tmp_path, key, encode, filling=filling)
    assert file is not None and file.read(torch.arange(30))[:, 0, 0].round().tolist() == list(range(30))
    assert 30 <= sum(seen[:]) <= 30 + kills * 2
    assert files(tmp_path) == [f"shard-{number:06}.safetensors" for number in range(15)]


def test_one_process_need_not_wait_for_another(tmp_path: Path) -> None:
    seen, started, go_on = FORK.Array("i", 5), FORK.Event(), FORK.Event()
    writer = writing(tmp_path, KEY, seen, started, go_on)
    try:
        assert started.wait(60)
        encode = encoder(numbered(5))
        assert write_features(tmp_path, KEY, encode, filling=replace(SMALL, waits=False)) is None
        assert len(files(tmp_path)) == 3  # two made here, one by the other
        go_on.set()
        assert write_features(tmp_path, KEY, encode, filling=SMALL) is not None
        assert seen[:] == [1, 1, 0, 0, 0]
    finally:
        writer.kill()
        writer.join()


def test_a_file_system_without_locks_gets_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    written = batches()
    file = write(tmp_path, KEY, written, filling=SMALL)
    assert torch.equal(file.read(torch.arange(5)), torch.cat(written))


def test_bfloat16_rounds_and_holds_any_size(tmp_path: Path) -> None:
    key = replace(KEY, dtype="bfloat16")
    written = [batch * 1e20 for batch in batches()]
    tokens_BSE = write(tmp_path, key, written).read(torch.tensor([3, 1]))
    assert tokens_BSE.dtype == torch.float32 and key.num_bytes * 2 == KEY.num_bytes
    assert torch.equal(tokens_BSE, torch.cat(written).bfloat16().float()[[3, 1]])


def test_int8_has_a_scale_per_token(tmp_path: Path) -> None:
    """A token's error is at most half a step of 1/127 of its largest value, however large other tokens are."""
    key = replace(KEY, dtype="int8")
    written = torch.cat(batches()) * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    file = write(tmp_path, key, [written], filling=SMALL)
    assert key.num_bytes == 5 * 4 * (3 + 4) and len(files(tmp_path)) > 1
    index_B = torch.tensor([4, 1, 1, 3])
    read, exact = file.read(index_B), written[index_B]
    assert read.dtype == torch.float32
    assert ((read - exact).abs() <= exact.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)).all()
    card = json.loads((tmp_path / key.name / "card.json").read_text(encoding="utf-8"))
    error = (file.read(torch.arange(5)) - written).norm() / written.norm()
    assert card["error"] == pytest.approx(float(error), rel=1e-5) and card["error"] > 1e-4


def test_int8_refuses_tokens_with_outliers(tmp_path: Path) -> None:
    """A step of int8 is 100/127 here, so that the other 9,999 values become 0: a tenth of the whole would be 1."""
    tokens = torch.ones(5, 1, 10_000) * 0.3
    tokens[..., 0] = 100.0
    with pytest.raises(DataError, match=r"Encoder 'a' .* int8 loses more than 0.125 .* float16 or bfloat16"):
        write(tmp_path, replace(KEY, dtype="int8", tokens=1, width=10_000), [tokens], owner="Encoder 'a'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("factor", "dtype", "told"),
    [
        (7e4, "float16", ("up to", "6.55e+04", "bfloat16 or float32")),
        (1e-6, "float16", ("so small", "float16", "bfloat16 or float32")),
        (float("nan"), "float32", ("NaN or infinite",)),
        (float("inf"), "bfloat16", ("NaN or infinite",)),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    tmp_path: Path, factor: float, dtype: StoreDtype, told: tuple[str, ...]
) -> None:
    wrong = torch.ones(2, 4, 3)
    wrong[1] *= factor
    if factor < 1:
        wrong[0] *= factor
    with pytest.raises(DataError) as error:
        write(tmp_path, replace(KEY, dtype=dtype), [torch.ones(3, 4, 3), wrong], owner="Encoder 'depth'")
    assert str(error.value).startswith("Encoder 'depth' gave tokens") and all(part in str(error.value) for part in told)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_and_smallest_that_fit(tmp_path: Path) -> None:
    """A few values that become 0 beside larger ones are no loss; nor are zeros."""
    tokens = torch.full((5, 4, 3), 65504.0)
    tokens[0, 0] = torch.tensor([0.0, 1e-9, 6e-5])
    tokens[2:] = 0.0
    read = write(tmp_path, replace(KEY, dtype="float16"), [tokens]).read(torch.arange(5))
    torch.testing.assert_close(read, tokens, atol=1e-7, rtol=0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot use .*; set store.folder to another one"):
        write(tmp_path / "file" / "store", KEY, batches())
