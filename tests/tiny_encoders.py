"""Tiny random encoders, each written as its own library writes it.

The files under configs/distill describe the same networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

SIDE = 64
SIGLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
VIT: dict[str, Any] = {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}


def write_siglip(folder: Path) -> None:
    """Write a folder of transformers."""
    SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def write_vit(folder: Path) -> None:
    """Write a folder of timm, as ``push_to_hf_hub`` would."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    timm.models.save_for_hf(model, str(folder), model_args=VIT, safe_serialization=True)


WRITERS: Mapping[str, Callable[[Path], None]] = {"siglip": write_siglip, "timm": write_vit}
