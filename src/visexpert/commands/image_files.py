"""Image files that a command line names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import IMAGE_FORMATS

IMAGE_SUFFIXES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
"""Suffixes by which images are found in a folder; a file that is named itself may have any."""


def find_images(arguments: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """Return the files that a command line names; a folder stands for the images in it, sorted by name.

    Args:
        arguments: Files and folders.
        recursive: Include the images of subfolders; links to folders are not followed.

    Raises:
        ConfigError: An argument is a URL, or no image is found.
        DataError: A folder cannot be listed.
    """
    found: list[Path] = []
    for argument in arguments:
        if "://" in argument:
            raise ConfigError(f"{argument} is a URL, and nothing is fetched; download the image and give the file.")
        path = Path(argument)
        found += _images_in(path, recursive) if path.is_dir() else [path]
    if not found:
        hint = "name files, or other folders" if recursive else "name files, other folders, or add --recursive"
        raise ConfigError(f"There is no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(arguments)}; {hint}.")
    return found


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"The folder {folder} cannot be listed ({error.strerror}); grant access, or leave it out.")

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        found += [Path(parent) / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        folders[:] = folders if recursive else []
    return sorted(found)
