"""``visexpert compare`` from its arguments to the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.compare.made import make_run
from visexpert.commands.compare import run
from visexpert.errors import ConfigError


def test_a_folder_of_variants_just_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, vqa in (("clip-only", 0.5), ("tove", 0.7)):
        for seed in (0, 1):
            make_run(tmp_path / "runs" / name / f"seed{seed}", seed=seed, vqa=vqa + seed / 100)
    (make_run(tmp_path / "runs" / "died" / "seed0") / "metrics.json").unlink()
    (tmp_path / "runs" / "log.txt").write_text("x", encoding="utf-8")
    run([*map(str, sorted((tmp_path / "runs").iterdir())), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "2 variants of 4 runs, against 'clip-only':" in printed
    for words in ("left out: ", "died/seed0: failed or still going", "log.txt: is not a run"):
        assert words in printed, words
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "results.csv", "figures"}


def test_groups_name_variants_and_bring_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a1", seed=1)
    make_run(tmp_path / "a2", seed=2, model={"top_k": 1})
    make_run(tmp_path / "b" / "seed1", seed=1, model={"top_k": 2})
    arguments = ["--group", f"first={tmp_path}/a*", "--group", f"second={tmp_path}/b", "--out", str(tmp_path / "out")]
    run([*arguments, "--baseline", "second"])
    assert "2 variants of 3 runs, against 'second':" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| first | model.top_k | null: seed 1; 1: seed 2 |" in text
    with pytest.raises(ConfigError, match="'.*a1' is in two groups, 'first' and 'third'"):
        run([*arguments, "--group", f"third={tmp_path}/a1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run was given; name folders of runs, or groups"),
        (["--group", "ToVE"], "'ToVE' is not NAME=GLOB, such as"),
        (["--group", "ToVE=none/*"], "nothing matches 'none/\\*' of 'ToVE'"),
        (["none"], "'none' does not exist"),
        (["--wrong"], "unrecognized arguments: --wrong; see visexpert compare --help"),
    ],
)
def test_bad_arguments_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run([*arguments, "--out", "out"])
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "out").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="--out '.*out' is a file; name a folder"):
        run([str(tmp_path / "a"), "--out", str(tmp_path / "out")])
