"""Which process makes which shard: the one that holds the lock of its unfinished file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from visexpert.io.files import force_folder

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def claimed(part: Path, target: Path) -> Iterator[BinaryIO | None]:
    """Provide the file to write; at the end it takes the place of ``target``.

    The file is locked while it is open, so that one process writes a target. After a kill the lock is gone, and the
    next process that claims the target writes the same file anew. On a file system without locks every process gets a
    file of its own, and the last one counts.

    Args:
        part: Unfinished file, in the folder of ``target``.
        target: Finished file.

    Yields:
        The file; None if another process is writing it, or ``target`` is there.

    Raises:
        OSError: The folder cannot be written. The unfinished file is removed after any error.
    """
    if target.exists():
        yield None
        return
    file, part = _locked(part)
    if file is None:
        yield None
        return
    try:
        if target.exists():  # finished between the look above and the lock
            yield None
            return
        yield file
        file.flush()
        os.replace(part, target)
        force_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # from flushing what did not fit; the file is gone
            file.close()


def remove_dead_parts(root: Path) -> None:
    """Remove unfinished files, in all folders of a store, that no process holds."""
    for part in root.glob("*/.*.part"):
        with contextlib.suppress(OSError), part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _locked(part: Path) -> tuple[BinaryIO | None, Path]:
    """Open and lock an unfinished file; None if another process has it."""
    while True:
        # Closed by the caller: the lock lasts as long as the file is open.
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in TAKEN:
                return None, part
            own = part.with_name(f"{part.stem}.{uuid4().hex[:12]}.part")  # a file system without locks
            return own.open("w+b"), own
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file, part
        file.close()  # renamed or removed by its last owner before it was locked here
