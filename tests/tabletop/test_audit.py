"""Answers are balanced, so that a guesser that never sees an image stays at chance."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from tests.tabletop.some_graphs import random_graphs
from visexpert.tabletop.audit import audit, report
from visexpert.tabletop.questions import Balancer
from visexpert.tabletop.texts import Pools, generate_pools
from visexpert.types import TextItem


@pytest.fixture(scope="module")
def train() -> Pools:
    return generate_pools(random_graphs(1200, seed=1), split="train", seed=0, progress=False)


@pytest.fixture(scope="module")
def test() -> Pools:
    return generate_pools(random_graphs(400, seed=2), split="test", seed=0, progress=False)


def counts(pools: Pools, kind: str, *, by_family: bool) -> dict[tuple[str, str], Counter[str]]:
    grouped: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for pool in pools:
        for item in pool:
            if item.kind == kind:
                grouped[item.family if by_family else "", item.prompt][item.answer] += 1
    return grouped


@pytest.mark.parametrize(("kind", "by_family"), [("vsr", False), ("pope", True)])
def test_yes_equals_no_for_every_prompt_up_to_one(train: Pools, kind: str, by_family: bool) -> None:
    grouped = counts(train, kind, by_family=by_family)
    assert len(grouped) == 24 + 24 + 8 if by_family else len(grouped) > 1000
    assert all(abs(answers["yes"] - answers["no"]) <= 1 for answers in grouped.values())


def test_every_answer_of_a_question_is_as_frequent_up_to_one(train: Pools) -> None:
    for (_, prompt), answers in counts(train, "vqa", by_family=False).items():
        if sum(answers.values()) > 20:
            assert max(answers.values()) - min(answers.values()) <= 1, (prompt, answers)


def test_the_beginning_of_a_split_is_as_balanced_as_the_whole(train: Pools) -> None:
    for answers in counts(train[:500], "vsr", by_family=False).values():
        assert abs(answers["yes"] - answers["no"]) <= 1


def test_a_text_only_guesser_is_at_chance(train: Pools, test: Pools) -> None:
    rows = audit(train, test)
    assert len(rows) == 9 + 4 + 3
    for row in rows:
        # One-sided: prompts that are rare in a split lean a little against their own majority.
        assert row.exact < row.chance + 4 * row.sampling_error, row
        assert row.template < row.chance + 4 * row.sampling_error, row


def test_the_audit_finds_a_bias_that_is_there() -> None:
    biased = [[TextItem("vsr", "the cube is large ?", "yes", family="size")]] * 30
    (row,) = audit(biased, biased)
    assert row.exact == 1.0 and row.chance == 0.5
    assert "| vsr | size | 30 | 30 | 100.0 | 100.0 | 50.0 ± 9.1 |" in report([row])


def test_the_audit_sees_through_colours() -> None:
    fitted = [[TextItem("vsr", f"the {colour} cube is large ?", "yes", family="size")] for colour in ("red", "blue")]
    asked = [[TextItem("vsr", "the green cube is large ?", "yes", family="size")]]
    assert audit(fitted, asked)[0].template == 1.0


def test_the_balancer_waits_for_the_rarest_answer() -> None:
    balancer = Balancer()
    options = ("one", "two", "three")
    assert balancer.allows(("key",), "one", options)
    balancer.use(("key",), "one")
    assert not balancer.allows(("key",), "one", options)
    assert balancer.lead("key", "one", options) == 1
    for answer in ("two", "three"):
        assert balancer.allows(("key",), answer, options)
        balancer.use(("key",), answer)
    assert balancer.allows(("key",), "one", options)


def test_the_balancer_looks_at_every_key() -> None:
    balancer = Balancer()
    assert balancer.allows(("a", "b"), "yes", ("yes", "no"))
    balancer.use(("a",), "yes")
    assert not balancer.allows(("a", "b"), "yes", ("yes", "no"))
    assert balancer.allows(("b",), "yes", ("yes", "no"))
