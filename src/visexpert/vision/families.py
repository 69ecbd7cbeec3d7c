"""Recognize what files of an encoder are, by their configuration or the names of their weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from visexpert.errors import WeightsError
from visexpert.io.source import ModelSource
from visexpert.networks.looks import Look, look_at_keys, told
from visexpert.networks.open_clip import OPEN_CLIP_CONFIG, described_by
from visexpert.networks.timm import is_vit
from visexpert.networks.towers import vision_part
from visexpert.vision.anatomy import OF_TIMM, OF_TRANSFORMERS
from visexpert.vision.convert import without_wrapper

OWNER = "ClipEncoder"

CLIPS = frozenset({"clip", "clip_vision_model", "visexpert_clip_mole"})
"""transformers' ``model_type`` of encoders with CLIP's network and CLIP's names of weights."""

VITS = frozenset(
    {
        "siglip",
        "siglip_vision_model",
        "siglip2",
        "siglip2_vision_model",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
    }
)
"""transformers' ``model_type`` of the other encoders that can be taught."""


def look_at(files: ModelSource) -> Look | None:
    """Return what the configuration that lies with some files describes; None if there is none on this machine."""
    written = described_by(files).read_json(OPEN_CLIP_CONFIG, owner="an encoder")
    if written is not None:
        return look_at_tower((written.get("model_cfg") or {}).get("vision_cfg") or {})
    settings = files.read_json("config.json", owner="an encoder")
    return None if settings is None else look_at_settings(settings)


def look_at_tower(vision: Mapping[str, Any]) -> Look:
    """Return what open_clip's ``vision_cfg`` describes."""
    trunk = vision.get("timm_model_name")
    if trunk is not None:
        return Look(f"open_clip's tower on timm's {trunk!r}", ("OpenClipEncoder",) if is_vit(trunk) else ())
    plain = isinstance(vision.get("layers", 12), int)
    return Look("open_clip's own ViT", ("ClipEncoder",)) if plain else Look("open_clip's ResNet of CLIP")


def look_at_settings(settings: Mapping[str, Any]) -> Look:
    """Return what a ``config.json`` describes."""
    if "mm_vision_tower" in settings:  # LLaVA's own format
        return Look("a LLaVA", ("ClipEncoder",))
    if "model_type" not in settings and "architecture" in settings:
        name = str(settings["architecture"])
        return Look(f"timm's model {name!r}", ("TimmEncoder",) if is_vit(name) else ())
    nested = settings.get("vision_config")
    vision: Mapping[str, Any] = nested if isinstance(nested, Mapping) else vision_part(settings)
    kind = vision.get("model_type", settings.get("model_type"))
    if kind is None or kind in CLIPS:
        at_top = vision is settings or vision is nested
        return Look(f"a CLIP (model_type {kind!r})", (*(("ClipEncoder",) if at_top else ()), "TransformersEncoder"))
    return Look(f"an encoder of model_type {kind!r}", ("TransformersEncoder",) if kind in VITS else ())


def check_reader(files: ModelSource, *, owner: str) -> None:
    """Check that a class reads what the configuration of some files describes.

    Args:
        files: Their source.
        owner: Name of the class.

    Raises:
        WeightsError: Another class reads it, or none; the message names it.
    """
    look = look_at(files)
    if look is not None and owner not in look.readers:
        raise WeightsError(f"{owner}: '{files.text}' holds {look.what}; {next_step(look, files.text)}.")


def next_step(look: Look, text: str) -> str:
    """Return which class reads an encoder, or how it can be used instead."""
    if look.readers:
        return f"class_path: visexpert.vision.{look.readers[0]} reads it"
    return (
        f"it cannot be taught here; use a ViT of transformers ({', '.join(OF_TRANSFORMERS)}), timm "
        f"({', '.join(OF_TIMM)}) or open_clip, or add its family (docs/encoders.md); `visexpert try {text} "
        "--as expert` tells whether it can be a teacher"
    )


def check_keys_for(keys: Collection[str], expected: Collection[str], path: Path, *, owner: str) -> None:
    """Check that some weights share a name with a network; otherwise say what they look like.

    Raises:
        WeightsError: They share none.
    """
    if not set(keys).isdisjoint(expected):
        return
    raise WeightsError(f"{owner}: {told(keys, path)}, and none belongs to this network{_reads(look_at_keys(keys))}.")


def _reads(look: Look | None) -> str:
    if look is None:
        return ""
    return f"; class_path: visexpert.vision.{look.readers[0]} reads them" if look.readers else "; use other weights"


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
    step = _reads(look_at_keys(keys)) or "; use other weights"
    raise WeightsError(f"{OWNER}: {told(keys, path)}, and contain no CLIP vision tower{step}.")
