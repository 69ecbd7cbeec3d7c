"""Folders of a CLIP alone: for ``transformers``, for ``open_clip``, and, with its MoLE, for visexpert itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from safetensors.torch import save_file
from transformers import CLIPImageProcessor
from transformers.utils import logging as hf_logging

from visexpert.errors import ConfigError
from visexpert.export.rounding import stored
from visexpert.export.source import ExportSource
from visexpert.vision import mole_settings
from visexpert.vision.convert import open_clip_config, to_open_clip

HF_USAGE = """\
from transformers import AutoImageProcessor, CLIPVisionModel

processor, model = AutoImageProcessor.from_pretrained(FOLDER), CLIPVisionModel.from_pretrained(FOLDER)
output = model(**processor(images=image, return_tensors="pt"), output_hidden_states=True)
tokens = output.hidden_states[{layer}][:, 1:]  # patch tokens as the language model reads them"""


PREFIX = "vision_model."
"""Prefix of keys that ``transformers`` 4 writes and both 4 and 5 read. Without it (as 5 writes) 4 warns, keeps random
weights and goes on."""


def write_hf(source: ExportSource, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, for ``transformers`` 4 and 5."""
    config = vision_config(source)
    config.architectures, config.dtype = [type(source.clip.model).__name__], source.dtype or torch.float32
    config.save_pretrained(folder)
    state = {PREFIX + key: stored(value, source.dtype) for key, value in source.clip.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor(source).save_pretrained(folder)


def vision_config(source: ExportSource) -> Any:
    """Return a copy of CLIP's configuration with the width of the projection, though the folder does not hold it."""
    config = copy.deepcopy(source.clip.config)
    if source.projection is not None:
        config.projection_dim = source.projection.dim
    return config


def image_processor(source: ExportSource) -> CLIPImageProcessor:
    """Return CLIP's processor with the settings of :meth:`ClipEncoder.preprocess`."""
    how = source.preprocessing
    size = dict(zip(("height", "width"), how["size"], strict=True))
    return CLIPImageProcessor(
        do_resize=True,
        size=size,
        resample=3,
        do_center_crop=False,
        crop_size=size,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=how["mean"],
        image_std=how["std"],
        do_convert_rgb=True,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of ``transformers`` while it writes."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


OPEN_CLIP_USAGE = """\
import open_clip

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")
output = model.visual.forward_intermediates(
    transform(image)[None], indices=[{index}], output_fmt="NLC", intermediates_only=True
)
tokens = output["image_intermediates"][0]  # patch tokens as the language model reads them"""

NO_TEXT: dict[str, Any] = {
    "context_length": 1,
    "vocab_size": 1,
    "width": 1,
    "heads": 1,
    "layers": 1,
    "proj_type": "none",
}
"""open_clip needs a text tower. This one knows one word: encoding a text fails at once (index out of range), so nobody
mistakes an untrained tower for CLIP's. It has 26 weights, all zero."""


def write_open_clip(source: ExportSource, folder: Path) -> None:
    """Write ``open_clip_config.json`` and ``open_clip_model.safetensors``.

    The image embedding is the pooled output: ``proj`` is the identity, since a ``CLIPVisionModel`` has none.

    Raises:
        ConfigError: open_clip lacks the activation, or does not return the tokens.
    """
    depth = int(source.clip.config.num_hidden_layers)
    if min(source.clip.layer, *source.layers) < -depth:
        raise ConfigError(f"open_clip returns no tokens before the first block (layer {-depth - 1}); use --format hf.")
    how = source.preprocessing
    model_cfg = {"embed_dim": source.clip.width, **open_clip_config(source.clip.config), "text_cfg": NO_TEXT}
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
    """Return zeros for everything but the image tower, in the shapes that open_clip builds."""
    with torch.device("meta"):
        shapes = CLIP(**model_cfg).state_dict()
    return {key: torch.zeros(value.shape) for key, value in shapes.items() if not key.startswith("visual.")}


MODEL_TYPE = "visexpert_clip_mole"
"""Unknown to ``transformers``, so that its auto classes refuse the folder instead of dropping MoLE."""

VISEXPERT_USAGE = """\
import json
from visexpert.vision import ClipEncoder, MoLESettings

settings = MoLESettings(**json.load(open("FOLDER/mole.json")))
clip = ClipEncoder(source="FOLDER", layer={layer}, mole=settings).eval()
clip.load_weights()
tokens = clip(images).tokens_BTD  # images float32 (B, 3, H, W) in [0, 1], any size
# In a configuration: clip.init_args {{source: FOLDER, layer: {layer}, mole: what mole.json holds}}."""


def write_visexpert(source: ExportSource, folder: Path) -> None:
    """Write ``config.json``, ``mole.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Raises:
        ConfigError: The CLIP has no MoLE.
    """
    settings = mole_settings(source.clip)
    if settings is None:
        raise ConfigError("--format visexpert is for a CLIP with MoLE; this one has none, use --format hf.")
    write_hf(source, folder)
    (folder / "mole.json").write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_type": MODEL_TYPE, "architectures": ["ClipEncoder"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
