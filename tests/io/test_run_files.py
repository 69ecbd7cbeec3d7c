"""Files written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from visexpert.errors import DataError
from visexpert.io.run_files import set_aside, write_json, write_text


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "earlier")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"Cannot write .*metrics.json \(No space left on device\)"):
        write_text(path, "later")
    assert path.read_text(encoding="utf-8") == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": 2}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": None, "b": [1.5, None], "c": {"d": 2}}


def test_setting_aside_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert set_aside(path) is None
    for text in ("one", "two"):
        path.write_text(text, encoding="utf-8")
        set_aside(path)
    assert (tmp_path / "metrics.1.csv").read_text(encoding="utf-8") == "one"
    assert (tmp_path / "metrics.2.csv").read_text(encoding="utf-8") == "two"
