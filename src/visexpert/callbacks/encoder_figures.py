"""Collects what a student's encoder does on test images, and draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visexpert.methods import Method
from visexpert.methods.views import EncoderViews, RoutingViews
from visexpert.names import CLIP
from visexpert.report.encoder import cls_attention_maps, router_maps, router_usage
from visexpert.types import Batch

LABELS = {CLIP: "CLIP"}
"""Names of encoders as figures write them, where that is not the name itself."""


class EncoderFigures:
    """[CLS] attention, router choice and router usage over the first images of a test.

    Args:
        shown: Images in the maps.
        counted: Images that usage is counted over.
    """

    def __init__(self, *, shown: int, counted: int) -> None:
        self._shown, self._counted = shown, counted
        self._seen = 0
        self._images: list[NDArray[Any]] = []
        self._attention: dict[str, list[NDArray[Any]]] = {}
        self._probs_LHWE: list[NDArray[Any]] = []
        self._layers: tuple[int, ...] = ()
        self._sums: list[NDArray[Any]] = []

    def add(self, method: Method, batch: Batch) -> None:
        """Look at a batch while images are wanted."""
        if self._seen >= self._counted or (batch.has_image_B is not None and not batch.has_image_B.any()):
            return
        views = method.views(batch)
        if views is None:
            self._seen = self._counted  # nothing to show in later batches either
            return
        self._seen += len(views.images_BCHW)
        self._keep(views, self._shown - len(self._images))
        if views.routing is not None:
            self._count(views.routing)

    def draw(self, folder: Path) -> None:
        """Write what there is into ``folder``."""
        if not self._images:
            return
        images = np.stack(self._images)
        if self._attention:
            maps = {LABELS.get(name, name): np.stack(rows) for name, rows in self._attention.items()}
            cls_attention_maps(images, maps, folder / "cls_attention.png")
        if self._probs_LHWE:
            shown = images[: max(1, self._shown // 2)]  # a row each, so fewer
            router_maps(shown, np.stack(self._probs_LHWE[: len(shown)]), self._layers, folder / "router_maps.png")
            share_LE, probability_LE = np.sum(self._sums, axis=0) / self._seen
            over = f"{self._seen} test images"
            router_usage(share_LE, probability_LE, self._layers, folder / "router_usage.png", over=over)

    def _keep(self, views: EncoderViews, room: int) -> None:
        images_BHWC = _array(views.images_BCHW.permute(0, 2, 3, 1)[: max(0, room)])
        self._images += list(images_BHWC)
        for name, shares_BHW in views.attention.items():
            self._attention.setdefault(name, []).extend(_array(shares_BHW[: len(images_BHWC)]))
        if views.routing is not None:
            self._probs_LHWE += list(_array(views.routing.probs_BLHWE[: len(images_BHWC)]))

    def _count(self, routing: RoutingViews) -> None:
        """Sum over images of each expert's share of tokens and of its mean probability, (2, L, E)."""
        probs_BLHWE = routing.probs_BLHWE
        chosen_BLHWE = routing.choice_BLHW[..., None] == probs_BLHWE.new_tensor(range(probs_BLHWE.shape[-1])).long()
        parts = (chosen_BLHWE.to(probs_BLHWE.dtype), probs_BLHWE)
        self._sums.append(np.stack([_array(part.mean(dim=(2, 3)).sum(0)) for part in parts]))
        self._layers = routing.layers


def _array(values: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = values.float().cpu().numpy()
    return array
