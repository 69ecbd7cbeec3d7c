"""CLIP, the encoder that receives the experts' knowledge."""

from visexpert.vision.anyres import TiledClipEncoder, Views, views_of
from visexpert.vision.clip import ClipEncoder
from visexpert.vision.cls_attention import ClsAttention
from visexpert.vision.mole import MoLEFeedForward, add_mole
from visexpert.vision.mole_inference import (
    RouterUsage,
    UsageMeter,
    decision_margins,
    equipped_blocks,
    fold,
    merge_for_inference,
    mole_settings,
)
from visexpert.vision.mole_settings import MoLESettings
from visexpert.vision.routing import RoutingRecord, collect_routing

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
    "views_of",
]
