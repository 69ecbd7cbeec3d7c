"""Choices, summaries and the CSV of a comparison; scores by their keys."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from scipy import stats

from tests.report.compare.made import make_run
from visexpert.errors import ConfigError
from visexpert.report.compare import Choices, Comparison, compare_runs
from visexpert.report.compare.comparison import choose_baseline
from visexpert.report.compare.figures import front
from visexpert.report.compare.scores import score_of

VQA = {"clip-only": (0.50, 0.52, 0.51), "tove": (0.70, 0.75, 0.71), "merged": (0.66, 0.69, 0.70)}


def _compared(folder: Path, **choices: object) -> Comparison:
    made = [
        make_run(folder / name / f"seed{seed}", seed=seed, vqa=vqa, nll=1 - vqa)
        for name, values in VQA.items()
        for seed, vqa in enumerate(values)
    ]
    return compare_runs(made, Choices(**choices))  # type: ignore[arg-type]


def test_the_csv_holds_means_intervals_and_tests(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(_compared(tmp_path).csv())))
    row = next(r for r in rows if r["variant"] == "tove" and r["metric"] == "test/vqa/accuracy")
    assert (row["n"], row["by_seed"], row["baseline"]) == ("3", "0:0.7 1:0.75 2:0.71", "clip-only")
    assert float(row["mean"]) == pytest.approx(0.72)
    low, high = stats.t.interval(0.95, 2, loc=0.72, scale=stats.sem(VQA["tove"]))
    assert (float(row["ci95_low"]), float(row["ci95_high"])) == pytest.approx((low, high))
    p = {name: stats.ttest_rel(VQA[name], VQA["clip-only"]).pvalue for name in ("tove", "merged")}
    assert float(row["p_paired_t"]) == pytest.approx(p["tove"])
    assert float(row["p_holm"]) == pytest.approx(max(p["tove"], 2 * min(p.values())))
    base = next(r for r in rows if r["variant"] == "clip-only" and r["metric"] == "test/vqa/accuracy")
    assert base["difference"] == base["p_holm"] == ""
    assert {"cost/train_hours", "cost/ms_vision", "test/vqa/family/size"} <= {r["metric"] for r in rows}
    assert not any(r["metric"].startswith("train/") for r in rows)


def test_a_score_that_a_run_lacks_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "tove" / "seed9"
    make_run(folder, seed=9, metrics={"test/nll/nll": None})
    found = compare_runs([folder], Choices())
    assert found.missing() == {} and [score.key for score in found.scores] == [
        "test/vqa/accuracy",
        "test/vqa/family/size",
    ]
    other = make_run(tmp_path / "clip" / "seed9", seed=9)
    assert compare_runs([folder, other], Choices()).missing() == {"test/nll/nll": ["tove, seed 9 (not finite)"]}


def test_nothing_finished_is_refused_and_says_why(tmp_path: Path) -> None:
    (make_run(tmp_path / "r") / "metrics.json").unlink()
    with pytest.raises(
        ConfigError, match="None of 2 folders is a finished run: '.*r' failed or still going: .*; '.*log'"
    ):
        compare_runs([tmp_path / "r"], Choices(), strays=[tmp_path / "log"])


def test_mixed_worlds_are_refused_unless_allowed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", data={"seed": 1})]
    with pytest.raises(ConfigError, match="differ in data: data.seed is 0 in 'a' and 1 in 'b'"):
        compare_runs(runs, Choices())
    assert [one.key for one in compare_runs(runs, Choices(allow_mixed=True)).mixed] == ["data.seed"]


def test_the_baseline_is_the_one_that_is_named_or_looks_like_one() -> None:
    assert choose_baseline(["a", "x/clip-only"], None) == "x/clip-only"
    assert choose_baseline(["a", "b"], None) == "a" and choose_baseline(["a", "b"], "b") == "b"
    with pytest.raises(ConfigError, match="baseline is 'c', which is not a variant here; they are a, b"):
        choose_baseline(["a", "b"], "c")


def test_the_best_goes_by_the_direction_of_the_score(tmp_path: Path) -> None:
    found = _compared(tmp_path)
    best = {score.key: found.best(score) for score in found.scores}
    assert best["test/vqa/accuracy"] == pytest.approx(0.72) and best["test/nll/nll"] == pytest.approx(0.28)
    assert found.best(score_of("cost/gflop_vision", [])) is None  # all have the same


def test_the_front_is_what_nothing_beats_in_both() -> None:
    places = {"cheap": (1.0, 0.5), "worse": (2.0, 0.4), "same": (2.0, 0.5), "good": (3.0, 0.9), "dear": (4.0, 0.9)}
    assert front(places, better=1) == ["cheap", "good"]
    assert front(places, better=-1) == ["cheap", "worse"]
