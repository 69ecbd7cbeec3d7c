"""Curves: reading ``metrics.csv`` as Lightning writes it, and what is drawn from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from visexpert.errors import DataError
from visexpert.report import learning_curves, loss_curves, read_metrics
from visexpert.report.curves import _of, _palette, distillation_curves, in_words, moving_mean
from visexpert.report.palette import INK, OKABE_ITO, Floats, colors

CSV = """epoch,step,train/loss,train/images_per_s,val/loss
0,0,4.0,,
0,1,2.0,100.0,
0,1,,,3.0
0,2,1.0,,
0,1,2.5,,
"""

DISTILLED = """\
step,train/loss,train/weight/clip,train/weight/edges,train/variance/student,train/variance/edges,val/kd/edges
0,1,0.8,0.2,4,nan,
1,1,0.8,0.2,4,8,
2,1,0.8,0.2,4,8,0.5
3,1,0.8,0.2,4,8,0.5
"""


def _write(folder: Path, text: str = CSV) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text, encoding="utf-8")
    return path


def _has(path: Path, color: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    return bool((np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.012).sum() > 50)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train/text_loss", "training text loss, nats per token"),
        ("val/nll/nll", "validation nll nll, nats per token"),
        ("val/vqa/accuracy", "validation vqa accuracy"),
        ("kd/depth", "kd depth"),
        ("loss", "loss"),
    ],
)
def test_axes_are_labeled_in_words(key: str, words: str) -> None:
    assert in_words(key) == words


def test_blank_cells_are_skipped_and_the_later_row_of_a_step_counts(tmp_path: Path) -> None:
    curves = read_metrics(_write(tmp_path))
    assert {name: (steps.tolist(), values.tolist()) for name, (steps, values) in curves.items()} == {
        "train/loss": ([0, 1, 2], [4.0, 2.5, 1.0]),
        "train/images_per_s": ([1], [100.0]),
        "val/loss": ([1], [3.0]),
    }


def test_training_and_validation_are_drawn_in_one_panel_for_each_loss(tmp_path: Path) -> None:
    path = loss_curves(_write(tmp_path), tmp_path / "loss.png")
    with Image.open(path) as image:
        assert image.size == (round(4.2 * 150), round(3.2 * 150))  # one panel: images_per_s is no loss
    assert _has(path, OKABE_ITO[0])
    assert _has(path, OKABE_ITO[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no rows with a 'step' column"), ("epoch,step,train/lr\n0,0,0.1\n", r"none of \['train/lr'\]")],
)
def test_a_file_without_losses_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loss_curves(_write(tmp_path, text), tmp_path / "loss.png")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.csv"):
        read_metrics(tmp_path / "absent.csv")


def test_the_moving_mean_is_that_of_the_neighbors() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0])
    assert moving_mean(values) == pytest.approx([1.5, 7 / 3, 14 / 3, 6.0])


def test_the_band_of_two_seeds_lies_around_their_mean(tmp_path: Path) -> None:
    """Two flat seeds at 0 and 2 on different steps: the mean line is at 1, the middle of the axes' band."""
    runs = {"ToVE": [(np.array([0, 10]), np.array([0.0, 0.0])), (np.array([0, 5, 10]), np.array([2.0, 2.0, 2.0]))]}
    path = learning_curves(runs, tmp_path / "curves.png", ylabel="NLL")
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    line = np.abs(pixels - np.array(to_rgb(OKABE_ITO[0]))).max(axis=2) < 0.012
    band = np.abs(pixels - (0.2 * np.array(to_rgb(OKABE_ITO[0])) + 0.8)).max(axis=2) < 0.012
    rows_of_line = np.nonzero(line.sum(axis=1) > 300)[0]
    rows_of_band = np.nonzero(band.sum(axis=1) > 300)[0]
    assert rows_of_line.mean() == pytest.approx((rows_of_band[0] + rows_of_band[-1]) / 2, abs=2)


def _rows(pixels: Floats, color: str) -> NDArray[np.int_]:
    """Rows in which a line of a color runs."""
    return np.nonzero((np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.012).sum(axis=1) > 200)[0]


def test_each_kind_has_a_panel_and_each_teacher_a_color(tmp_path: Path) -> None:
    path = distillation_curves(_write(tmp_path, DISTILLED), tmp_path / "figures" / "distillation.png")
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    assert pixels.shape[:2] == (round(3.3 * 150), round(12.6 * 150))  # three panels in a row
    weights, variances, distances = np.array_split(pixels[: int(pixels.shape[0] * 0.85)], 3, axis=1)
    clip, edges = OKABE_ITO[:2]
    heights = [_rows(weights, color).mean() for color in (clip, edges)]
    assert heights[0] < heights[1]  # .8 is above .2
    assert len(_rows(variances, INK)) and not len(_rows(variances, clip))
    assert len(_rows(distances, edges)) and not len(_rows(distances, clip))


def test_variances_start_at_one_whatever_they_are(tmp_path: Path) -> None:
    path = distillation_curves(_write(tmp_path, DISTILLED), tmp_path / "distillation.png")
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    middle = np.array_split(pixels[: int(pixels.shape[0] * 0.85)], 3, axis=1)[1]
    student, edges = _rows(middle, INK), _rows(middle, OKABE_ITO[1])
    assert student.mean() == pytest.approx(edges.mean(), abs=3)  # 4 and 8 do not change: one line over the other


@pytest.mark.filterwarnings("error")
def test_variances_that_stay_at_zero_are_drawn(tmp_path: Path) -> None:
    out = distillation_curves(
        _write(tmp_path, "step,train/variance/a,train/variance/b\n1,0,0\n2,0,0\n"), tmp_path / "a.png"
    )
    assert _has(out, colors(2)[0]) and _has(out, colors(2)[1])


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
