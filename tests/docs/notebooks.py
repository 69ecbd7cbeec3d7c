"""Notebooks of docs/, read and shortened for tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
STEPS = re.compile(r"STEPS = \d+")


def read_notebook(path: Path) -> Any:
    """Return a notebook as nbformat reads it."""
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def code_of(notebook: Any) -> list[str]:
    """Return the text of each code cell."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def shortened(notebook: Any) -> Any:
    """Set the number of steps, which the first code cell names, to 2; return the notebook.

    Raises:
        ValueError: The first code cell names none.
    """
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if not STEPS.search(first.source):
        raise ValueError("The first code cell has no line 'STEPS = ...'")
    first.source = STEPS.sub("STEPS = 2", first.source)
    return notebook
