"""The front, the contributions and their tables: by pixels and by cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from visexpert.methods.tove.subset_search import Contribution, SubsetScore
from visexpert.report.palette import GRAY, OKABE_ITO, Floats
from visexpert.report.pareto import (
    FRONT,
    KEPT,
    contribution_figure,
    contribution_table,
    pareto_figure,
    subset_label,
    subset_table,
)

EXPERTS = ("depth", "edges", "normals")
SCORES = [
    SubsetScore((), 0.8, 0.5, 2.0, 1.0),
    SubsetScore(("depth",), 0.5, 0.7, 3.0, 4.0),
    SubsetScore(("edges",), 0.9, 0.4, 4.0, 1.5),
    SubsetScore(EXPERTS, 0.25, 0.75, 7.0, 8.0),
]
ON_FRONT = [(), ("depth",), EXPERTS]
WORTHS = [
    Contribution("depth", 0.3, 0.1, 1.0, 2.0),
    Contribution("edges", -0.02, -0.01, 2.0, 0.5),
    Contribution("normals", 0.1, 0.02, 0.5, 0.25),
]


def _pixels(path: Path) -> Floats:
    return np.asarray(Image.open(path).convert("RGB")) / 255.0


def _where(pixels: Floats, color: str) -> tuple[NDArray[Any], NDArray[Any]]:
    rows, columns = np.nonzero(np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.012)
    return rows, columns


def _figure(out: Path, *, measure: str = "ms", budget: float | None = None) -> Floats:
    path = pareto_figure(
        SCORES,
        out,
        front=ON_FRONT,
        kept=("depth",),
        experts=EXPERTS,
        measure=measure,
        budget=budget,
        score_name="vqa/accuracy",
    )
    return _pixels(path)


def _plotted(pixels: Floats, color: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where a color is in the plot: up to the first gap, behind which the legend lies."""
    rows, columns = _where(pixels, color)
    there = np.unique(columns)
    end = np.append(np.nonzero(np.diff(there) > 10)[0], len(there) - 1)[0]
    return rows[columns <= there[end]], columns[columns <= there[end]]


def _center(pixels: Floats) -> tuple[float, float]:
    """Share of the front's width and height at which the ring lies."""
    (rows, columns), (ring_rows, ring_columns) = _plotted(pixels, FRONT), _plotted(pixels, KEPT)
    at_column = (ring_columns.min() + ring_columns.max()) / 2
    at_row = (ring_rows.min() + ring_rows.max()) / 2
    return (at_column - columns.min()) / np.ptp(columns), (rows.max() - at_row) / np.ptp(rows)


def test_the_ring_lies_at_the_cost_and_score_of_what_is_kept(tmp_path: Path) -> None:
    """The front runs from 2 to 7 ms and from 0.5 to 0.75; depth has 3 ms and 0.7 (points are some pixels wide)."""
    across, up = _center(_figure(tmp_path / "pareto.png"))
    assert abs(across - 1 / 5) < 0.03
    assert abs(up - 4 / 5) < 0.03


def test_the_cost_may_be_gflop(tmp_path: Path) -> None:
    across, _ = _center(_figure(tmp_path / "pareto.png", measure="gflop"))
    assert abs(across - 3 / 7) < 0.03


def test_the_front_is_a_staircase(tmp_path: Path) -> None:
    """No more is had for a cost between two points than the cheaper one gives: a level line at 0.7 from 3 to 7 ms."""
    pixels = _figure(tmp_path / "pareto.png")
    rows, columns = _plotted(pixels, FRONT)
    row, counts = np.unique(rows, return_counts=True)
    level = row[counts.argmax()]
    assert counts.max() > 0.7 * np.ptp(columns)
    assert abs((rows.max() - level) / np.ptp(rows) - 4 / 5) < 0.03


def test_the_budget_is_an_upright_line_at_its_cost(tmp_path: Path) -> None:
    pixels = _figure(tmp_path / "pareto.png", budget=4.5)
    columns, counts = np.unique(_where(pixels, GRAY)[1], return_counts=True)
    front = _plotted(pixels, FRONT)[1]
    assert counts.max() > 0.4 * pixels.shape[0]  # dashes: no letter is as high
    assert abs((columns[counts.argmax()] - front.min()) / np.ptp(front) - 2.5 / 5) < 0.03


def test_bars_of_worth_and_gate_are_as_long_as_they_say(tmp_path: Path) -> None:
    path = contribution_figure(WORTHS, {"depth": 0.2, "edges": 0.5, "normals": 0.3}, tmp_path / "contribution.png")
    pixels = _pixels(path)
    for color, longest, ratio in ((FRONT, 0, 0.3 / 0.1), (OKABE_ITO[1], 1, 0.5 / 0.3)):
        rows, columns = _where(pixels, color)
        third = np.ptp(rows) / 3
        lengths = [np.ptp(columns[(rows - rows.min()) // third == place]) for place in range(3)]
        assert np.argmax(lengths) == longest
        assert abs(lengths[longest] / lengths[2] - ratio) < 0.05 * ratio


def test_a_model_without_a_gate_has_no_gate_bars(tmp_path: Path) -> None:
    pixels = _pixels(contribution_figure(WORTHS, {}, tmp_path / "contribution.png"))
    assert not len(_where(pixels, OKABE_ITO[1])[0])


def test_subsets_are_named_by_the_shorter_of_what_they_have_and_lack() -> None:
    assert subset_label((), EXPERTS) == "encoder alone"
    assert subset_label(("edges",), EXPERTS) == "edges"
    assert subset_label(("depth", "normals"), EXPERTS) == "all but edges"
    assert subset_label(EXPERTS, EXPERTS) == "all"
    assert subset_label(("depth", "edges"), (*EXPERTS, "semantic")) == "depth, edges"


def test_the_table_has_a_row_for_each_subset() -> None:
    lines = subset_table(SCORES, front=ON_FRONT, kept=("depth",), experts=EXPERTS).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == "| encoder alone | 0.8000 | 0.5000 | 2.000 | 1.00 | 1.0000 | 1.00 | yes |  |"
    assert lines[3] == "| depth | 0.5000 | 0.7000 | 3.000 | 1.50 | 4.0000 | 4.00 | yes | **kept** |"
    assert lines[4] == "| edges | 0.9000 | 0.4000 | 4.000 | 2.00 | 1.5000 | 1.50 |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_of_experts_says_what_their_removal_does() -> None:
    lines = contribution_table(WORTHS, {"depth": 0.25, "edges": 0.75}, kept=("depth",)).splitlines()
    assert lines[2] == "| depth | +0.3000 | -0.1000 | 0.250 | 1.000 | 2.0000 | kept |"
    assert lines[3] == "| edges | -0.0200 | +0.0100 | 0.750 | 2.000 | 0.5000 | detached |"
    assert lines[4] == "| normals | +0.1000 | -0.0200 | – | 0.500 | 0.2500 | detached |"


def test_milliseconds_that_were_measured_unsteadily_are_marked(tmp_path: Path) -> None:
    doubtful = [replace(SCORES[0], unsteadiness=0.5), replace(SCORES[1], unsteadiness=0.1), *SCORES[2:]]
    table = subset_table(doubtful, front=ON_FRONT, kept=("depth",), experts=EXPERTS)
    assert "~2.000" in table and table.count("~") == 1
    assert "~1.000" in contribution_table([replace(WORTHS[0], unsteadiness=0.3)], {}, kept=("depth",))
    sure, unsure = (
        pareto_figure(scores, tmp_path / f"{number}.png", front=ON_FRONT, kept=("depth",), experts=EXPERTS)
        for number, scores in enumerate((SCORES, doubtful))
    )
    assert sure.read_bytes() != unsure.read_bytes()
    work = [
        pareto_figure(
            scores, tmp_path / "gflop.png", front=ON_FRONT, kept=(), experts=EXPERTS, measure="gflop"
        ).read_bytes()
        for scores in (SCORES, doubtful)
    ]
    assert work[0] == work[1]  # work is counted, not timed
