"""The table of the source's structure, held against small sources whose numbers are plain to see."""

from __future__ import annotations

import ast
import importlib.util
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch

import visexpert as vx
from benchmarks import structure
from benchmarks.import_graph import circles, file_imports, folder_imports


def written(root: Path, **files: str) -> Path:
    """A package whose files are named with ``__`` for ``/``; each folder gets an ``__init__.py``."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        (path.parent / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    "back",
    [
        "import pack.one.a",
        "from pack.one import a",
        "from pack.one.a import f",
        "from ..one.a import f",
        "def g():\n    from pack.one.a import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.one.a import f",
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path, back: str) -> None:
    root = written(tmp_path / "pack", one__a="from pack.two.b import g", two__b=back, two__c="import pack.two.b")
    imports = file_imports(root)
    assert imports["one/a.py"] == {"two/b.py"} and imports["two/c.py"] == {"two/b.py"}
    assert circles(imports) == [frozenset({"one/a.py", "two/b.py"})]
    assert circles(folder_imports(imports)) == [frozenset({"one", "two"})]


def test_a_line_of_imports_is_no_circle(tmp_path: Path) -> None:
    root = written(
        tmp_path / "pack", one__a="from pack.one import b, nothing\nimport os", one__b="import pack.one.c", one__c=""
    )
    assert file_imports(root)["one/a.py"] == {"one/b.py", "one/__init__.py"}
    assert circles(file_imports(root)) == []


def test_sizes_and_constructors_are_counted(tmp_path: Path) -> None:
    wide = ", ".join(f"p{number}" for number in range(structure.MANY + 1))
    root = written(
        tmp_path / "pack", one__a=f"class Wide:\n    def __init__(self, {wide}):\n        pass\n", one__b="x = 1\n"
    )
    rows = dict(structure.source_rows(root))
    assert rows["source files"] == "3" and rows["lines of source"] == "4"
    assert (
        rows[f"constructors above {structure.MANY}"] == f"Wide {structure.MANY + 1}"
        and rows["lines of a function: median, p90, max"] == "2, 2, 2"
    )


def test_no_constructor_has_more_parameters_than_allowed() -> None:
    assert dict(structure.source_rows(structure.ROOT))[f"constructors above {structure.MANY}"] == "none"
    public = {name: kind for name in vx.__all__ if isinstance(kind := getattr(vx, name), type)}
    public = {name: kind for name, kind in public.items() if not issubclass(kind, Exception)}  # no signature
    counts = {name: len(signature(kind).parameters) for name, kind in public.items()}  # inherited fields, too
    assert counts["MoVEKD"] > 10
    assert not {name: count for name, count in counts.items() if count > structure.MANY}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("class A:\n    def __init__(self, a, /, b, *, c, **d): ...", 3),
        ("@dataclass(frozen=True)\nclass A:\n    a: int\n    b: str = ''\n    N: ClassVar[int] = 3", 2),
        ("class A:\n    a: int", 0),
    ],
)
def test_parameters_of_a_constructor(source: str, count: int) -> None:
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef) and structure.parameters(node) == count


class Stepping(L.LightningModule):
    """Calls a function of one file that calls one of another, twice."""

    def __init__(self, first: ModuleType) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.first = first

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.first.once()
        self.first.once()
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_step_is_traced_by_the_changes_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "def twice():\n    return [deep(), deep()]\n\n\ndef deep():\n    return 1\n"
    written(
        tmp_path, first="def once():\n    return other.twice() and own()\n\n\ndef own():\n    return 2\n", second=other
    )
    first = loaded(tmp_path / "first.py")
    first.other = loaded(tmp_path / "second.py")  # type: ignore[attr-defined]
    monkeypatch.setattr(structure, "ROOT", tmp_path)
    data = L.LightningDataModule.from_datasets(torch.zeros(3, 1))
    path = structure.traced_step(Stepping(first), data)
    assert path == ["first.py", "second.py", "first.py", "second.py", "first.py"]
