"""A tiny MoVE-KD of random parts, for the tests of its loss, its starts and what it watches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.helpers import (
    CLIP_FIELDS,
    VOCAB,
    WIDTH,
    bare_trainer,
    sorted_settings,
    tiny_experts,
)
from visexpert.language import CrossAttentionDecoder, LanguageModel
from visexpert.methods import MoVEKD
from visexpert.tabletop import TabletopData
from visexpert.types import Batch, ExpertTokens
from visexpert.vision import ClipEncoder, MoLESettings, VisionEncoder

MakeData = Callable[..., TabletopData]
MOLE = re.compile(r"^clip\..*\.mlp\.(router|fc1_experts|fc2_experts)\.")
PAPER: dict[str, Any] = {
    "clip_teacher_weight": 0.8,
    "alignment": "to_student",
    "adapter": "released",
    "teachers": "attention",
    "tokens": "attention",
}
STAGE_1: dict[str, Any] = {"clip_lr": 0.0, "language_lr": 0.0}


def tiny_movekd(
    *, seed: int = 0, depth: int = 3, mole: Mapping[str, Any] | None = None, plain: bool = False, **options: Any
) -> MoVEKD:
    """The same CLIP and experts for the same seed; MoLE in blocks 0 and 1 of 3, unless ``plain``."""
    torch.manual_seed(seed)
    settings = None if plain else MoLESettings(**{"num_experts": 3, "rank": 2, "dropout": 0.0, **(mole or {})})
    clip = ClipEncoder(config={**CLIP_FIELDS, "num_hidden_layers": depth}, mole=settings)
    parts: dict[str, Any] = {"experts": tiny_experts(), "language": decoder(), "warmup_steps": 2}
    parts |= {"alignment": "to_teacher", "clip_teacher_weight": 0.3, "tokens": "uniform"}
    return MoVEKD(clip=clip, **sorted_settings(MoVEKD, {**parts, **options}))


def decoder() -> LanguageModel:
    return CrossAttentionDecoder(vocab_size=VOCAB, width=WIDTH, depth=1, heads=2, dropout=0.0)


def shaken(model: MoVEKD, *, seed: int = 1, std: float = 0.2) -> MoVEKD:
    """Random weights for all that is added to CLIP: MoLE no longer starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    added = [part for layer in model.clip.mole_layers() for part in layer.added_modules()]
    for part in (*added, model.distillation, model.projector, model.language):
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


def unit(batch: Batch) -> Tensor:
    return batch.images_BCHW.float() / 255


def saved(tmp_path: Path, model: Any, data: MakeData, name: str = "start.ckpt") -> str:
    """Train a step and save."""
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(model, datamodule=data())
    trainer.save_checkpoint(tmp_path / name)
    return str(tmp_path / name)


def as_teacher(clip: VisionEncoder, images_BCHW: Tensor) -> ExpertTokens:
    """What a CLIP says, as of a teacher."""
    tokens = clip(images_BCHW)
    return ExpertTokens(tokens.tokens_BTD, tokens.grid_hw)
