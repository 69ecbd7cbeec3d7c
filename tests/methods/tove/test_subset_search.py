"""The search over subsets, on tables by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

from visexpert.errors import ConfigError
from visexpert.methods.tove.subset_search import (
    Choice,
    Criterion,
    Search,
    Subset,
    SubsetScore,
    choose,
    interpolated_cost,
    leave_one_out,
    pareto_front,
)

A, B, C = "a", "b", "c"

# Redundant pair: a and b say the same, c says something of its own. The pair {a, b} is worth 4, one of them 3.75.
REDUNDANT = {
    (): 8.0,
    (A,): 4.25,
    (B,): 4.25,
    (C,): 6.0,
    (A, B): 4.0,
    (A, C): 2.5,
    (B, C): 2.5,
    (A, B, C): 2.25,
}

# Interaction: a and b are worth much, but only together; c alone is better than either of them alone.
TOGETHER = {
    (): 8.0,
    (A,): 7.5,
    (B,): 7.5,
    (C,): 5.0,
    (A, B): 3.0,
    (A, C): 4.0,
    (B, C): 4.5,
    (A, B, C): 2.0,
}

COSTS = {A: 4.0, B: 2.0, C: 1.0}


class Table:
    """Scores by hand; counts how often each subset is asked for. Plain CLIP costs 2 ms and 1 GFLOP."""

    def __init__(self, losses: Mapping[Subset, float], costs: Mapping[str, float] = COSTS) -> None:
        self.losses, self.costs = losses, costs
        self.asked: list[Subset] = []

    def __call__(self, subsets: Sequence[Subset]) -> list[SubsetScore]:
        self.asked += subsets
        return [self.score(subset) for subset in subsets]

    def score(self, subset: Subset) -> SubsetScore:
        """The row of one subset; its score falls as its loss rises, GFLOP are the costs backwards."""
        loss, names = self.losses[subset], list(self.costs)
        back = sum(self.costs[names[-1 - names.index(name)]] for name in subset)
        return SubsetScore(subset, loss, 10 - loss, 2 + sum(self.costs[name] for name in subset), 1 + back)


def _choose(losses: Mapping[Subset, float], search: Search = "exhaustive", **criterion: Any) -> Choice:
    return choose((A, B, C), Criterion(**criterion), Table(losses), search=search)


def test_worth_is_the_rise_of_the_loss_without_the_expert() -> None:
    table = Table(REDUNDANT)
    contributions = leave_one_out((A, B, C), table([(A, B, C), (B, C), (A, C), (A, B)]))
    assert [contribution.expert for contribution in contributions] == [A, B, C]
    assert [contribution.loss for contribution in contributions] == [0.25, 0.25, 1.75]
    assert [contribution.score for contribution in contributions] == [0.25, 0.25, 1.75]
    assert [contribution.milliseconds for contribution in contributions] == [4, 2, 1]
    assert [contribution.gflop for contribution in contributions] == [1, 2, 4]


@pytest.mark.parametrize("search", ["greedy", "exhaustive"])
def test_of_a_redundant_pair_the_dearer_goes_and_the_other_stays(search: Search) -> None:
    """Each of a and b alone is worth 0.25 < 0.5; without a, b is worth 3.5: one must stay."""
    choice = _choose(REDUNDANT, search, min_contribution=0.5)
    assert choice.kept == (B, C)
    assert choice.detached == (A,)


@pytest.mark.parametrize("search", ["greedy", "exhaustive"])
@pytest.mark.parametrize(
    ("min_contribution", "kept"), [(0.0, (A, B, C)), (0.25, (A, B, C)), (0.26, (B, C)), (2.0, (B,)), (9.0, ())]
)
def test_an_expert_worth_exactly_the_bound_stays(search: Search, min_contribution: float, kept: Subset) -> None:
    assert _choose(REDUNDANT, search, min_contribution=min_contribution).kept == kept


@pytest.mark.parametrize("search", ["greedy", "exhaustive"])
def test_a_harmful_expert_goes_at_worth_zero(search: Search) -> None:
    losses = {subset: 4.0 - (A in subset) - (B in subset) + 0.5 * (C in subset) for subset in REDUNDANT}
    assert _choose(losses, search, min_contribution=0.0).kept == (A, B)


def test_greedy_misses_what_is_worth_something_only_together() -> None:
    """Losses without one are 4.5, 4.0 and 3.0: c goes first, and what is left of {a, b} is 7.5; {c} has 5.0."""
    assert _choose(TOGETHER, "greedy", keep=2).kept == _choose(TOGETHER, keep=2).kept == (A, B)
    assert _choose(TOGETHER, "greedy", keep=1).kept == (B,)
    assert _choose(TOGETHER, keep=1).kept == (C,)


def test_a_group_that_is_not_worth_its_number_goes_as_a_whole() -> None:
    """In {a, b} each is worth 4.5; together they are worth 5 over nothing, less than two times 2.6."""
    losses = {(): 8.0, (A,): 7.5, (B,): 7.5, (A, B): 3.0}
    for search, kept in (("greedy", (A, B)), ("exhaustive", ())):
        choice = choose((A, B), Criterion(min_contribution=2.6), Table(losses, {A: 1, B: 1}), search=search)  # type: ignore[arg-type]
        assert choice.kept == kept


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("search", ["greedy", "exhaustive"])
def test_so_many_are_kept_as_were_asked_for(search: Search, number: int) -> None:
    assert len(_choose(TOGETHER, search, keep=number).kept) == number


@pytest.mark.parametrize(
    ("budget", "measure", "kept"),
    [
        (1.0, "ms", ()),  # 2 ms: nothing but CLIP
        (1.49, "ms", ()),
        (1.5, "ms", (C,)),  # 3 ms, exactly the budget
        (2.5, "ms", (B, C)),  # 5 ms: {b, c} 4.5 before {c} 5.0
        (3.5, "ms", (A, C)),  # 7 ms: {a, c} 4.0; {a, b} of 8 ms is better but too dear
        (4.0, "ms", (A, B)),
        (9.0, "ms", (A, B, C)),
        (2.0, "gflop", (A,)),  # a costs 1 GFLOP beside CLIP's 1, b 2 and c 4
        (3.9, "gflop", (A,)),  # {b} is as good, but dearer
        (4.0, "gflop", (A, B)),
        (8.0, "gflop", (A, B, C)),
    ],
)
def test_the_budget_is_a_multiple_of_plain_clip(budget: float, measure: str, kept: Subset) -> None:
    assert _choose(TOGETHER, latency_budget=budget, measure=measure).kept == kept


def test_greedy_stops_as_soon_as_the_budget_is_met() -> None:
    table = Table(TOGETHER)
    choice = choose((A, B, C), Criterion(latency_budget=4.0), table, search="greedy")
    assert choice.kept == (A, B)  # without c 3.0, the least rise; 8 ms
    assert set(table.asked) == {(), (A, B, C), (A, B), (A, C), (B, C)}
    assert choose((A, B, C), Criterion(latency_budget=1.0), table, search="greedy").kept == ()


def test_equal_losses_go_to_the_cheaper_then_to_the_earlier() -> None:
    losses = {subset: 4.0 - len(subset) for subset in REDUNDANT}
    for search in ("greedy", "exhaustive"):
        assert _choose(losses, search, keep=1).kept == (C,)
        alike = choose((A, B, C), Criterion(keep=1), Table(losses, dict.fromkeys(COSTS, 1.0)), search=search)
        assert alike.kept == (A,)


@pytest.mark.parametrize("search", ["greedy", "exhaustive"])
def test_no_subset_is_evaluated_twice(search: Search) -> None:
    table = Table(TOGETHER)
    choice = choose((A, B, C), Criterion(keep=0), table, search=search)
    assert len(table.asked) == len(set(table.asked)) == len(choice.scores)
    assert len(choice.scores) == (8 if search == "exhaustive" else 7)  # greedy: 1 + 3 + 2 + 1 of them


@pytest.mark.parametrize(("number", "search"), [(6, "exhaustive"), (7, "greedy")])
def test_auto_looks_at_all_subsets_of_up_to_six(number: int, search: str) -> None:
    names = tuple(f"e{index}" for index in range(number))
    subsets = [subset for size in range(number + 1) for subset in combinations(names, size)]
    table = Table({subset: -float(len(subset)) for subset in subsets}, dict.fromkeys(names, 1.0))
    choice = choose(names, Criterion(keep=2), table)
    assert choice.search == search
    assert len(choice.scores) == (64 if number == 6 else 1 + 1 + 7 + 6 + 5 + 4 + 3)


def test_the_front_is_what_nothing_beats() -> None:
    rows = [("clip", 2, 5), ("worse", 3, 4), ("better", 3, 7), ("dear", 5, 7), ("twin", 3, 7), ("best", 6, 9)]
    scores = [SubsetScore((name,), 0.0, score, cost, -cost) for name, cost, score in rows]
    assert [score.experts[0] for score in pareto_front(scores)] == ["clip", "better", "twin", "best"]
    assert [score.experts[0] for score in pareto_front(scores, measure="gflop")] == ["best"]


def test_costs_between_the_measured_ones_count_what_is_shared_once() -> None:
    """CLIP 10, gate 1 with any expert, experts 2, 3 and 4: sums are known, of which five are measured."""
    parts = {A: 2.0, B: 3.0, C: 4.0}

    def true(subset: Subset) -> float:
        return 10 + bool(subset) + sum(parts[name] for name in subset)

    measured = {subset: true(subset) for subset in [(), (A,), (B,), (C,), (A, B, C)]}
    for size in range(4):
        for subset in combinations((A, B, C), size):
            assert interpolated_cost(subset, measured) == pytest.approx(true(subset))


def test_one_expert_needs_no_sums() -> None:
    assert interpolated_cost((A,), {(): 1.0, (A,): 1.5}) == 1.5


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({}, "one criterion, got none; set one of min_contribution, keep, latency_budget"),
        ({"keep": 1, "min_contribution": 0.1}, "got min_contribution=0.1, keep=1"),
        ({"latency_budget": 0.9}, "latency_budget .* got 0.9"),
        ({"latency_budget": float("nan")}, "latency_budget .* got nan"),
        ({"latency_budget": float("inf")}, "latency_budget .* got inf"),
        ({"min_contribution": float("nan")}, "min_contribution .* got nan"),
        ({"keep": -1}, "keep .* got -1"),
        ({"keep": 1, "measure": "hours"}, "'hours' of the budget is unknown; use 'ms' or 'gflop'"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_runs(criterion: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Criterion(**criterion)


def test_more_than_there_are_cannot_be_kept() -> None:
    table = Table(TOGETHER)
    with pytest.raises(ConfigError, match="keep is 4, but the model has 3 experts: a, b, c"):
        choose((A, B, C), Criterion(keep=4), table)
    with pytest.raises(ConfigError, match="The search 'best' is unknown"):
        choose((A, B, C), Criterion(keep=1), table, search="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="There is no expert to detach"):
        choose((), Criterion(keep=0), table)
    assert not table.asked


def test_a_loss_that_is_no_number_is_not_ranked() -> None:
    losses = {**TOGETHER, (A, C): float("nan")}
    with pytest.raises(ConfigError, match=r"With the experts \['a', 'c'\] the validation loss is nan"):
        _choose(losses, keep=1)
