"""Attention and routing in a student's encoder on a batch, for figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from visexpert.losses import cls_token_weights
from visexpert.types import Batch, imaged
from visexpert.vision import RoutingRecord, VisionEncoder, collect_routing


@dataclass(frozen=True)
class RoutingViews:
    """Decisions of MoLE's routers on patch tokens, without [CLS].

    Args:
        layers: Blocks of the encoder, from 0, that L runs over.
        probs_BLHWE: Probability of each low-rank expert, on the grid of the tokens.
        choice_BLHW: int64, the most probable expert.
    """

    layers: tuple[int, ...]
    probs_BLHWE: Tensor
    choice_BLHW: Tensor


@dataclass(frozen=True)
class EncoderViews:
    """Attention and routing on the images of a batch.

    Args:
        images_BCHW: The images, float in [0, 1].
        attention: [CLS] attention over the patches, mean over heads, by encoder: (B, H, W), each image's sum is 1.
        routing: Routing in the student; None without MoLE.
    """

    images_BCHW: Tensor
    attention: Mapping[str, Tensor]
    routing: RoutingViews | None = None


@torch.no_grad()
def view_encoders(encoders: Mapping[str, VisionEncoder], batch: Batch, *, student: str) -> EncoderViews:
    """Collect attention and routing of samples with an image.

    Args:
        encoders: Encoders by name.
        batch: A batch of images.
        student: Name of the encoder whose routing to collect.
    """
    images_BCHW = imaged(batch.images_01(), batch.has_image_B)
    attention: dict[str, Tensor] = {}
    with collect_routing(encoders[student]) as routing:
        for name, clip in encoders.items():
            if clip.read_blocks():  # an encoder that reads its embeddings has no attention
                logits_BHN = clip.attend(images_BCHW).logits_BHN
                attention[name] = cls_token_weights(logits_BHN, "paper").unflatten(1, clip.grid_hw)
    record = routing.record()
    routed = None if record is None else _of_patches(record, encoders[student])
    return EncoderViews(images_BCHW, attention, routed)


def _of_patches(record: RoutingRecord, encoder: VisionEncoder) -> RoutingViews:
    grid_hw = encoder.grid_hw
    probs_BLTE = record.probs_LBNE[:, :, encoder.prefix :].transpose(0, 1)
    choice_BLT = record.choice_LBN[:, :, encoder.prefix :].transpose(0, 1)
    return RoutingViews(record.layers, probs_BLTE.unflatten(2, grid_hw), choice_BLT.unflatten(2, grid_hw))
