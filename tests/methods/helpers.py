"""A tiny ToVE of random parts, batches of noise with random texts, and a bare trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from visexpert.data import pack
from visexpert.experts import VisionExpert
from visexpert.language import CrossAttentionDecoder
from visexpert.methods import Merging, Method, ToVE
from visexpert.tabletop import TinyExpert
from visexpert.types import Batch
from visexpert.vision import ClipEncoder

CLIP_FIELDS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VOCAB = 96
WIDTH = 8


def tiny_experts() -> dict[str, VisionExpert]:
    """Three experts of unlike widths and grids; depth hands on its predicted map."""
    vit = {"patch_size": 12, "token_dim": 12, "depth": 1, "num_heads": 2}
    depth = {"widths": [8, 8], "token_dim": 8, "outputs": {"depth": 1}}
    edges = {"widths": [8, 8, 8], "token_dim": 10}
    return {
        "semantic": TinyExpert(arch={"kind": "vit", "image_size": 48, "network": vit}),
        "depth": TinyExpert(arch={"kind": "conv", "image_size": 32, "network": depth}, tokens="prediction"),
        "edges": TinyExpert(arch={"kind": "conv", "image_size": 48, "network": edges}),
    }


def tiny_tove(*, seed: int = 0, dropout: float = 0.0, **options: Any) -> ToVE:
    """The same random parts for the same seed, whatever the options."""
    torch.manual_seed(seed)
    clip, experts = ClipEncoder(config=CLIP_FIELDS), tiny_experts()
    language = CrossAttentionDecoder(vocab_size=VOCAB, width=WIDTH, depth=1, heads=2, dropout=dropout)
    return ToVE(
        clip=clip, language=language, **sorted_settings(ToVE, {"experts": experts, "warmup_steps": 2, **options})
    )


def merging_of(**options: Any) -> Merging:
    """Merging with its settings given by their own names."""
    return Merging(**sorted_settings(Merging, options))


def sorted_settings(method: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a method, in which settings given by their own names lie in the groups that have them."""
    groups = {name: p.default for name, p in signature(method).parameters.items() if is_dataclass(p.default)}
    owners = {field.name: name for name, group in groups.items() for field in fields(group)}
    given: dict[str, Any] = {name: value for name, value in options.items() if name not in owners}
    for group in {owners[name] for name in options if name in owners}:
        changes = {name: value for name, value in options.items() if owners.get(name) == group}
        given[group] = replace(given.get(group, groups[group]), **changes)
    return given


def shake(model: ToVE, *, seed: int = 1) -> ToVE:
    """Give all that trains random weights: adapters no longer end in zeros."""
    generator = torch.Generator().manual_seed(seed)
    for part in (model.projector, model.adapters, model.gate, model.language):
        for parameter in [] if part is None else part.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def noise_batch(*, seed: int = 0, size: int = 20) -> Batch:
    """Two images of noise, with two texts and one."""
    generator = torch.Generator().manual_seed(seed)

    def item(length: int, prompt: int) -> tuple[list[int], int]:
        return torch.randint(5, VOCAB, (length,), generator=generator).tolist(), prompt

    images_BCHW = torch.randint(0, 256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    return Batch(images_BCHW, torch.arange(2), "train", text=pack([[item(5, 2), item(6, 3)], [item(4, 1)]], 0))


def logits_of(model: ToVE, batch: Batch) -> Tensor:
    """Logits of the supervised tokens."""
    assert batch.text is not None
    logits_MV: Tensor = model.language(model.encode(batch), batch.text).logits_MV
    return logits_MV


def trained_names(model: Method) -> set[str]:
    """Names of the parameters that the optimizer gets."""
    chosen = {id(p) for group in model.trained_groups() for module in group.modules for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def bare_trainer(folder: Path, *, steps: int, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    """CPU, no validation, no logger; checkpoints only where a callback writes them."""
    settings: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": bool(callbacks), **options}
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **settings,
    )
