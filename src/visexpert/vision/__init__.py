"""CLIP, the encoder that receives the experts' knowledge."""

from visexpert.vision.anyres import TiledClipEncoder
from visexpert.vision.clip import ClipEncoder, ClsAttention, Views
from visexpert.vision.mole import MoLEFeedForward, MoLESettings, RoutingRecord, add_mole, collect_routing
from visexpert.vision.mole_inference import (
    RouterUsage,
    UsageMeter,
    decision_margins,
    equipped_blocks,
    fold,
    merge_for_inference,
    mole_settings,
)

__all__ = [
    "ClipEncoder",
    "ClsAttention",
    "MoLEFeedForward",
    "MoLESettings",
    "RouterUsage",
    "RoutingRecord",
    "TiledClipEncoder",
    "UsageMeter",
    "Views",
    "add_mole",
    "collect_routing",
    "decision_margins",
    "equipped_blocks",
    "fold",
    "merge_for_inference",
    "mole_settings",
]
