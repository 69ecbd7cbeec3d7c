"""MoVE-KD through the command line: a run, its folder, its scores again, and opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from visexpert.cli import main
from visexpert.methods import MoVEKD
from visexpert.runs import open_run

SMOKE = Path(__file__).parents[2] / "configs" / "movekd" / "smoke.yaml"


def scores_of(run: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return scores


def test_a_run_is_scored_alike_again_and_opens(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(scenes))
    run = tmp_path / "run"
    main(["fit", "--config", str(SMOKE), "--run", str(run), "--model.init_args.meteor", "false"])
    first = scores_of(run)
    watched = {f"train/{kind}/{name}" for kind, names in WATCHED.items() for name in names}
    assert watched | {"train/kd_loss", "train/balance_loss", "train/text_loss"} <= first.keys()
    main(["test", "--run", str(run)])
    again = scores_of(run)
    scored = [name for name in first if name.startswith("test/")]
    assert scored and all(again[name] == first[name] for name in scored)
    opened = open_run(run)
    assert isinstance(opened.model, MoVEKD) and opened.steps == 8
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    own = opened.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert {key.split(".")[0] for key in own.keys() - state.keys()} == {"hub", "anchor"}


WATCHED = {"variance": ("student", "clip", "semantic", "edges"), "entropy": ("teachers", "tokens")}
