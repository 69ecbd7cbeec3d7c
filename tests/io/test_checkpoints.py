"""Which checkpoint a command reads, and what it says of one that cannot be read."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.io.test_sharded import Attack
from tests.sharded_parts import as_fsdp
from visexpert.errors import WeightsError
from visexpert.io.checkpoints import checked_checkpoint, load_checkpoint, newest_checkpoint


def write(path: Path, steps: int, *, at: int) -> Path:
    """A checkpoint of so many steps, written at a time in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"weight": torch.full((64,), float(steps))}, "global_step": steps}, path)
    os.utime(path, (at, at))
    return path


def cut(path: Path) -> None:
    times = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-300])
    os.utime(path, (times, times))


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def saved(content: Any) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    return make


DAMAGED: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda folder: b"",
    "text": lambda folder: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "zeros": lambda folder: bytes(4096),
    "cut": lambda folder: write(folder / "whole", 3, at=1).read_bytes()[:-300],
    "half": lambda folder: write(folder / "whole", 3, at=1).read_bytes()[:700],
    "pickle": lambda folder: pickle.dumps({"state_dict": {}}),
    "code": lambda folder: pickle.dumps(Attack(folder / "ran")),
    "zip": lambda folder: zipped(b""),
    "opcodes": lambda folder: zipped(b"\x80\x02}q\x00(X\x01"),
    "memo": lambda folder: zipped(b"\x80\x02h\xff."),
    "stack": lambda folder: zipped(b"\x80\x02aaaa."),
    "safetensors": lambda folder: b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
    "list": saved([torch.zeros(1)]),
    "tensor": saved(torch.zeros(1)),
    "foreign": saved({"model": {"weight": torch.zeros(1)}, "epoch": 3}),
    "null": saved({"state_dict": None, "global_step": 3}),
    "numbers": saved({"state_dict": {"weight": 1.0}, "global_step": 3}),
    "names": saved({"state_dict": {1: torch.zeros(1)}, "global_step": 3}),
}


@pytest.mark.parametrize("kind", sorted(DAMAGED))
def test_whatever_is_no_checkpoint_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(DAMAGED[kind](tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(path, owner="init_from")
    message = str(caught.value)
    assert message.startswith("init_from: ") and str(path) in message and "\n" not in message and len(message) < 600
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", sorted(set(DAMAGED) - {"numbers", "names"}))
def test_a_look_without_reading_weights_refuses_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(DAMAGED[kind](tmp_path))
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        checked_checkpoint(path, owner="ckpt_path")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "last.ckpt"
    make(path)
    for read in (load_checkpoint, checked_checkpoint):
        with pytest.raises(WeightsError, match=r"last\.ckpt"):
            read(path, owner="ckpt_path")


def test_old_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    content = {"state_dict": {"weight": torch.ones(2)}, "global_step": 5}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert checked_checkpoint(path, owner="test") == 5 == load_checkpoint(path, owner="test")["global_step"]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    write(tmp_path / "training.ckpt", 3, at=1)  # of an unfinished phase
    assert newest_checkpoint(tmp_path) is None


def test_last_is_taken_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "step=3.ckpt", 3, at=10)
    last = write(tmp_path / "last.ckpt", 3, at=11)
    assert newest_checkpoint(tmp_path) == last and not caplog.records


def test_a_copied_folder_whose_times_are_mixed_up_still_gives_last(tmp_path: Path) -> None:
    last = write(tmp_path / "last.ckpt", 8, at=10)
    write(tmp_path / "step=6.ckpt", 6, at=99)
    assert newest_checkpoint(tmp_path) == last


def test_a_kill_between_two_files_gives_the_later_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "last.ckpt", 250, at=10)
    newer = write(tmp_path / "step=500.ckpt", 500, at=20)
    assert newest_checkpoint(tmp_path) == newer
    assert "step=500.ckpt" in caplog.text and "500 steps" in caplog.text


def test_the_second_run_in_a_folder_is_the_one_that_its_config_is_of(tmp_path: Path) -> None:
    write(tmp_path / "step=1000.ckpt", 1000, at=10)
    write(tmp_path / "last.ckpt", 1000, at=11)
    write(tmp_path / "step=200.ckpt", 200, at=20)
    second = write(tmp_path / "last-v1.ckpt", 200, at=21)
    assert newest_checkpoint(tmp_path) == second


def test_a_damaged_last_gives_way_to_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "step=250.ckpt", 250, at=10)
    whole = write(tmp_path / "step=500.ckpt", 500, at=20)
    cut(write(tmp_path / "last.ckpt", 500, at=21))
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == whole
    assert "last.ckpt" in caplog.text and "step=500.ckpt, after 500 steps" in caplog.text


def test_a_damaged_file_later_than_last_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = write(tmp_path / "last.ckpt", 20, at=10)
    cut(write(tmp_path / "step=30.ckpt", 30, at=20))
    assert newest_checkpoint(tmp_path) == last
    assert "step=30.ckpt cannot be read" in caplog.text and f"Instead using {last}, after 20 steps" in caplog.text


def test_where_none_is_whole_the_newest_is_named(tmp_path: Path) -> None:
    for name, at in (("step=250.ckpt", 10), ("last.ckpt", 20)):
        cut(write(tmp_path / name, 250, at=at))
    with pytest.raises(WeightsError, match=r"last\.ckpt"):
        newest_checkpoint(tmp_path)


def test_a_folder_of_shards_counts_and_one_on_its_way_out_is_the_last_resort(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", 500, at=1)
    last = as_fsdp(plain, tmp_path / "checkpoints" / "last.ckpt")
    assert newest_checkpoint(last.parent) == last
    old = last.with_name(".last.ckpt.old")
    last.rename(old)  # killed while a new one took its place
    assert newest_checkpoint(last.parent) == old
    shutil.rmtree(old)
    assert newest_checkpoint(last.parent) is None
