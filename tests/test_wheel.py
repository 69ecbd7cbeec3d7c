"""The wheel: everything that a user needs, and nothing else."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling import build

import visexpert

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".typed", ".yaml", ".json", ".md", ".safetensors"}
LARGEST = 8 * 2**20
"""Bytes; shipped weights are 5 MB of it."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build.build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as file:
        yield file


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_holds_the_package_and_the_configurations_alone(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"visexpert/{name}" for name in files_below(ROOT / "src" / "visexpert")}
    expected |= {f"visexpert/configs/{name}" for name in files_below(ROOT / "configs")}
    assert held == expected and "visexpert/configs/tove/tabletop.yaml" in held
    assert {Path(name).suffix for name in held} == SUFFIXES
    assert sum(item.file_size for item in wheel.infolist()) < LARGEST
    assert not [name for name in held if set(Path(name).parts) & {"tests", "benchmarks", "docs", "make"}]


def test_it_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    def read(name: str) -> str:
        (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
        return wheel.read(path).decode("utf-8")

    about = Parser().parsestr(read("METADATA"))
    assert (about["Name"], about["Version"]) == ("visexpert", visexpert.__version__)
    assert about["License-Expression"] == "Apache-2.0" and about["Requires-Python"] == ">=3.10"
    assert about.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert read("licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "visexpert = visexpert.cli:main" in read("entry_points.txt")
