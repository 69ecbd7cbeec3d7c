"""Curves of a run or of several: pure functions from ``metrics.csv`` or arrays to a PNG file."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visexpert.errors import DataError
from visexpert.report.palette import Floats, NothingToDrawError, canvas, colors, save, styled


def loss_curves(metrics_csv: Path, out: Path, *, keys: Sequence[str] = ("loss", "nll")) -> Path:
    """Draw every logged loss over the steps: training as a thin line with its moving mean, validation as points.

    Args:
        metrics_csv: A run's ``metrics.csv``.
        out: The PNG to write.
        keys: What the last part of a logged name must contain to be drawn.

    Raises:
        DataError: The file is missing, or no such name was logged.
    """
    logged = read_metrics(metrics_csv)
    panels: dict[str, dict[str, tuple[Floats, Floats]]] = defaultdict(dict)
    for name, curve in logged.items():
        stage, _, rest = name.partition("/")
        if stage in {"train", "val"} and any(key in rest.rpartition("/")[2] for key in keys):
            panels[rest.removesuffix("_step").removesuffix("_epoch")].setdefault(stage, curve)
    if not panels:
        raise NothingToDrawError(
            f"{metrics_csv} has no loss to draw: none of {sorted(logged)} contains one of {list(keys)}."
        )
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = canvas(4.2 * columns, 2.9 * rows + 0.3)
    train_color, val_color = colors(2)
    for place, (name, curves) in enumerate(
        sorted(panels.items(), key=lambda item: (item[0] != "loss", item[0])), start=1
    ):
        axes = styled(figure.add_subplot(rows, columns, place), title=name, xlabel="step")
        if "train" in curves:
            steps, values = curves["train"]
            axes.plot(steps, values, color=train_color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, moving_mean(values), color=train_color, linewidth=1.8, label="training")
        if "val" in curves:
            axes.plot(*curves["val"], color=val_color, marker="o", markersize=4, linewidth=1.4, label="validation")
        axes.legend(frameon=False, fontsize=8)
    return save(figure, out)


def learning_curves(
    runs: Mapping[str, Sequence[tuple[Floats, Floats]]], out: Path, *, ylabel: str, title: str = "Learning curves"
) -> Path:
    """Compare variants over training: the mean of each one's seeds, with a band of one standard deviation.

    Args:
        runs: For each variant its seeds' curves, each (steps, values); seeds are interpolated onto their common steps.
        out: The PNG to write.
        ylabel: What the values are, with their unit.
        title: Headline.
    """
    figure = canvas(6.0, 3.8)
    axes = styled(figure.add_subplot(), title=title, xlabel="training step", ylabel=ylabel)
    for (variant, curves), color in zip(runs.items(), colors(len(runs)), strict=True):
        first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
        at = np.unique(np.concatenate([steps for steps, _ in curves]))
        at = at[(at >= first) & (at <= last)]
        values = np.stack([np.interp(at, steps, scores) for steps, scores in curves])
        mean = values.mean(axis=0)
        axes.plot(at, mean, color=color, linewidth=1.8, label=f"{variant} (n={len(curves)})")
        if len(curves) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(at, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, out)


def read_metrics(metrics_csv: Path) -> dict[str, tuple[Floats, Floats]]:
    """Read a run's ``metrics.csv`` into curves by name, each (steps, values) in order of steps.

    Where a continued run logged a step again, the later row counts.

    Raises:
        DataError: The file is missing or has no ``step`` column.
    """
    try:
        with metrics_csv.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"Cannot read {metrics_csv} ({error.strerror}): name the folder of a run.") from error
    if not rows or "step" not in rows[0]:
        raise NothingToDrawError(f"{metrics_csv} has no rows with a 'step' column: it is not the metrics.csv of a run.")
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if value and name not in {"step", "epoch"}:
                curves[name][int(float(row["step"]))] = float(value)
    return {name: (np.array(sorted(c)), np.array([c[step] for step in sorted(c)])) for name, c in curves.items()}


def moving_mean(values: Floats, share: float = 0.05) -> Floats:
    """Centered mean over a twentieth of the curve; fewer values at its ends."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    means: Floats = (sums[high] - sums[low]) / (high - low)
    return means
