"""A target folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visexpert.errors import ConfigError, DataError
from visexpert.io.files import whole_folder


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a hidden folder beside ``out`` that is renamed to ``out`` at the end, or removed if anything goes wrong.

    A process that is killed leaves at most the hidden folder, ``.NAME.HOST-NUMBER.part``.

    Args:
        out: Target; may exist only as an empty folder.

    Raises:
        ConfigError: The target is taken.
        DataError: The disk refuses.
    """
    check_target(out)
    try:
        with whole_folder(out) as partial:
            yield partial
    except OSError as error:
        raise DataError(
            f"'{out}' cannot be written ({error}); choose a folder with room that you may write."
        ) from error


def check_target(out: Path) -> None:
    """Refuse a target that is taken.

    Raises:
        ConfigError: It is a file, or a folder that is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"The folder '{out}' is not empty; give --out a new or an empty one.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; give --out a new or an empty folder.")
