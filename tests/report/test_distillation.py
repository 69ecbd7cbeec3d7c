"""Curves of a distillation, checked by the pixels that are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from visexpert.errors import DataError
from visexpert.report.distillation import _of, _palette, distillation_curves
from visexpert.report.palette import INK, OKABE_ITO, Floats

CSV = """step,train/loss,train/weight/clip,train/weight/edges,train/variance/student,train/variance/edges,val/kd/edges
0,1,0.8,0.2,4,nan,
1,1,0.8,0.2,4,8,
2,1,0.8,0.2,4,8,0.5
3,1,0.8,0.2,4,8,0.5
"""


def _write(folder: Path, text: str = CSV) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text, encoding="utf-8")
    return path


def _rows(pixels: Floats, color: str) -> NDArray[np.int_]:
    """Rows in which a line of a color runs."""
    return np.nonzero((np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.012).sum(axis=1) > 200)[0]


def test_each_kind_has_a_panel_and_each_teacher_a_color(tmp_path: Path) -> None:
    path = distillation_curves(_write(tmp_path), tmp_path / "figures" / "distillation.png")
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    assert pixels.shape[:2] == (round(3.3 * 150), round(12.6 * 150))  # three panels in a row
    weights, variances, distances = np.array_split(pixels[: int(pixels.shape[0] * 0.85)], 3, axis=1)
    clip, edges = OKABE_ITO[:2]
    heights = [_rows(weights, color).mean() for color in (clip, edges)]
    assert heights[0] < heights[1]  # .8 is above .2
    assert len(_rows(variances, INK)) and not len(_rows(variances, clip))
    assert len(_rows(distances, edges)) and not len(_rows(distances, clip))


def test_variances_start_at_one_whatever_they_are(tmp_path: Path) -> None:
    path = distillation_curves(_write(tmp_path), tmp_path / "distillation.png")
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    middle = np.array_split(pixels[: int(pixels.shape[0] * 0.85)], 3, axis=1)[1]
    student, edges = _rows(middle, INK), _rows(middle, OKABE_ITO[1])
    assert student.mean() == pytest.approx(edges.mean(), abs=3)  # 4 and 8 do not change: one line over the other


def test_values_that_are_not_finite_are_left_out() -> None:
    steps = np.arange(3.0)
    logged = {"train/variance/a": (steps, np.array([np.nan, 2.0, np.inf])), "train/variance/b": (steps, steps * np.nan)}
    found = _of(logged, "train/variance/")
    assert list(found) == ["a"] and found["a"][0].tolist() == [1] and found["a"][1].tolist() == [2.0]


def test_what_has_weights_is_no_teacher() -> None:
    one = (np.zeros(1), np.ones(1))
    panels = {"train/entropy/": {"teachers": one, "tokens": one}, "train/variance/": {"student": one, "edges": one}}
    palette = _palette(panels)
    assert list(palette) == ["edges", "student", "teachers", "tokens"] and palette["edges"] == OKABE_ITO[0]
    assert len(set(palette.values())) == 4


def test_a_run_without_distillation_has_no_such_figure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no distillation to draw: no name begins with one of"):
        distillation_curves(_write(tmp_path, "step,train/loss\n0,1\n"), tmp_path / "distillation.png")
