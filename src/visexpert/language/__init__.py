"""Language models: from vision tokens and text to logits, and generation."""

from visexpert.language.base import (
    LanguageModel,
    NoLanguage,
    Predictions,
    Projector,
    ProjectorSettings,
    item_mask,
    sincos_2d,
    supervised,
)
from visexpert.language.bert_decoder import BertDecoder
from visexpert.language.chat import LlavaTemplate
from visexpert.language.cross_attention import CrossAttentionDecoder
from visexpert.language.generation import Decoding
from visexpert.language.lora import LoRASettings
from visexpert.language.prefix import PrefixLM

__all__ = [
    "BertDecoder",
    "CrossAttentionDecoder",
    "Decoding",
    "LanguageModel",
    "LlavaTemplate",
    "LoRASettings",
    "NoLanguage",
    "Predictions",
    "PrefixLM",
    "Projector",
    "ProjectorSettings",
    "item_mask",
    "sincos_2d",
    "supervised",
]
