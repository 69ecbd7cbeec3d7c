"""``visexpert demo``, but for the two fits, which `make check-wheel` carries out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from visexpert import demo, interruption
from visexpert.cli import main

SCORES = {"clip-only": 2.0, "tove": 1.0}


@pytest.fixture
def fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Arguments of the fits, in place of which only their scores are written."""
    given: list[Sequence[str]] = []

    def fit(arguments: Sequence[str]) -> None:
        given.append(arguments)
        folder = Path(arguments[arguments.index("--run") + 1])
        folder.mkdir(parents=True)
        scores = {key: SCORES[folder.name] for key in demo.SCORES}
        (folder / "metrics.json").write_text(json.dumps(scores), encoding="utf-8")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("visexpert.training.run_lightning", fit)
    return given


def configs(arguments: Sequence[str]) -> list[str]:
    return [value for option, value in zip(arguments, arguments[1:], strict=False) if option == "--config"]


def test_it_runs_in_any_folder_with_shipped_configurations(
    fits: list[Sequence[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tove").mkdir()
    (tmp_path / "tove" / "demo.yaml").write_text("trainer: {max_steps: 1}\n", encoding="utf-8")  # anyone's own
    main(["demo", "--steps", "7"])
    clip_only, both = fits
    assert configs(clip_only) == configs(both) and len(configs(both)) == 2
    assert all(Path(path).is_file() and tmp_path not in Path(path).parents for path in configs(both))
    assert "--model.init_args.use=[]" in clip_only and "--model.init_args.use=[]" not in both
    assert both[both.index("--trainer.max_steps") + 1] == "7"
    out = "".join(capsys.readouterr().out.split())
    assert "runs/demo/tove/figures" in out
    card = Path(out[out.index("card:") + 5 : out.index("language.json")] + "language.json")
    assert card.is_file()


def test_the_smoke_scale_lies_over_the_others(fits: list[Sequence[str]], capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--smoke", "--run", "mine"])
    assert [Path(path).stem for path in configs(fits[1])] == ["tabletop", "demo", "smoke"]
    assert "mean nothing" in capsys.readouterr().out and Path("mine/tove/metrics.json").is_file()


def test_a_stopped_demo_names_no_option_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def stopped(arguments: Sequence[str]) -> None:
        with interruption.stoppable(go_on="go on with --ckpt_path last"):  # as every fit does
            told.append(interruption.hint())
        raise interruption.Interrupted(2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("visexpert.training.run_lightning", stopped)
    with pytest.raises(interruption.Interrupted):
        demo.run([])
    assert told and "--ckpt_path" not in told[0] and "same command" in told[0]
