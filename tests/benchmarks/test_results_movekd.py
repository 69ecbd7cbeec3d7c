"""The page of MoVE-KD: what its rows are made of, and what is scored of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ablations import names
from benchmarks.results_movekd import ABLATIONS, MAIN, STEPS, main_runs, row_with_probes, scarce_runs, two_stages
from benchmarks.runs import Run

COST = {"cost/steps": 400.0, "cost/parameters_trained": 9.0, "cost/gflop_vision": 0.5, "cost/images_per_s": 70.0}


def option(run: Run, name: str) -> str:
    """The last value that a run's arguments give an option."""
    arguments = list(run.arguments)
    last = len(arguments) - 1 - arguments[::-1].index(name)
    return arguments[last + 1]


def finished(folder: Path, **more: float) -> Run:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({**COST, "test/loss": 0.25, "val/loss": 0.5, **more}))
    (folder / "probes.json").write_text(json.dumps({"probe/depth": 0.75}))
    return Run(folder, (), 1, "base")


def test_every_row_is_an_ablation_that_there_is() -> None:
    known = set(names("movekd"))
    assert {*ABLATIONS.values(), *(name for name, *_ in MAIN.values())} <= known


def test_no_two_rows_share_a_folder() -> None:
    runs = [*main_runs([0, 1]), *scarce_runs([0, 1]), *two_stages(0), *two_stages(1)]
    assert len({run.folder for run in runs}) == len(runs)


def test_two_stages_take_the_steps_of_one_and_the_second_starts_from_the_first() -> None:
    first, second = two_stages(0)
    assert sum(int(option(run, "--trainer.max_steps")) for run in (first, second)) == STEPS
    assert option(second, "--model.init_args.init_from").startswith(f"{first.folder}/")
    assert (
        option(first, "--model.init_args.optimizer.clip_lr")
        == option(first, "--model.init_args.optimizer.language_lr")
        == "0"
    )


def test_what_was_distilled_first_starts_from_a_main_row_of_the_same_seed() -> None:
    fitted = {run.folder for run in main_runs([0, 1])}
    starts = [run for run in scarce_runs([0, 1]) if "--model.init_args.init_from" in run.arguments]
    assert len(starts) == 12  # two ways on 5, 10, 25 % of the scenes, two seeds
    for run in starts:
        folder = Path(option(run, "--model.init_args.init_from")).parents[1]
        assert folder in fitted and folder.name == run.folder.name == f"seed{run.seed}"


def test_a_row_has_test_scores_probes_and_speed_and_nothing_of_validation(tmp_path: Path) -> None:
    row = row_with_probes(finished(tmp_path / "run", **{"train/images_per_s": 30.0}))
    assert (row.variant, row.seed, row.steps, row.parameters) == ("base", 1, 400, 9)
    extra = {"test/loss": 0.25, "student/probe/depth": 0.75, "train/images_per_s": 30.0}
    assert {key: value for key, value in row.scores.items() if not key.startswith("cost/")} == extra


def test_a_run_that_was_interrupted_after_its_last_step_has_no_speed(tmp_path: Path) -> None:
    row = row_with_probes(finished(tmp_path / "run"))
    assert "train/images_per_s" not in row.scores
    assert row.scores["student/probe/depth"] == pytest.approx(0.75)
