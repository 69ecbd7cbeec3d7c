"""Tiny models in the formats of the libraries, with weights far from their start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

TIMM = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
TIMM_ARGUMENTS: dict[str, Any] = {"depth": 3, "embed_dim": 24, "num_heads": 2}

CLIP_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SAM: dict[str, Any] = {
    "model_type": "sam_vision_model",
    "hidden_size": 16,
    "output_channels": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "mlp_dim": 32,
    "global_attn_indexes": [1],
    "window_size": 3,
    "num_pos_feats": 6,
}
DINOV2: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
DEPTH: dict[str, Any] = {
    "model_type": "depth_anything",
    "neck_hidden_sizes": [4, 8, 8, 8],
    "fusion_hidden_size": 8,
    "head_hidden_size": 4,
    "reassemble_hidden_size": 16,
    "backbone_config": {**DINOV2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
}
SEGFORMER: dict[str, Any] = {
    "model_type": "segformer",
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 8,
    "num_labels": 5,
}


def randomized(model: Any) -> Any:
    """The model in eval mode, every weight drawn anew, biases and norms included."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def smooth_images(count: int, height: int, width: int) -> Tensor:
    """(count, 3, height, width), uint8, without the hard edges on which resampling filters differ most."""
    coarse = torch.rand(count, 3, 5, 5)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return smooth.clamp(0, 1).mul(255).round().to(torch.uint8)


def as_pil(image_CHW: Tensor) -> Image.Image:
    """A PIL image of uint8 pixels."""
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def saved(model: Any, processor: Any, folder: Path) -> Path:
    """Write both in save_pretrained form."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
