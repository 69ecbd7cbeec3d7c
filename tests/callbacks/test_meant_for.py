"""What a run is meant for: refused before training, in one sentence, where an export would refuse it afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands.test_export import LLAVA, SMOKE
from visexpert.callbacks import MeantFor
from visexpert.callbacks.meant_for import check_exportable
from visexpert.cli import main
from visexpert.errors import ConfigError
from visexpert.runs import build

GPT2 = {
    "class_path": "visexpert.language.PrefixLM",
    "init_args": {"config": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 2}},
}
TILED = {"class_path": "visexpert.vision.TiledClipEncoder"}


def config_with(**settings: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    config["model"]["init_args"] |= copy.deepcopy(LLAVA) | settings
    return config


def model_with(**settings: Any) -> Any:
    return build(config_with(**settings), SMOKE)[0]


def test_a_model_in_llavas_form_passes_before_its_experts_are_merged() -> None:
    model = model_with()
    assert model.hub.attached
    check_exportable(model, ["llava", "hf", "open_clip", "onnx"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"language": GPT2}, "embed_tokens.*GPT2"),
        ({"projector": {"kind": "linear", "norm": False}}, "mlp2x_gelu"),
        ({"projector": {"kind": "mlp2x_gelu", "norm": True}}, "projector.norm: true"),
        ({"language": {"class_path": "visexpert.language.NoLanguage"}}, "NoLanguage"),
    ],
)
def test_what_llava_has_no_place_for(settings: dict[str, Any], named: str) -> None:
    model = model_with(**settings)
    check_exportable(model, ["hf"])
    with pytest.raises(ConfigError, match=named):
        check_exportable(model, ["hf", "llava"])


def test_tiles_have_no_place_in_llava() -> None:
    clip = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))["model"]["init_args"]["clip"]
    model = model_with(clip=clip | TILED)
    check_exportable(model, ["hf"])
    with pytest.raises(ConfigError, match=r"TiledClipEncoder \(tiles\)"):
        check_exportable(model, ["llava"])


def test_an_unknown_format() -> None:
    with pytest.raises(ConfigError, match=r"coreml.*hf, open_clip"):
        MeantFor(formats=["hf", "coreml"])


def test_a_fit_is_refused_before_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    config = config_with(language=GPT2)
    meant = {"class_path": "visexpert.callbacks.MeantFor", "init_args": {"formats": ["llava"]}}
    config["trainer"]["callbacks"] = [meant]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(tmp_path / "given.yaml"), "--run", str(tmp_path / "run")])
    assert end.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("visexpert: ")]
    assert "embed_tokens" in said and "llama" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


TIMM = {
    "class_path": "visexpert.vision.TimmEncoder",
    "init_args": {"model": "vit_tiny_patch16_224", "image_size": 32, "arguments": {"depth": 2}},
}


@pytest.mark.parametrize("name", ["hf", "open_clip", "visexpert"])
def test_a_format_that_the_encoder_cannot_be_written_in_is_refused_before_training(name: str) -> None:
    model = model_with(clip=TIMM)
    check_exportable(model, ["native", "onnx", "torch_export"])
    with pytest.raises(ConfigError, match=f"format {name} .*TimmEncoder.*native, onnx or torch_export"):
        check_exportable(model, ["native", name])
