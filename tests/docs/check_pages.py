"""Every block of every page at smoke scale, to its end: ``make check-pages``, minutes; test_pages.py only parses.

pytest does not collect this file unless it is named.
"""

from __future__ import annotations

from pathlib import Path

import nbclient
import pytest

from tests.docs.notebooks import NOTEBOOKS, read_notebook, shortened
from tests.docs.runner import PAGES, ROOT, Runner, write_surroundings


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_runs_to_its_end(page: Path, runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["visexpert"])
    monkeypatch.setenv("VISEXPERT_CACHE", str(runner.shared / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    write_surroundings(tmp_path)
    assert runner.page(page) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel_of_its_own(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    notebook = shortened(read_notebook(path))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert (tmp_path / "merged-clip" / "model.safetensors").is_file()
