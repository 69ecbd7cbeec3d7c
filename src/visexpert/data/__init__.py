"""Annotations and images to batches.

The names below are imported on first use: processes that only render need neither Lightning nor transformers, whose
imports take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visexpert.data.images import read_image
    from visexpert.data.loader import BatchKey, BatchLoader
    from visexpert.data.packing import TextPacker, pack
    from visexpert.data.tabletop.datamodule import TabletopData

__all__ = ["BatchKey", "BatchLoader", "TabletopData", "TextPacker", "pack", "read_image"]

_HOMES = {
    "BatchKey": "loader",
    "BatchLoader": "loader",
    "TabletopData": "tabletop.datamodule",
    "TextPacker": "packing",
    "pack": "packing",
    "read_image": "images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
