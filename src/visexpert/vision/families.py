"""Check whether a published encoder is a CLIP, by its configuration or the names of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from visexpert.errors import ConfigError, WeightsError, first_line
from visexpert.io.source import ModelSource
from visexpert.vision.convert import without_wrapper

OWNER = "ClipEncoder"

CLIPS = frozenset({"clip", "clip_vision_model", "visexpert_clip_mole"})
"""transformers' ``model_type`` of encoders with CLIP's network and CLIP's names of weights."""

_HINT = "clip takes CLIP encoders only, such as openai/clip-vit-base-patch16"

_SIGNS: Mapping[str, str] = {
    "embeddings.patch_embedding.bias": "SigLIP",
    "image_encoder.patch_embed": "SAM",
    "vision_encoder.patch_embed": "SAM",
    "visual.trunk.": "a timm encoder inside open_clip",
    "visual.layer1.": "CLIP's ResNet",
    "embeddings.register_tokens": "DINOv2 with registers or DINOv3",
    "layer_scale1.lambda1": "DINOv2 or DINOv3",
    "blocks.0.ls1.gamma": "DINOv2",
    "encoder.layer.0.attention.attention.query": "ViT or DINO",
    "blocks.0.attn.qkv": "a ViT of timm",
    "stages.0.blocks.0": "a ConvNeXt of timm",
    "encoder.stages.0": "ConvNeXt or Swin",
    "visual.transformer.resblocks": "an open_clip encoder other than a plain CLIP",
    "lm_head.weight": "a language model",
    "text_model.": "a text encoder",
}
"""Fragments of weight names and the family they belong to; the first match counts."""


def check_family(settings: Mapping[str, Any], vision: Mapping[str, Any], files: ModelSource) -> None:
    """Check that a ``config.json`` describes a CLIP.

    Args:
        settings: The whole configuration.
        vision: Its ``vision_config``, or the whole if there is none.
        files: Source of the configuration, for messages.

    Raises:
        WeightsError: It does not describe a CLIP.
    """
    kind = vision.get("model_type", settings.get("model_type"))
    if kind is None and "architecture" in settings:  # as timm writes it
        raise WeightsError(
            f"{OWNER}: '{files.text}' is timm's model {settings['architecture']!r}, but {_HINT}; it can be a teacher: "
            "class_path: visexpert.experts.TimmExpert."
        )
    if kind is not None and kind not in CLIPS:
        raise WeightsError(
            f"{OWNER}: the encoder of '{files.text}' is of model_type {kind!r}, but {_HINT}; whether it can "
            f"be a teacher is told by `visexpert try {files.text} --as expert`."
        )


def check_keys(keys: Collection[str], path: Path, *, elsewhere: str | None = None) -> None:
    """Check that the weights include a CLIP vision tower.

    Args:
        keys: Names of the weights.
        path: Their file, for messages.
        elsewhere: Source of the vision tower used with them, if their configuration names one.

    Raises:
        WeightsError: There is no tower, or several.
    """
    try:
        if without_wrapper(keys) is not None:
            return
    except WeightsError as error:
        raise WeightsError(f"{OWNER}: {path}: {error}") from None
    if elsewhere is not None:
        raise WeightsError(
            f"{OWNER}: {path} has no vision tower of its own; it uses that of '{elsewhere}'; give that as source."
        )
    kind = next((name for sign, name in _SIGNS.items() if any(sign in key for key in keys)), None)
    looks = f"look like those of {kind}" if kind else f"are named {', '.join(sorted(keys)[:3]) or 'nothing'}"
    raise WeightsError(f"{OWNER}: the weights in {path} {looks}, and contain no CLIP vision tower; {_HINT}.")


@contextmanager
def checked_fields(owner: str) -> Iterator[None]:
    """Tell in one sentence what a configuration of transformers says of a field that it cannot take.

    Raises:
        ConfigError: A field has a value of the wrong type, or several contradict one another.
    """
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"{owner}: transformers takes no such configuration ({first_line(error)}); correct that field of "
            "config.json, or fetch it again."
        ) from error
