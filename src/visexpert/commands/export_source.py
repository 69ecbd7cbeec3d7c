"""Collect from a run what ``visexpert export`` writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.callbacks.meant_for import llava_problems
from visexpert.captioning import text_encoder_of
from visexpert.errors import ConfigError
from visexpert.export import ExportSource, LanguageParts, Projection
from visexpert.io.run_files import read_json
from visexpert.language import Predictions, PrefixLM
from visexpert.methods import Method
from visexpert.runs import SavedRun
from visexpert.types import IGNORE_INDEX, Batch, TextBatch
from visexpert.vision import VisionEncoder

log = logging.getLogger(__name__)

FACTS = "merge.json"
REPORTED = (
    "steps",
    "student",
    "distance",
    "adaptation",
    "normalize",
    "token_weight",
    "lm_weight",
    "fusion_space",
    "teacher_steps",
)
"""Entries of ``merge.json`` that the report shows."""


def source_of(saved: SavedRun, layers: Sequence[int] | None, *, with_language: bool) -> ExportSource:
    """Collect what to export of a run.

    Args:
        saved: The run.
        layers: Hidden states to compare; None for the layer that the run reads, and the last.
        with_language: Include the language model (for LLaVA).

    Raises:
        ConfigError: the encoder lacks one of the layers, or LLaVA cannot hold the language model.
    """
    model, clip = saved.model, saved.model.clip
    clip.requires_grad_(False)
    depth = clip.depth
    lowest = -depth - clip.returns_embeddings
    wanted = tuple(dict.fromkeys((clip.layer, -1) if layers is None else layers))
    for layer in wanted:
        if not lowest <= layer <= -1:
            raise ConfigError(f"--layers {layer} is outside {lowest}..-1 of an encoder with {depth} layers.")
    path = saved.folder / FACTS
    facts = read_json(path) if path.is_file() else {}
    name = saved.folder.resolve()
    origin = {"run": f"{name.parent.name}/{name.name}", "optimizer steps in all": str(saved.steps)}
    origin |= {f"merge: {key.replace('_', ' ')}": str(facts[key]) for key in REPORTED if facts.get(key) is not None}
    if model.beside_clip():
        origin["not exported"] = ", ".join(model.beside_clip())
        log.warning(
            "Not exported, though the run's language model reads it beside the encoder: %s.", origin["not exported"]
        )
    start = start_of(clip)
    return ExportSource(
        clip,
        wanted,
        None if start is None else _pooled_trained(clip, start),
        _licenses(model, facts),
        origin,
        _language_parts(saved) if with_language else None,
        projection=None if start is None else _projection(start),
    )


def _licenses(model: Method, facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the licenses of the encoder and the experts merged into it; without a merge, of those beside it."""
    own = dict(model.licenses())
    experts = facts.get("experts")
    merged = own if experts is None else {f"expert {name}": str(license) for name, license in experts.items()}
    return merged | {"clip": str(facts.get("clip_license", own["clip"]))}


def start_of(clip: VisionEncoder) -> VisionEncoder | None:
    """Return the encoder with its source's weights and without MoLE; None if it started from random weights."""
    if clip.source is None:
        return None
    start = clip.rebuilt()
    start.load_weights()
    return start


def _pooled_trained(clip: VisionEncoder, start: VisionEncoder) -> bool:
    """Return whether training changed the final norm or pooling head, which only the pooled output uses."""
    before, after = (nn.ModuleList(encoder.anatomy.pooling(encoder.model)) for encoder in (start, clip))
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return not all(torch.equal(old, new) for old, new in pairs)


def _projection(start: VisionEncoder) -> Projection | None:
    """Return the projection of CLIP's source, which a ``CLIPVisionModel`` lacks; None if it has none."""
    return None if start.projection_dim is None else Projection(start.projection_dim, str(start.source))


def _language_parts(saved: SavedRun) -> LanguageParts:
    """Return the language model in LLaVA's form.

    Raises:
        ConfigError: LLaVA cannot hold a setting of the run, which the message names.
    """
    model = saved.model
    language, projector = model.language, model.projector
    problems = llava_problems(model)
    if model.read_experts:
        problems.append(f"use: {list(model.read_experts)} (its language model reads experts: merge first)")
    if problems:
        raise ConfigError(
            f"--format llava cannot hold {problems[0]}; export '{saved.folder}' as hf, or train without it."
        )
    layers = list(projector.layers.children())
    assert isinstance(language, PrefixLM)
    first, last = layers[0], layers[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    encoder, logits = text_encoder_of(saved), partial(_logits, model)
    return LanguageParts(language.plain_model(), first, last, saved.tokenizer, encoder, language, logits)


def _logits(model: Method, images_BCHW: Tensor, ids_BN: Tensor) -> Tensor:
    """Return logits (B, N - 1, V) of one text per image, from the run's own forward."""
    batch, length = ids_BN.shape
    labels_BN = ids_BN.clone()
    labels_BN[:, 0] = IGNORE_INDEX
    positions_BN = torch.arange(length).expand(batch, -1)
    text = TextBatch(ids_BN, labels_BN, torch.ones_like(ids_BN), positions_BN)
    vision = model.encode(Batch(images_BCHW, torch.arange(batch), split="export"))
    found: Predictions = model.language(vision, text)
    return found.logits_MV.view(batch, length - 1, -1)
