"""VQA accuracy: the official rules, by hand."""

from __future__ import annotations

import pytest

from visexpert.metrics import VQAAccuracy, normalize_answer


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
