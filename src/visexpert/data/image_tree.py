"""Find the images below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from visexpert.data.annotations import slow
from visexpert.errors import DataError, first_line
from visexpert.io.reading import IMAGE_FORMATS

SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)

_NOT_OURS = "__MACOSX"
"""Folder of resource forks in archives that macOS packs."""


def images_below(folder: Path) -> list[str]:
    """Return the names of all images below a folder, relative to it, with ``/``, sorted.

    Links are followed, except back to a folder above; a link that leads nowhere is listed, so that it is reported as
    broken. Hidden files and folders are left out.

    Args:
        folder: The folder.

    Raises:
        DataError: There are no images, or a folder cannot be read.
    """
    others = 0
    found = []
    for name in slow(_files(folder, "", ()), doing=f"listing {folder.name}", unit="file"):
        if name.lower().endswith(SUFFIXES):
            found.append(name)
        else:
            others += 1
    if not found:
        has = f"only {others} other files" if others else "no files at all"
        raise DataError(
            f"The folder {folder} has no images ({', '.join(SUFFIXES)}), {has}; name the folder that holds them."
        )
    return sorted(found)


def _files(folder: Path, inner: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Yield the names of files below ``folder / inner``; ``above`` identifies the folders on the way."""
    try:
        facts = os.stat(folder / inner)
        entries = list(os.scandir(folder / inner))
    except OSError as error:
        raise DataError(
            f"The folder {folder / inner} cannot be read ({first_line(error)}); check its rights."
        ) from error
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == _NOT_OURS:
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _files(folder, f"{inner}{entry.name}/", (*above, here))
        else:
            yield f"{inner}{entry.name}"
