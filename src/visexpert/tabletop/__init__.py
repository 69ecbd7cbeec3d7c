"""The embedded world: ray-cast scenes on a table with exact truth, texts written from it, and small experts.

The names below are imported on first use: Lightning and transformers take seconds to import, and processes that only
render need neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visexpert.tabletop.datamodule import TabletopData
    from visexpert.tabletop.texts import tabletop_tokenizer
    from visexpert.tabletop.tiny import TinyExpert
    from visexpert.tabletop.world import TabletopWorld

__all__ = ["TabletopData", "TabletopWorld", "TinyExpert", "tabletop_tokenizer"]

_HOMES = {
    "TabletopData": "datamodule",
    "TabletopWorld": "world",
    "TinyExpert": "tiny",
    "tabletop_tokenizer": "texts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
