"""Atomic writes of files and folders: write beside the target, flush to disk, rename.

The part file is in the target's own folder, since a rename is atomic only within a file system. Whatever ends the
writer - an error, a full disk, a kill, a crash of the machine - the earlier file stays intact.
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
except ImportError:  # Windows: parts of killed processes stay until deleted by hand
    fcntl = None  # type: ignore[assignment]

_HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:32] or "here"

_cleaned: set[Path] = set()
"""Folders that this process has searched for parts of dead processes."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Provide an empty part file beside ``path``; at the end it replaces ``path``.

    Parts left by killed processes are removed; those of active writers are not, since each writer locks its own.

    Args:
        path: Target; its folder is created if missing, and an earlier file stays until the new one is complete.

    Raises:
        OSError: The folder or the file cannot be written. The part is removed after any error.
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
        with contextlib.suppress(OSError):  # on a failing disk, the first error counts
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Provide an empty folder beside ``path``; at the end it replaces ``path``.

    Args:
        path: Target; an earlier folder or file stays until the new one is complete.

    Raises:
        OSError: The folder cannot be written. The part is removed after any error.
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
    """Flush a finished file or folder to disk and move it to ``path``, replacing what is there.

    A folder cannot be replaced atomically: for a moment ``path`` is missing and the earlier folder is ``.NAME.old``
    beside it.
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
    """Flush the content of a file to disk."""
    with file.open("rb+" if os.name == "nt" else "rb") as stream:
        os.fsync(stream.fileno())


def force_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, if the system can (Windows cannot)."""
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
    """Create an empty file and hold its lock, which tells others that the writer is alive."""
    while True:
        with part.open("wb") as lock:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # no locks on this file system: nobody removes parts there
                    fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not part.exists():  # another process removed it before it was locked
                continue
            yield
            return


def _remove_dead_parts(folder: Path) -> None:
    """Remove the parts of dead writers in ``folder``, once per process.

    Only parts of this machine: not every file system shares locks.
    """
    if fcntl is None or folder in _cleaned:
        return
    _cleaned.add(folder)
    for part in folder.glob(f".*.{_HOST}-????????.part"):
        with contextlib.suppress(OSError), part.open("rb") as lock:  # OSError: locked, a folder, or gone
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
