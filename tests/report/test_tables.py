"""Rows of results and their table, against figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from visexpert.errors import ConfigError, DataError
from visexpert.report import Column, ResultRow, markdown_table, read_rows, write_rows


def _row(variant: str, seed: int, **scores: float) -> ResultRow:
    return ResultRow(variant, seed, steps=3000, parameters=402_000, gflop=0.25, images_per_s=310.0, scores=scores)


ROWS = [
    _row("CLIP only", 0, nll=0.8, vqa=0.51),
    _row("ToVE", 0, nll=0.30, vqa=0.64),
    _row("ToVE", 1, nll=0.34, vqa=0.66),
    _row("ToVE", 2, nll=0.32, vqa=0.65),
    _row("text only", 0, nll=1.5),
]


def test_cells_are_means_and_sample_deviations() -> None:
    columns = [
        Column("nll", "NLL", better="min"),
        Column("vqa", "VQA %", digits=1, scale=100, better="max"),
        Column("parameters", "M", digits=2, scale=1e-6),
    ]
    assert markdown_table(ROWS, columns) == (
        "| variant | seeds | NLL | VQA % | M |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| CLIP only | 1 | 0.800 | 51.0 | 0.40 |\n"
        "| ToVE | 3 | **0.320** ± 0.020 | **65.0** ± 1.0 | 0.40 |\n"
        "| text only | 1 | 1.500 | – | 0.40 |\n"
    )


def test_an_unknown_column_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"No row has 'cider'.*'gflop'.*'nll'.*'vqa'"):
        markdown_table(ROWS, [Column("cider")])


def test_rows_survive_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", ROWS)
    assert read_rows(tmp_path / "rows.json") == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(ROWS[0]).items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds a dict where a list"),
        ([3], "row 1: is a int"),
        ([_without("gflop")], r"row 1: missing keys \['gflop'\], unknown keys \[\]"),
        ([asdict(ROWS[0]), {**asdict(ROWS[1]), "note": "x"}], r"row 2: missing keys \[\], unknown keys \['note'\]"),
        ([{**asdict(ROWS[0]), "seed": "0"}], "'seed' is '0', and should be a whole number"),
        ([{**asdict(ROWS[0]), "steps": True}], "'steps' is True, and should be a whole number"),
        ([{**asdict(ROWS[0]), "gflop": None}], "'gflop' is None, and should be a number"),
        ([{**asdict(ROWS[0]), "scores": {"nll": None}}], "score 'nll' is None, and should be a finite number"),
        ([asdict(ROWS[0]), asdict(ROWS[0])], "two rows for variant 'CLIP only' with seed 0"),
    ],
)
def test_a_row_of_another_form_is_explained(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_broken_or_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no"):
        read_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text("[{", encoding="utf-8")
    with pytest.raises(DataError, match="not readable JSON"):
        read_rows(tmp_path / "rows.json")
