"""MoLE's config settings, apart from the module so that CLIP can name them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Routing = Literal["top1", "dense"]
RouterKind = Literal["released", "scaled", "straight_through"]
MoLEInit = Literal["identity", "released"]


@dataclass(frozen=True)
class MoLESettings:
    """Mixture-of-LoRA-experts in the MLPs of a CLIP; see :class:`visexpert.vision.MoLEFeedForward`.

    Args:
        num_experts: Low-rank experts per layer (paper: 3).
        rank: Rank of each (paper: 32).
        alpha: Experts are scaled by alpha / rank; null means rank, or 1 (as released) with ``init: released``.
        dropout: Dropout on the input of A in training (release: 0.05).
        routing: ``top1`` (release) or ``dense``.
        init: ``identity`` - the student starts as CLIP; ``released`` - A and B random.
        router: How a top-1 router learns: ``released`` (from the balance loss only), ``scaled`` or
            ``straight_through``.
        layers: Blocks to equip, from 0; null for all that the tokens depend on; ``all`` also for those behind them, as
            in the release, which neither text nor teachers reach, only the balance loss.
    """

    num_experts: int = 3
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.05
    routing: Routing = "top1"
    init: MoLEInit = "identity"
    router: RouterKind = "released"
    layers: list[int] | Literal["all"] | None = None
