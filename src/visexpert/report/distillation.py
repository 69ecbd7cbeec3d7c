"""Distillation over training: weights, their entropy, variance across images, distance to each teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from visexpert.names import STUDENT, WEIGHED
from visexpert.report.curves import moving_mean, read_metrics
from visexpert.report.palette import GRAY, INK, Floats, NothingToDrawError, canvas, colors, save, styled

Curves = Mapping[str, tuple[Floats, Floats]]

PANELS = {
    "train/weight/": "Mean weight of each teacher",
    "train/entropy/": "Entropy of weights",
    "train/peak/": "Heaviest token, times the mean",
    "train/variance/": "Variance across images",
    "val/kd/": "Distance to each teacher (validation)",
}
"""Beginnings of logged names, and the title of the panel that shows what they begin."""

ENTROPIES = dict(zip(WEIGHED, ("#8C510A", GRAY), strict=True))
"""Colors of the entropies of weights."""

UNITS = {
    "train/weight/": "share",
    "train/entropy/": "share of the greatest",
    "train/peak/": "1 = all tokens alike",
    "train/variance/": "times its start",
    "val/kd/": "mean squared error",
}


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
        styled(axes, title=PANELS[start], xlabel="step", ylabel=UNITS[start])
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
