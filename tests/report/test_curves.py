"""Curves: reading ``metrics.csv`` as Lightning writes it, and what is drawn from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from visexpert.errors import DataError
from visexpert.report import learning_curves, loss_curves, read_metrics
from visexpert.report.curves import moving_mean
from visexpert.report.palette import OKABE_ITO

CSV = """epoch,step,train/loss,train/images_per_s,val/loss
0,0,4.0,,
0,1,2.0,100.0,
0,1,,,3.0
0,2,1.0,,
0,1,2.5,,
"""


def _write(folder: Path, text: str = CSV) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text, encoding="utf-8")
    return path


def _has(path: Path, color: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    return bool((np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.012).sum() > 50)


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


def test_themoving_mean_is_that_of_the_neighbours() -> None:
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
