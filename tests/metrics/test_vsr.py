"""True/false answers."""

from __future__ import annotations

import pytest

from visexpert.errors import DataError
from visexpert.metrics import VSRAccuracy
from visexpert.metrics.vsr import parse_truth


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
def test_reading(text: str, truth: bool | None) -> None:
    assert parse_truth(text) is truth


def test_by_hand() -> None:
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
