"""The matrix of both methods: what its rows are made of, in which order, and the figure of shares."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from benchmarks.ablations import run_of
from benchmarks.results_comparison import MATRIX, SHARES, done, matrix_runs, share_figure, share_runs, stages
from visexpert.report import ResultRow


def test_a_hybrid_is_fitted_after_the_run_that_it_goes_on_from() -> None:
    first, hybrids, _ = stages([0, 1])
    fitted = {str(run.folder) for run in first}
    starts = [
        run.arguments[run.arguments.index("--model.init_args.init_from") + 1]
        for run in hybrids
        if "--model.init_args.init_from" in run.arguments
    ]
    assert len(starts) == 4  # two hybrids, two seeds
    assert all(any(start.startswith(f"{folder}/") for folder in fitted) for start in starts)


def test_every_row_scores_a_run_that_some_stage_fits() -> None:
    fitted = {run.folder for runs in stages([0]) for run in runs}
    for run in (*matrix_runs([0]), *share_runs([0])):
        assert {run.folder, run.folder.parent} & fitted, run.variant


def test_the_matrix_shares_its_runs_with_the_ablations() -> None:
    folders = {run.folder for run in matrix_runs([2])}
    assert run_of("movekd", "base", seed=2, scale="default").folder in folders
    assert run_of("tove", "merge", seed=2, scale="default").folder / "merged" in folders
    longer = next(run for run in matrix_runs([2]) if run.variant == "fine-tuned CLIP for 800 steps")
    assert longer.folder.parts[-2] == "text-only-800-steps"
    assert longer.arguments[-4:] == MATRIX["fine-tuned CLIP for 800 steps"].extra


def test_what_is_still_going_has_no_row(tmp_path: Path) -> None:
    (run,) = [run for run in matrix_runs([0]) if run.variant == "ToVE merged"]
    moved = type(run)(tmp_path / "seed0" / "merged", run.arguments, run.seed, run.variant)
    moved.folder.mkdir(parents=True)
    (moved.folder / "metrics.json").write_text("{}")
    assert done([moved]) == []
    (tmp_path / "seed0" / "done").write_text("1 s")
    assert done([moved]) == [moved]


def test_the_figure_of_shares_is_drawn_from_what_there_is(tmp_path: Path) -> None:
    rows = [
        ResultRow(f"{share} %, ToVE", seed, 400, 1, 1.0, 1.0, {"test/vqa/accuracy": 0.5, "test/nll/kind/dense": 0.4})
        for share in SHARES
        for seed in (0, 1)
    ]
    path = share_figure(rows, tmp_path / "shares.png")
    with Image.open(path) as image:
        assert image.width > image.height
