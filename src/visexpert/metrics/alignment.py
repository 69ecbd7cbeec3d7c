"""How well image embeddings fit those of a text tower: retrieval both ways, and zero-shot classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import DataError

RECALLS = (1, 5, 10)
"""Ranks K at which recall is taken."""


def retrieval_recall(images_NE: Tensor, texts_ME: Tensor, matches_NM: Tensor) -> dict[str, float]:
    """Return recall at 1, 5 and 10 by cosine, both ways, in [0, 1]: ``image_to_text/R@1``, ``text_to_image/R@1``, ...

    A query is found at K if a match is among its K nearest. Ties count against it, so equal embeddings find nothing.
    Queries without a match are left out.

    Args:
        images_NE: Embeddings of the images.
        texts_ME: Embeddings of the texts.
        matches_NM: bool, which texts belong to which image; equal captions belong to the images of both.

    Raises:
        DataError: An embedding is not finite, or shapes do not match.
    """
    if matches_NM.shape != (len(images_NE), len(texts_ME)):
        raise DataError(
            f"retrieval_recall: matches have shape {tuple(matches_NM.shape)}, but there are {len(images_NE)} images "
            f"and {len(texts_ME)} texts; give one row per image and one column per text."
        )
    scores_NM = _cosines(images_NE, texts_ME)
    found: dict[str, float] = {}
    for name, scores, matches in (
        ("image_to_text", scores_NM, matches_NM),
        ("text_to_image", scores_NM.T, matches_NM.T),
    ):
        ranks = _ranks(scores, matches)
        found |= {f"{name}/R@{k}": float((ranks < k).double().mean()) for k in RECALLS}
    return found


def zero_shot_accuracy(images_NE: Tensor, classes_CE: Tensor, truth_N: Tensor) -> float:
    """Return the share of images, in [0, 1], whose class's text is nearer by cosine than any other class's.

    Args:
        images_NE: Embeddings of the images, at least one.
        classes_CE: Embeddings of one text per class.
        truth_N: int64 class of each image.

    Raises:
        DataError: An embedding is not finite.
    """
    matches_NC = F.one_hot(truth_N, len(classes_CE)).bool()
    return float((_ranks(_cosines(images_NE, classes_CE), matches_NC) < 1).double().mean())


def matching_texts(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Return the distinct texts of all images, and which belong to which image, bool (N, M)."""
    distinct = list(dict.fromkeys(text for own in texts for text in own))
    place = {text: index for index, text in enumerate(distinct)}
    matches_NM = torch.zeros(len(texts), len(distinct), dtype=torch.bool)
    for row, own in enumerate(texts):
        matches_NM[row, [place[text] for text in own]] = True
    return distinct, matches_NM


def _cosines(left_NE: Tensor, right_ME: Tensor) -> Tensor:
    scores_NM = F.normalize(left_NE.float(), dim=-1) @ F.normalize(right_ME.float(), dim=-1).T
    if not bool(scores_NM.isfinite().all()):
        raise DataError("Text alignment: an embedding of an image or text is not finite; check the encoder's weights.")
    return scores_NM


def _ranks(scores_QC: Tensor, matches_QC: Tensor) -> Tensor:
    """Return how many candidates that do not match are at least as near as the nearest match, by query with one."""
    asked_Q = matches_QC.any(1)
    scores_QC, matches_QC = scores_QC[asked_Q], matches_QC[asked_Q]
    best_Q1 = scores_QC.masked_fill(~matches_QC, -torch.inf).amax(1, keepdim=True)
    return ((scores_QC >= best_Q1) & ~matches_QC).sum(1)
