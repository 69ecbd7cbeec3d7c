"""The feature store: what is written is what is read; nothing half-written, damaged or foreign is ever read."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.store import FeatureKey, open_features, write_features

KEY = FeatureKey(data="d", encoder="e", rows=5, tokens=4, width=3, grid_hw=(2, 2), dtype="float32")


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
        replace(KEY, data="other"),
        replace(KEY, encoder="other"),
        replace(KEY, rows=6),
        replace(KEY, tokens=9),
        replace(KEY, width=4),
        replace(KEY, grid_hw=(4, 1)),
        replace(KEY, dtype="float16"),
    ]
    assert len({KEY.name, *(key.name for key in others)}) == 8
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
    with pytest.raises(DataError, match=rf"got tokens of {rows} images, the split has 5"):
        write_features(tmp_path, KEY, batches(rows))
    assert list(tmp_path.iterdir()) == []


def test_too_many_rows_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got tokens of 7 images, the split has 5"):
        write_features(tmp_path, KEY, batches(7))
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_features(tmp_path, KEY, batches())
    path = tmp_path / f"{KEY.name}.npy"
    content = path.read_bytes()
    for kept in (len(content) - 8, 60, 0):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match=r"is damaged .*; delete it, it is computed again"):
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
    with pytest.raises(DataError, match=r"needs 480 MB, 2 MB are free; free some space, or set feature_cache to null"):
        write_features(tmp_path, key, [])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot use .*; set feature_cache to another folder"):
        write_features(tmp_path / "file" / "store", KEY, batches())


def test_leftovers_of_a_killed_writer_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / f".{KEY.name}.{os.getpid() + 1}.npy", np.zeros((5, 4, 3), dtype=np.float32))
    assert open_features(tmp_path, KEY) is None
