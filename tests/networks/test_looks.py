"""A model's files with the weights of another family: what the weights look like is said, by students and experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from visexpert.errors import WeightsError
from visexpert.experts import TimmExpert, TransformersExpert
from visexpert.networks.looks import look_at_keys
from visexpert.vision import vision_encoder

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
OF_TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SAID = {
    "clip": "CLIP with 2 blocks",
    "siglip": "SigLIP with 2 blocks",
    "dinov2": "DINOv2 or DINOv3 with 2 blocks",
    "dinov3": "DINOv2 with registers or DINOv3 with 2 blocks",
    "timm": "a ViT of timm with 2 blocks",
    "vit": "ViT or DINO with 2 blocks",
    "bert": "a text encoder with 2 blocks",
}
STUDENTS = ("clip", "siglip", "dinov2", "dinov3", "timm")
PAIRS = [(files, weights) for files in STUDENTS for weights in SAID if files != weights]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Any] = {
        "clip": CLIPVisionModel(CLIPVisionConfig(intermediate_size=64, **IMAGES)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(intermediate_size=64, **IMAGES)),
        "dinov2": Dinov2Model(Dinov2Config(**IMAGES)),
        "dinov3": DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=64, num_register_tokens=4, **IMAGES)),
        "vit": ViTModel(ViTConfig(intermediate_size=64, **IMAGES)),
        "bert": BertModel(BertConfig(vocab_size=64, intermediate_size=64, **SIZES)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / name)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **OF_TIMM)
    timm.models.save_for_hf(vit, str(root / "timm"), model_args=OF_TIMM, safe_serialization=True)
    return root


@pytest.mark.parametrize(("files", "weights"), PAIRS)
def test_what_weights_look_like_is_said(files: str, weights: str, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(models / files, folder)
    shutil.copy(models / weights / "model.safetensors", folder)
    with pytest.raises(WeightsError, match=SAID[weights]):
        vision_encoder(str(folder), layer=-1).load_weights()
    expert = TimmExpert(weights=str(folder)) if files == "timm" else TransformersExpert(source=str(folder))
    with pytest.raises(WeightsError, match=SAID[weights]):
        expert.load_weights()


def test_unknown_names_look_like_nothing() -> None:
    assert look_at_keys(["a.weight", "b.bias"]) is None
