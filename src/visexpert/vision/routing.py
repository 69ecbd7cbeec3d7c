"""Decisions of MoLE's routers, and how to inspect them.

Letters in addition to those of types.py: E low-rank experts, N tokens with [CLS].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from visexpert.vision.clip import ClipEncoder


@dataclass(frozen=True)
class RouterChoice:
    """Decision of one router.

    Args:
        probs_BNE: Softmax over experts, float32 or better.
        choice_BN: int64, the most probable expert.
    """

    probs_BNE: Tensor
    choice_BN: Tensor


@dataclass(frozen=True)
class RoutingRecord:
    """Decisions of all routers in one forward pass.

    Args:
        layers: Blocks of the encoder, from 0, that the first axis runs over.
        probs_LBNE: Softmax over experts; with a graph if the pass had one.
        choice_LBN: int64, the most probable expert.
    """

    layers: tuple[int, ...]
    probs_LBNE: Tensor
    choice_LBN: Tensor


class Router(nn.Linear):
    """Logits of the experts for each token, softmax and the winner; no noise, temperature or capacity."""

    def forward(self, x_BND: Tensor) -> RouterChoice:  # type: ignore[override]
        logits_BNE = super().forward(x_BND)
        probs_BNE = logits_BNE.to(torch.promote_types(logits_BNE.dtype, torch.float32)).softmax(-1)
        return RouterChoice(probs_BNE, probs_BNE.argmax(-1))


class RoutingCollector:
    """Records the routers' decisions while :func:`collect_routing` is active; the latest pass counts."""

    def __init__(self) -> None:
        self._choices: dict[int, RouterChoice] = {}

    def keep(self, layer: int, choice: RouterChoice) -> None:
        """Record the decisions of one layer."""
        self._choices[layer] = choice

    def record(self) -> RoutingRecord | None:
        """Return the decisions of all layers that ran; None if no layer has a router (a plain CLIP)."""
        if not self._choices:
            return None
        layers = tuple(sorted(self._choices))
        probs = torch.stack([self._choices[layer].probs_BNE for layer in layers])
        return RoutingRecord(layers, probs, torch.stack([self._choices[layer].choice_BN for layer in layers]))


@contextmanager
def collect_routing(encoder: nn.Module) -> Iterator[RoutingCollector]:
    """Record the routers' decisions in an encoder: ``with collect_routing(clip) as routing: clip(images)``.

    Layers count blocks of a :class:`ClipEncoder`, and routers in the order of the model in any other encoder that
    :func:`~visexpert.vision.add_mole` has equipped. In a :class:`ClipEncoder`, blocks with MoLE behind the tokens also
    run, for their routers. The modules store nothing, so no graph outlives the record. Under gradient checkpointing the
    blocks run again in the backward pass, after the ``with``, and are not recorded; the recorded probabilities have a
    gradient if checkpointing is not reentrant (transformers' default). Under DDP each process has the decisions on its
    own images.
    """
    collector = RoutingCollector()
    clip = encoder if isinstance(encoder, ClipEncoder) else None
    watched = clip is not None and clip.routing_watched
    if clip is not None:
        clip.routing_watched = True
    handles = [router.register_forward_hook(partial(_report, collector, index)) for index, router in _routers(encoder)]
    try:
        yield collector
    finally:
        if clip is not None:
            clip.routing_watched = watched
        for handle in handles:
            handle.remove()


def _routers(encoder: nn.Module) -> list[tuple[int, Router]]:
    if not isinstance(encoder, ClipEncoder):
        return list(enumerate(module for module in encoder.modules() if isinstance(module, Router)))
    found = ((index, getattr(block.mlp, "router", None)) for index, block in enumerate(encoder.model.encoder.layers))
    return [(index, router) for index, router in found if isinstance(router, Router)]


def _report(collector: RoutingCollector, layer: int, module: nn.Module, inputs: object, output: RouterChoice) -> None:
    collector.keep(layer, output)
