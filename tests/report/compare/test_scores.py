"""Scores by their keys, and what training took, with what it started from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.compare.made import make_run, write_environment
from visexpert.errors import ConfigError
from visexpert.report.compare.record import read_run
from visexpert.report.compare.scores import choose_scores, score_of, skill_groups, with_costs

NEW = {"cost/train_images": 41.0, "cost/train_gflop": 100.0, "cost/train_gflop_live": 300.0}


def _costs(folder: Path) -> dict[str, float]:
    metrics = with_costs(read_run(folder)).metrics
    return {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith("cost/")}


def test_what_was_not_counted_is_derived_or_left_out(tmp_path: Path) -> None:
    costs = _costs(make_run(tmp_path / "r", trainer={"accumulate_grad_batches": 2}))
    assert costs["ms_vision"] == 2.0 and costs["train_hours"] == 0.5
    assert costs["train_images"] == costs["all_train_images"] == 10 * 4 * 2
    assert "train_gflop" not in costs and "all_train_gflop" not in costs


def test_a_start_is_added(tmp_path: Path) -> None:
    start = make_run(tmp_path / "start", metrics=NEW)
    (start / "checkpoints").mkdir()
    run = make_run(tmp_path / "r", metrics=NEW, model={"init_from": str(start / "checkpoints" / "last.ckpt")})
    again = make_run(tmp_path / "again", metrics=NEW, model={"init_from": str(run / "checkpoints" / "last.ckpt")})
    assert _costs(run)["train_gflop"] == 100 and _costs(run)["all_train_gflop"] == 200
    assert _costs(again)["all_train_gflop_live"] == 900 and _costs(again)["all_train_hours"] == 1.5


def test_a_start_that_is_gone_is_not_counted_as_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", metrics=NEW, model={"init_from": str(tmp_path / "gone/checkpoints/last.ckpt")})
    assert "all_train_gflop" not in _costs(run)
    bare = make_run(tmp_path / "bare", metrics=NEW, model={"init_from": str(tmp_path / "weights.safetensors")})
    assert _costs(bare)["all_train_gflop"] == 100


def test_a_merge_is_counted_by_its_own_steps_and_with_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    merged = make_run(run / "merged", metrics={"cost/steps": 16.0})
    (merged / "merge.json").write_text(json.dumps({"steps": 6, "lr": 0.1, "weights": "x"}), encoding="utf-8")
    assert read_run(merged).settings["merge.lr"] == 0.1
    assert _costs(merged)["train_images"] == 24 and _costs(merged)["all_train_images"] == 64
    assert _costs(merged)["all_train_hours"] == 1.0


@pytest.mark.parametrize("retuned", [0, 5])
def test_detaching_trains_only_where_it_re_tunes(tmp_path: Path, retuned: int) -> None:
    detached = make_run(make_run(tmp_path / "r") / "detached")
    facts = {"settings": {"retune_steps": retuned, "keep": 1}, "kept": ["depth"]}
    (detached / "detachment.json").write_text(json.dumps(facts), encoding="utf-8")
    assert _costs(detached)["train_images"] == 4 * retuned
    assert _costs(detached)["all_train_images"] == 40 + 4 * retuned


def test_a_folder_that_only_scored_another_run_has_trained_nothing(tmp_path: Path) -> None:
    start = make_run(tmp_path / "start")
    folder = make_run(tmp_path / "r")
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").unlink()
    checkpoint = f"ckpt_path: {start}/checkpoints/last.ckpt\n"
    (folder / "config.test.yaml").write_text(config + checkpoint, encoding="utf-8")
    write_environment(folder, test={"seed": 0})
    assert _costs(folder)["train_hours"] == 0 and _costs(folder)["all_train_hours"] == 0.5


def test_a_run_that_starts_from_itself_ends_the_search(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", model={"init_from": str(tmp_path / "r" / "checkpoints" / "last.ckpt")})
    assert "all_train_hours" not in _costs(folder)


@pytest.mark.parametrize(
    ("key", "values", "better", "percent"),
    [
        ("test/vqa/accuracy", [0.1, 0.9], 1, True),
        ("test/nll/kind/dense", [0.1, 0.9], -1, False),
        ("test/caption/cider", [0.1, 0.9], 1, False),
        ("test/pope/yes_ratio", [0.5], 0, True),
        ("test/pope/unparsable", [0.0], -1, False),
        ("val/nmse", [0.2], -1, False),
        ("test/caption/meteor", [25.0], 1, False),
    ],
)
def test_scores_by_their_keys(key: str, values: list[float], better: int, percent: bool) -> None:
    score = score_of(key, values)
    assert (score.better, score.percent) == (better, percent)


def test_scores_are_chosen_by_key_or_by_what_is_there() -> None:
    known = ["test/nll/nll", "test/vqa/accuracy", "test/own/score", "val/nll/nll"]
    assert choose_scores(known, [], split="test") == ["test/vqa/accuracy", "test/nll/nll"]
    assert choose_scores(known, ["own/score", "val/nll/nll"], split="test") == ["test/own/score", "val/nll/nll"]
    assert choose_scores(["test/own/score", "train/loss"], [], split="test") == ["test/own/score"]
    with pytest.raises(ConfigError, match="No run has a score 'vqa'; there are test/vqa/accuracy and more"):
        choose_scores(known, ["vqa"], split="test")


def test_skills_are_grouped_by_task() -> None:
    keys = ["test/vqa/family/size", "test/slots/slot/color", "test/probe/depth", "test/nll/kind/vqa", "val/probe/x"]
    assert skill_groups(keys, split="test") == {
        "vqa": ["test/vqa/family/size"],
        "slots": ["test/slots/slot/color"],
        "probe": ["test/probe/depth"],
    }


def test_neighbors_are_headlines_and_skills_as_the_alignment_is() -> None:
    keys = ["test/alignment/student/image_to_text/R1", "test/knn/frozen", "test/knn/student", "test/knn/a/b"]
    assert choose_scores(keys, [], split="test") == ["test/knn/student", "test/knn/frozen"]
    assert skill_groups(keys, split="test") == {"alignment": keys[:1], "knn": keys[1:3]}
    score = score_of("test/knn/student", [0.2, 0.9])
    assert (score.title, score.better, score.percent) == ("kNN", 1, True)
