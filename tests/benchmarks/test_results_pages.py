"""The committed pages: printed again from the committed rows by the target's own command, and small."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Page, Table, trial_table
from benchmarks.runs import Run
from visexpert.report import Column, ResultRow, read_rows

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PAGES = {
    "results_tove": "tove-tabletop",
    "results_merge": "merge",
    "results_movekd": "movekd-tabletop",
    "results_comparison": "comparison",
    "results_distill": "distill",
}


@pytest.mark.parametrize("module", PAGES)
def test_a_page_is_printed_again_from_its_rows(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RESULTS, tmp_path / "docs" / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, "--report_only"])
    importlib.import_module(f"benchmarks.{module}").main()
    for file in (f"{PAGES[module]}.md", f"{PAGES[module]}.json"):
        made, committed = tmp_path / "docs" / "results" / file, RESULTS / file
        assert made.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8"), file


def test_the_committed_rows_are_small_and_hold_a_row_per_variant_and_seed() -> None:
    files = [RESULTS / f"{name}.json" for name in PAGES.values()]
    assert sum(file.stat().st_size for file in files) <= 310_000
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) == len(read_rows(file)) + 2


def test_no_generated_report_lies_beside_the_pages() -> None:
    assert not [path.name for path in RESULTS.rglob("*") if path.name in ("report.md", "report.html", "results.csv")]


def test_a_table_of_trials_has_a_line_for_each_that_is_done(tmp_path: Path) -> None:
    trials = [(["a", "1e-3"], Run(tmp_path / "a", (), 0, "a")), (["b", "2e-3"], Run(tmp_path / "b", (), 0, "b"))]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.json").write_text('{"val/x": 0.25}', encoding="utf-8")
    (tmp_path / "a" / "done").touch()
    lines = trial_table(["kind", "rate"], trials, {"val/x": "x", "val/y": "y"})
    assert lines == ["| kind | rate | x | y |", "|---|---|---:|---:|", "| a | 1e-3 | 0.250 | – |"]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setattr(results, "OUT", tmp_path)
    (tmp_path / "page.intro.md").write_text("# Intro\n", encoding="utf-8")
    (tmp_path / "page.notes.md").write_text("Notes\n", encoding="utf-8")
    shown = [("", [Column("test/a", "a"), Column("test/b", "b")]), ("Cost:", [Column("steps", digits=0)])]
    tables = [Table("First", ["base", "other"], shown, "one"), Table("Second", ["base"], shown, "two", after="After\n")]
    return Page("page", tables, also=["test/c"])


ROW = ResultRow("one/other", 0, 400, 9, 0.5, 70.0, {"test/a": 0.123456789, "test/c": 1.0, "test/d": 2.0})


def test_rows_keep_what_tables_show_and_take_the_place_of_older_ones(page: Page, tmp_path: Path) -> None:
    base = replace(ROW, variant="one/base")
    page.write([ROW, base, replace(ROW, variant="one/renamed")])
    page.write([replace(ROW, scores={"test/a": 0.5}), replace(ROW, seed=1)])
    rows = {(row.variant, row.seed): row.scores for row in page.committed()}
    assert rows == {
        ("one/base", 0): {"test/a": 0.1234568, "test/c": 1.0},
        ("one/other", 0): {"test/a": 0.5},
        ("one/other", 1): {"test/a": 0.1234568, "test/c": 1.0},
    }
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## First" in text and "## Second" not in text and "After" not in text  # it has no rows
    assert "| base | 1 | 0.123 |" in text and "| other | 2 | 0.312 ± 0.266 |" in text
    assert text.index("| base") < text.index("| other") and " b |" not in text


def test_a_page_names_another_machine_only_where_something_was_measured_on_it(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "describe_machine", lambda: "the first")
    page.write([ROW])
    monkeypatch.setattr(results, "describe_machine", lambda: "the second")
    page.write([])
    assert "Machine: the first\n" in (tmp_path / "page.md").read_text(encoding="utf-8")
    page.write([ROW], measured=False)
    assert "Machine: the first\n" in (tmp_path / "page.md").read_text(encoding="utf-8")
    page.write([ROW])
    assert "Machine: the second\n" in (tmp_path / "page.md").read_text(encoding="utf-8")
