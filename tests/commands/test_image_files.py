"""Files and folders of a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from visexpert.commands.image_files import find_images
from visexpert.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.webp", "sub/deep/d.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def test_a_folder_is_its_images_sorted(folder: Path) -> None:
    assert find_images([str(folder)]) == [folder / "a.JPG", folder / "b.png"]
    everything = find_images([str(folder)], recursive=True)
    assert everything == [folder / name for name in ("a.JPG", "b.png", "sub/c.webp", "sub/deep/d.png")]


def test_a_named_file_is_taken_whatever_its_name_and_in_its_place(folder: Path) -> None:
    notes, absent = folder / "notes.txt", folder / "absent.png"
    assert find_images([str(notes), str(folder / "sub"), str(absent)]) == [notes, folder / "sub" / "c.webp", absent]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    assert len(find_images([str(folder)], recursive=True)) == 4


def test_addresses_and_folders_without_images_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="https://a.org/b.png is a URL"):
        find_images(["https://a.org/b.png"])
    with pytest.raises(ConfigError, match="There is no image .* or add --recursive"):
        find_images([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="There is no image .*; name files, or other folders.$"):
        find_images([str(tmp_path / "empty")], recursive=True)
