"""Which files an ablation is made of, in which order, and what a hybrid starts from."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks import ablations
from benchmarks.ablations import CONFIGS, names, run_of
from benchmarks.runs import Run


def files(method: str, name: str) -> list[str]:
    arguments = run_of(method, name, seed=1, scale="smoke", root=Path("r")).arguments
    given = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--config"]
    return [Path(file).relative_to(CONFIGS).as_posix() for file in given]


def test_overlays_come_in_the_order_that_they_ask_for_and_the_scale_last() -> None:
    base = ["movekd/tabletop-stage2.yaml", "movekd/one-stage.yaml"]
    chain = [f"movekd/ablations/{name}.yaml" for name in ("no-mole", "no-kd", "text-only")]
    assert files("movekd", "text-only") == [*base, *chain, "scales/smoke.yaml"]
    assert files("movekd", "base") == [*base, "scales/smoke.yaml"]


def test_a_hybrid_starts_from_toves_run_of_its_seed_and_scale() -> None:
    arguments = run_of("hybrid", "from-merged", seed=1, scale="smoke", root=Path("r")).arguments
    start = arguments[arguments.index("--model.init_args.init_from") + 1]
    assert start == "r/smoke/tove/merge/seed1/merged/checkpoints/last.ckpt"


def test_merging_into_mole_is_a_run_of_tove() -> None:
    assert files("hybrid", "merge-into-mole")[0] == "tove/tabletop.yaml"


@pytest.mark.parametrize("method", ["tove", "movekd", "hybrid"])
def test_the_matrix_has_rows_for_files_that_are_there_alone(method: str) -> None:
    rows = ablations.MATRIX[method]
    known = set(names(method))
    for key in ("after", "bases", "starts"):
        assert set(rows.get(key, {})) <= known, key
    for name, before in rows.get("after", {}).items():
        assert set(before) < known and name not in before, name


def test_a_row_is_a_command_that_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ablations", "movekd", "text-only", "--seed", "2", "--scale", "full", "--show"])
    ablations.main()
    words = shlex.split(capsys.readouterr().out)
    run = run_of("movekd", "text-only", seed=2, scale="full")
    assert words == ["visexpert", *run.arguments, "--run", str(run.folder)] and words[1] == "fit"


@pytest.mark.parametrize("method", ["tove", "movekd", "hybrid"])
def test_every_ablation_names_files_that_are_there(method: str) -> None:
    assert names(method)
    for name in names(method):
        assert all((CONFIGS / file).is_file() for file in files(method, name)), name


@pytest.mark.parametrize(("code", "recorded"), [(143, False), (130, False), (1, True)])
def test_a_stopped_ablation_is_neither_done_nor_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, recorded: bool
) -> None:
    def run_here(run: Run) -> int:
        run.folder.mkdir(parents=True)
        (run.folder / "log.txt").write_text("visexpert: the reason\n", encoding="utf-8")
        return code

    monkeypatch.setattr(ablations, "run_here", run_here)
    monkeypatch.setattr("sys.argv", ["ablations", "tove", "base", "--scale", "smoke", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        ablations.main()
    folder = tmp_path / "smoke" / "tove" / "base" / "seed0"
    assert (folder / "failed").is_file() is recorded and not (folder / "done").exists()
    assert recorded or ended.value.code == code
