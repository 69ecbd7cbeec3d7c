"""MoVE-KD through the command line: a run, its folder, its scores again, and opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from visexpert.cli import main
from visexpert.methods import MoVEKD
from visexpert.runs import load_run
from visexpert.training import build_cli

SMOKE = Path(__file__).parents[3] / "configs" / "movekd" / "smoke.yaml"


def scores_of(run: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return scores


def test_a_run_is_scored_alike_again_and_opens(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(scenes))
    run = tmp_path / "run"
    main(["fit", "--config", str(SMOKE), "--run", str(run), "--model.init_args.evaluation.meteor", "false"])
    first = scores_of(run)
    watched = {f"train/{kind}/{name}" for kind, names in WATCHED.items() for name in names}
    assert watched | {"train/kd_loss", "train/balance_loss", "train/text_loss", "val/kd_loss"} <= first.keys()
    assert {f"val/kd/{name}" for name in WATCHED["weight"]} <= first.keys()
    figures = {"loss_curves", "distillation_curves", "cls_attention", "router_maps", "router_usage"}
    assert {path.stem for path in (run / "figures").iterdir()} == figures | {"captions"}
    main(["test", str(run)])
    again = scores_of(run)
    scored = [name for name in first if name.startswith("test/")]
    assert scored and all(again[name] == first[name] for name in scored)
    opened = load_run(run)
    assert isinstance(opened.model, MoVEKD) and opened.steps == 8
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    own = opened.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert {key.split(".")[0] for key in own.keys() - state.keys()} == {"hub", "anchor"}


WATCHED = {
    "variance": ("student", "clip", "semantic", "edges"),
    "entropy": ("teachers", "tokens"),
    "weight": ("clip", "semantic", "edges"),
    "peak": ("tokens",),
}


def test_a_run_begins_with_its_start_and_goes_on_without_it(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(scenes))
    overlay, run, start = tmp_path / "overlay.yaml", tmp_path / "run", tmp_path / "start.ckpt"
    overlay.write_text(ENCODER_ONLY.format(start=start), encoding="utf-8")
    fit = ["fit", "--config", str(SMOKE), "--config", str(overlay), "--run", str(run)]

    def refused(*more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*fit, *more])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visexpert: ")]
        return line.removeprefix("visexpert: ")

    assert refused().startswith(f"init_from: there is no checkpoint {start}; let the run that it belongs to finish")
    assert "there is no checkpoint" in refused("--ckpt_path", "last")  # there is no last one either
    assert not run.exists()  # refused before any scene was rendered
    built = build_cli(fit[1:], run=False).model
    torch.save({"state_dict": built.state_dict()}, start)
    main(fit)
    start.unlink()
    main([*fit, "--ckpt_path", "last", "--trainer.max_steps", "2"])
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert f"init_from: {start}" in (run / "config.yaml").read_text(encoding="utf-8")
    main(["validate", str(run)])
    assert "val/kd_loss" in scores_of(run)
    message = refused("--model.init_args.heads.alignment", "fixed", "--ckpt_path", str(last))
    assert message.startswith(f"The checkpoint {last} is of another model: missing")


ENCODER_ONLY = """
model:
  init_args:
    language: {{class_path: visexpert.language.NoLanguage}}
    lm_weight: 0.0
    init_from: {start}
data: {{init_args: {{texts: {{train: {{}}}}}}}}
test_after_fit: false
trainer: {{max_steps: 1, limit_val_batches: 1}}
"""
