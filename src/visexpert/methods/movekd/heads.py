"""The teachers of MoVE-KD: their heads, and their output on a batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from visexpert.errors import ConfigError
from visexpert.experts import ExpertHub, FeatureCache
from visexpert.methods.parts import StoredTokens
from visexpert.methods.settings import HeadSettings
from visexpert.names import CLIP, EncoderName
from visexpert.transfer import KDHead, PhiS, TokenGate, make_kd_head
from visexpert.types import Batch, ExpertTokens, ImageSource
from visexpert.vision import Saliency, VisionEncoder

log = logging.getLogger(__name__)

FROZEN_CLIP = EncoderName("teacher", CLIP)
"""Its tokens with their [CLS] attention."""


@dataclass(frozen=True)
class ClipTeacher:
    """Sizes of the frozen CLIP as a teacher.

    Args:
        token_dim: Its width.
        grid_hw: Its grid.
    """

    token_dim: int
    grid_hw: tuple[int, int]


@dataclass(frozen=True)
class TeacherOutputs:
    """Output of the teachers on a batch, without a graph.

    Args:
        teachers: Tokens by name.
        clip: Output of the frozen CLIP; None without one.
        gates_BTK: Gate of each expert per token; None without a gate.
    """

    teachers: Mapping[str, ExpertTokens]
    clip: Saliency | None
    gates_BTK: torch.Tensor | None


def kd_heads(
    clip: VisionEncoder, hub: ExpertHub, settings: HeadSettings, *, with_anchor: bool, cls_weighs: bool
) -> dict[str, KDHead]:
    """Build a head for each teacher, CLIP first.

    Args:
        clip: The student; the frozen CLIP has the same size.
        hub: The experts.
        settings: How experts are compared.
        with_anchor: Whether CLIP is also a teacher.
        cls_weighs: Whether CLIP's [CLS] token weights the teachers, which needs targets of CLIP's width.

    Raises:
        ConfigError: No teacher, settings that exclude one another, or sizes that do not match.
    """
    if not with_anchor and not hub.names:
        raise ConfigError(
            "MoVEKD: without experts (use) and with clip_teacher_weight null there is no teacher, but there must be "
            "at least one; name an expert, or give CLIP a weight."
        )
    sizes = {CLIP: ClipTeacher(clip.width, clip.grid_hw)} if with_anchor else {}
    heads = {
        name: make_kd_head(name, size, clip_width=clip.width, clip_grid=clip.grid_hw, alignment="raw")
        for name, size in sizes.items()
    }
    for name in hub.names:
        heads[name] = make_kd_head(
            name,
            hub[name],
            clip_width=clip.width,
            clip_grid=clip.grid_hw,
            alignment=settings.alignment,
            adapter=settings.adapter,
            hidden_dim=settings.hidden,
            standardize=settings.standardize,
        )
    wide = {name: head.width for name, head in heads.items() if head.width != clip.width}
    if cls_weighs and wide:
        raise ConfigError(
            f"MoVEKD: weighting.teachers='attention' compares CLIP's [CLS] token, {clip.width} wide, with targets, but "
            f"heads.alignment={settings.alignment!r} leaves them as wide as {wide}; use to_student or fixed, or weigh "
            "teachers uniformly."
        )
    return heads


@torch.no_grad()
def run_teachers(
    hub: ExpertHub, anchor: VisionEncoder | None, gate: TokenGate | None, batch: Batch, *, cache: FeatureCache | None
) -> TeacherOutputs:
    """Run the teachers, CLIP first, or read their tokens from the store."""
    clip, gates_BTK = None, None
    teachers: dict[str, ExpertTokens] = {}
    if anchor is not None:
        clip = _read_anchor(anchor, cache, batch) or anchor.attend(batch.images_01())
        if gate is not None:
            gates_BTK = gate(clip.tokens.tokens_BTD, (True,) * len(hub.names)).gates_BTK
        teachers[CLIP] = ExpertTokens(clip.tokens.tokens_BTD, clip.tokens.grid_hw, summary_BF=clip.tokens.cls_BD)
    teachers |= hub(batch)
    return TeacherOutputs(teachers, clip, gates_BTK)


def summary_widths(clip: VisionEncoder, hub: ExpertHub, *, with_anchor: bool, live: bool) -> dict[str, int]:
    """Return the width of the summary of each teacher that has one of its own.

    Args:
        clip: The student; the frozen CLIP's summary is its [CLS] token.
        hub: The experts.
        with_anchor: Whether CLIP is a teacher.
        live: Whether experts run in each step: a store keeps their patch tokens only.
    """
    own = {CLIP: clip.width} if with_anchor and clip.saliency == "cls" else {}
    experts = {name: hub[name].summary_width() for name in hub.names} if live else {}
    return own | {name: width for name, width in experts.items() if width is not None}


@torch.no_grad()
def fit_standardization(
    heads: Mapping[str, KDHead], hub: ExpertHub, sources: Mapping[str, ImageSource], *, images: int = 512
) -> None:
    """Compute the maps of PHI-S that are not computed yet from training images, evenly spaced over the splits.

    Args:
        heads: Heads by teacher.
        hub: The experts, which run or read their tokens from the store.
        sources: Training images by split.
        images: Most images to read. Without any that can be read by row, the first batch of training has to do.
    """
    waiting = {name: map for name, head in heads.items() if (map := _phi_s_of(head)) is not None and not map.ready()}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in waiting}
    device = next((expert.mean.device for expert in hub.attached_experts().values()), torch.device("cpu"))
    for split, source in sources.items() if waiting else ():
        if getattr(source, "in_sequence", False):  # spread rows would read all of it
            log.info("PHI-S is computed from the first batch of training: %s is read in sequence.", split)
            continue
        count = min(len(source), -(-images // len(sources)))
        rows = torch.linspace(0, len(source) - 1, count).round().long().unique()
        for part in rows.split(32):
            try:
                images_BCHW = source.read(part.tolist())
            except ConfigError as error:
                log.info("PHI-S is computed from the first batch of training: %s", error)
                break
            tokens = hub(Batch(images_BCHW.to(device), part, split))
            for name in waiting:
                seen[name].append(heads[name].resampled(tokens[name]).cpu())
    for name, map in waiting.items():
        map.fit(seen[name])


def _phi_s_of(head: KDHead) -> PhiS | None:
    found = getattr(head, "standardize", None)
    return found if isinstance(found, PhiS) else None


def store_anchor(anchor: VisionEncoder, cache: FeatureCache, sources: Mapping[str, ImageSource]) -> None:
    """Fill or open the store of the frozen CLIP's tokens and [CLS] attention for these images, by split."""
    kept = stored_anchor(anchor)
    for split, source in sources.items():
        cache.prepare(
            FROZEN_CLIP,
            split,
            source,
            fingerprint=anchor.fingerprint(),
            encode=lambda images_BCHW: anchor.attend(images_BCHW).packed(),
            grid_hw=anchor.grid_hw,
            width=kept.width,
            tokens=kept.rows,
            device=anchor.mean.device,
        )


def stored_anchor(anchor: VisionEncoder) -> StoredTokens:
    """Return the size of what :func:`store_anchor` stores per image: hidden states with their attention by head."""
    return StoredTokens(1 + math.prod(anchor.grid_hw), anchor.width + anchor.saliency_heads)


def _read_anchor(anchor: VisionEncoder, cache: FeatureCache | None, batch: Batch) -> Saliency | None:
    packed_BNF = None if cache is None else cache.read(FROZEN_CLIP, batch)
    if packed_BNF is None:
        return None
    return Saliency.unpacked(packed_BNF, width=anchor.width, grid_hw=anchor.grid_hw)
