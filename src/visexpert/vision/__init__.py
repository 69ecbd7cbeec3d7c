"""Encoders that train, and MoLE in their MLPs."""

from visexpert.vision.anatomy import Saliency
from visexpert.vision.anyres import TiledClipEncoder
from visexpert.vision.choosing import vision_encoder
from visexpert.vision.clip import ClipEncoder
from visexpert.vision.encoder import Views, VisionEncoder
from visexpert.vision.mole import MoLEFeedForward, MoLESettings
from visexpert.vision.mole_adding import add_mole
from visexpert.vision.mole_forward import RoutingRecord, collect_routing
from visexpert.vision.mole_inference import (
    RouterUsage,
    UsageMeter,
    decision_margins,
    equipped_blocks,
    fold,
    merge_for_inference,
    mole_settings,
)
from visexpert.vision.of_open_clip import OpenClipEncoder
from visexpert.vision.of_timm import TimmEncoder
from visexpert.vision.of_transformers import TransformersEncoder
from visexpert.vision.pooled import PooledRecord, record_pooled

__all__ = [
    "ClipEncoder",
    "MoLEFeedForward",
    "MoLESettings",
    "OpenClipEncoder",
    "PooledRecord",
    "RouterUsage",
    "RoutingRecord",
    "Saliency",
    "TiledClipEncoder",
    "TimmEncoder",
    "TransformersEncoder",
    "UsageMeter",
    "Views",
    "VisionEncoder",
    "add_mole",
    "collect_routing",
    "decision_margins",
    "equipped_blocks",
    "fold",
    "merge_for_inference",
    "mole_settings",
    "record_pooled",
    "vision_encoder",
]
