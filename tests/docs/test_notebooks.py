"""The notebooks run from top to bottom, offline, in a folder of their own."""

from __future__ import annotations

import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "clip-and-two-experts.ipynb"
STEPS = re.compile(r"STEPS = \d+")


def read_notebook() -> Any:
    return nbformat.reads(NOTEBOOK.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def code_of(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_a_notebook_goes_from_a_clip_and_two_experts_to_an_exported_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    notebook = read_notebook()
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert STEPS.search(first.source)
    first.source = STEPS.sub("STEPS = 2", first.source)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output["data"]["text/plain"] for output in outputs if output["output_type"] == "execute_result"]
    assert (tmp_path / "merged-clip" / "model.safetensors").is_file()
    assert float(shown[-1]) < 1e-4  # transformers' own forward against ours
    gates = literal_eval(shown[-3])
    assert set(gates) == {"semantic", "depth"} and sum(gates.values()) == pytest.approx(1, abs=1e-4)


def test_it_is_short_and_kept_without_outputs() -> None:
    notebook = read_notebook()
    lines = [line for text in code_of(notebook) for line in text.splitlines() if line.strip()]
    assert len(lines) <= 40
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
