"""A target folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visexpert.errors import ConfigError, DataError


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``out`` that is renamed to ``out`` at the end, or removed if anything goes wrong.

    A process that is killed leaves at most the hidden folder, ``.NAME.partial-PID``.

    Args:
        out: Target; may exist only as an empty folder.

    Raises:
        ConfigError: The target is taken.
        DataError: The disk refuses.
    """
    check_target(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        os.rename(partial, out)
    except OSError as error:
        raise DataError(
            f"'{out}' cannot be written ({error}); choose a folder with room that you may write."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(out: Path) -> None:
    """Refuse a target that is taken.

    Raises:
        ConfigError: It is a file, or a folder that is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"The folder '{out}' is not empty; give --out a new or an empty one.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; give --out a new or an empty folder.")
