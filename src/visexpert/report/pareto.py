"""What experts contribute and cost: the front of score against cost, contribution beside gate mass, their tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from visexpert.report.palette import GRAY, INK, OKABE_ITO, canvas, save, styled, tick_label
from visexpert.timing import MARK, TOLD, UNSTEADY

Subset = tuple[str, ...]

FRONT, KEPT = OKABE_ITO[0], OKABE_ITO[4]


class Costed(Protocol):
    """Loss and score, and time and work per image: of a model, or of what goes and is saved without a part."""

    @property
    def loss(self) -> float: ...
    @property
    def score(self) -> float: ...
    @property
    def milliseconds(self) -> float: ...
    @property
    def gflop(self) -> float: ...
    @property
    def unsteadiness(self) -> float: ...


class Scored(Costed, Protocol):
    """A subset of experts."""

    @property
    def experts(self) -> Subset: ...


class Valued(Costed, Protocol):
    """An expert, by what changes without it."""

    @property
    def expert(self) -> str: ...


def pareto_figure(
    scores: Sequence[Scored],
    out: Path,
    *,
    front: Sequence[Subset],
    kept: Subset,
    experts: Subset,
    measure: str = "ms",
    budget: float | None = None,
    score_name: str = "score",
) -> Path:
    """Draw the score of every subset against its cost; the front is a numbered line whose legend names the subsets.

    Args:
        scores: All evaluated subsets.
        out: The PNG to write.
        front: Subsets on the front, by rising cost.
        kept: The chosen subset, ringed.
        experts: All experts, to name subsets by what they lack where that is shorter.
        measure: Cost on the axis, ``ms`` or ``gflop``.
        budget: Greatest allowed cost, in the same unit; drawn as a dashed line.
        score_name: What the score is.
    """
    place = {score.experts: (_cost(score, measure), score.score) for score in scores}
    figure = canvas(8.2, max(3.8, 1.4 + 0.22 * len(front)))
    cost = "time of the vision side, ms" if measure == "ms" else "work of the vision side, GFLOP"
    axes = styled(
        figure.add_subplot(),
        title="Score against cost, by experts attached",
        xlabel=f"{cost} per image",
        ylabel=f"validation {score_name}",
    )
    costs, values = zip(*place.values(), strict=True)
    axes.scatter(costs, values, s=22, color="#B5B5B5")
    marked = {score.experts for score in scores if measure == "ms" and score.unsteadiness > UNSTEADY}
    if marked:
        axes.set_xlabel(f"{axes.get_xlabel()}\n{TOLD}", fontsize=7)
    handles = [
        numbered(axes, number, place[one], subset_label(one, experts), steady=one not in marked)
        for number, one in enumerate(front, 1)
    ]
    axes.plot(*zip(*(place[one] for one in front), strict=True), color=FRONT, linewidth=1.4, drawstyle="steps-post")
    ring = axes.scatter(
        *place[kept],
        s=260,
        facecolors="none",
        edgecolors=KEPT,
        linewidths=2,
        zorder=4,
        label=f"kept: {subset_label(kept, experts)}",
    )
    lines = [] if budget is None else [axes.axvline(budget, color=GRAY, linewidth=1, linestyle="--", label="budget")]
    figure.legend(handles=[*handles, ring, *lines], loc="outside right upper", frameon=False, fontsize=8)
    return save(figure, out)


def contribution_figure(contributions: Sequence[Valued], gate_mass: Mapping[str, float], out: Path) -> Path:
    """Draw each expert's contribution and, beside it, its share of the gate: the two need not agree.

    Args:
        contributions: Contribution of each expert.
        gate_mass: Mean gate per expert; empty for a model without a gate.
        out: The PNG to write.
    """
    names = [contribution.expert for contribution in contributions][::-1]
    figure = canvas(7.2, 1.2 + 0.36 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    styled(left, title="Contribution", xlabel="rise of the validation loss without it, nats per token")
    labels = [tick_label(name) for name in names]
    left.barh(labels, [contribution.loss for contribution in contributions][::-1], color=FRONT)
    left.axvline(0, color=INK, linewidth=0.8)
    styled(right, title="Gate mass", xlabel="mean gate over validation tokens (0 to 1)")
    right.barh(labels, [gate_mass.get(name, 0.0) for name in names], color=OKABE_ITO[1])
    right.axvline(1 / len(names), color=GRAY, linewidth=0.9, linestyle="--")
    return save(figure, out)


def subset_table(scores: Sequence[Scored], *, front: Collection[Subset], kept: Subset, experts: Subset) -> str:
    """Make a Markdown table of all evaluated subsets: quality, cost, multiple of the encoder's own, front, choice.

    Args:
        scores: With the empty subset (encoder alone) among them.
        front: Subsets on the front.
        kept: The chosen subset.
        experts: All experts.
    """
    clip = next(score for score in scores if not score.experts)
    rows = [
        [
            subset_label(score.experts, experts),
            f"{score.loss:.4f}",
            f"{score.score:.4f}",
            _ms(score),
            f"{score.milliseconds / clip.milliseconds:.2f}",
            f"{score.gflop:.4f}",
            f"{score.gflop / clip.gflop:.2f}",
            "yes" if score.experts in front else "",
            "**kept**" if score.experts == kept else "",
        ]
        for score in scores
    ]
    costs = ["ms/image", "x encoder", "GFLOP/image", "x encoder"]
    heading = ["experts", "loss", "score", *costs, "on the front", "choice"]
    return _table(heading, rows)


def contribution_table(contributions: Sequence[Valued], gate_mass: Mapping[str, float], *, kept: Subset) -> str:
    """Make a Markdown table of the experts: contribution, gate mass, cost and fate.

    Args:
        contributions: Contribution of each expert.
        gate_mass: Mean gate per expert; a dash where there is none.
        kept: The experts that stay.
    """
    rows = [
        [
            contribution.expert,
            f"{contribution.loss:+.4f}",
            f"{0 - contribution.score:+.4f}",
            f"{gate_mass[contribution.expert]:.3f}" if contribution.expert in gate_mass else "–",
            _ms(contribution),
            f"{contribution.gflop:.4f}",
            "kept" if contribution.expert in kept else "detached",
        ]
        for contribution in contributions
    ]
    heading = ["expert", "loss without it", "score without it", "gate mass", "ms/image", "GFLOP/image", "choice"]
    return _table(heading, rows)


def subset_label(subset: Subset, experts: Subset) -> str:
    """Name a subset briefly: ``encoder alone``, ``depth, edges``, ``all but edges``, ``all``."""
    missing = [name for name in experts if name not in subset]
    if not subset:
        return "encoder alone"
    if not missing:
        return "all"
    return f"all but {', '.join(missing)}" if len(missing) < len(subset) else ", ".join(subset)


def numbered(
    axes: Axes,
    number: int,
    at: tuple[float, float],
    label: str,
    *,
    color: str = FRONT,
    level: float = 3,
    steady: bool = True,
) -> Line2D:
    """Put a point with a number on the axes, above those of a lower level; return its entry in the legend.

    A point whose cost was measured unsteadily is hollow, and its entry is marked.
    """
    fill, ink = (color, "white") if steady else ("white", color)
    axes.scatter(*at, s=90, color=fill, edgecolors=color, linewidths=1.2, zorder=level)
    axes.annotate(
        str(number), at, color=ink, fontsize=7, fontweight="bold", ha="center", va="center", zorder=level + 0.5
    )
    told = f"{number}  {MARK * (not steady)}{label}"
    return Line2D([], [], linestyle="none", marker="o", color=color, markerfacecolor=fill, markersize=6, label=told)


def _ms(costed: Costed) -> str:
    """Milliseconds, marked where they were measured unsteadily."""
    return f"{MARK * (costed.unsteadiness > UNSTEADY)}{costed.milliseconds:.3f}"


def _cost(score: Scored, measure: str) -> float:
    return score.milliseconds if measure == "ms" else score.gflop


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heading, rule, *rows))
