"""Segmentation models of transformers: SegFormer, Mask2Former, UperNet, BEiT and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visexpert.experts.base import TokenKind
from visexpert.experts.maps import resize_map
from visexpert.experts.transformers import EncoderMap, HubExpert


class SegmentationExpert(HubExpert):
    """Tokens of a segmentation model's encoder, or the classes that it predicts.

    Args:
        tokens: ``features`` - of the encoder (the decoder is not run); ``prediction`` - class probabilities per cell,
            one channel per class of the model.
        layer: Of features; see :class:`~visexpert.experts.transformers.TransformersExpert`.
        map_size: Side of the predicted map that is handed on, cells; null for the model's own.
        masks: The model predicts masks with a class each (Mask2Former, MaskFormer, OneFormer-like) instead of a class
            per cell.
        kwargs: See :class:`~visexpert.experts.transformers.HubExpert`.
    """

    def __init__(
        self,
        *,
        tokens: TokenKind = "features",
        layer: int | None = None,
        map_size: int | None = None,
        masks: bool = False,
        **kwargs: Any,
    ) -> None:
        predicts = tokens == "prediction"
        super().__init__(
            auto="AutoModelForUniversalSegmentation" if masks else "AutoModelForSemanticSegmentation",
            wrap=lambda model: (
                ClassMap(model, map_size=map_size) if predicts else EncoderMap(model, layer=layer, headed=True)
            ),
            facts={"layer": layer, "map_size": map_size} if predicts else {"layer": layer},
            tokens=tokens,
            **kwargs,
        )


class ClassMap(nn.Module):
    """A segmentation model as (B, 3, H, W) -> (B, classes, h, w).

    Args:
        model: Gives ``logits``, or ``class_queries_logits`` and ``masks_queries_logits``.
        map_size: See :class:`SegmentationExpert`.
    """

    def __init__(self, model: nn.Module, *, map_size: int | None) -> None:
        super().__init__()
        self.model = model
        self.map_size = map_size

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Class probabilities; of masks, the sum over masks of class times coverage, as transformers scores them."""
        output = self.model(pixels_BCHW)
        if "masks_queries_logits" in output:
            classes_BQC = output.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last class is "no object"
            scores = torch.einsum("bqc,bqhw->bchw", classes_BQC, output.masks_queries_logits.sigmoid())
        else:
            scores = output.logits.softmax(dim=1)
        return resize_map(scores, self.map_size)
