"""Choose the experts to keep: contributions by leave-one-out, and the best subset under one criterion.

Pure ranking: a callable gives the scores and costs of subsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from visexpert.errors import ConfigError

Subset = tuple[str, ...]
"""Names of attached experts in the hub's order; empty for the encoder alone."""

Measure = Literal["ms", "gflop"]
Search = Literal["auto", "greedy", "exhaustive"]

EXHAUSTIVE_UP_TO = 6
"""Most experts for which ``auto`` tries every subset (64 of them)."""


@dataclass(frozen=True)
class SubsetScore:
    """Scores and costs of a model with some of its experts attached.

    Args:
        experts: The attached experts.
        loss: Validation loss, lower is better.
        score: Validation score, higher is better.
        milliseconds: Time of the vision side per image.
        gflop: Work of the vision side per image, 10^9 operations.
        unsteadiness: How unreliable ``milliseconds`` is: the spread of the repeats (interquartile range over median) or
            the share of the machine used by other processes, whichever is larger.
    """

    experts: Subset
    loss: float
    score: float
    milliseconds: float
    gflop: float
    unsteadiness: float = 0.0

    def cost(self, measure: Measure) -> float:
        """Return the cost in milliseconds or GFLOP."""
        return self.milliseconds if measure == "ms" else self.gflop


Evaluate = Callable[[Sequence[Subset]], Sequence[SubsetScore]]
"""Scores subsets, in order; takes several at once so that encoders can run once for all of them."""


@dataclass(frozen=True)
class Criterion:
    """When to stop detaching: exactly one of the first three.

    Args:
        min_contribution: Detach experts whose removal raises the validation loss by less than this.
        keep: Number of experts to keep.
        latency_budget: Largest cost as a multiple of the encoder's alone, at least 1.
        measure: Unit of the budget, and what decides between equal losses: ``ms`` (depends on the machine and its
            load) or ``gflop`` (the same everywhere).

    Raises:
        ConfigError: None or several are given, or one is outside its range.
    """

    min_contribution: float | None = None
    keep: int | None = None
    latency_budget: float | None = None
    measure: Measure = "ms"

    def __post_init__(self) -> None:
        given = {"min_contribution": self.min_contribution, "keep": self.keep, "latency_budget": self.latency_budget}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            got = ", ".join(f"{name}={value}" for name, value in chosen.items()) or "none"
            raise ConfigError(f"Detachment needs exactly one criterion, got {got}; set one of {', '.join(given)}.")
        if self.measure not in ("ms", "gflop"):
            raise ConfigError(f"The measure {self.measure!r} of the budget is unknown; use 'ms' or 'gflop'.")
        if self.min_contribution is not None and not math.isfinite(self.min_contribution):
            raise ConfigError(
                f"min_contribution must be a finite rise of the loss, such as 0.01, got {self.min_contribution}."
            )
        if self.keep is not None and self.keep < 0:
            raise ConfigError(f"keep must be at least 0 (the encoder alone), got {self.keep}.")
        if self.latency_budget is not None and not 1 <= self.latency_budget < math.inf:
            raise ConfigError(
                f"latency_budget must be a finite multiple of the encoder's own cost, at least 1, such as 1.5, got "
                f"{self.latency_budget}."
            )


@dataclass(frozen=True)
class Contribution:
    """What one expert adds to all the others, and costs.

    Args:
        expert: Its name.
        loss: Rise of the validation loss without it; negative if it harms.
        score: Fall of the validation score without it.
        milliseconds: Time saved without it.
        gflop: Work saved without it.
        unsteadiness: How unreliable ``milliseconds`` is; see :class:`SubsetScore`.
    """

    expert: str
    loss: float
    score: float
    milliseconds: float
    gflop: float
    unsteadiness: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The experts to keep, and all evaluated subsets.

    Args:
        kept: Experts to keep.
        detached: The others.
        scores: All evaluated subsets, smaller ones first; includes none, all, and all but one.
        contributions: Contribution of each expert, in the hub's order.
        search: ``greedy`` or ``exhaustive``.
    """

    kept: Subset
    detached: Subset
    scores: tuple[SubsetScore, ...]
    contributions: tuple[Contribution, ...]
    search: str


def choose(experts: Sequence[str], criterion: Criterion, evaluate: Evaluate, *, search: Search = "auto") -> Choice:
    """Choose the experts to keep.

    Exhaustive search evaluates all 2^K subsets. It takes the lowest loss among those of ``keep`` experts, or within
    the budget; with ``min_contribution`` the lowest loss + min_contribution x experts, so that each group of kept
    experts lowers the loss by at least its size times ``min_contribution``. Greedy search removes the expert whose
    removal raises the loss least, evaluates the remaining ones again, and stops when the criterion holds: about K^2 / 2
    subsets. It misses experts that help only together.

    Of equal losses the cheaper subset wins, then the one that keeps the earlier experts.

    Args:
        experts: All experts, in the hub's order.
        criterion: When to stop.
        evaluate: Scores subsets; called once for each.
        search: ``auto`` is exhaustive for up to 6 experts, greedy beyond.

    Raises:
        ConfigError: There is no expert, or fewer than ``keep``; a score is not finite; the search is unknown.
    """
    everything = tuple(experts)
    check(everything, criterion, search)
    method = search if search != "auto" else "exhaustive" if len(everything) <= EXHAUSTIVE_UP_TO else "greedy"
    table = _Table(evaluate)
    table.fill([(), everything, *_without_one(everything)])
    seek = _best_of_all if method == "exhaustive" else _step_by_step
    kept = seek(everything, criterion, table)
    detached = tuple(name for name in everything if name not in kept)
    scores = sorted(table.scores.values(), key=lambda s: (len(s.experts), [everything.index(n) for n in s.experts]))
    return Choice(kept, detached, tuple(scores), leave_one_out(everything, scores), method)


def check(experts: Subset, criterion: Criterion, search: str) -> None:
    """Check the arguments of :func:`choose` before anything is evaluated.

    Raises:
        ConfigError: There is no expert, fewer than ``keep``, or an unknown search.
    """
    if search not in ("auto", "greedy", "exhaustive"):
        raise ConfigError(f"The search {search!r} is unknown; use 'auto', 'greedy' or 'exhaustive'.")
    if not experts:
        raise ConfigError("There is no expert to detach: the model is its encoder alone; give a run that uses experts.")
    if criterion.keep is not None and criterion.keep > len(experts):
        raise ConfigError(f"keep is {criterion.keep}, but the model has {len(experts)} experts: {', '.join(experts)}.")


def leave_one_out(experts: Sequence[str], scores: Iterable[SubsetScore]) -> tuple[Contribution, ...]:
    """Return the contribution of each expert to all the others.

    Args:
        experts: All experts, in the hub's order.
        scores: Scores that contain all experts and all but each one.
    """
    table = {score.experts: score for score in scores}
    everything = tuple(experts)
    full = table[everything]
    contributions = []
    for name in everything:
        less = table[tuple(other for other in everything if other != name)]
        contributions.append(
            Contribution(
                name,
                less.loss - full.loss,
                full.score - less.score,
                full.milliseconds - less.milliseconds,
                full.gflop - less.gflop,
                max(full.unsteadiness, less.unsteadiness),
            )
        )
    return tuple(contributions)


def pareto_front(scores: Iterable[SubsetScore], *, measure: Measure = "ms") -> tuple[SubsetScore, ...]:
    """Return the subsets that no other beats: no other is better in cost or score and at least as good in the other.

    Returns:
        Subsets in order of rising cost, including all of equal cost and score.
    """
    every = list(scores)

    def beaten(one: SubsetScore) -> bool:
        cost = one.cost(measure)
        return any(
            other.cost(measure) <= cost
            and other.score >= one.score
            and (other.cost(measure) < cost or other.score > one.score)
            for other in every
        )

    return tuple(sorted((one for one in every if not beaten(one)), key=lambda one: (one.cost(measure), one.score)))


def interpolated_cost(subset: Subset, measured: Mapping[Subset, float]) -> float:
    """Estimate the cost of a subset from few measurements: none, each expert alone, and all of K.

    cost(S) = cost of none + sum over S of what each adds alone - (|S| - 1) x what that counts twice (the gate), which
    is exact for the measured subsets.

    Args:
        subset: The subset.
        measured: Cost of the empty subset, of each expert alone and of all experts.
    """
    if subset in measured:
        return measured[subset]
    none, everything = measured[()], max(measured, key=len)
    added = {name: measured[name,] - none for name in everything}
    twice = (sum(added.values()) - (measured[everything] - none)) / (len(everything) - 1)
    return none + sum(added[name] for name in subset) - (len(subset) - 1) * twice


class _Table:
    """Scores by subset; evaluates each subset once."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self.scores: dict[Subset, SubsetScore] = {}

    def fill(self, subsets: Iterable[Subset]) -> list[SubsetScore]:
        wanted = list(subsets)
        fresh = [subset for subset in dict.fromkeys(wanted) if subset not in self.scores]
        for score in self._evaluate(fresh) if fresh else ():
            if not math.isfinite(score.loss) or not math.isfinite(score.score):
                raise ConfigError(
                    f"With the experts {list(score.experts)} the validation loss is {score.loss} and the score "
                    f"{score.score}, which cannot be ranked; give a run whose validation scores are finite."
                )
            self.scores[score.experts] = score
        return [self.scores[subset] for subset in wanted]


def _best_of_all(experts: Subset, criterion: Criterion, table: _Table) -> Subset:
    scores = table.fill(_subsets(experts))
    price = criterion.min_contribution or 0.0
    if criterion.min_contribution is not None:  # an expert exactly at the threshold stays, so the larger subset wins
        best = min(scores, key=lambda s: (s.loss + price * len(s.experts), -len(s.experts), s.cost(criterion.measure)))
    else:
        fitting = [score for score in scores if _fits(score, criterion, table)]
        best = min(fitting, key=lambda s: (s.loss, s.cost(criterion.measure)))
    return best.experts


def _step_by_step(experts: Subset, criterion: Criterion, table: _Table) -> Subset:
    kept = experts
    while kept and (criterion.min_contribution is not None or not _fits(table.scores[kept], criterion, table)):
        options = table.fill(_without_one(kept))
        best = min(options, key=lambda s: (s.loss, s.cost(criterion.measure)))
        if criterion.min_contribution is not None and best.loss - table.scores[kept].loss >= criterion.min_contribution:
            break
        kept = best.experts
    return kept


def _fits(score: SubsetScore, criterion: Criterion, table: _Table) -> bool:
    if criterion.keep is not None:
        return len(score.experts) == criterion.keep
    assert criterion.latency_budget is not None
    return score.cost(criterion.measure) <= criterion.latency_budget * table.scores[()].cost(criterion.measure)


def _without_one(experts: Subset) -> list[Subset]:
    """Return all subsets without one expert, the last left out first: of equals the earlier experts stay."""
    return [experts[:place] + experts[place + 1 :] for place in reversed(range(len(experts)))]


def _subsets(experts: Subset) -> list[Subset]:
    return [subset for size in range(len(experts) + 1) for subset in combinations(experts, size)]
