"""Finding run folders, and telling finished runs from others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.compare.made import CONFIG, make_run, write_environment
from visexpert.errors import ConfigError
from visexpert.report.compare.record import differences, find_runs, flatten, natural, read_run, without_seed

FIT = {"time": "2026-01-02T03:04:05+00:00", "seed": 0}


def test_folders_of_folders_are_searched_and_runs_are_not(tmp_path: Path) -> None:
    for name in ("b/seed10", "b/seed2", "a"):
        make_run(tmp_path / name)
    make_run(tmp_path / "a" / "merged")
    make_run(tmp_path / "a" / "without" / "depth")
    (tmp_path / "notes").mkdir()
    (tmp_path / "log.txt").write_text("x", encoding="utf-8")
    given = sorted(tmp_path.iterdir())
    runs, strays = find_runs([*given, tmp_path / "a"])
    assert runs == [tmp_path / "a", tmp_path / "b" / "seed2", tmp_path / "b" / "seed10"]
    assert strays == [tmp_path / "log.txt", tmp_path / "notes"]
    assert find_runs([tmp_path / "a"], phases=True)[0] == [tmp_path / "a", tmp_path / "a" / "merged"]


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing' does not exist; give folders that"):
        find_runs([tmp_path / "nothing"])


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "r", seed=4, metrics={"test/nll/nll": None}, test={"tokenizer": "abc"}))
    assert run.problem == "" and run.seed == 4
    assert run.metrics["test/vqa/accuracy"] == 0.5 and run.not_finite == ("test/nll/nll",)
    assert run.fact("tokenizer") == "abc" and run.fact("machine", "cpu") == "A" and run.fact("data", "images") is None


def test_why_a_run_cannot_be_compared_is_said(tmp_path: Path) -> None:
    def problem(name: str, **stages: object) -> str:
        write_environment(make_run(tmp_path / name), **stages)
        return read_run(tmp_path / name).problem

    failed = {**FIT, "outcome": "failed", "error": "OutOfMemoryError: 2 GiB"}
    assert problem("failed", fit=failed).startswith("failed in training: OutOfMemoryError: 2 GiB; last logged step 9")
    assert problem("running", fit={**FIT, "outcome": "running"}).startswith("still training, or killed: began 2026-01")
    assert problem("fine", fit={**FIT, "outcome": "finished"}) == ""
    (make_run(tmp_path / "old") / "metrics.json").unlink()
    assert read_run(tmp_path / "old").problem.startswith("failed or still going: there is no metrics.json; last logged")
    (tmp_path / "old" / "metrics.csv").unlink()
    assert read_run(tmp_path / "old").problem.endswith("it logged no step")


def test_a_run_without_scores_of_the_split_says_how_to_get_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    assert read_run(folder, split="val").problem == (f"has no val scores; score it by `visexpert validate {folder}`")
    (folder / "metrics.json").write_text(json.dumps({"val/nll/nll": 1.0}), encoding="utf-8")
    assert "visexpert test " in read_run(folder).problem
    stages = {"fit": {**FIT, "outcome": "finished"}, "test": {"outcome": "failed", "error": "KeyError: 'x'"}}
    write_environment(folder, **stages)
    assert read_run(folder).problem == "failed in scoring: KeyError: 'x'"


def test_a_run_that_was_scored_early_is_told_unless_it_ended_by_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", metrics={"cost/steps": 7.0})
    assert read_run(folder).problem == "scored after 7 of 10 steps: it was interrupted"
    write_environment(folder, fit={**FIT, "outcome": "finished"})  # by a budget, or early stopping
    assert read_run(folder).problem == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.json", "{"), ("metrics.json", "[1]"), ("environment.json", "3"), ("config.yaml", "a: [")],
)
def test_a_damaged_file_is_a_problem_and_no_crash(tmp_path: Path, name: str, content: str) -> None:
    folder = make_run(tmp_path / "r")
    (folder / name).write_text(content, encoding="utf-8")
    assert read_run(folder).problem.startswith("cannot be read: ")


def test_a_configuration_runs_no_code(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    (folder / "config.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path}/made']", encoding="utf-8")
    assert read_run(folder).problem.startswith("cannot be read: ")
    assert not (tmp_path / "made").exists()


def test_numbers_sort_as_numbers() -> None:
    paths = [Path("a/seed10"), Path("a/seed9"), Path("10"), Path("b")]
    assert sorted(paths, key=natural) == [Path("10"), Path("a/seed9"), Path("a/seed10"), Path("b")]


def test_objects_are_named_by_their_class_and_arguments_lie_below() -> None:
    settings = flatten(CONFIG)
    assert settings["model"] == "ToVE" and settings["data"] == "TabletopData"
    assert settings["model.language"] == "CrossAttentionDecoder" and settings["model.language.width"] == 64
    assert settings["model.experts"] == "depth" and settings["model.experts.depth.source"] == "zoo:depth"
    assert not {"seed_everything", "run", "trainer.logger"} & settings.keys()


def test_callbacks_in_a_list_are_settings_by_their_names() -> None:
    budget = {"class_path": "visexpert.callbacks.TrainingBudget", "init_args": {"gflop": 5.0, "seconds": None}}
    settings = flatten({"trainer": {"callbacks": [budget]}})
    assert settings["trainer.callbacks.TrainingBudget.gflop"] == 5.0
    assert "trainer.callbacks" in differences([settings, flatten({"trainer": {"callbacks": None}})])


def test_seeds_and_places_make_no_difference_but_experts_do() -> None:
    other: dict[str, Any] = copy.deepcopy(CONFIG)
    other["seed_everything"], other["run"] = 3, "elsewhere"
    other["data"]["init_args"]["order_seed"] = 9
    assert differences([flatten(CONFIG), flatten(other)]) == {}
    other["model"]["init_args"]["experts"]["edges"] = other["model"]["init_args"]["experts"]["depth"]
    assert differences([flatten(CONFIG), flatten(other)]) == {"model.experts": ["depth", "depth, edges"]}


def test_a_run_without_experts_differs_from_one_with_experts() -> None:
    other: dict[str, Any] = copy.deepcopy(CONFIG)
    other["model"]["init_args"]["experts"] = {}
    assert differences([flatten(CONFIG), flatten(other)]) == {"model.experts": ["depth", "none"]}


def test_a_setting_of_a_later_version_is_no_difference() -> None:
    assert differences([{"a": 1}, {"a": 1, "new": 2}]) == {}
    assert differences([{"a": 1}, {"a": 2, "new": 2}, {}]) == {"a": [1, 2, None]}
    assert differences([{"a": None}, {"a": 0}]) == {"a": [None, 0]}


def test_paths_lose_the_number_of_the_seed_only() -> None:
    assert without_seed("runs/tove/seed12/checkpoints/last.ckpt") == "runs/tove/seed*/checkpoints/last.ckpt"
    assert without_seed("runs/tove-s3/x") == "runs/tove-s*/x"
    assert without_seed("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
    assert without_seed("runs/stage1/x") == "runs/stage1/x"
