"""Files and folders that appear whole or not at all: written beside their place, forced to the disk, renamed.

The part lies in the target's own folder, since a rename is atomic on one file system alone. Whatever ends the writer -
an error, a full disk, a kill, a crash of the machine - the earlier file stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: parts of killed processes then stay until they are deleted by hand
    fcntl = None  # type: ignore[assignment]

_HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32] or "here"

_cleaned: set[Path] = set()
"""Folders in which this process has looked for parts of dead ones."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the path of an empty part file beside ``path``, which takes its place at the end.

    Parts that killed processes have left there are removed; those of processes that still write are not, since each
    writer holds a lock on its own.

    Args:
        path: Target; its folder is made where it is missing, and an earlier file stays until the new one is whole.

    Raises:
        OSError: The folder or the file cannot be written. The part is removed, whatever was raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead_parts(path.parent)
    part = _part(path)
    try:
        with _locked(part):
            yield part
            force(part)
            part.replace(path)
        force_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # on a disk that fails, what was raised first counts
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path``, which takes its place at the end.

    Args:
        path: Target; an earlier folder or file there stays until the new one is whole.

    Raises:
        OSError: The disk refuses. The part is removed, whatever was raised.
    """
    part = _part(path)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        take_place(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def take_place(part: Path, path: Path) -> None:
    """Force a finished file or folder to the disk and move it to ``path``, replacing what lies there.

    A folder cannot be replaced in one go: for a moment neither lies at ``path``, the earlier one beside it as
    ``.NAME.old``.
    """
    for file in [part] if part.is_file() else sorted(part.rglob("*")):
        if file.is_file():
            force(file)
        else:
            force_folder(file)
    old = path.with_name(f".{path.name}.old")
    if part.is_file() and not path.is_dir():
        part.replace(path)
    else:
        remove(old)
        if path.exists():
            path.rename(old)
        part.rename(path)
    force_folder(path.parent)
    remove(old)


def force(file: Path) -> None:
    """Wait until a file's content lies on the disk."""
    with file.open("rb+" if os.name == "nt" else "rb") as stream:
        os.fsync(stream.fileno())


def force_folder(folder: Path) -> None:
    """Wait until a folder's names lie on the disk, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_HOST}-{secrets.token_hex(4)}.part")


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Make an empty file and hold the lock that says that its writer lives."""
    while True:
        with part.open("wb") as lock:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # file systems without locks: nobody removes parts there, either
                    fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not part.exists():  # taken for a dead one before it was locked
                continue
            yield
            return


def _remove_dead_parts(folder: Path) -> None:
    """Remove what writers into ``folder`` that are no more have left there; looks once per process.

    Of this machine alone: not every file system tells locks to others.
    """
    if fcntl is None or folder in _cleaned:
        return
    _cleaned.add(folder)
    for part in folder.glob(f".*.{_HOST}-????????.part"):
        with contextlib.suppress(OSError), part.open("rb") as lock:  # OSError: it is locked, a folder, or gone by now
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
