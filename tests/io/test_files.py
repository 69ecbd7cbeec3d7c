"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from visexpert.io import files
from visexpert.io.files import take_place, whole_file, whole_folder


def test_the_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as part:
        assert part.parent == path.parent and part.stat().st_size == 0
        part.write_text("one", encoding="utf-8")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "one" and [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("writer")])
def test_whatever_ends_the_writer_the_earlier_file_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(type(error)), whole_file(path) as part:
        part.write_text("ne", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["a.txt"]


def killed_while_writing(path: Path) -> None:
    """Write half a file in another process, which is killed there."""
    child = os.fork()
    if child == 0:
        with whole_file(path) as part:
            part.write_text("ne", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_killed_writer_leaves_the_earlier_file_and_the_next_process_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    killed_while_writing(path)
    assert path.read_text(encoding="utf-8") == "old" and len(os.listdir(tmp_path)) == 2
    monkeypatch.setattr(files, "_cleaned", set())
    with whole_file(tmp_path / "b.txt") as part:
        part.write_text("b", encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_the_part_of_a_writer_that_lives_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_file(tmp_path / "a.txt") as part:
        part.write_text("a", encoding="utf-8")
        monkeypatch.setattr(files, "_cleaned", set())
        with whole_file(tmp_path / "b.txt") as other:
            other.write_text("b", encoding="utf-8")
        assert part.exists()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a"


def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename, force = Path.replace, os.fsync

    def forced(number: int) -> None:
        done.append("force")
        force(number)

    def renamed(part: Path, target: Path) -> Path:
        done.append("rename")
        return rename(part, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(Path, "replace", renamed)
    with whole_file(tmp_path / "a.txt") as part:
        part.write_text("a", encoding="utf-8")
    assert done == ["force", "rename", "force"]  # the file, its name, the folder


@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
def test_a_folder_takes_the_place_of_whatever_was_there(tmp_path: Path, before: str) -> None:
    path = tmp_path / "last.ckpt"
    if before == "file":
        path.write_text("old", encoding="utf-8")
    elif before == "folder":
        path.mkdir()
        (path / "old").touch()
    with whole_folder(path) as part:
        (part / "inner").mkdir()
        (part / "inner" / "new").write_text("new", encoding="utf-8")
    assert (path / "inner" / "new").read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["last.ckpt"] and os.listdir(path) == ["inner"]


def test_a_file_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "part").write_text("new", encoding="utf-8")
    take_place(tmp_path / "part", tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_text(encoding="utf-8") == "new" and os.listdir(tmp_path) == ["last.ckpt"]


def test_a_folder_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.mkdir()
    with pytest.raises(OSError, match="full"), whole_folder(path) as part:
        (part / "new").touch()
        raise OSError(errno.ENOSPC, "full")
    assert os.listdir(tmp_path) == ["last.ckpt"] and not any(path.iterdir())
