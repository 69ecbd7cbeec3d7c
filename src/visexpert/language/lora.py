"""LoRA and QLoRA on a language model, through peft and bitsandbytes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import BitsAndBytesConfig

from visexpert.errors import ConfigError
from visexpert.typed import typed

Quantization = Literal["nf4", "int8"]

PACKED: dict[Quantization, float] = {"nf4": 0.52, "int8": 1.0}
"""Bytes per number of a quantized weight; nf4 with doubly quantized constants takes 4.13 bits (QLoRA, section 3)."""


@typed
@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank updates of a frozen language model (LoRA, arXiv 2106.09685). Defaults are LLaVA-1.5's.

    Args:
        rank: Rank of each update.
        alpha: Updates are scaled by alpha / rank.
        dropout: Dropout on their input in training.
        targets: Names of the linear layers to update, such as ``q_proj``; null for all except the output layer.
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or self.alpha <= 0:
            raise ConfigError(
                f"LoRA: rank={self.rank}, alpha={self.alpha} and dropout={self.dropout} are invalid; give a rank of at "
                "least 1, an alpha above 0 and a dropout in [0, 1)."
            )


def add_lora(model: nn.Module, settings: LoRASettings) -> LoraModel:
    """Add updates to a causal language model in place; everything else is frozen.

    They are always float32, since bfloat16 would round away small steps.

    Raises:
        ConfigError: A target does not name a linear layer.
    """
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    place = next(model.parameters()).device
    try:
        with place if place.type == "meta" else nullcontext():  # else peft allocates memory
            tuner = LoraModel(model, config, "default")
    except ValueError as error:
        linear = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ConfigError(
            f"LoRA: targets {settings.targets} name no linear layer of the model; use some of {sorted(linear)}."
        ) from error
    for part in lora_modules(model):
        part.to(torch.float32)
    return tuner


def lora_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the low-rank factors of a model, in module order."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return tuple(part for layer in layers for part in (layer.lora_A, layer.lora_B))


def quantized(kind: Quantization, compute: torch.dtype) -> Any:
    """Return transformers' setting for loading a model in 4 or 8 bits.

    Args:
        kind: ``nf4`` - QLoRA's 4 bits (arXiv 2305.14314) with doubly quantized constants; ``int8``.
        compute: Type in which products are computed.

    Raises:
        ConfigError: An unknown kind, or bitsandbytes is not installed.
    """
    if kind not in get_args(Quantization):
        raise ConfigError(f"quantization={kind!r} is unknown; use one of {', '.join(get_args(Quantization))}.")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization={kind!r} needs bitsandbytes, which is not installed: "
            "pip install 'visexpert[quantization]', or set quantization to null and dtype to bfloat16."
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
