"""The whole way on the smoke configs: fit, detach, merge, export, reload, caption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from visexpert.cli import main
from visexpert.methods import ToVE
from visexpert.runs import load_run

CONFIGS = Path(__file__).parents[1] / "configs" / "tove"


def test_from_fit_to_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["visexpert"])
    run = tmp_path / "run"
    configs = ["--config", str(CONFIGS / "smoke.yaml"), "--config", str(CONFIGS / "smoke-merge.yaml")]
    main(["fit", *configs, "--run", str(run)])

    models = [tove(folder) for folder in (run, run / "detached", run / "merged")]
    hubs = [model.hub.names for model in models]
    assert len(hubs[0]) == 2 and len(hubs[1]) == 1 and hubs[2] == ()
    assert set(hubs[1]) < set(hubs[0])
    facts = json.loads((run / "merged" / "merge.json").read_text(encoding="utf-8"))
    assert set(facts["experts"]) == set(hubs[1])  # merging began where detachment ended
    folders = (run, run / "detached", run / "merged")
    scores = [json.loads((folder / "metrics.json").read_text("utf-8")) for folder in folders]
    assert all("test/nll/nll" in metrics for metrics in scores)
    gflop = [metrics["cost/gflop_vision"] for metrics in scores]
    assert gflop[0] > gflop[1] > gflop[2]

    out = tmp_path / "clip-hf"
    main(["export", str(run), "--format", "hf", "--out", str(out)])
    fidelity = json.loads((out / "fidelity.json").read_text(encoding="utf-8"))
    assert fidelity
    from transformers import CLIPVisionModel

    pixels = torch.rand(2, 3, 32, 32)
    expected = models[-1].clip.model(pixels, output_hidden_states=True).hidden_states[-2]
    reloaded = CLIPVisionModel.from_pretrained(out)(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(reloaded, expected, atol=1e-5)

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    for folder in folders:
        main(["caption", str(folder), str(tmp_path / "red.png"), "--json"])
        answers = json.loads(capsys.readouterr().out)
        assert len(answers) == 1


def tove(folder: Path) -> ToVE:
    model = load_run(folder).model
    assert isinstance(model, ToVE)
    return model
