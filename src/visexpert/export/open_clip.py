"""A folder for ``open_clip.create_model``: the image tower, with no text side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from safetensors.torch import save_file

from visexpert.errors import ConfigError
from visexpert.export.rounding import stored
from visexpert.export.source import ExportSource
from visexpert.vision.convert import open_clip_config, to_open_clip

USAGE = """\
import open_clip

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
output = model.visual.forward_intermediates(
    transform(image)[None], indices=[{index}], output_fmt="NLC", intermediates_only=True
)
tokens = output["image_intermediates"][0]  # patch tokens as the language model reads them"""

TEXT: dict[str, Any] = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1, "proj_type": "none"}
"""open_clip builds no model without a text tower. This one has one word, so that encoding a text fails at once (index
out of range) and nothing can mistake an untrained tower for CLIP's; 26 weights, all zero."""


def write(source: ExportSource, folder: Path) -> None:
    """Write ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    The image embedding is the pooled output itself: ``proj`` is the identity, since a ``CLIPVisionModel`` has none.

    Raises:
        ConfigError: An activation that open_clip's towers do not have, or tokens that they do not hand out.
    """
    depth = int(source.clip.config.num_hidden_layers)
    if min(source.clip.layer, *source.layers) < -depth:
        raise ConfigError(f"open_clip hands out no tokens before the first block (layer {-depth - 1}); export as hf.")
    how = source.preprocessing
    model_cfg = {"embed_dim": source.clip.width, **open_clip_config(source.clip.config), "text_cfg": TEXT}
    preprocess = {
        "size": how["size"],
        "mode": "RGB",
        "mean": how["mean"],
        "std": how["std"],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    state = {f"visual.{key}": value for key, value in to_open_clip(source.clip.model.state_dict()).items()}
    state |= _no_text(model_cfg)
    save_file(
        {key: stored(value, source.dtype) for key, value in state.items()}, folder / "open_clip_model.safetensors"
    )


def _no_text(model_cfg: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Zeros for all but the image tower, shapes as open_clip builds them."""
    with torch.device("meta"):
        shapes = CLIP(**model_cfg).state_dict()
    return {key: torch.zeros(value.shape) for key, value in shapes.items() if not key.startswith("visual.")}
