"""POPE: the official reading and counts by hand."""

from __future__ import annotations

import pytest

from visexpert.metrics import POPEScores
from visexpert.metrics.pope import parse_pope


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is not.", False),
        ("no", False),
        ("no\n", False),
        ("There is not a dog", False),
        ("There is none", True),  # the official rule knows three words only
        ("NO", True),
        ("Yes. There is no cat, though.", True),  # first sentence alone
        ("Nothing", True),
        ("", True),
    ],
)
def test_reading(text: str, yes: bool) -> None:
    assert parse_pope(text) is yes


def test_by_hand() -> None:
    metric = POPEScores()
    # 3 true yes (2 found), 3 true no (1 claimed, one of them by mumbling).
    metric.update(["yes", "Yes, it is.", "no"], ["yes"] * 3, ["random", "random", "popular"])
    metric.update(["no", "hm", "No."], ["no"] * 3, ["random", "popular", "popular"])
    scores = metric.compute()
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["yes_ratio"] == pytest.approx(3 / 6)
    assert scores["unparsable"] == pytest.approx(1 / 6)
    assert [scores[f"random/{name}"] for name in ("accuracy", "precision", "recall", "f1")] == [1, 1, 1, 1]
    assert scores["popular/accuracy"] == pytest.approx(1 / 3)
    assert scores["popular/f1"] == 0
    assert len(scores) == 6 * 3


def test_always_yes() -> None:
    metric = POPEScores()
    metric.update(["yes"] * 4, ["yes", "no"] * 2)
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0, "unparsable": 0.0}
    assert metric.compute() == pytest.approx(expected)


def test_always_no_divides_by_nothing() -> None:
    metric = POPEScores()
    metric.update(["no"] * 4, ["yes", "no"] * 2)
    expected = {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0, "unparsable": 0.0}
    assert metric.compute() == expected
