"""The import law: which room may import which (docs/design.md), read from the source by ast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.import_graph import circles, file_imports, imported_names

PACKAGE = "visexpert"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

EVERYWHERE = frozenset(
    {
        "errors",
        "io",
        "optim",
        "chat_jinja",
        "checking",
        "grids",
        "interruption",
        "trust",
        "precision",
        "processes",
        "overlays",
        "parse_errors",
        "run_arguments",
        "timing",
        "typed",
        "names",
        "noise",
        "version",
        "shipped",
    }
)
"""What any room may import; these import nothing but one another, and ``io`` the errors alone."""

STAGES = frozenset({"types", "networks", "data", "experts", "vision", "transfer", "language", "losses"})

LAW: dict[str, frozenset[str]] = {
    "types": frozenset(),
    "data": frozenset({"types"}),
    "networks": frozenset(),
    "experts": frozenset({"types", "networks", "vision", "store"}),
    "vision": frozenset({"types", "networks"}),
    "transfer": frozenset({"types", "losses"}),
    "language": frozenset({"types"}),
    "losses": frozenset({"types"}),
    "methods": STAGES | {"metrics", "store"},
    "callbacks": frozenset({"types", "methods", "language", "vision", "transfer", "losses", "report", "export"}),
    "metrics": frozenset({"types"}),
    "store": frozenset({"types"}),
    "export": frozenset({"types", "vision", "losses", "metrics"}),
    "report": frozenset({"types"}),
    "tabletop": frozenset({"types", "data", "experts", "vision", "losses", "metrics"}),
}
ROOMS = frozenset(LAW)
LAW["training"] = ROOMS
LAW["demo"] = ROOMS | {"training", "commands"}
LAW["runs"] = ROOMS | {"training"}
LAW["captioning"] = ROOMS | {"training", "runs"}
LAW["planning"] = ROOMS | {"training", "runs"}
LAW["integrations"] = frozenset({"captioning", "data", "language", "runs"})
LAW["app"] = frozenset({"data", "report", "runs", "captioning"})
LAW["commands"] = ROOMS | {"training", "runs", "captioning", "app", "planning"}
LAW["cli"] = LAW["commands"] | {"demo", "commands"}
LAW["__main__"] = frozenset({"cli"})
LAW["__init__"] = ROOMS | {"runs", "captioning"}  # names of `import visexpert as vx`, imported on first use
LAW.update({name: EVERYWHERE for name in EVERYWHERE})
LAW["io"] = frozenset({"errors", "version"})


def imported_rooms(source: str, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, room) for each import of the package in ``source``, wherever in the file it stands."""
    for line, name in imported_names(source, module):
        parts = name.split(".")
        if parts[0] == PACKAGE:
            yield line, parts[1] if len(parts) > 1 else "__init__"


def violations(source: str, path: Path) -> list[str]:
    """Arrows of one file that the law does not have; ``path`` is relative to the package."""
    room = path.parts[0].removesuffix(".py")
    allowed = LAW[room] | {room, "__init__"} | (frozenset() if room in EVERYWHERE else EVERYWHERE)
    found = imported_rooms(source, (PACKAGE, *path.parts[:-1]))
    return [f"{path}:{line}: {room} may not import {target}" for line, target in found if target not in allowed]


def test_no_file_breaks_the_law() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert files
    broken = [item for file in files for item in violations(file.read_text(encoding="utf-8"), file.relative_to(ROOT))]
    assert not broken, "\n".join(broken)


def test_every_room_is_in_the_law() -> None:
    found = {path.parts[0].removesuffix(".py") for path in (p.relative_to(ROOT) for p in ROOT.rglob("*.py"))}
    assert found <= set(LAW), f"not in the table: {sorted(found - set(LAW))}"


def test_every_room_is_a_package() -> None:
    folders = {path.parent for path in ROOT.rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_law_has_no_cycle() -> None:
    def reach(room: str) -> set[str]:
        direct = set(LAW[room]) - EVERYWHERE
        return direct.union(*(reach(other) for other in direct))

    assert not [room for room in ROOMS if room in reach(room)]


def test_no_files_import_one_another() -> None:
    """Imports inside functions and under TYPE_CHECKING count, too, but for those of the front door."""
    imports = file_imports(ROOT)
    imports["__init__.py"] = set()  # `import visexpert as vx`: its names are imported when they are asked for
    assert not circles(imports)


@pytest.mark.parametrize(
    "source",
    [
        "import visexpert.methods",
        "import visexpert.methods.tove.method as t",
        "from visexpert.methods import ToVE",
        "from visexpert import methods",
        "from ..methods import ToVE",
        "from .. import methods",
        "def f():\n    from visexpert.methods.tove.method import ToVE",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from visexpert.methods import ToVE",
        "import importlib\nimportlib.import_module('visexpert.methods.tove.method')",
    ],
)
def test_the_law_catches_each_form_of_import(source: str) -> None:
    assert len(violations(source, Path("losses/balance.py"))) == 1
    assert violations(source, Path("callbacks/detach.py")) == []


def test_the_law_lets_a_room_import_itself_and_the_errors() -> None:
    source = "from visexpert.errors import ConfigError\nfrom .gate import TokenGate\nfrom visexpert.types import Batch"
    assert violations(source, Path("transfer/gate.py")) == []


def test_the_law_keeps_files_apart_from_the_rest() -> None:
    path = Path("io/source.py")
    assert len(violations("from visexpert.types import Batch\nfrom visexpert.checking import built", path)) == 2
    assert violations("from visexpert.errors import DataError\nfrom visexpert.io import reading", path) == []
