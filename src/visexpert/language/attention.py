"""Attention masks for each layer of a causal language model: full, sliding-window or chunked.

transformers builds such masks only for plain rows; packed items that share an image need their own.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from visexpert.errors import ConfigError
from visexpert.language.base import additive

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
KINDS = (FULL, SLIDING, CHUNKED)
"""Layer kinds, by transformers' names, in which a mask can separate packed items."""

Attention = Literal["sdpa", "eager"]


def attention_of(settings: PretrainedConfig) -> Attention:
    """Return PyTorch's fused attention if the model can use it, else the eager one (Gemma-2, GPT-OSS)."""
    model = _class_of(settings)
    return "sdpa" if model is None or model._supports_sdpa else "eager"


def check_packing(settings: PretrainedConfig, *, owner: str) -> None:
    """Check that a language model can read packed items.

    Raises:
        ConfigError: It carries a state along the row (Mamba, RWKV), mixes neighbors (convolutions), measures distances
            along the row instead of using positions (ALiBi), builds its own masks, embeds token ids again in every
            layer, which image tokens do not have, sees later tokens (BERT), ignores the given positions (BART), has a
            window in its cache but not in its masks (Moshi), or generates from token ids only (CTRL).
    """
    model: Any = _class_of(settings)
    text = settings.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    has_own_masks = model is not None and not (model._supports_sdpa or model._supports_attention_backend)
    problems = {
        "carries a state along the row": model is not None and model._is_stateful,
        f"has layers of the kind {', '.join(sorted(kinds - {*KINDS}))}": bool(kinds - {*KINDS}),
        "measures distances along the row (ALiBi)": bool(getattr(text, "alibi", False)),
        "builds its own attention masks": has_own_masks,
        "takes no position_ids": model is not None
        and "position_ids" not in inspect.signature(model.forward).parameters,
        "applies its sliding_window in generation only": model is not None
        and getattr(text, "sliding_window", None) is not None
        and not (kinds or hasattr(sys.modules[model.__module__], "create_sliding_window_causal_mask")),
        "is an encoder-decoder": bool(getattr(settings, "is_encoder_decoder", False)),
        "reads token ids in every layer": bool(getattr(text, "hidden_size_per_layer_input", None)),
        "reads text in both directions (is_decoder is false)": getattr(text, "is_decoder", True) is False
        and "is_decoder" in inspect.signature(type(text).__init__).parameters
        and (model is None or _asks_is_decoder(model)),
        "cannot generate from embeddings": model is not None
        and "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters,
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(
                f"{owner}: a language model of type '{settings.model_type}' {problem}, so it cannot read packed text "
                "with images as if each item were alone; use another, such as llama, qwen3, mistral or gemma3_text."
            )


def _asks_is_decoder(model: Any) -> bool:
    """Whether a model's code asks the field at all: GPT-NeoX has it and never looks."""
    return re.search(r"\.is_decoder\b(?! =)", inspect.getsource(sys.modules[model.__module__])) is not None


def layer_masks(
    settings: PretrainedConfig, visible_BLL: Tensor, positions_BL: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Build the ``attention_mask`` of transformers' forward: one for all layers, or one per kind of layer.

    Args:
        settings: The model's configuration.
        visible_BLL: bool, which token sees which without any window.
        positions_BL: int64 position of each token in its own item; windows and chunks are counted in these.
        dtype: Type of the masks (B, 1, L, L), which are added to the attention logits.
    """
    text = settings.get_text_config(decoder=True)
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = getattr(text, "layer_types", None)
    masks = {FULL: visible_BLL}
    if window is not None:
        distance_BLL = positions_BL[:, :, None] - positions_BL[:, None]
        masks[SLIDING] = visible_BLL & (distance_BLL < int(window))
    if chunk is not None:
        number_BL = positions_BL // int(chunk)
        masks[CHUNKED] = visible_BLL & (number_BL[:, :, None] == number_BL[:, None])
    if not kinds:  # all layers are of the same kind
        return additive(masks.get(SLIDING, visible_BLL)[:, None], dtype)
    return {kind: additive(mask_BLL[:, None], dtype) for kind, mask_BLL in masks.items()}


def _class_of(settings: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that AutoModelForCausalLM builds for a configuration."""
    found: Any = AutoModelForCausalLM._model_mapping.get(type(settings), None)
    made: type[PreTrainedModel] | None = found
    return made
