"""The page about text alignment: its numbers from scores made by hand, and printed again from the committed ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import text_alignment
from benchmarks.text_alignment import RECIPES, chosen_weight, gain_kept, goal_reached, lost

ONE, OTHER = RECIPES[:2]


def _scores(recall: float, zero_shot: float, probes: float) -> dict[str, float]:
    recalls = {f"{way}/R@{k}": recall for way in ("image_to_text", "text_to_image") for k in (1, 10)}
    scores = recalls | {"zero_shot": zero_shot, "probes": probes}
    return {f"{split}/{name}": value for split in ("val", "test") for name, value in scores.items()}


@pytest.fixture
def results() -> dict[str, dict[str, float]]:
    """Return CLIP's scores and one recipe's: a gain of 4 points, of which .3 keeps 3.4 and 1 keeps 2."""
    return {
        "CLIP": _scores(0.50, 0.20, 0.60),
        f"{ONE} | 0 | 0": _scores(0.40, 0.25, 0.64),
        f"{ONE} | 0 | 1": _scores(0.42, 0.15, 0.64),
        f"{ONE} | 0.3 | 0": _scores(0.48, 0.20, 0.634),
        f"{ONE} | 0.3 | 1": _scores(0.51, 0.20, 0.634),
        f"{ONE} | 1 | 0": _scores(0.50, 0.20, 0.62),
    }


def test_losses_and_gains_are_differences_to_clip_in_points(results: dict[str, dict[str, float]]) -> None:
    assert lost(results, ONE, 0.3, "test", "image_to_text/R@1") == pytest.approx([2, -1])
    assert lost(results, ONE, 0.0, "test", "zero_shot") == pytest.approx([-5, 5])
    for weight, expected in ((0.3, ([3.4, 3.4], [4, 4])), (1.0, ([2], [4]))):  # of the seeds that both have
        with_weight, without = gain_kept(results, ONE, weight, "test")
        assert with_weight == pytest.approx(expected[0])
        assert without == pytest.approx(expected[1])


def test_the_goal_asks_for_small_losses_and_most_of_the_gain(results: dict[str, dict[str, float]]) -> None:
    assert goal_reached(results, ONE, 0.0, "test") is False  # all of the gain, 9 points lost
    assert goal_reached(results, ONE, 0.3, "test") is True  # half a point lost, 85 %
    assert goal_reached(results, ONE, 1.0, "test") is False  # nothing lost, 50 %
    assert goal_reached(results, OTHER, 0.3, "test") is None
    results["CLIP"]["test/zero_shot"] = 0.22
    assert goal_reached(results, ONE, 0.3, "test") is False  # one score is enough


def test_the_weight_is_chosen_on_validation_scenes_alone(results: dict[str, dict[str, float]]) -> None:
    assert chosen_weight(results) == 0.3
    results[f"{ONE} | 1 | 0"]["test/probes"] = 0.64
    assert chosen_weight(results) == 0.3
    results[f"{ONE} | 1 | 0"] |= {"test/probes": 0.62, "val/probes": 0.64}
    assert chosen_weight(results) == 1.0


def test_a_run_without_the_weights_of_seeds_or_recipes_still_prints(results: dict[str, dict[str, float]]) -> None:
    lines = text_alignment.page(results).splitlines()
    row = next(line for line in lines if line.startswith(f"| {ONE} | 0.3 | 2 |"))
    assert "49.5 ± 2.1" in row
    assert row.endswith("| 85 |")
    assert "-0.0" not in text_alignment.page(results | {f"{ONE} | 0.3 | 0": _scores(0.5001, 0.2, 0.634)})
    assert not [line for line in lines if line.startswith(f"| {OTHER} |")]


def test_the_committed_page_is_printed_again_from_the_committed_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    committed = json.loads(text_alignment.OUT.read_text(encoding="utf-8"))
    assert text_alignment.page(committed) == text_alignment.PAGE.read_text(encoding="utf-8")
