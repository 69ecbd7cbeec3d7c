"""The notebooks run from top to bottom, offline, in a folder of their own."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.docs.notebooks import NOTEBOOKS, code_of, read_notebook, shortened

(NOTEBOOK,) = NOTEBOOKS


def run_cells(cells: list[str]) -> list[Any]:
    """Run cells of plain Python one after another, as a kernel would; return what they show.

    A kernel of its own imports everything anew, which takes longer than the cells: check_pages.py starts one.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, text in enumerate(cells, 1):
        body = ast.parse(text).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
    assert all(repr(value) for value in shown)
    return [value for value in shown if value is not None]


def test_a_notebook_goes_from_a_clip_and_two_experts_to_an_exported_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shown = run_cells(code_of(shortened(read_notebook(NOTEBOOK))))
    assert (tmp_path / "merged-clip" / "model.safetensors").is_file()
    assert shown[-1] < 1e-4  # transformers' own forward against ours
    gates = shown[-3]
    assert set(gates) == {"semantic", "depth"} and sum(gates.values()) == pytest.approx(1, abs=1e-4)


def test_it_is_short_and_kept_without_outputs() -> None:
    notebook = read_notebook(NOTEBOOK)
    lines = [line for text in code_of(notebook) for line in text.splitlines() if line.strip()]
    assert len(lines) <= 40
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
