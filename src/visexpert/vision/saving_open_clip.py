"""Save an image tower as open_clip saves a whole model: text tower and projections copied from the source."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor

from visexpert.errors import WeightsError
from visexpert.io.source import WEIGHT_FILES, ModelSource
from visexpert.io.weights import read_source
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_FILES, described_by
from visexpert.networks.preprocessing import Preprocessing
from visexpert.vision.saving import copy_small_files, gone, unshared

log = logging.getLogger(__name__)

OPEN_CLIP_USAGE = """\
import open_clip

model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{{FOLDER}}")
output = model.visual.forward_intermediates(
    transform(image)[None], indices=[{index}], output_fmt="NLC", intermediates_only=True
)
tokens = output["image_intermediates"][0]  # patch tokens that the run read"""

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

IMAGE = "visual."
SCALES = ("logit_scale", "logit_bias")


def read_whole(source: ModelSource, *, owner: str) -> Mapping[str, Tensor]:
    """Return all weights of an open_clip model.

    Raises:
        WeightsError: They are gone.
    """
    try:
        return read_source(source, owner=owner, names=(*OPEN_CLIP_FILES, *WEIGHT_FILES)).tensors
    except WeightsError as error:
        raise gone(source, "weights", owner=owner) from error


def save_with_open_clip(
    visual: Mapping[str, Tensor],
    folder: Path,
    *,
    whole: Mapping[str, Tensor],
    source: ModelSource | None,
    settings: Mapping[str, Any],
    preprocess: Mapping[str, Any],
) -> None:
    """Write ``open_clip_config.json``, ``open_clip_model.safetensors`` and the tokenizer's files.

    Where the source has no text tower, :data:`NO_TEXT` takes its place.

    Args:
        visual: Weights of the image tower under open_clip's names, without ``visual.``. Those of ``whole`` that are
            not among them stay, such as CLIP's projection.
        folder: Existing folder.
        whole: All weights of the source, under open_clip's names; none for a random tower.
        source: Files of the source; None for a random tower.
        settings: open_clip's ``model_cfg``, with the tower's own image size.
        preprocess: open_clip's ``preprocess_cfg``.
    """
    state = dict(whole) | {f"{IMAGE}{key}": value for key, value in visual.items()}
    if not any(not key.startswith(IMAGE) and key not in SCALES for key in whole):
        if source is not None:
            log.warning("'%s' has no text tower, so the export gets one that knows one word.", source.text)
        settings = {name: settings[name] for name in ("embed_dim", "vision_cfg", "quick_gelu")} | {"text_cfg": NO_TEXT}
        state = no_text(settings) | {key: value for key, value in state.items() if key.startswith(IMAGE)}
    dtypes = {value.dtype for value in visual.values() if value.is_floating_point()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    save_file(unshared(stored), folder / OPEN_CLIP_FILES[0], metadata={"format": "pt"})
    write_config(folder, settings, preprocess)
    config = None if source is None else described_by(source).find(OPEN_CLIP_CONFIG)
    if config is not None:
        copy_small_files(config.parent, folder)


def write_config(folder: Path, settings: Mapping[str, Any], preprocess: Mapping[str, Any]) -> None:
    """Write ``open_clip_config.json``."""
    text = json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess}, indent=2)
    (folder / OPEN_CLIP_CONFIG).write_text(text + "\n", encoding="utf-8")


def preprocess_of(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the ``preprocess_cfg`` of images that are stretched to a square."""
    return {
        "size": [preprocessing.image_size] * 2,
        "mode": "RGB",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "resize_mode": "squash",
    }


def no_text(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return zeros for everything but the image tower, in the shapes that open_clip builds.

    Args:
        settings: ``model_cfg`` with :data:`NO_TEXT`.
    """
    with torch.device("meta"):
        shapes = CLIP(**settings).state_dict()
    return {key: torch.zeros(value.shape) for key, value in shapes.items() if not key.startswith(IMAGE)}
