"""Accuracy of answers by the official rules (VQA v2, VSR, POPE), by hand."""

from __future__ import annotations

import pytest

from visexpert.errors import DataError
from visexpert.metrics import POPEScores, VQAAccuracy, VSRAccuracy, normalize_answer
from visexpert.metrics.answers import parse_pope, parse_truth


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A red cube.", "red cube"),
        ("The Eiffel Tower", "eiffel tower"),
        ("two", "2"),
        ("None", "0"),
        ("Ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("Its a dogs", "its dogs"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # as the official table has it
        ("Im", "im"),  # the table's "Im" is never met: words are lower-cased first
        ("1,000", "1000"),  # a number with a comma: every mark is deleted
        ("red,blue", "red blue"),  # no space beside the mark: it becomes one
        ("red, blue", "red blue"),  # a space beside it: it is deleted
        ("black/white", "black white"),
        ("x-ray", "x ray"),
        ("wi-fi , x-ray", "wi fi x ray"),  # the hyphen touches no space, the comma does
        ("3.5", "3.5"),
        (".5 miles.", ".5 miles"),
        ("U.S.", "us"),
        ("5:30 p.m.", "5:30 pm"),
        ("it's", "it's"),
        ("$5 & 10%", "$5 & 10%"),
        ("yes!", "yes"),
        ("  ", ""),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("matches, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_ten_humans(matches: int, accuracy: float) -> None:
    """Leaving out each human in turn: with m matches, m subsets have m - 1 of them and 10 - m have m, each / 3."""
    by_hand = (matches * min((matches - 1) / 3, 1) + (10 - matches) * min(matches / 3, 1)) / 10
    assert by_hand == pytest.approx(accuracy)
    metric = VQAAccuracy()
    metric.update(["Two."], [["2"] * matches + [f"other {n}" for n in range(10 - matches)]])
    assert metric.compute()["accuracy"] == pytest.approx(accuracy)


def test_unanimous_humans_are_compared_raw_as_officially() -> None:
    answers, references = ["Yes.", "yes"], [["yes"] * 10] * 2
    raw, normalize = VQAAccuracy(), VQAAccuracy(unanimous="normalize")
    raw.update(answers, references)
    normalize.update(answers, references)
    assert raw.compute() == {"accuracy": 0.5}
    assert normalize.compute() == {"accuracy": 1.0}


def test_single_reference_is_exact_match_by_family() -> None:
    metric = VQAAccuracy()
    metric.update(["Red", "two", "left"], ["red", ("2",), "right"], ["colour", "count", "side"])
    metric.update(["blue\n"], ["The blue."])
    scores = metric.compute()
    assert scores == {"accuracy": 0.75, "family/colour": 1.0, "family/count": 1.0, "family/side": 0.0}


def test_question_without_reference() -> None:
    with pytest.raises(ValueError, match="'red' has no reference"):
        VQAAccuracy().update(["red"], [[]])


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("yes", True),
        ("True.", True),
        ("Answer: YES, it is", True),
        ("1", True),
        ("no", False),
        ("False", False),
        ("That is not true", False),
        ("0", False),
        ("", None),
        ("maybe", None),
        ("nothing", None),
        ("10", None),
    ],
)
def test_truth_is_read_from_the_first_decisive_word(text: str, truth: bool | None) -> None:
    assert parse_truth(text) is truth


def test_statements_by_hand() -> None:
    metric = VSRAccuracy()
    metric.update(["yes", "false", "no", "hm"], ["true", "no", "yes", "no"], ["depth", "depth", "size", "size"])
    expected = {"accuracy": 0.5, "family/depth": 1.0, "family/size": 0.0, "unparsable": 0.25}
    assert metric.compute() == expected


def test_always_yes_on_balanced_statements_is_chance() -> None:
    metric = VSRAccuracy()
    metric.update(["yes"] * 10, ["yes", "no"] * 5)
    assert metric.compute() == {"accuracy": 0.5, "unparsable": 0.0}


def test_indecisive_reference_is_named() -> None:
    with pytest.raises(DataError, match="'left' is neither true nor false: use one of 0, 1, false, no, not, true, yes"):
        VSRAccuracy().update(["yes"], ["left"])


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
def test_pope_is_read_by_the_official_rule(text: str, yes: bool) -> None:
    assert parse_pope(text) is yes


def test_pope_by_hand() -> None:
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


def test_pope_always_yes() -> None:
    metric = POPEScores()
    metric.update(["yes"] * 4, ["yes", "no"] * 2)
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0, "unparsable": 0.0}
    assert metric.compute() == pytest.approx(expected)


def test_pope_always_no_divides_by_nothing() -> None:
    metric = POPEScores()
    metric.update(["no"] * 4, ["yes", "no"] * 2)
    expected = {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0, "unparsable": 0.0}
    assert metric.compute() == expected
