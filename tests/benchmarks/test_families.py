"""The script behind docs/families.md: its families are the page's, and each verdict finds its place there."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.families import (
    OUT,
    Family,
    Row,
    Tried,
    all_families,
    page,
    titles_on,
    tried_before,
    try_all,
    try_family,
)
from visexpert.commands.trial import Request

ROOT = Path(__file__).parents[2]


def named(title: str) -> Family:
    (found,) = [family for family in all_families() if family.title == title]
    return found


def test_the_page_has_the_families_of_the_script() -> None:
    text = (ROOT / OUT).read_text(encoding="utf-8")
    on_page = titles_on(text)
    families = all_families()
    assert on_page["encoders"] == {family.title for family in families if "expert" in family.roles}
    if f"transformers {version('transformers')}," in text:  # another release has other families
        assert on_page["languages"] == {family.title for family in families if "language" in family.roles}


def test_an_encoder_and_a_language_model_are_tried_as_the_command_does() -> None:
    expert, clip = try_family(named("CLIP (`clip`)")).rows
    assert (expert.name, expert.verdict, clip.verdict) == ("TransformersExpert", "works", "works")
    assert expert.equal.endswith("tokens 1 to 16 of 17") and expert.difference is not None and expert.difference < 1e-5
    (language,) = try_family(named("qwen3")).rows
    assert (language.name, language.verdict) == ("PrefixLM", "works")
    assert language.difference is not None and language.difference < 1e-5


def test_a_recipe_that_fails_is_no_fault_of_the_package(tmp_path: Path) -> None:
    def broken(_: Path) -> tuple[Request, str]:
        raise ValueError("no such size")

    def unknown(folder: Path) -> tuple[Request, str]:
        return Request(str(folder)), ""

    (row,) = try_family(Family("mine", "timm", ("expert",), broken)).rows
    assert (row.verdict, row.message) == ("not reached", "ValueError: no such size")
    families = [Family("empty", "transformers", ("expert",), unknown), Family("mine", "timm", ("expert",), broken)]
    found = try_all(families, tmp_path / "kept.jsonl")
    assert found[0].rows[0].verdict == "refused" and "FOLDER" in found[0].rows[0].message
    assert list(tried_before(tmp_path / "kept.jsonl").values()) == found
    with (tmp_path / "kept.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"title": "cut sh')
    assert try_all([Family("mine", "timm", ("expert",), unknown)], tmp_path / "kept.jsonl") == found[1:]  # not again


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("expert", "X", "works", equal="timm: norm", difference=2e-7, tokens="4"), "| X | 4 | norm | 2e-07 |"),
        (Row("expert", "X", "refused", "X: it is too odd; take another"), "| refused |  | it is too odd |"),
        (Row("language", "P", "works", difference=0.0), "| P | 0 |"),
        (Row("language", "P", "error", "KeyError: 'a|b'"), r"| error | KeyError: 'a\|b' |"),
        (Row("language", "P", "differs", "logits from L: 2; more"), "| differs | logits from L: 2 |"),
    ],
)
def test_each_verdict_has_its_place(row: Row, cells: str) -> None:
    text = page([Tried("fam", "timm", (row,))])
    (line,) = [line for line in text.splitlines() if line.startswith(("| fam |", "| `fam` |"))]
    assert cells in line
    assert titles_on(text)["languages" if row.role == "language" else "encoders"] == {"fam"}
