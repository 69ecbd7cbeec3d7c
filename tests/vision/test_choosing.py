"""Every source is read by one class of encoder, found by its files or its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import save_file

import visexpert as vx
from tests.vision import test_open_clip_encoder as towers
from tests.vision.test_encoder_families import SMALL, TINY, WIDE, shaken
from visexpert.errors import ConfigError, UserError, WeightsError
from visexpert.vision import ClipEncoder, OpenClipEncoder, TimmEncoder, TransformersEncoder, VisionEncoder

OF_TIMM = {key: value for key, value in SMALL.items() if key != "depth"} | {"depth": 1}


def folder(kind: str, path: Path) -> Path:
    """Write a tiny encoder in its library's own format."""
    model: Any
    if kind == "open_clip":
        towers.folder(path, "siglip")
    elif kind == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, **OF_TIMM)
        timm.models.save_for_hf(
            shaken(model), str(path), safe_serialization=True, model_args={"img_size": 32, **OF_TIMM}
        )
    elif kind == "convnet":
        timm.models.save_for_hf(timm.create_model("test_convnext"), str(path), safe_serialization=True)
    else:
        networks: dict[str, Any] = {
            "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TINY, **WIDE)),
            "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY, **WIDE)),
            "resnet": lambda: hf.ResNetModel(hf.ResNetConfig(hidden_sizes=[8] * 4, depths=[1] * 4, embedding_size=8)),
        }
        model = shaken(networks[kind]())
        model.save_pretrained(path)
        hf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


CLASSES: dict[str, Any] = {
    "clip": ClipEncoder,
    "siglip": TransformersEncoder,
    "timm": TimmEncoder,
    "open_clip": OpenClipEncoder,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_is_read_by_the_class_of_its_library(kind: str, tmp_path: Path) -> None:
    encoder = vx.vision_encoder(str(folder(kind, tmp_path)), layer=-1)
    assert type(encoder) is CLASSES[kind] and encoder.layer == -1
    with torch.no_grad():
        assert encoder.eval()(torch.rand(1, 3, 32, 32)).tokens_BTD.isfinite().all()


@pytest.mark.parametrize("kind", CLASSES)
def test_every_other_class_names_the_class_that_reads_a_folder(kind: str, tmp_path: Path) -> None:
    source = str(folder(kind, tmp_path))
    for other in set(CLASSES.values()) - {CLASSES[kind]}:
        if (kind, other) == ("clip", TransformersEncoder):
            continue  # reads it, too
        with pytest.raises(UserError) as caught:
            other(source=source)
        told = str(caught.value)
        assert CLASSES[kind].__name__ in told and told.startswith(other.__name__) and "\n" not in told


@pytest.mark.parametrize("kind", ["convnet", "resnet"])
def test_a_convnet_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = str(folder(kind, tmp_path))
    for build in (vx.vision_encoder, *CLASSES.values()):
        with pytest.raises(UserError, match=f"{'test_convnext' if kind == 'convnet' else 'resnet'}.*--as expert"):
            build(source=source)


@pytest.mark.parametrize(
    ("source", "options", "kind"),
    [
        ("zoo:clip", {}, ClipEncoder),
        ("vit_tiny_patch16_224.augreg_in21k", {}, TimmEncoder),
        ("open_clip:EVA02-B-16/merged2b_s8b_b131k", {}, OpenClipEncoder),
        ("open_clip:ViT-B-32/openai", {}, ClipEncoder),
        (
            "someone/siglip",
            {
                "config": {"model_type": "siglip_vision_model", **TINY, **WIDE},
                "processor": {"image_processor_type": "SiglipImageProcessor"},
            },
            TransformersEncoder,
        ),
        ("someone/clip", {"config": {**TINY, **WIDE}}, ClipEncoder),
        ("someone/vit", {"model": "vit_tiny_patch16_224"}, TimmEncoder),
        (None, {"model": "vit_tiny_patch16_224"}, TimmEncoder),
        (None, {"architecture": "ViT-B-32"}, ClipEncoder),
    ],
)
def test_names_are_built_without_files(source: str | None, options: dict[str, Any], kind: type[VisionEncoder]) -> None:
    encoder = vx.vision_encoder(source, **options)
    assert type(encoder) is kind
    if source is not None and not source.startswith("zoo:"):
        with pytest.raises(WeightsError):
            encoder.load_weights()


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        ("someone/else", {}, ("someone/else", "config.json")),
        (None, {}, ("source", "config", "model")),
        (None, {"model": "convnext_tiny"}, ("convnext_tiny", "teacher")),
        (None, {"model": "vit_tini"}, ("vit_tini", "timm", "open_clip")),
        ("zoo:clip", {"interpolation": "bicubic"}, ("interpolation", "ClipEncoder", "image_size")),
    ],
)
def test_what_names_no_encoder_is_refused(source: str | None, options: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        vx.vision_encoder(source, **options)
    assert all(name in str(caught.value) for name in named)


def test_weights_of_another_family_are_refused_by_what_they_look_like(tmp_path: Path) -> None:
    siglip: Any = hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY, **WIDE))
    save_file(siglip.state_dict(), path := tmp_path / "other.safetensors")
    encoder = TimmEncoder(source=str(path), model="vit_tiny_patch16_224")
    with pytest.raises(WeightsError, match=r"other.safetensors look like those of SigLIP.*TransformersEncoder"):
        encoder.load_weights()
    with pytest.raises(ConfigError, match=r"TransformersEncoder.*'model'"):
        vx.vision_encoder(str(path), model="vit_tiny_patch16_224")
