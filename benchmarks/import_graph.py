"""Read from the source which file imports which, including imports in functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path


def imported_names(source: str, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for each import in ``source``; ``from a import b`` is the name ``a.b``.

    Args:
        source: Python source.
        module: Dotted name of the package that contains the file, as parts, to resolve relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: len(module) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        yield from ((node.lineno, name) for name in names)


def file_imports(root: Path) -> dict[str, set[str]]:
    """Return the files of the package in folder ``root`` that each of its files imports, by path relative to ``root``.

    An import from a package counts as one of its ``__init__.py``, not of the file that defines the name.
    """
    files = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for file in sorted(files):
        package = (root.name, *Path(file).parts[:-1])
        names = imported_names((root / file).read_text(encoding="utf-8"), package)
        found[file] = {target for _, name in names if (target := _file_of(name, root.name, files))} - {file}
    return found


def folder_imports(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the same by folder or file directly under the package, without its own ``__init__.py``."""
    found: dict[str, set[str]] = {}
    for file, targets in imports.items():
        found.setdefault(_room(file), set()).update(map(_room, targets))
    return {room: targets - {room, "__init__"} for room, targets in found.items() if room != "__init__"}


def circles(imports: Mapping[str, set[str]]) -> list[frozenset[str]]:
    """Return the maximal sets of nodes that reach one another."""
    reached = {node: _reached(imports, node) for node in imports}
    return sorted(
        {
            frozenset(other for other in near if node in reached[other])
            for node, near in reached.items()
            if node in near
        },
        key=sorted,
    )


def _reached(imports: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(imports.get(start, ()))
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += imports.get(node, ())
    return seen


def _file_of(name: str, package: str, files: set[str]) -> str | None:
    """Return the file of a dotted name: its longest prefix that is a module; None if it is in another package."""
    parts = name.split(".")
    if parts[0] != package:
        return None
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[1:end])
        for file in (f"{stem}.py", f"{stem}/__init__.py".lstrip("/")):
            if file in files:
                return file
    return None


def _room(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")
