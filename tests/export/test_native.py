"""The native format: load an encoder, export it, and get the files that its own library wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from tests.vision.test_encoder_families import TIMM, TRANSFORMERS, of_timm, of_transformers, shaken
from visexpert.errors import ConfigError, WeightsError
from visexpert.export import FORMATS, check_encoder, default_format, export_encoder
from visexpert.vision import ClipEncoder, MoLESettings, TimmEncoder, TransformersEncoder, VisionEncoder

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXT |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WHOLE: dict[str, tuple[Any, Any]] = {
    "clip": (hf.CLIPModel, hf.CLIPConfig),
    "siglip": (hf.SiglipModel, hf.SiglipConfig),
    "siglip2": (hf.Siglip2Model, hf.Siglip2Config),
}


def whole_folder(name: str, folder: Path) -> Path:
    """Write a model with a text tower, image processor and a file of a tokenizer."""
    model_class, config_class = WHOLE[name]
    vision = TRANSFORMERS[name].to_dict()
    shaken(model_class(config_class(text_config=TEXT, vision_config=vision))).save_pretrained(folder)  # type: ignore[operator]
    hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"of": "the source"}', encoding="utf-8")
    return folder


def must_be_equal(found: Path, source: Path) -> None:
    ours, theirs = load_file(found / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) and ours[key].dtype == value.dtype for key, value in theirs.items())


def loaded(encoder: VisionEncoder) -> VisionEncoder:
    encoder.load_weights()
    return encoder.eval()


def saved(encoder: VisionEncoder, folder: Path) -> Path:
    folder.mkdir()
    encoder.save(folder)
    return folder


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_weight_of_transformers_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    encoder = loaded(of_transformers(name, tmp_path / "in").encoder)
    out = saved(encoder, tmp_path / "out")
    must_be_equal(out, tmp_path / "in")
    own, written = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "in", out))
    assert written == own
    again = hf.AutoModel.from_pretrained(out)
    assert type(again) is type(encoder.model)


@pytest.mark.parametrize("name", TIMM)
def test_every_weight_of_timm_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    encoder = loaded(of_timm(name, tmp_path / "in", image_size=112).encoder)
    out = saved(encoder, tmp_path / "out")
    must_be_equal(out, tmp_path / "in")
    pixels = torch.rand(1, 3, 112, 112)
    models = [timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in (tmp_path / "in", out)]
    written = json.loads((out / "config.json").read_text())
    third = timm.create_model(name, checkpoint_path=out / "model.safetensors", **written["model_args"]).eval()
    with torch.no_grad():
        first, second, last = (model(pixels) for model in (*models, third))
    assert torch.equal(first, second) and torch.equal(first, last)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_keeps_its_text_tower_and_its_tokenizer(name: str, tmp_path: Path) -> None:
    source = whole_folder(name, tmp_path / "in")
    encoder = loaded(TransformersEncoder(source=str(source)))
    must_be_equal(saved(encoder, tmp_path / "same"), source)
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1)
    out = saved(encoder, tmp_path / "out")
    assert (out / "tokenizer.json").read_text(encoding="utf-8") == '{"of": "the source"}'
    model = WHOLE[name][0].from_pretrained(out)
    before, after = load_file(source / "model.safetensors"), model.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(after[key], value)]
    assert len(changed) == 1 and changed[0].startswith("vision_model.")


def test_a_clip_of_transformers_comes_out_with_its_text_tower(tmp_path: Path) -> None:
    source = whole_folder("clip", tmp_path / "in")
    must_be_equal(saved(loaded(ClipEncoder(source=str(source))), tmp_path / "out"), source)


def test_keys_with_the_prefix_of_transformers_4_keep_it(tmp_path: Path) -> None:
    encoder = of_transformers("siglip", tmp_path / "in").encoder
    path = tmp_path / "in" / "model.safetensors"
    save_file({f"vision_model.{key}": value for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    must_be_equal(saved(loaded(encoder), tmp_path / "out"), tmp_path / "in")


@pytest.mark.parametrize("name", ["siglip2", "whole siglip", "eva02_tiny_patch14_224"])
def test_the_export_is_proved_in_its_own_library(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In a fresh process of each library."""
    if name != "whole siglip":
        request.getfixturevalue("read_afresh")
    if name in TIMM:
        encoder = of_timm(name, tmp_path / "in", image_size=224).encoder
    elif name in TRANSFORMERS:
        encoder = of_transformers(name, tmp_path / "in").encoder
    else:
        encoder = TransformersEncoder(source=str(whole_folder("siglip", tmp_path / "in")), image_size=48)
    loaded(encoder)
    for parameter in encoder.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    found = export_encoder(encoder, tmp_path / "out")
    assert {"layer_minus_2", "layer_minus_1", "pooled"} == found.outputs.keys()
    assert all(entry["min_cosine"] >= 0.9999 for entry in found.outputs.values())
    facts = json.loads((tmp_path / "out" / "fidelity.json").read_text(encoding="utf-8"))
    assert facts["format"] == "native" and facts["reload"]["not_importable"] == ["visexpert"]
    assert ("timm" if name in TIMM else "transformers") in facts["reload"]["versions"]
    assert facts["pooled"]["min_cosine"] >= 0.9999
    keeps_shape = "stretched to a square" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert keeps_shape is (name == "siglip2")  # its own processor cuts images of any shape into patches


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_text_tower_that_is_not_there_is_not_written_at_random(name: str, tmp_path: Path) -> None:
    source = whole_folder(name, tmp_path / "in")
    path = source / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if not key.startswith("text_model.encoder")}
    save_file(kept, path, metadata={"format": "pt"})
    encoder = loaded(TransformersEncoder(source=str(source)))
    with pytest.raises(WeightsError, match=r"in' lack .*text_model\.encoder.*onnx or torch_export"):
        saved(encoder, tmp_path / "out")


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    encoder = loaded(TransformersEncoder(source=str(whole_folder("siglip", tmp_path / "in"))))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"in' cannot be read any more.*put it back"):
        saved(encoder, tmp_path / "out")


class OwnEncoder(TimmEncoder):
    """An encoder of a user's, with no files of its own but a place in open_clip."""

    def formats(self) -> dict[str, str | None]:
        found = dict.fromkeys(FORMATS, "is not for mine")
        return found | {"open_clip": None, "onnx": None}


def test_an_encoder_says_itself_what_it_can_be_written_in() -> None:
    small: dict[str, Any] = {"model": "vit_tiny_patch16_224", "arguments": {"depth": 2}, "image_size": 32}
    own = OwnEncoder(**small)
    assert default_format(own) == "open_clip"
    check_encoder(own, "onnx")
    with pytest.raises(ConfigError, match="The format hf is not for mine; use open_clip or onnx"):
        check_encoder(own, "hf")
    vision = TRANSFORMERS["clip"].to_dict()
    for encoder in (TimmEncoder(**small), ClipEncoder(config=vision), TransformersEncoder(config=vision)):
        assert encoder.formats().keys() == FORMATS.keys()


def test_what_a_format_cannot_hold_is_refused_with_those_that_can(tmp_path: Path) -> None:
    encoder = TimmEncoder(model="vit_tiny_patch16_224", arguments={"depth": 2}, image_size=32)
    for name in ("hf", "open_clip", "llava", "visexpert"):
        with pytest.raises(ConfigError, match=f"{name} .*TimmEncoder.* native, onnx or torch_export"):
            check_encoder(encoder, name)
    for name in ("native", "onnx", "torch_export"):
        check_encoder(encoder, name)
    assert default_format(encoder) == "native"
    mole = MoLESettings(rank=2)
    student = TimmEncoder(model="vit_tiny_patch16_224", arguments={"depth": 2}, image_size=32, mole=mole)
    with pytest.raises(ConfigError, match="native .*MoLE.*fold.*flatten.*onnx, torch_export"):
        export_encoder(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()
