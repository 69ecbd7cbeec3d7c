"""A CLIP with MoLE in forms that other libraries can run: exact, with merged weights, or folded into a plain CLIP."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.vision.encoder import VisionEncoder
from visexpert.vision.mole import MoLEFeedForward, MoLESettings
from visexpert.vision.mole_forward import RouterChoice, collect_routing

Encoder = TypeVar("Encoder", bound=VisionEncoder)


def merge_for_inference(clip: Encoder, *, keep_weighed: bool = False) -> Encoder:
    """Return a copy of a CLIP with each MoLE in its merged form (:meth:`MoLEFeedForward.for_inference`).

    Args:
        clip: The encoder.
        keep_weighed: Leave a MoLE unchanged if it weights experts by token and so has no merged form.

    Raises:
        ConfigError: A MoLE has no merged form.
    """
    merged = copy.deepcopy(clip)
    for name in merged.mlp_names():
        mlp = merged.get_submodule(name)
        if isinstance(mlp, MoLEFeedForward) and (mlp.has_merged_form or not keep_weighed):
            merged.set_submodule(name, mlp.for_inference())
    return merged.requires_grad_(False).eval()


def equipped_blocks(clip: VisionEncoder) -> dict[int, MoLEFeedForward]:
    """Return each MoLE by the index of its block, from 0."""
    mlps = (clip.get_submodule(name) for name in clip.mlp_names())
    return {index: mlp for index, mlp in enumerate(mlps) if isinstance(mlp, MoLEFeedForward)}


def mole_settings(clip: VisionEncoder) -> MoLESettings | None:
    """Return settings that rebuild a MoLE of the same shapes and function; None for a plain CLIP."""
    blocks = equipped_blocks(clip)
    if not blocks:
        return None
    first = next(iter(blocks.values()))
    experts = first.experts()[0]
    return MoLESettings(
        num_experts=experts.num_experts,
        rank=experts.rank,
        alpha=experts.scale * experts.rank,
        dropout=experts.dropout.p,
        routing=first.routing,
        router=first.router_kind,
        layers=list(blocks),
    )


@dataclass(frozen=True)
class RouterUsage:
    """How much the tokens of a set of images used each expert.

    Args:
        gates: By block, from 0: mean weight of each expert over all tokens, (E,), float64. With top-1 this is the share
            of tokens routed to it (times their p if the router is ``scaled``), with ``dense`` its mean p.
        num_images: Number of images seen.
    """

    gates: Mapping[int, Tensor]
    num_images: int


class UsageMeter:
    """Collects :class:`RouterUsage` over batches.

    Args:
        clip: A CLIP with MoLE, in eval mode.
    """

    def __init__(self, clip: VisionEncoder) -> None:
        self.clip = clip
        self._sums: dict[int, Tensor] = {}
        self._images = self._tokens = 0

    @torch.no_grad()
    def update(self, images_BCHW: Tensor) -> None:
        """Add one batch of images in [0, 1]."""
        with collect_routing(self.clip) as routing:
            self.clip(images_BCHW)
        record = routing.record()
        if record is None:
            raise ConfigError(
                "UsageMeter: this CLIP has no MoLE, so it has no router to measure; use a CLIP with MoLE."
            )
        blocks = equipped_blocks(self.clip)
        for index, probs_BNE, choice_BN in zip(record.layers, record.probs_LBNE, record.choice_LBN, strict=True):
            gates_BNE = blocks[index].gates(RouterChoice(probs_BNE, choice_BN))
            total_E = gates_BNE.double().sum((0, 1)).cpu()
            self._sums[index] = self._sums.get(index, torch.zeros_like(total_E)) + total_E
        self._images += len(images_BCHW)
        self._tokens += record.choice_LBN[0].numel()

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return self._images

    def usage(self) -> RouterUsage:
        """Return the usage over all images seen so far.

        Raises:
            ConfigError: No image was seen.
        """
        if not self._images:
            raise ConfigError("UsageMeter: no image was seen; call update first.")
        return RouterUsage({index: total / self._tokens for index, total in self._sums.items()}, self._images)


def fold(clip: Encoder, usage: RouterUsage) -> Encoder:
    """Fold MoLE into a plain CLIP: average each layer's experts by their use, W + sum_e mean(g_e) (W_e - W).

    Exact only if one expert gets every token; otherwise the error has to be measured.

    Args:
        clip: A CLIP with MoLE.
        usage: Mean gate of each expert per block, from images like those it will see.
    """
    plain = copy.deepcopy(clip)
    names = plain.mlp_names()
    for index, mole in equipped_blocks(plain).items():
        plain.set_submodule(names[index], mole.folded(usage.gates[index]))
    return plain.requires_grad_(False).eval()


@torch.no_grad()
def decision_margins(clip: VisionEncoder, images_BCHW: Tensor) -> Tensor:
    """Return the smallest margin of each image's routing decisions: (B,), the lead of the best expert's probability.

    Infinite if there is no decision. Below a few float32 roundings, another library may choose the other expert.
    """
    margins_B = torch.full((len(images_BCHW),), torch.inf)
    with collect_routing(clip) as routing:
        clip(images_BCHW)
    record = routing.record()
    if record is None or record.probs_LBNE.shape[-1] == 1:
        return margins_B
    blocks = equipped_blocks(clip)
    for index, probs_BNE in zip(record.layers, record.probs_LBNE, strict=True):
        if index not in blocks or blocks[index].routing == "top1":
            best = probs_BNE.topk(2, dim=-1).values
            margins_B = margins_B.minimum((best[..., 0] - best[..., 1]).amin(1).float().cpu())
    return margins_B
