"""CLIP, the encoder that knowledge goes into."""

from visexpert.vision.clip import ClipEncoder
from visexpert.vision.cls_attention import ClsAttention
from visexpert.vision.mole import (
    MoLEFeedForward,
    RoutingRecord,
    add_mole,
    collect_routing,
    merge_for_inference,
)
from visexpert.vision.mole_settings import MoLESettings

__all__ = [
    "ClipEncoder",
    "ClsAttention",
    "MoLEFeedForward",
    "MoLESettings",
    "RoutingRecord",
    "add_mole",
    "collect_routing",
    "merge_for_inference",
]
