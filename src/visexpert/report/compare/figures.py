"""The figures of a comparison: score against cost, learning curves, skills."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from visexpert.errors import DataError
from visexpert.report.compare.comparison import Comparison
from visexpert.report.compare.scores import MS, Score, unsteady
from visexpert.report.compare.variants import Variant
from visexpert.report.curves import in_words, learning_curves, read_metrics
from visexpert.report.palette import GRAY, INK, Floats, canvas, save, styled
from visexpert.report.pareto import FRONT, numbered
from visexpert.timing import TOLD

COST_AXES = {
    "gflop": ("cost/gflop_vision", "work of the vision side, GFLOP per image"),
    "ms": (MS, "time of the vision side, ms per image (on the machine of the run)"),
}
PER_FIGURE = 6
"""Most curves in one figure."""

LEAST_POINTS = 3
"""Fewest points of a curve worth drawing."""

_BEHIND = "#A3A3A3"


def pareto(comparison: Comparison, out: Path, *, measure: str = "gflop") -> Path | None:
    """Draw every variant's score with its interval against its cost at inference; the front is a staircase.

    Variants whose milliseconds were measured unsteadily are hollow and left out of the front.

    Args:
        comparison: What to draw.
        out: The PNG to write.
        measure: ``gflop`` or ``ms``.

    Returns:
        The PNG; None where no variant has both numbers.
    """
    key, label = COST_AXES[measure]
    score, places = comparison.primary, _places(comparison, key)
    if not places:
        return None
    marked = {variant.name for variant in comparison.variants if key == MS and unsteady(variant)}
    steady = {name: (cost, value) for name, (cost, value, _) in places.items() if name not in marked}
    ahead = front(steady, better=score.better)
    figure = canvas(8.6, max(4.0, 1.2 + 0.21 * len(places)))
    axes = styled(
        figure.add_subplot(), title=f"{score.title} against cost at inference", xlabel=label, ylabel=_axis(score)
    )
    numbers = {variant.name: number for number, variant in enumerate(comparison.variants, start=1)}
    if marked & places.keys():
        axes.set_xlabel(f"{label}\n{TOLD}", fontsize=7)
    handles = {}
    for name in sorted(places, key=lambda each: each in ahead):  # the front on top
        cost, value, half = places[name]
        color, level = (FRONT, 4) if name in ahead else (_BEHIND, 3)
        axes.errorbar(cost, value, yerr=half, color=color, elinewidth=1, capsize=2, zorder=2)
        handles[name] = numbered(
            axes, numbers[name], (cost, value), _short(name), color=color, level=level, steady=name not in marked
        )
    if ahead:
        line = zip(*(steady[name] for name in ahead), strict=True)
        axes.plot(*line, color=FRONT, linewidth=1.3, drawstyle="steps-post", zorder=1)
    costs = [cost for cost, _, _ in places.values()]
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        axes.set_xscale("log")
    _frame(axes, [value for _, value, _ in places.values()])
    if score.better < 0:
        axes.invert_yaxis()
    figure.legend(handles=[handles[name] for name in places], loc="outside right upper", frameon=False, fontsize=8)
    return save(figure, out)


def front(places: Mapping[str, tuple[float, float]], *, better: int) -> list[str]:
    """Names that no other beats in both, by rising cost.

    Args:
        places: Cost and score by name.
        better: 1 where a greater score is better, -1 where a smaller one is.
    """
    ranked = sorted(places, key=lambda name: (places[name][0], -better * places[name][1]))
    kept: list[str] = []
    for name in ranked:
        if not kept or better * places[name][1] > better * places[kept[-1]][1]:
            kept.append(name)
    return kept


def curves(comparison: Comparison, folder: Path) -> tuple[list[Path], str]:
    """Draw learning curves, at most six variants in a figure, the baseline in each.

    The figure drawn is the first of these that most variants have at three steps or more: the primary score on
    validation images, their NLL, the text's training loss, the training loss.

    Returns:
        The PNGs, and a sentence on what is drawn and whose curve is missing.
    """
    logged = {variant.name: _logged(variant) for variant in comparison.variants}
    wanted = [f"val/{comparison.primary.key.partition('/')[2]}", "val/nll/nll", "train/text_loss", "train/loss"]
    drawable = {key: [name for name, runs in logged.items() if _has(runs, key)] for key in wanted}
    key = max(wanted, key=lambda each: (len(drawable[each]) > len(logged) / 2, len(drawable[each])))
    names = drawable[key]
    if not names:
        return [], f"No run has logged any of {', '.join(wanted)} at three steps or more."
    first = [comparison.baseline] if comparison.baseline in names else []
    others = [name for name in names if name not in first]
    room = PER_FIGURE - len(first)
    made = []
    for number, start in enumerate(range(0, max(1, len(others)), room), start=1):
        chunk = [*first, *others[start : start + room]]
        shown = {_short(name, 40): [_smooth(run[key], key) for run in logged[name]] for name in chunk}
        made.append(
            learning_curves(shown, folder / f"curves_{number}.png", ylabel=in_words(key), title=f"{key} over training")
        )
    absent = [name for name in logged if name not in names]
    smoothed = " Training losses are running means." if key.startswith("train/") else ""
    told = f" Without such a curve: {', '.join(absent)}." if absent else ""
    return made, f"{key}: mean over seeds, band of one standard deviation.{smoothed}{told}"


def skills(comparison: Comparison, scores: Sequence[Score], task: str, out: Path) -> Path:
    """Draw one panel per skill of a task with a bar per variant, numbered as in the tables, and its 95 % interval."""
    columns = min(5, len(scores))
    rows = -(-len(scores) // columns)
    figure = canvas(2.5 * columns + 0.6, rows * (0.55 + 0.17 * len(comparison.variants)) + 0.4)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    places = np.arange(len(comparison.variants))
    for axes, score in zip(grid.flat, scores, strict=False):
        styled(axes, title=score.key.rpartition("/")[2] + (", %" if score.percent else ""))
        for place, variant in enumerate(comparison.variants):
            summary = comparison.summary(variant, score.key)
            if summary is None:
                continue
            half = (summary.half_width or 0.0) * score.scale
            color = GRAY if variant.name == comparison.baseline else FRONT
            axes.barh(
                place,
                summary.mean * score.scale,
                0.75,
                xerr=half,
                color=color,
                error_kw={"elinewidth": 0.8, "capsize": 1.5, "ecolor": INK},
            )
        axes.set_yticks(places, [str(place + 1) for place in places], fontsize=6.5)
        axes.set_ylim(len(places) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(
            left=min(0.0, axes.get_xlim()[0]) if not score.percent else 0, right=104 if score.percent else None
        )
    for axes in list(grid.flat)[len(scores) :]:
        axes.set_axis_off()
    figure.suptitle(f"{task}, by skill (numbers as in the table; gray: the baseline)", fontsize=10, color=INK)
    return save(figure, out)


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Show all means; the huge interval of two seeds may leave the figure."""
    low, high = axes.get_ylim()
    room = 0.3 * (max(values) - min(values)) or 1.0
    axes.set_ylim(max(low, min(values) - room), min(high, max(values) + room))


def _places(comparison: Comparison, cost_key: str) -> dict[str, tuple[float, float, float]]:
    """Cost, score and half width by variant, as shown."""
    scale = comparison.primary.scale
    found = {}
    for variant in comparison.variants:
        cost = comparison.summary(variant, cost_key)
        value = comparison.summary(variant, comparison.primary.key)
        if cost is not None and value is not None:
            found[variant.name] = (cost.mean, value.mean * scale, (value.half_width or 0.0) * scale)
    return found


def _logged(variant: Variant) -> list[Mapping[str, tuple[Floats, Floats]]]:
    found: list[Mapping[str, tuple[Floats, Floats]]] = []
    for run in variant.runs:
        try:
            found.append(read_metrics(run.folder / "metrics.csv"))
        except (DataError, ValueError):
            continue
    return found


def _has(runs: Sequence[Mapping[str, tuple[Floats, Floats]]], key: str) -> bool:
    return bool(runs) and all(key in run and len(run[key][0]) >= LEAST_POINTS for run in runs)


def _smooth(curve: tuple[Floats, Floats], key: str, share: float = 0.1) -> tuple[Floats, Floats]:
    """Running mean over a tenth of a training curve; a validation curve as it is."""
    steps, values = curve
    width = round(share * len(values))
    if not key.startswith("train/") or width < 2:
        return curve
    return steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), mode="valid")


def _axis(score: Score) -> str:
    return f"{score.title}{', %' if score.percent else ''} (95 % interval over seeds)"


def _short(name: str, width: int = 60) -> str:
    return textwrap.shorten(name, width, placeholder=" ...") if " " in name else name[:width]
