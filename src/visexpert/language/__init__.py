"""Vision tokens and text to logits, and generation."""

from visexpert.language.base import LanguageSide, item_mask, supervised
from visexpert.language.cross_attention import CrossAttentionDecoder
from visexpert.language.position import sincos_2d
from visexpert.language.prefix import PrefixLM
from visexpert.language.projector import Projector

__all__ = ["CrossAttentionDecoder", "LanguageSide", "PrefixLM", "Projector", "item_mask", "sincos_2d", "supervised"]
