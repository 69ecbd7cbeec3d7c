"""Images to expert tokens, frozen."""

from visexpert.experts.base import TokenKind, VisionExpert, resize_images
from visexpert.experts.cache import FeatureCache
from visexpert.experts.hub import ExpertHub
from visexpert.experts.tiny import TinyExpert

__all__ = ["ExpertHub", "FeatureCache", "TinyExpert", "TokenKind", "VisionExpert", "resize_images"]
