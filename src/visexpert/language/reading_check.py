"""Check on a few tokens, before training, that a causal language model reads packed items as it reads each alone.

Problems visible in the configuration are refused by :func:`~visexpert.language.attention.check_packing`. transformers
has some 200 families and gains new ones; this check finds what no field shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from visexpert.errors import ConfigError
from visexpert.language.attention import layer_masks
from visexpert.language.base import item_mask
from visexpert.types import IGNORE_INDEX, TextBatch

LENGTHS = (6, 3)
"""Lengths of the two items that are read packed and alone."""

LIMIT, HALF_LIMIT = 1e-3, 0.1
"""Largest deviation of an item's logits from those of the item alone, in standard deviations: float32, and narrower."""

_read_well: set[str] = set()
"""Configurations that passed: the result depends on a model's code and fields, not on its weights."""


def check_reading(model: Any, settings: PretrainedConfig, *, owner: str) -> None:
    """Check that two items give the same logits and generated text when packed and when read alone.

    Most tokens of an item must agree, since rounding may route single ones to other experts. Generation is tried in
    float32 only: in bfloat16 and float16 rounding may change the text. Models without weights yet, or in 4 or 8 bits,
    are skipped.

    Args:
        model: Model from ``AutoModelForCausalLM``.
        settings: Its configuration.
        owner: Who asks, for the message.

    Raises:
        ConfigError: The logits or the text differ, or the model fails.
    """
    weights = list(model.parameters())
    key = f"{weights[0].dtype} {settings.to_json_string(use_diff=False)}"
    if key in _read_well or any(weight.is_meta for weight in weights) or getattr(model, "is_quantized", False):
        return
    try:
        with _evaluating(model), torch.no_grad():
            problem = _difference(model, settings, weights[0])
    except Exception as error:  # the model's own code may raise anything
        problem = f"fails on packed text ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    if problem:
        raise ConfigError(
            f"{owner}: a language model of type '{settings.model_type}' {problem}, tried on {sum(LENGTHS)} tokens; "
            "use another, such as llama, qwen3, mistral or gemma3_text."
        )
    _read_well.add(key)


def _difference(model: Any, settings: PretrainedConfig, weight: Tensor) -> str:
    """Return a description of the difference; empty if there is none."""
    embed = model.get_input_embeddings()
    ids = torch.arange(2, 2 + sum(LENGTHS), device=weight.device) % embed.num_embeddings
    items = [row[None] for row in embed(ids).split(LENGTHS)]
    alone = [model(inputs_embeds=item, use_cache=False).logits[0].float() for item in items]
    text = _packed(ids)
    masks = layer_masks(settings, item_mask(text)[:, 0], text.positions_BN, items[0].dtype)
    packed = model(
        inputs_embeds=torch.cat(items, dim=1), attention_mask=masks, position_ids=text.positions_BN, use_cache=False
    )
    exact = weight.dtype == torch.float32
    for number, (wanted_LV, found_LV) in enumerate(
        zip(alone, packed.logits[0].float().split(LENGTHS), strict=True), start=1
    ):
        spread = float(wanted_LV.std())
        error = float((found_LV - wanted_LV).abs().amax(-1).median())
        if spread > 0 and error > (LIMIT if exact else HALF_LIMIT) * spread:
            return (
                f"predicts other tokens in item {number} of a packed row than for the item alone (off by {error:.2g})"
            )
    if not exact:
        return ""
    together = _written(model, items)
    for number, item in enumerate(items):
        for found_RV, wanted_RV in zip(together, _written(model, [item]), strict=False):  # one may stop earlier
            error = float((found_RV[number] - wanted_RV[0]).abs().max())
            if error > LIMIT * float(wanted_RV.std()):
                return f"generates different text for several prompts at once than for each alone (off by {error:.2g})"
    return ""


def _packed(ids_N: Tensor) -> TextBatch:
    """Pack both items into one row."""
    lengths = torch.tensor(LENGTHS, device=ids_N.device)
    segments = torch.arange(1, 1 + len(LENGTHS), device=ids_N.device).repeat_interleave(lengths)
    positions = torch.cat([torch.arange(length, device=ids_N.device) for length in LENGTHS])
    return TextBatch(ids_N[None], torch.full_like(ids_N, IGNORE_INDEX)[None], segments[None], positions[None])


def _written(model: Any, items: list[Tensor]) -> list[Tensor]:
    """Return logits (R, V) of two tokens after each item, generated as by PrefixLM: left-padded, with a cache."""
    longest = max(item.shape[1] for item in items)
    rows = [nn.functional.pad(item, (0, 0, longest - item.shape[1], 0)) for item in items]
    mask = torch.stack([torch.arange(longest) >= longest - item.shape[1] for item in items]).long()
    out = model.generate(
        inputs_embeds=torch.cat(rows),
        attention_mask=mask.to(rows[0].device),
        eos_token_id=1,
        pad_token_id=1,
        max_new_tokens=2,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return [logits_RV.float() for logits_RV in out.logits]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
