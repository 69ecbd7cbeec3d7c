"""Curves of a run or of several, losses and distillation: from ``metrics.csv`` or arrays to a PNG file."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from visexpert.errors import DataError
from visexpert.names import STUDENT, WEIGHED
from visexpert.report.palette import GRAY, INK, Floats, NothingToDrawError, canvas, colors, save, styled

Curves = Mapping[str, tuple[Floats, Floats]]

PANELS = {
    "train/weight/": "Mean weight of each teacher",
    "train/entropy/": "Entropy of weights",
    "train/peak/": "Heaviest token, times the mean",
    "train/variance/": "Variance across images",
    "val/kd/": "Distance to each teacher (validation)",
}
"""Prefixes of logged names, and the titles of their panels."""

ENTROPIES = dict(zip(WEIGHED, ("#8C510A", GRAY), strict=True))
"""Colors of the entropies of weights."""

UNITS = {
    "train/weight/": "mean weight (the teachers' sum is 1)",
    "train/entropy/": "entropy, share of the greatest (0 to 1)",
    "train/peak/": "greatest weight / mean weight",
    "train/variance/": "variance / its first value",
    "val/kd/": "mean squared error of the tokens",
}


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
        axes = styled(
            figure.add_subplot(rows, columns, place), title=name, xlabel="training step", ylabel=in_words(name)
        )
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


def in_words(key: str) -> str:
    """Return what a logged name measures, in words and with its unit where it has one."""
    split, _, rest = key.partition("/")
    part = {"train": "training ", "val": "validation "}.get(split)
    if part is None:
        part, rest = "", key
    unit = ", nats per token" if rest.rpartition("/")[2] in ("nll", "text_loss") else ""
    return f"{part}{rest.replace('/', ' ').replace('_', ' ')}{unit}"


def moving_mean(values: Floats, share: float = 0.05) -> Floats:
    """Centered mean over a twentieth of the curve; fewer values at its ends."""
    half = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    means: Floats = (sums[high] - sums[low]) / (high - low)
    return means


def distillation_curves(metrics_csv: Path, out: Path) -> Path:
    """Draw what a distillation watched over its steps, one panel for each kind that was logged.

    A teacher has one color in all panels. Variances are divided by their first value, on
    a logarithmic scale, beside the third of it at which a run raises an alarm.

    Args:
        metrics_csv: A run's ``metrics.csv``.
        out: The PNG to write.

    Raises:
        DataError: The file is missing, or nothing of this was logged.
    """
    logged = read_metrics(metrics_csv)
    panels = {start: curves for start in PANELS if (curves := _of(logged, start))}
    if not panels:
        raise NothingToDrawError(
            f"{metrics_csv} has no distillation to draw: no name begins with one of {list(PANELS)}."
        )
    palette = _palette(panels)
    columns = 3 if len(panels) in (3, 5, 6) else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = canvas(4.2 * columns, 2.9 * rows + 0.4)
    for place, (start, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        styled(axes, title=PANELS[start], xlabel="training step", ylabel=UNITS[start])
        _draw(axes, start, curves, palette)
    handles = [
        Line2D([], [], color=color, linewidth=2, label=f"weights of {name}" if name in WEIGHED else name)
        for name, color in palette.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * columns), frameon=False, fontsize=9
    )
    return save(figure, out)


def _palette(panels: Mapping[str, Curves]) -> dict[str, str]:
    """A color for each teacher, the student black; ``teachers`` and ``tokens`` are no teachers and come last."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    teachers = [name for name in names if name not in (STUDENT, *WEIGHED)]
    palette = dict(zip(teachers, colors(len(teachers)), strict=True))
    return palette | {name: color for name, color in {STUDENT: INK, **ENTROPIES}.items() if name in names}


def _of(logged: Curves, start: str) -> dict[str, tuple[Floats, Floats]]:
    """Curves whose name begins so, by the rest of it; steps at which they were not finite are left out."""
    found = {}
    for name, (steps, values) in logged.items():
        sound = np.isfinite(values)
        if name.startswith(start) and sound.any():
            found[name.removeprefix(start)] = (steps[sound], values[sound])
    return found


def _draw(axes: Axes, start: str, curves: Curves, palette: Mapping[str, str]) -> None:
    for place, (name, (steps, values)) in enumerate(curves.items()):
        color = palette[name]
        if start == "val/kd/":
            axes.plot(steps, values, color=color, marker="o", markersize=4, linewidth=1.4)
            continue
        if start == "train/variance/":
            values = values / max(float(values[0]), 1e-12)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        # Earlier lines are thicker, so that one under another still shows.
        thick = 1.5 + 1.5 * (len(curves) - 1 - place) / max(1, len(curves) - 1)
        axes.plot(steps, moving_mean(values), color=color, linewidth=thick)
    if start == "train/variance/":
        if any((values > 0).any() for _, values in curves.values()):  # a logarithmic axis needs something above 0
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        _mark(axes, 1 / 3, "alarm", above=True)
    elif start == "train/entropy/":
        axes.set_ylim(-0.03, 1.03)
        _mark(axes, 1, "uniform", above=False)
    elif start in ("train/weight/", "val/kd/"):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _mark(axes: Axes, level: float, words: str, *, above: bool) -> None:
    """A dashed line with its meaning at its right end."""
    axes.axhline(level, color=GRAY, linewidth=0.9, linestyle="--")
    axes.annotate(
        words,
        (1.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2 if above else -3),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        fontsize=8,
        color=GRAY,
    )
