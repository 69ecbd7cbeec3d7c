"""Where the image's tokens go among those of packed text: in place of a marker in each item, or in front of all.

Letters beside those of types.py: L length of a row with its image in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.language.base import item_mask, supervised
from visexpert.types import IGNORE_INDEX, IMAGE_TOKEN, TextBatch, VisionTokens


@dataclass(frozen=True)
class Reading:
    """What a causal language model reads of a batch, images and texts in one row.

    Args:
        source_BL: int64 place of each token in a row of the N text tokens and then the T image tokens.
        mask_BLL: bool, which token sees which, true = visible.
        positions_BL: int64.
        predicting_BL: bool, where the supervised tokens are predicted from, in their order.
    """

    source_BL: Tensor
    mask_BLL: Tensor
    positions_BL: Tensor
    predicting_BL: Tensor


def lay_out(vision: VisionTokens, text: TextBatch) -> Reading:
    """Put each image where its texts say.

    Items that hold :data:`~visexpert.types.IMAGE_TOKEN` get the image's tokens in its place, each item its own copy,
    since what stands before the image differs (LLaVA). Where no item of the batch says anything, each image stands once
    in front of its row and all items share it.

    Raises:
        DataError: Some items have a marker, but one has none, or several, or its sample has no image.
    """
    lengths_B = token_counts(vision)
    if bool((text.ids_BN == IMAGE_TOKEN).any()):
        check_markers(text, lengths_B)
        return _inside(text, lengths_B)
    return _in_front(text, lengths_B, num_places=vision.tokens_BTD.shape[1])


def token_counts(vision: VisionTokens) -> Tensor:
    """Number of tokens of each image, int64 (B,)."""
    tokens_BTD = vision.tokens_BTD
    if vision.lengths_B is not None:
        return vision.lengths_B
    return torch.full((tokens_BTD.shape[0],), tokens_BTD.shape[1], device=tokens_BTD.device)


def check_markers(text: TextBatch, lengths_B: Tensor) -> None:
    """Compare the markers in each item with the images of its sample.

    Raises:
        DataError: They differ.
    """
    segments_BN, is_image_BN = text.segments_BN, (text.ids_BN == IMAGE_TOKEN).long()
    counts_BI = segments_BN.new_zeros(len(segments_BN), int(segments_BN.max()) + 1)
    markers_BI = counts_BI.scatter_add(1, segments_BN, is_image_BN)
    there_BI = counts_BI.scatter_add(1, segments_BN, torch.ones_like(segments_BN)) > 0
    there_BI[:, 0] = False
    images_B1 = (lengths_B > 0).long()[:, None]
    wrong = ((markers_BI != images_B1) & there_BI).nonzero().tolist()
    if wrong:
        row, item = wrong[0]
        raise DataError(
            f"Text item {item} of sample {row} of the batch has {int(markers_BI[row, item])} image tokens (<image>), "
            f"but the sample has {int(images_B1[row, 0])} image; write <image> once in each text of a sample with an "
            "image, and in no other."
        )


def _inside(text: TextBatch, lengths_B: Tensor) -> Reading:
    """Each marker widens to the image's tokens."""
    is_image_BN = text.ids_BN == IMAGE_TOKEN
    num_tokens = text.ids_BN.shape[1]
    sizes_BN = torch.where(is_image_BN, lengths_B[:, None], 1)
    ends_BN = sizes_BN.cumsum(1)
    starts_BN = ends_BN - sizes_BN
    places_BL = torch.arange(int(ends_BN[:, -1].max()), device=ends_BN.device).expand(len(ends_BN), -1).contiguous()
    token_BL = torch.searchsorted(ends_BN, places_BL, right=True).clamp(max=num_tokens - 1)
    real_BL = places_BL < ends_BN[:, -1:]
    in_image_BL = is_image_BN.gather(1, token_BL) & real_BL
    within_BL = places_BL - starts_BN.gather(1, token_BL)
    first_BN = torch.arange(num_tokens, device=ends_BN.device) - text.positions_BN
    item_start_BL = starts_BN.gather(1, first_BN.gather(1, token_BL))
    unlabelled_BL = in_image_BL | ~real_BL
    widened = TextBatch(
        ids_BN=torch.where(in_image_BL, num_tokens + within_BL, token_BL),
        labels_BN=text.labels_BN.gather(1, token_BL).masked_fill(unlabelled_BL, IGNORE_INDEX),
        segments_BN=text.segments_BN.gather(1, token_BL).masked_fill(~real_BL, 0),
        positions_BN=(places_BL - item_start_BL).masked_fill(~real_BL, 0),
    )
    _, predicting_BL = supervised(widened)
    return Reading(widened.ids_BN, item_mask(widened)[:, 0], widened.positions_BN, predicting_BL)


def _in_front(text: TextBatch, lengths_B: Tensor, *, num_places: int) -> Reading:
    """The image's tokens, then all items."""
    batch, num_tokens = text.ids_BN.shape
    total = num_places + num_tokens
    image_T = torch.arange(num_places, device=lengths_B.device)
    real_BT = image_T < lengths_B[:, None]
    mask = torch.zeros(batch, total, total, dtype=torch.bool, device=lengths_B.device)
    mask[:, :num_places, :num_places] = torch.ones(num_places, num_places, device=mask.device).tril().bool()
    mask[:, num_places:, :num_places] = real_BT[:, None]
    mask[:, num_places:, num_places:] = item_mask(text)[:, 0]
    _, predicting_BN = supervised(text)
    source_L = torch.cat([num_tokens + image_T, torch.arange(num_tokens, device=image_T.device)])
    return Reading(
        source_BL=source_L.expand(batch, -1),
        mask_BLL=mask,
        positions_BL=torch.cat([image_T.expand(batch, -1), text.positions_BN + lengths_B[:, None]], dim=1),
        predicting_BL=torch.cat([torch.zeros_like(real_BT), predicting_BN], dim=1),
    )
