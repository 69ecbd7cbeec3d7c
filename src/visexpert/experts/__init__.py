"""Frozen experts, which turn images into tokens."""

from visexpert.experts.base import TokenKind, VisionExpert, resize_images
from visexpert.experts.cache import FeatureCache
from visexpert.experts.dense import DepthExpert, NormalsFromDepth, SegmentationExpert
from visexpert.experts.edges import KorniaEdges
from visexpert.experts.hub import ExpertHub
from visexpert.experts.open_clip import OpenClipExpert
from visexpert.experts.timm import TimmExpert
from visexpert.experts.transformers import TransformersExpert

__all__ = [
    "DepthExpert",
    "ExpertHub",
    "FeatureCache",
    "KorniaEdges",
    "NormalsFromDepth",
    "OpenClipExpert",
    "SegmentationExpert",
    "TimmExpert",
    "TokenKind",
    "TransformersExpert",
    "VisionExpert",
    "resize_images",
]
