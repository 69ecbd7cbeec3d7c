"""Terms that agglomerative encoders put beside the error of each token: relations, summaries, balance of teachers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.processes import summed

RelationForm = Literal["symmetric", "asymmetric"]

SMALLEST = 1e-3
"""Least running mean of a loss, as a share of the largest."""


def relation_errors(prediction_BTX: Tensor, target_BTX: Tensor, form: RelationForm = "symmetric") -> Tensor:
    """Return how far the similarities between an image's tokens are from the teacher's.

    Similarity is the cosine of two tokens of the same image, s for the student and t for the teacher; each pair of
    different tokens counts once. ``symmetric``: the mean of (s - t)^2. ``asymmetric``: pairs that the teacher finds
    more similar than its median pair of that image are only pulled together, max(0, t - s)^2, the others only pushed
    apart, max(0, s - t)^2. A student that separates tokens more clearly than the teacher pays nothing.

    SigLino (AMoE, arXiv 2512.20157) has an asymmetric relational loss with such a split at the median, on distances
    between images of a batch. Its exact formula was not at hand: this one is ours, on tokens within an image.

    Args:
        prediction_BTX: Computed from the student's tokens.
        target_BTX: The teacher's tokens in the same space, not differentiated.
        form: ``symmetric`` or ``asymmetric``.

    Returns:
        (B,), float32 or better, in [0, 4]; 0 for images of a single token.

    Raises:
        ConfigError: An unknown form.
    """
    if form not in get_args(RelationForm):
        raise ConfigError(f"relation_errors: form={form!r} is unknown; use 'symmetric' or 'asymmetric'.")
    tokens = prediction_BTX.shape[1]
    first_P, second_P = torch.triu_indices(tokens, tokens, offset=1, device=prediction_BTX.device)
    if not len(first_P):
        return prediction_BTX.new_zeros(len(prediction_BTX), dtype=torch.float32)
    ours_BP = _similarities(prediction_BTX)[:, first_P, second_P]
    theirs_BP = _similarities(target_BTX.detach())[:, first_P, second_P]
    gap_BP = theirs_BP - ours_BP
    if form == "asymmetric":
        near_BP = theirs_BP > theirs_BP.median(dim=1, keepdim=True).values
        gap_BP = torch.where(near_BP, gap_BP, -gap_BP).clamp_min(0.0)
    return gap_BP.square().mean(1)


def summary_errors(prediction_BX: Tensor, target_BX: Tensor) -> Tensor:
    """Return one minus the cosine of each image's summary and the teacher's, as AM-RADIO compares summary tokens.

    Args:
        prediction_BX: Computed from the student's summary.
        target_BX: The teacher's own summary ([CLS] or pooled output), not differentiated.

    Returns:
        (B,), float32 or better, in [0, 2].
    """
    full = torch.promote_types(prediction_BX.dtype, torch.float32)
    return 1 - F.cosine_similarity(prediction_BX.to(full), target_BX.detach().to(full), dim=-1)


def kept_teachers(losses_BK: Tensor, drop: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw which teachers each image learns from in a step (UNIC's teacher dropping, arXiv 2408.05088).

    The teacher with the largest loss always stays; every other one is dropped with probability ``drop``, so that those
    that are easy to match do not dominate. Multiply weights by the result, and rescale them to their old sum over the
    batch, as UNIC's code does: :func:`rescaled`.

    Args:
        losses_BK: Loss of each image and teacher.
        drop: Probability, in [0, 1].
        generator: Source of the draws; None for torch's own.

    Returns:
        (B, K), 1.0 for teachers that stay and 0.0 for the others, without a graph.
    """
    drawn_BK = torch.rand(losses_BK.shape, generator=generator, device=losses_BK.device)
    worst_B = losses_BK.detach().argmax(1)
    kept_BK = (drawn_BK >= drop).scatter(1, worst_B[:, None], True)
    return kept_BK.to(losses_BK.dtype)


def rescaled(weights_BK: Tensor, kept_BK: Tensor) -> Tensor:
    """Return ``weights_BK`` with those of dropped teachers at 0, the rest scaled to the same sum over the batch.

    The batch is that of all processes that train together.
    """
    left_BK = weights_BK * kept_BK
    before, after = summed(torch.stack([weights_BK.sum(), left_BK.sum()])).unbind()
    return left_BK * (before / after.clamp_min(torch.finfo(left_BK.dtype).tiny))


def loss_shares(means_K: Tensor, weights_K: Tensor) -> Tensor:
    """Return the factor of each teacher's loss that makes all weigh alike: inverse to its running mean.

    Adaptive loss balancing (AdaLoss, arXiv 1708.06832). The factors are scaled so that the weighted sum of the means
    stays what it is, and with it the step size and the balance against other terms.

    Args:
        means_K: Running mean of each teacher's loss.
        weights_K: Weight of each teacher.

    Returns:
        (K,), all 1 if the means are equal. A mean below a thousandth of the largest counts as that, so that a teacher
        that is matched exactly cannot take over.
    """
    least = torch.finfo(means_K.dtype).tiny
    floor = (SMALLEST * means_K.amax()).clamp_min(least)
    return (weights_K * means_K).sum() / weights_K.sum().clamp_min(least) / means_K.clamp_min(floor)


def _similarities(tokens_BTX: Tensor) -> Tensor:
    """Return the cosines (B, T, T) of all pairs of tokens of an image, float32 or better."""
    unit_BTX = F.normalize(tokens_BTX.to(torch.promote_types(tokens_BTX.dtype, torch.float32)), dim=-1)
    return unit_BTX @ unit_BTX.mT
