"""Recognize what weights are of by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:layers?|blocks|resblocks)\.(\d+)\.")


@dataclass(frozen=True)
class Look:
    """What files look like.

    Args:
        what: Family and library, for messages.
        readers: Names of the classes in :mod:`visexpert.vision` that read it, the first to be preferred; none if it
            cannot be taught.
    """

    what: str
    readers: tuple[str, ...] = ()


_SIGNS: Mapping[str, Look] = {
    "visual.trunk.blocks.": Look("a vision transformer of timm inside open_clip", ("OpenClipEncoder",)),
    "visual.trunk.": Look("a ConvNet of timm inside open_clip"),
    "embeddings.patch_embedding.bias": Look("SigLIP", ("TransformersEncoder",)),
    "image_encoder.patch_embed": Look("SAM"),
    "vision_encoder.patch_embed": Look("SAM"),
    "visual.layer1.": Look("CLIP's ResNet"),
    "embeddings.register_tokens": Look("DINOv2 with registers or DINOv3", ("TransformersEncoder",)),
    "layer_scale1.lambda1": Look("DINOv2 or DINOv3", ("TransformersEncoder",)),
    "blocks.0.ls1.gamma": Look("DINOv2", ("TimmEncoder",)),
    "encoder.layer.0.attention.attention.query": Look("ViT or DINO"),
    "blocks.0.attn.qkv": Look("a ViT of timm", ("TimmEncoder",)),
    "blocks.0.attn.q_proj": Look("EVA of timm", ("TimmEncoder",)),
    "embeddings.class_embedding": Look("CLIP", ("ClipEncoder", "TransformersEncoder")),
    "stages.0.blocks.0": Look("a ConvNeXt of timm"),
    "encoder.stages.0": Look("ConvNeXt or Swin"),
    "visual.transformer.resblocks": Look("an open_clip encoder other than a plain CLIP"),
    "lm_head.weight": Look("a language model"),
    "text_model.": Look("a text encoder"),
    "embeddings.word_embeddings": Look("a text encoder"),
    "embed_tokens.weight": Look("a language model"),
}
"""Fragments of weight names and the family they belong to; the first match counts."""


def look_at_keys(keys: Collection[str]) -> Look | None:
    """Return what the names of some weights look like; None if they are unknown."""
    return next((look for sign, look in _SIGNS.items() if any(sign in key for key in keys)), None)


def told(keys: Collection[str], path: Path) -> str:
    """Return a clause that says what weights look like, by their names, with the number of their blocks."""
    look = look_at_keys(keys)
    if look is None:
        return f"the weights in {path} are named {', '.join(sorted(keys)[:3]) or 'nothing'}"
    blocks = [int(found[1]) for found in map(_BLOCK.search, keys) if found]
    depth = f" with {max(blocks) + 1} blocks" if blocks else ""
    return f"the weights in {path} look like those of {look.what}{depth}"
