"""The feature store: what is written is what is read; nothing half-written, damaged or foreign is ever read."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.store import FeatureKey, StoreDtype, open_features, write_features

KEY = FeatureKey(role="expert", data="d", encoder="e", rows=5, tokens=4, width=3, grid_hw=(2, 2), dtype="float32")


def batches(rows: int = 5) -> list[Tensor]:
    return list(torch.randn(rows, 4, 3).split(2))


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    written = batches()
    write_features(tmp_path, KEY, written)
    file = open_features(tmp_path, KEY)
    assert file is not None
    index_B = torch.tensor([4, 0, 0, 2])
    tokens_BSE = file.read(index_B)
    assert torch.equal(tokens_BSE, torch.cat(written)[index_B])
    assert tokens_BSE.dtype == torch.float32


def test_half_precision_halves_the_space_and_rounds(tmp_path: Path) -> None:
    key = replace(KEY, dtype="float16")
    written = batches()
    tokens_BSE = write_features(tmp_path, key, written).read(torch.arange(5))
    assert tokens_BSE.dtype == torch.float32
    assert torch.equal(tokens_BSE, torch.cat(written).half().float())
    assert key.num_bytes * 2 == KEY.num_bytes == 5 * 4 * 3 * 4


def test_the_provenance_lies_beside_the_tokens(tmp_path: Path) -> None:
    write_features(tmp_path, KEY, batches())
    facts = json.loads((tmp_path / f"{KEY.name}.json").read_text(encoding="utf-8"))
    assert facts["data"] == "d" and facts["encoder"] == "e" and facts["grid_hw"] == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{KEY.name}.json", f"{KEY.name}.npy"])


def test_every_change_of_the_key_is_another_file(tmp_path: Path) -> None:
    write_features(tmp_path, KEY, batches())
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
    ]
    assert len({KEY.name, *(key.name for key in others)}) == 10
    assert all(open_features(tmp_path, key) is None for key in others)
    assert open_features(tmp_path, KEY) is not None


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def breaking() -> Iterator[Tensor]:
        yield torch.randn(2, 4, 3)
        assert any(path.suffix == ".npy" for path in tmp_path.iterdir())  # it is being written, under another name
        assert open_features(tmp_path, KEY) is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path, KEY, breaking())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [4, 3])
def test_too_few_rows_are_refused_and_leave_nothing(tmp_path: Path, rows: int) -> None:
    with pytest.raises(DataError, match=rf"got tokens of {rows} images, but the split has 5"):
        write_features(tmp_path, KEY, batches(rows))
    assert list(tmp_path.iterdir()) == []


def test_too_many_rows_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got tokens of 7 images, but the split has 5"):
        write_features(tmp_path, KEY, batches(7))
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_features(tmp_path, KEY, batches())
    path = tmp_path / f"{KEY.name}.npy"
    content = path.read_bytes()
    for kept in (len(content) - 8, 60, 0):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match=r"is damaged .*; delete it"):
            open_features(tmp_path, KEY)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / f"{KEY.name}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is damaged"):
        open_features(tmp_path, KEY)


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / f"{KEY.name}.npy", np.zeros((5, 4, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"holds \(5, 4, 2\) float32, \(5, 4, 3\) float32 is needed; delete it"):
        open_features(tmp_path, KEY)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    key = replace(KEY, rows=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 2 * 10**6, 2 * 10**6))
    with pytest.raises(
        DataError, match=r"needs 480 MB, but 2 MB are free; free some space, or set store.folder to null"
    ):
        write_features(tmp_path, key, [])
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

    def never() -> Iterator[Tensor]:
        asked.append(1)
        yield torch.randn(1, 4, 3)

    key = replace(KEY, rows=100_000)
    with largest_file(10**6), pytest.raises(DataError, match=r"needs 5 MB.*free some space"):
        write_features(tmp_path, key, never())
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
        write_features(tmp_path, key, iter(torch.randn(100_000, 4, 3).split(1000)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    ready, hold = multiprocessing.Event(), multiprocessing.Event()

    def write() -> None:
        def slow() -> Iterator[Tensor]:
            ready.set()
            hold.wait(60)
            yield torch.randn(5, 4, 3)

        write_features(tmp_path, KEY, slow())

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    try:
        assert ready.wait(60)
        (tmp_path / f".{KEY.name}.4711.npy").write_bytes(b"of an older version, killed")
        other = replace(KEY, data="other")
        write_features(tmp_path, other, batches())
        hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert len(hidden) == 1 and "4711" not in hidden[0]  # that of the living writer
    finally:
        writer.kill()
        writer.join()
    write_features(tmp_path, replace(KEY, data="third"), batches())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    inner = batches()

    def nested() -> Iterator[Tensor]:
        write_features(tmp_path, KEY, inner)
        yield from batches()

    file = write_features(tmp_path, KEY, nested())
    assert not torch.equal(file.read(torch.arange(5)), torch.cat(inner))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]


def test_bfloat16_rounds_and_holds_any_size(tmp_path: Path) -> None:
    key = replace(KEY, dtype="bfloat16")
    written = [batch * 1e20 for batch in batches()]
    tokens_BSE = write_features(tmp_path, key, written).read(torch.tensor([3, 1]))
    assert tokens_BSE.dtype == torch.float32 and key.num_bytes * 2 == KEY.num_bytes
    assert torch.equal(tokens_BSE, torch.cat(written).bfloat16().float()[[3, 1]])


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
        write_features(tmp_path, replace(KEY, dtype=dtype), [torch.ones(3, 4, 3), wrong], owner="Encoder 'depth'")
    assert str(error.value).startswith("Encoder 'depth' gave tokens") and all(part in str(error.value) for part in told)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_and_smallest_that_fit(tmp_path: Path) -> None:
    """A few values that become 0 beside larger ones are no loss; nor are zeros."""
    tokens = torch.full((5, 4, 3), 65504.0)
    tokens[0, 0] = torch.tensor([0.0, 1e-9, 6e-5])
    tokens[2:] = 0.0
    read = write_features(tmp_path, replace(KEY, dtype="float16"), [tokens[:2], tokens[2:]]).read(torch.arange(5))
    torch.testing.assert_close(read, tokens, atol=1e-7, rtol=0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot use .*; set store.folder to another one"):
        write_features(tmp_path / "file" / "store", KEY, batches())


def test_leftovers_of_a_killed_writer_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / f".{KEY.name}.{os.getpid() + 1}.npy", np.zeros((5, 4, 3), dtype=np.float32))
    assert open_features(tmp_path, KEY) is None
