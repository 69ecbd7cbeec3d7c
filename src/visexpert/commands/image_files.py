"""Image files that a command line names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import IMAGE_FORMATS

IMAGE_SUFFIXES = frozenset(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
"""Files of a folder that are taken for images; a file that is named itself may be called anything."""


def find_images(arguments: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """Files that a command line names: files as they are, folders as the images in them, sorted by name.

    Args:
        arguments: Files and folders.
        recursive: Take the images of subfolders, too; links to folders are not followed.

    Raises:
        ConfigError: An argument is an address, or no image is left.
        DataError: A folder cannot be listed.
    """
    found: list[Path] = []
    for argument in arguments:
        if "://" in argument:
            raise ConfigError(f"{argument} is an address; download the image and give the file, nothing is fetched.")
        path = Path(argument)
        found += _images_in(path, recursive) if path.is_dir() else [path]
    if not found:
        hint = "name files, or other folders" if recursive else "name files, other folders, or add --recursive"
        raise ConfigError(f"There is no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(arguments)}; {hint}.")
    return found


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"The folder {folder} cannot be listed ({error.strerror}); allow it or leave it out.")

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        found += [Path(parent) / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        folders[:] = folders if recursive else []
    return sorted(found)
