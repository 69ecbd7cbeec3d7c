"""The words for MoLE in a config, apart from the module so that CLIP can name them."""

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
        alpha: Experts are scaled by alpha / rank; null takes rank, and 1 (the release's) with ``init: released``.
        dropout: On the input of A, in training (release: 0.05).
        routing: ``top1`` (release) or ``dense``.
        init: ``identity`` - the student starts as CLIP; ``released`` - A and B random.
        router: How top-1 learns: ``released`` (from the balance loss only), ``scaled`` or ``straight_through``.
        layers: Blocks to equip, from 0; null for all that the tokens depend on; ``all`` for those behind them, too, as
            in the release: neither text nor teachers reach these, only the balance loss does.
    """

    num_experts: int = 3
    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.05
    routing: Routing = "top1"
    init: MoLEInit = "identity"
    router: RouterKind = "released"
    layers: list[int] | Literal["all"] | None = None
