"""Data sets: from annotations and images to batches.

The names below are imported on first use: Lightning and transformers take seconds to import, and processes that only
render need neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visexpert.data.cc3m import CC3M
    from visexpert.data.chat import ChatPacker
    from visexpert.data.coco import COCOCaptions, NoCaps
    from visexpert.data.hugging_face import HuggingFaceData
    from visexpert.data.image_shards import ImageShards
    from visexpert.data.image_table import ImageTable
    from visexpert.data.images import read_image
    from visexpert.data.llava import LLaVAInstruct
    from visexpert.data.loader import BatchKey, BatchLoader, StepLoader
    from visexpert.data.mixed import MixedData
    from visexpert.data.packing import TextPacker, pack
    from visexpert.data.pope import POPE
    from visexpert.data.source import SourceData
    from visexpert.data.vqav2 import VQAv2
    from visexpert.data.vsr import VSR

__all__ = [
    "CC3M",
    "POPE",
    "VSR",
    "BatchKey",
    "BatchLoader",
    "COCOCaptions",
    "HuggingFaceData",
    "ImageShards",
    "ImageTable",
    "ChatPacker",
    "LLaVAInstruct",
    "MixedData",
    "NoCaps",
    "SourceData",
    "StepLoader",
    "TextPacker",
    "VQAv2",
    "pack",
    "read_image",
]

_HOMES = {
    "CC3M": "cc3m",
    "COCOCaptions": "coco",
    "HuggingFaceData": "hugging_face",
    "ImageShards": "image_shards",
    "ImageTable": "image_table",
    "ChatPacker": "chat",
    "BatchKey": "loader",
    "BatchLoader": "loader",
    "LLaVAInstruct": "llava",
    "MixedData": "mixed",
    "NoCaps": "coco",
    "POPE": "pope",
    "SourceData": "source",
    "StepLoader": "loader",
    "TextPacker": "packing",
    "VQAv2": "vqav2",
    "VSR": "vsr",
    "pack": "packing",
    "read_image": "images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
