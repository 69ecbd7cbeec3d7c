"""Towers of open_clip with a trunk of timm against open_clip's own ``visual``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP
from safetensors.torch import save_file

from tests.vision.test_encoder_families import shaken
from visexpert.errors import ConfigError, UserError, WeightsError
from visexpert.networks.open_clip import STUB_TEXT
from visexpert.vision import ClipEncoder, MoLESettings, OpenClipEncoder

TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {"timm_model_name": "test_vit3", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
    "plain": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": "linear"},
    "eva02": {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224, "timm_pool": "avg", "timm_proj": "mlp"},
}
WIDTHS = {"siglip": 96}


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    vision = {**TOWERS[name], **changes}
    return {"embed_dim": WIDTHS.get(name, 10), "vision_cfg": vision, "text_cfg": STUB_TEXT, "quick_gelu": False}


def folder(path: Path, name: str) -> Any:
    """Write a folder of open_clip; return its image tower."""
    path.mkdir(exist_ok=True)
    settings = settings_of(name)
    model: Any = shaken(CLIP(settings["embed_dim"], settings["vision_cfg"], STUB_TEXT))
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    written = {
        "model_cfg": settings,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"},
    }
    (path / "open_clip_config.json").write_text(json.dumps(written), encoding="utf-8")
    return model.visual


@pytest.mark.parametrize("scale", [1, 2], ids=["own size", "another size"])
@pytest.mark.parametrize("name", TOWERS)
def test_tokens_and_pooled_output_are_those_of_open_clip(name: str, scale: int, tmp_path: Path) -> None:
    visual = folder(tmp_path, name)
    size = TOWERS[name]["image_size"] // scale
    encoder = OpenClipEncoder(source=str(tmp_path), image_size=size, layer=-2).eval()
    if scale != 1:
        visual.set_input_size(size)
    images = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = encoder(images)
        pixels = encoder.preprocess(images)
        (expected,) = visual.trunk.forward_intermediates(
            pixels, indices=[encoder.depth - 2], norm=False, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(tokens.tokens_BTD, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.pooled(images), visual(pixels), atol=1e-5, rtol=0)
    assert set(encoder.model.state_dict()) == set(visual.state_dict())
    assert encoder.saliency == {"siglip": "pool", "plain": "cls", "eva02": "cls"}[name]
    assert encoder.std.flatten().tolist() == [0.25] * 3


def test_weights_load_beside_mole_and_the_copy_is_plain(tmp_path: Path) -> None:
    folder(tmp_path, "siglip")
    plain = OpenClipEncoder(source=str(tmp_path)).eval()
    student = OpenClipEncoder(source=str(tmp_path), mole=MoLESettings(rank=2)).eval()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(student(images).tokens_BTD, plain(images).tokens_BTD)
        assert student.plain_copy().fingerprint() == plain.fingerprint()


def test_gradients_reach_what_the_tokens_depend_on(tmp_path: Path) -> None:
    folder(tmp_path, "siglip")
    encoder = OpenClipEncoder(source=str(tmp_path))
    encoder(torch.rand(1, 3, 32, 32)).tokens_BTD.square().sum().backward()
    reached = {key for key, parameter in encoder.named_parameters() if parameter.grad is not None}
    ids = {id(parameter): key for key, parameter in encoder.named_parameters()}
    assert {ids[id(p)] for part in encoder.plain_modules() for p in part.parameters()} == reached
    behind = {ids[id(p)] for part in encoder.pooled_modules() for p in part.parameters()}
    assert behind | reached == set(ids.values())


def test_names_and_ids_are_built_without_files() -> None:
    for made in (
        OpenClipEncoder(model="EVA02-B-16"),
        OpenClipEncoder(source="open_clip:EVA02-B-16/merged2b_s8b_b131k"),
        OpenClipEncoder(source="someone/eva02", model="EVA02-B-16"),
    ):
        assert (made.width, made.grid_hw, made.prefix) == (768, (14, 14), 1)
    with pytest.raises(WeightsError, match="someone/eva02"):
        made.load_weights()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("ViT-B-16", ("ViT-B-16", "ClipEncoder")),
        ("RN50", ("RN50", "ResNet", "OpenClipExpert")),
        ("convnext_base", ("convnext_base", "ConvNeXt", "OpenClipExpert")),
        ("ViTamin-S", ("vitamin_small_224", "ConvNet", "OpenClipExpert")),
        ("EVA02-B-17", ("EVA02-B-17", "EVA02-B-16")),
        (None, ("source", "model")),
    ],
)
def test_towers_that_cannot_be_taught_are_refused_by_name(model: str | None, named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenClipEncoder(model=model)
    assert all(name in str(caught.value) for name in named)


def test_a_clip_encoder_names_the_class_that_reads_a_tower_of_timm(tmp_path: Path) -> None:
    folder(tmp_path, "siglip")
    with pytest.raises(UserError, match=r"test_vit3.*OpenClipEncoder"):
        ClipEncoder(source=str(tmp_path))
