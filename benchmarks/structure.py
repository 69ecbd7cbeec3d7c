"""Print how the source is built: sizes, constructors, import cycles, and what one training step runs through.

    python -m benchmarks.structure

The step is the third `training_step` of a run at the smoke scale of configs/, so that nothing is done for the first
time, with one expert and without a feature store, so that no work is repeated per expert.

- files: files of visexpert of which the step calls a function.
- moves: changes of file between one called function of visexpert and the next, in the order of the calls. Returns and
  calls into other packages add none.
- waits: how often the host waits for the device between the start of a batch and the end of the optimizer's step, see
  benchmarks/waits.py.
- circle: files that reach one another by imports, those in functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import statistics
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

import visexpert
from benchmarks.ablations import run_of
from benchmarks.import_graph import circles, file_imports, folder_imports
from benchmarks.waits import bare_trainer, waits_per_step

ROOT = Path(visexpert.__file__).parent
MANY = 18
"""Classes are listed if their constructor has more parameters."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source_only", action="store_true", help="only read the source, without training")
    parser.add_argument("--trace", action="store_true", help="print the files of each step in the order of the calls")
    options = parser.parse_args()
    console = Console(width=110)
    table = Table("what", "value", title="Structure of visexpert")
    for what, value in source_rows(ROOT):
        table.add_row(what, value)
    console.print(table)
    if options.source_only:
        return
    steps = Table("method", "files", "moves", "waits", title="One training step")
    paths = {}
    for name, model, data in methods():
        paths[name] = traced_step(model, data)
        waits = waits_of(model, data)
        steps.add_row(name, str(len(set(paths[name]))), str(len(paths[name]) - 1), str(waits))
    console.print(steps)
    if options.trace:
        for name, path in paths.items():
            console.print(f"{name}: {' > '.join(path)}", soft_wrap=True)


def source_rows(root: Path) -> list[tuple[str, str]]:
    """Return what the source alone shows, as pairs of a label and numbers."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in trees]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    constructors = sorted(
        ((parameters(node), node.name) for node in nodes if isinstance(node, ast.ClassDef)), reverse=True
    )
    imports = file_imports(root)
    file_circles, folder_circles = circles(imports), circles(folder_imports(imports))
    return [
        ("source files", str(len(trees))),
        ("lines of source", str(sum(lines))),
        ("lines of a file: median, p90, max", spread(lines)),
        ("functions", str(len(functions))),
        ("lines of a function: median, p90, max", spread([length(node) for node in functions])),
        ("parameters of a constructor: max", str(constructors[0][0])),
        (f"constructors above {MANY}", listed(f"{name} {count}" for count, name in constructors if count > MANY)),
        ("circles between files", str(len(file_circles))),
        *(("", ", ".join(sorted(circle))) for circle in file_circles),
        ("circles between folders", str(len(folder_circles))),
        *(("", ", ".join(sorted(circle))) for circle in folder_circles),
    ]


def spread(values: Sequence[int]) -> str:
    """Return median, 90th percentile and maximum."""
    ranked = sorted(values)
    return f"{statistics.median(ranked):.0f}, {ranked[math.ceil(0.9 * len(ranked)) - 1]}, {ranked[-1]}"


def listed(parts: Iterator[str]) -> str:
    """Join parts with commas, or return that there are none."""
    return ", ".join(parts) or "none"


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from ``def`` to its last, docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.ClassDef) -> int:
    """Return the number of parameters of a class's own constructor, or of a dataclass's own fields."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = item.args
            return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return sum(isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item) for item in node.body)
    return 0


def methods() -> Iterator[tuple[str, L.LightningModule, L.LightningDataModule]]:
    """Yield both methods, and merging of ToVE, each with data of a few rendered scenes."""
    from visexpert.methods import Merging
    from visexpert.training import build_cli

    for name, method, ablation in (("ToVE", "tove", "depth"), ("MoVE-KD", "movekd", "teacher-depth")):
        arguments = run_of(method, ablation, seed=0, scale="smoke").arguments[1:]
        cli = build_cli([*arguments, "--model.init_args.store.folder", "null"], run=False)
        yield name, cli.model, cli.datamodule
        if method == "tove":
            yield "Merging", Merging(teacher=cli.model), cli.datamodule


def traced_step(model: L.LightningModule, data: L.LightningDataModule) -> list[str]:
    """Return the files of visexpert that the third step runs through, one entry each time the file changes."""
    path: list[str] = []

    def called(frame: FrameType, event: str, arg: object) -> None:
        with contextlib.suppress(ValueError):
            file = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
            if event == "call" and path[-1:] != [file]:
                path.append(file)

    step = model.training_step

    def traced(*args: Any, **kwargs: Any) -> Any:
        path.clear()
        sys.setprofile(called)
        try:
            return step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    with unittest.mock.patch.object(model, "training_step", traced):
        fit(model, data)
    return path


def waits_of(model: L.LightningModule, data: L.LightningDataModule) -> int:
    """Return how often the third step waits for the device."""
    with tempfile.TemporaryDirectory() as folder:
        return len(waits_per_step(model, data, folder=Path(folder))[-1])


def fit(model: L.LightningModule, data: L.LightningDataModule, *, steps: int = 3) -> None:
    """Train a few steps without logger, checkpoints and validation."""
    with tempfile.TemporaryDirectory() as folder:
        bare_trainer(Path(folder), steps=steps).fit(model, datamodule=data)


if __name__ == "__main__":
    main()
