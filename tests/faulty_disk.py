"""Disks that fail: one that is full when what was written is flushed, and folders that nothing may be written into."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_closed: list[Path] = []
"""Folders that are read-only at present."""
_hooked: list[bool] = []


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file be flushed to disk: as where space is given out late (NFS, quotas), the write itself succeeds."""

    def refuse(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder, with all below it, one of a file system that is mounted read-only, for this process."""
    if not _hooked:
        sys.addaudithook(_refuse)  # stays for good, and looks at nothing when no folder is closed
        _hooked.append(True)
    _closed.append(folder)
    try:
        yield
    finally:
        _closed.remove(folder)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if not _closed or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.chmod"):
        return
    name = arguments[0]
    if event == "open" and not int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if isinstance(name, str | bytes | os.PathLike):
        path = Path(os.fsdecode(name))
        if any(path.is_relative_to(folder) for folder in _closed):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
