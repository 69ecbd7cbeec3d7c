"""Encoders that are no CLIP are refused by what they are; CLIPs are found in whatever holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.io.hub import put_in_cache
from tests.vision.test_published import FIELDS, loaded, open_clip_model, randomized
from visexpert.errors import UserError, WeightsError
from visexpert.planning import read_configs
from visexpert.vision import ClipEncoder
from visexpert.vision.published import describe_clip

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 32, "num_key_value_heads": 1}


def others() -> dict[str, Any]:
    """Tiny encoders of other families, by what a message must name."""
    vit = SIZES | {"image_size": 16, "patch_size": 8}
    return {
        "siglip_vision_model": SiglipVisionModel(SiglipVisionConfig(**vit)),
        "dinov2": Dinov2Model(Dinov2Config(**vit)),
        "convnext": ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
    }


READERS = {
    "siglip_vision_model": "visexpert.vision.TransformersEncoder",
    "dinov2": "visexpert.vision.TransformersEncoder",
    "convnext": "visexpert try {} --as expert",
}


@pytest.mark.parametrize("kind", ["siglip_vision_model", "dinov2", "convnext"])
def test_a_folder_of_another_family_is_refused_by_its_model_type(tmp_path: Path, kind: str) -> None:
    others()[kind].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"model_type '{kind}'.*{READERS[kind].format(tmp_path)}"):
        ClipEncoder(source=str(tmp_path))
    clip = f"--model.init_args.clip.init_args.source={tmp_path}"
    with pytest.raises(UserError, match=f"model_type '{kind}'"):
        read_configs(["configs/tove/smoke.yaml"], [clip])


def test_a_whole_model_is_refused_by_the_encoder_in_it(tmp_path: Path) -> None:
    config = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="'siglip_vision_model'"):
        describe_clip(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}), encoding="utf-8")
    with pytest.raises(UserError, match="'siglip'"):
        describe_clip(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [
        ("metaclip_2", "metaclip_2_vision_model"),
        ("altclip", "altclip_vision_model"),
        ("chinese_clip", "chinese_clip_vision_model"),
        ("clipseg", "clipseg_vision_model"),
        ("blip", "blip_vision_model"),
        ("blip-2", "blip_2_vision_model"),
        ("owlvit", "owlvit_vision_model"),
        ("owlv2", "owlv2_vision_model"),
        ("aimv2", "aimv2_vision_model"),
        ("flava", "flava"),
        ("xclip", "xclip_vision_model"),
        ("groupvit", "groupvit_vision_model"),
        ("siglip2", "siglip2_vision_model"),
        ("bridgetower", "bridgetower_vision_model"),
        ("florence2", "florence_vision"),
        ("vit", "vit"),
    ],
)
def test_families_near_clip_are_refused_by_their_model_type(tmp_path: Path, kind: str, encoder: str) -> None:
    """With the configuration that transformers writes, and without the type of the part, as older ones are."""
    settings = CONFIG_MAPPING[kind]().to_dict()
    for told in (encoder, kind):
        (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        step = "TransformersEncoder" if kind == "siglip2" else f"try {tmp_path} --as expert"
        with pytest.raises(UserError, match=rf"model_type '{told}\w*'.*{step}") as caught:
            ClipEncoder(source=str(tmp_path))
        assert "\n" not in str(caught.value)
        settings.get("vision_config", {}).pop("model_type", None)


def test_a_family_near_clip_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING["metaclip_2"]().to_dict()), encoding="utf-8")
    with pytest.raises(UserError, match="model_type 'metaclip_2_vision_model'"):
        read_configs(["configs/tove/smoke.yaml"], [f"--model.init_args.clip.init_args.source={tmp_path}"])


def test_a_folder_of_timm_is_refused_by_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"timm's model 'vit_tiny_patch16_224'.*TimmEncoder"):
        describe_clip(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convnext_tiny"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"timm's model 'convnext_tiny'.*--as expert"):
        describe_clip(str(tmp_path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("kind", "told"), [("siglip_vision_model", "SigLIP"), ("dinov2", "DINOv2"), ("convnext", "ConvNeXt")]
)
def test_a_file_of_another_family_is_refused_by_its_keys(tmp_path: Path, kind: str, told: str, suffix: str) -> None:
    write(others()[kind].state_dict(), path := tmp_path / f"other{suffix}")
    for architecture in (None, "ViT-B-16"):
        with pytest.raises(UserError, match=f"other{suffix} look like those of {told}.*no CLIP vision tower"):
            describe_clip(str(path), architecture=architecture)


def test_a_file_of_timm_is_refused_by_its_keys(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1, num_heads=2)
    write(model.state_dict(), path := tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="look like those of a ViT of timm"):
        describe_clip(str(path), architecture="ViT-B-16")


def write(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.clip.visual."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_what_training_scripts_write(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    model = open_clip_model()
    tower = model.visual if prefix.endswith("visual.") else model
    state = {prefix + key: value for key, value in tower.state_dict().items()}
    if prefix.startswith("model."):
        state["loss.scale"] = torch.ones(1)  # LightningModules have more than their model
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {}}, path := tmp_path / "e.ckpt")
    plain = tmp_path / "plain.safetensors"
    write(model.state_dict(), plain)
    expected = loaded(source=str(plain), config=FIELDS).fingerprint()
    assert loaded(source=str(path), config=FIELDS).fingerprint() == expected


def test_part_of_a_compiled_model_is_read(tmp_path: Path) -> None:
    model = open_clip_model()
    write({key.replace("visual.", "visual._orig_mod."): v for key, v in model.state_dict().items()}, tmp_path / "c.pt")
    write(model.state_dict(), tmp_path / "p.pt")
    both = [loaded(source=str(tmp_path / name), config=FIELDS).fingerprint() for name in ("c.pt", "p.pt")]
    assert both[0] == both[1]


def test_two_towers_in_a_file_are_refused(tmp_path: Path) -> None:
    state = open_clip_model().visual.state_dict()
    twice = {f"{name}.visual.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    write(twice, path := tmp_path / "two.safetensors")
    with pytest.raises(WeightsError, match=r"two.safetensors.*several vision towers.*student.*teacher"):
        describe_clip(str(path), config=FIELDS)


def test_prefixes_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: CLIPVisionModel = randomized(CLIPVisionModel(CLIPVisionConfig(**FIELDS)))
    model.save_pretrained(tmp_path / "hf")
    expected = loaded(source=str(tmp_path / "hf")).fingerprint()
    assert loaded(source=f"local-dir:{tmp_path / 'hf'}").fingerprint() == expected
    put_in_cache(monkeypatch, tmp_path / "cache", "org/clip", tmp_path / "hf")
    assert loaded(source="hf-hub:org/clip").fingerprint() == expected
    with pytest.raises(WeightsError, match="hf-hub:ORG/NAME"):
        describe_clip("hf-hub:../clip")


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    vision = FIELDS | {"model_type": "clip_vision_model"}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT)))
    found: LlavaForConditionalGeneration = randomized(model)
    return found


def tower_of(llava: Any) -> nn.Module:
    tower: nn.Module = llava.model.vision_tower
    return tower


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_the_tower_of_a_llava_of_transformers(
    tmp_path: Path, llava: LlavaForConditionalGeneration, shards: str
) -> None:
    llava.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").is_file() == (shards == "1GB")
    encoder, reference = loaded(source=str(tmp_path)), tower_of(llava)
    images_BCHW = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        states = reference((images_BCHW - encoder.mean) / encoder.std).last_hidden_state
        torch.testing.assert_close(encoder(images_BCHW).tokens_BTD, states[:, 1:], atol=1e-5, rtol=1e-5)


def test_the_tower_of_a_llava_in_its_own_form(tmp_path: Path, llava: LlavaForConditionalGeneration) -> None:
    plain = CLIPVisionModel(CLIPVisionConfig(**FIELDS))
    plain.load_state_dict(tower_of(llava).state_dict())
    plain.save_pretrained(tmp_path / "clip")
    (folder := tmp_path / "llava").mkdir()
    settings = {"model_type": "llava_llama", "mm_vision_tower": str(tmp_path / "clip"), "hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    under = "model.vision_tower.vision_tower.vision_model."
    state = {under + key.removeprefix("vision_model."): v for key, v in plain.state_dict().items()}
    language = {"model.embed_tokens.weight": torch.ones(2, 2), "model.mm_projector.0.weight": torch.ones(2, 2)}
    torch.save(language | state, folder / "pytorch_model.bin")
    expected = loaded(source=str(tmp_path / "clip")).fingerprint()
    assert loaded(source=str(folder)).fingerprint() == expected
    torch.save(language, folder / "pytorch_model.bin")  # as most releases of LLaVA-1.5 are
    with pytest.raises(WeightsError, match=f"no vision tower of its own; it uses that of '{tmp_path / 'clip'}'"):
        loaded(source=str(folder))
