"""Tiny language models with weights wide enough that no two of their predictions are alike, and packed texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visexpert.data import pack
from visexpert.language import CrossAttentionDecoder, LanguageModel, PrefixLM
from visexpert.types import TextBatch, VisionTokens

VOCAB = 40
WIDTH = 16
GRID = (2, 3)
NEVER = 0
"""A token whose logit is always 0, hence below the largest of the other random ones: it is never written."""
KINDS = ("cross", "prefix")


def language_model(kind: str) -> LanguageModel:
    """``cross`` or ``prefix`` (a tiny Llama), random, in eval mode."""
    side: LanguageModel
    if kind == "cross":
        side = CrossAttentionDecoder(vocab_size=VOCAB, width=WIDTH, depth=2, heads=2, max_tokens=24)
    else:
        side = PrefixLM(config=llama(), position_scale=0.7)
    for name, parameter in side.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=1.5 if name == "model.model.embed_tokens.weight" else 0.4)
    head = side.head if isinstance(side, CrossAttentionDecoder) else side.get_submodule("model.lm_head")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[NEVER] = 0.0
    return side.eval()


def llama() -> dict[str, Any]:
    """Fields of a tiny Llama."""
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }


def vision(batch: int) -> VisionTokens:
    """Random tokens, other ones for each image."""
    return VisionTokens(torch.randn(batch, GRID[0] * GRID[1], WIDTH), GRID)


def item(length: int, prompt: int) -> tuple[list[int], int]:
    """Random ids above the special ones, the first ``prompt`` of them not predicted."""
    return torch.randint(3, VOCAB, (length,)).tolist(), prompt


def one_item(ids: list[int], prompt: int) -> TextBatch:
    """A batch of one image with one item."""
    return pack([[(ids, prompt)]], 0)
