"""Distances between a student's tokens and the tokens it should produce (knowledge merging)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.types import imaged

TokenDistance = Literal["mse", "cosine", "smooth_l1"]


def token_distance(
    student_BTD: Tensor,
    target_BTD: Tensor,
    kind: TokenDistance = "mse",
    *,
    normalize: bool = False,
    has_image_B: Tensor | None = None,
) -> Tensor:
    """Return the mean distance of tokens from their targets (ToVE's knowledge merging; its form is unconfirmed).

    Args:
        student_BTD: Tokens of the student.
        target_BTD: Fused tokens, not differentiated.
        kind: ``mse`` - squared error, mean over all entries; ``smooth_l1`` - Huber's with beta 1; ``cosine`` - one
            minus the cosine of each token pair.
        normalize: Apply LayerNorm (without affine) to every token of both sides first.
        has_image_B: bool; samples without an image take no part. None: all have one.

    Returns:
        Scalar, float32; 0 if both agree, and (with a graph) if no sample has an image.

    Raises:
        ConfigError: An unknown kind.
    """
    student_BTD, target_BTD = imaged(student_BTD, has_image_B), imaged(target_BTD, has_image_B)
    student, target = student_BTD.float(), target_BTD.detach().float()
    if not student.numel():
        return student.sum()
    if normalize:
        student, target = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in (student, target))
    if kind == "mse":
        return F.mse_loss(student, target)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, target)
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, target, dim=-1)).mean()
    raise ConfigError(f"token_distance: kind={kind!r} is unknown; use one of {', '.join(get_args(TokenDistance))}.")


def normalized_mse(student_BTD: Tensor, target_BTD: Tensor, *, has_image_B: Tensor | None = None) -> Tensor:
    """Return the squared error over the targets' variance about their mean token: 0 is exact, 1 is the best constant.

    Samples without an image (``has_image_B`` False) are ignored; 0 if none has one.
    """
    student_BTD, target_BTD = imaged(student_BTD, has_image_B), imaged(target_BTD, has_image_B)
    student, target = student_BTD.float(), target_BTD.float()
    centered = target - target.mean(dim=(0, 1), keepdim=True)
    return (student - target).square().sum() / centered.square().sum().clamp_min(1e-12)
