"""The settings of a class read from its source file, so that help need not import what the class needs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Setting:
    """One setting of a constructor.

    Args:
        name: Its name; dotted inside a group of settings.
        type: Its annotation as written.
        default: Its default as written.
        help: What the docstring says of it.
    """

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class ClassSource:
    """A class as it stands in a file of this package.

    Args:
        module: Dotted path of the module.
        name: Name of the class.
    """

    module: str
    name: str

    @property
    def file(self) -> Path:
        """Where the module lies."""
        path = ROOT.joinpath(*self.module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def description(self) -> str:
        """Return the docstring up to its ``Args``, without the marks of reStructuredText."""
        return plain(_docstring(self._read()[1]).partition("\nArgs:")[0].strip())

    def settings(self, prefix: str = "") -> list[Setting]:
        """Return the settings of the constructor, or the fields of a dataclass; those of groups by dotted names."""
        tree, node = self._read()
        told = _arguments_told(_docstring(node))
        found = {one.name: one for base in self._inherited(tree, node) for one in base.settings(prefix)}
        for name, annotation, default in _parameters(node):
            is_group = isinstance(default, ast.Call) and ast.unparse(default) == f"{annotation}()"
            home = _imported_from(tree, annotation) if is_group else None
            if home is not None:
                found |= {one.name: one for one in ClassSource(home, annotation).settings(f"{prefix}{name}.")}
                continue
            value, dotted = "" if default is None else ast.unparse(default), prefix + name
            text = told.get(name) or (found[dotted].help if dotted in found else "")
            found[dotted] = Setting(dotted, annotation, value, text)
        return list(found.values())

    def _inherited(self, tree: ast.Module, node: ast.ClassDef) -> Iterator[ClassSource]:
        """Yield the bases whose fields a dataclass has, too; a constructor of its own names all of its settings."""
        if any(isinstance(part, ast.FunctionDef) and part.name == "__init__" for part in node.body):
            return
        here = {part.name for part in tree.body if isinstance(part, ast.ClassDef)}
        for base in map(ast.unparse, node.bases):
            home = self.module if base in here else _imported_from(tree, base)
            if home is not None:
                yield ClassSource(home, base)

    def _read(self) -> tuple[ast.Module, ast.ClassDef]:
        tree = ast.parse(self.file.read_text(encoding="utf-8"))
        found = next(part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == self.name)
        return tree, found


def _docstring(node: ast.ClassDef) -> str:
    return ast.get_docstring(node) or ""


def _parameters(node: ast.ClassDef) -> Iterator[tuple[str, str, ast.expr | None]]:
    """Yield name, annotation and default of each argument."""
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is not None:
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
            yield argument.arg, ast.unparse(argument.annotation or ast.Constant(None)), default
        return
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id, ast.unparse(part.annotation), part.value


def _imported_from(tree: ast.Module, name: str) -> str | None:
    """Return the module that a name is imported from, if it is one of this package."""
    for part in tree.body:
        if isinstance(part, ast.ImportFrom) and any(alias.name == name for alias in part.names):
            return part.module if part.module and part.module.startswith(f"{ROOT.name}.") else None
    return None


def _arguments_told(docstring: str) -> dict[str, str]:
    """Return what a docstring in Google's style says of each argument."""
    told: dict[str, str] = {}
    name, indent = "", " " * 4
    for line in docstring.partition("\nArgs:\n")[2].splitlines():
        if line.startswith(indent * 2) and name:
            told[name] += " " + line.strip()
        elif line.startswith(indent) and ":" in line:
            name, _, text = line.strip().partition(":")
            told[name] = text.strip()
        elif line.strip():
            break
    return {name: plain(text) for name, text in told.items()}


def plain(text: str) -> str:
    """Return a docstring's text without its markup: of a role such as ``:class:`~a.B``` the name, B."""
    text = re.sub(
        r":[a-z]+:`([^`]+)`", lambda found: found[1].rsplit(".", 1)[-1] if found[1][0] in "~." else found[1], text
    )
    return text.replace("``", "")
