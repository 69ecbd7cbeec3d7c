"""Splice image tokens into packed text: in place of a marker in each item, or in front of all items.

Letters in addition to those of types.py: L length of a row with its image in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.language.base import at_places, item_mask, segment_mask, supervised, token_counts, token_lengths
from visexpert.types import IMAGE_TOKEN, TextBatch, VisionTokens

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """Input of a causal language model: image and texts in one row.

    Args:
        source_BL: int64 index of each token in the concatenation of N text tokens and T image tokens.
        mask_BLL: bool attention mask, true = visible.
        positions_BL: int64.
        predicting_M: int64 indices row * L + column of the positions that predict the supervised tokens, in order.
        targets_M: int64, the supervised tokens.
        longest: Length of the longest item with its image.
    """

    source_BL: Tensor
    mask_BLL: Tensor
    positions_BL: Tensor
    predicting_M: Tensor
    targets_M: Tensor
    longest: int


def lay_out(vision: VisionTokens, text: TextBatch) -> Reading:
    """Place each image as its texts require. Sizes are known on the host, so there is no wait for the device.

    Items that hold :data:`~visexpert.types.IMAGE_TOKEN` get the image's tokens in its place, one copy per item, since
    the text before the image differs (LLaVA). If no item of the batch has a marker, each image is placed once in front
    of its row, shared by all items.

    Raises:
        DataError: Some items have a marker, but another has none or several, or its sample has no image.
    """
    lengths = np.asarray(token_lengths(vision))
    if text.facts.has_markers:
        check_markers(text, lengths)
        return _inside(text, token_counts(vision), lengths)
    return _in_front(text, token_counts(vision), lengths, num_places=vision.tokens_BTD.shape[1])


def check_markers(text: TextBatch, lengths: IntArray) -> None:
    """Check that the markers of each item match the image of its sample.

    Args:
        text: The texts.
        lengths: Number of image tokens of each sample, 0 without an image.

    Raises:
        DataError: They do not match.
    """
    facts, has_image_B = text.facts, (lengths > 0).astype(int)
    wrong = np.argwhere((facts.markers_BI != has_image_B[:, None]) & (facts.lengths_BI > 0))
    if len(wrong):
        row, item = wrong[0]
        raise DataError(
            f"Text item {item + 1} of sample {row} of the batch has {facts.markers_BI[row, item]} image tokens "
            f"(<image>), but the sample has {has_image_B[row]} image; write <image> once in each text of a sample with "
            "an image, and in no other."
        )


def _inside(text: TextBatch, lengths_B: Tensor, lengths: IntArray) -> Reading:
    """Replace each marker with the image's tokens."""
    facts, num_tokens = text.facts, text.ids_BN.shape[1]
    is_image_BN = text.ids_BN == IMAGE_TOKEN
    sizes_BN = torch.where(is_image_BN, lengths_B[:, None], 1)
    ends_BN = sizes_BN.cumsum(1)
    starts_BN = ends_BN - sizes_BN
    total = int((num_tokens + facts.markers_BI.sum(1) * (lengths - 1)).max())
    places_BL = torch.arange(total, device=ends_BN.device).expand(len(ends_BN), -1).contiguous()
    token_BL = torch.searchsorted(ends_BN, places_BL, right=True).clamp(max=num_tokens - 1)
    real_BL = places_BL < ends_BN[:, -1:]
    in_image_BL = is_image_BN.gather(1, token_BL) & real_BL
    within_BL = places_BL - starts_BN.gather(1, token_BL)
    first_BN = torch.arange(num_tokens, device=ends_BN.device) - text.positions_BN
    item_start_BL = starts_BN.gather(1, first_BN.gather(1, token_BL))
    segments_BL = text.segments_BN.gather(1, token_BL).masked_fill(~real_BL, 0)
    targets_M, _ = supervised(text)
    rows_M = facts.places_M // num_tokens
    return Reading(
        source_BL=torch.where(in_image_BL, num_tokens + within_BL, token_BL),
        mask_BLL=segment_mask(segments_BL)[:, 0],
        positions_BL=(places_BL - item_start_BL).masked_fill(~real_BL, 0),
        predicting_M=rows_M * total + at_places(starts_BN, facts.places_M) - 1,
        targets_M=targets_M,
        longest=int((facts.lengths_BI + facts.markers_BI * (lengths[:, None] - 1)).max()),
    )


def _in_front(text: TextBatch, lengths_B: Tensor, lengths: IntArray, *, num_places: int) -> Reading:
    """Return the image's tokens, then all items."""
    batch, num_tokens = text.ids_BN.shape
    total = num_places + num_tokens
    image_T = torch.arange(num_places, device=lengths_B.device)
    real_BT = image_T < lengths_B[:, None]
    mask = torch.zeros(batch, total, total, dtype=torch.bool, device=lengths_B.device)
    mask[:, :num_places, :num_places] = torch.ones(num_places, num_places, device=mask.device).tril().bool()
    mask[:, num_places:, :num_places] = real_BT[:, None]
    mask[:, num_places:, num_places:] = item_mask(text)[:, 0]
    targets_M, predicting_M = supervised(text)
    source_L = torch.cat([num_tokens + image_T, torch.arange(num_tokens, device=image_T.device)])
    return Reading(
        source_BL=source_L.expand(batch, -1),
        mask_BLL=mask,
        positions_BL=torch.cat([image_T.expand(batch, -1), text.positions_BN + lengths_B[:, None]], dim=1),
        predicting_M=predicting_M + (predicting_M // num_tokens + 1) * num_places,
        targets_M=targets_M,
        longest=max(num_places, int((text.facts.lengths_BI + lengths[:, None]).max(initial=0))),
    )
