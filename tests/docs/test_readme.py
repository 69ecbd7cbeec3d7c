"""The README: short, its table as the committed rows give it, its links without a gap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme_table import PLACE, cell, main, table
from tests.docs.runner import DOCS, ROOT

README = ROOT / "README.md"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
WORDS = 1100


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= WORDS


def test_its_links_lead_to_files_and_to_every_page() -> None:
    told = set(LINK.findall(README.read_text(encoding="utf-8")))
    assert [name for name in told if not (ROOT / name).is_file()] == []
    pages = {f"docs/{path.name}" for path in DOCS.glob("*.md")} - {"docs/index.md"}
    assert pages - told == set()


def test_its_table_is_that_of_the_committed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8")
    found = PLACE.search(text)
    assert found is not None and found[2].strip() == table(DOCS / "results").strip()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results").symlink_to(DOCS / "results")
    (tmp_path / "README.md").write_text(text.replace(found[2], "old\n"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["readme_table", "--write"])
    main()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_an_interval_is_students_t() -> None:
    """Of 1, 2, 3: sd 1, t of two degrees of freedom 4.3027, so 4.3027 / sqrt(3) = 2.484."""
    assert cell([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert cell([0.5, 0.5], 1) == "0.5 ± 0.0"
