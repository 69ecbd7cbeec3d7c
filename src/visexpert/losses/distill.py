"""Distillation of several teachers into one student, weighted by [CLS] attention (MoVE-KD, arXiv 2501.01709).

``convention`` selects the paper's formulas or those of the released code (hey-cjj/MoVE-KD at c822da0), which differ in
all three functions. The default is the paper's, because the second softmaxes of the released code leave both weights
nearly constant. Which one trains better is an open question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.names import CLIP
from visexpert.processes import summed
from visexpert.types import imaged

Convention = Literal["released", "paper"]

DOMINANT = 0.8
"""Mean weight of a single teacher over a batch above which the released code flattens all weights."""


def cls_token_weights(cls_logits_BHN: Tensor, convention: Convention = "paper", *, detach: bool = True) -> Tensor:
    """Return the weight of each patch token in distillation: the [CLS] token's attention, averaged over heads.

    ``paper``: one softmax over the patches. ``released``: softmax over [CLS] and patches, mean over heads, and a second
    softmax over the patches, so the largest weight is at most e^p times the smallest, where p is the largest
    probability: nearly uniform.

    Args:
        cls_logits_BHN: Scores q_cls . k / sqrt(head width) before the softmax, [CLS] itself first: N = 1 + T.
        convention: ``paper`` or ``released``.
        detach: Stop the gradient, so that the loss does not train the attention behind the weights.

    Returns:
        (B, T), float32 or better, each row summing to 1.

    Raises:
        ConfigError: An unknown convention.
    """
    _check_convention("cls_token_weights", convention)
    logits_BHN = _full(cls_logits_BHN.detach() if detach else cls_logits_BHN)
    if convention == "paper":
        return logits_BHN[..., 1:].softmax(-1).mean(1)
    return logits_BHN.softmax(-1).mean(1)[:, 1:].softmax(-1)


def teacher_weights(
    cls_BD: Tensor,
    targets: Mapping[str, Tensor],
    *,
    anchor: str | None = CLIP,
    clip_teacher_weight: float = 0.8,
    convention: Convention = "paper",
    has_image_B: Tensor | None = None,
    detach: bool = True,
) -> Tensor:
    """Return the weight of each teacher for each image: how well its tokens agree with CLIP's [CLS] token.

    The anchor keeps ``clip_teacher_weight``; the others share the rest by the softmax of mean_m <cls, z_tm>, which
    ``paper`` divides by sqrt(D). ``released`` does not, and where one teacher's mean over the batch exceeds .8 it
    applies softmax(u + .2) = softmax(u) to all weights u, so one image changes the weights of the others. Processes
    that train together take the mean over the images of all. If the anchor is not among the targets, the others share
    the full weight; on its own it has weight 1.

    Args:
        cls_BD: [CLS] token of CLIP, in the space of the targets.
        targets: Tokens (B, T, D) by teacher, in any order.
        anchor: Name of the teacher with a fixed weight (CLIP itself); None if there is none.
        clip_teacher_weight: Its weight, 0 to 1.
        convention: ``paper`` or ``released``.
        has_image_B: bool; samples without an image are left out of the batch mean of ``released``. None: every sample
            has one.
        detach: Stop the gradient, so that the targets cannot be trained to shift the weights. The released code does
            not detach.

    Returns:
        (B, K) in the order of ``targets``, float32 or better, each row summing to 1.

    Raises:
        ConfigError: An unknown convention, no target, a weight outside [0, 1], or a target whose width is not D.
    """
    _check_convention("teacher_weights", convention)
    for name, target_BTD in targets.items():
        if target_BTD.shape[-1] != cls_BD.shape[-1]:
            raise ConfigError(
                f"teacher_weights: teacher {name!r} has targets of width {target_BTD.shape[-1]}, but [CLS] has "
                f"{cls_BD.shape[-1]}; map it into CLIP's width (to_student, fixed), or weigh teachers uniformly."
            )
    others = [name for name in targets if name != anchor]
    if not others:
        return _beside_anchor(cls_BD.new_zeros(len(cls_BD), 0), targets, anchor, clip_teacher_weight)
    cls_BD = _full(cls_BD)
    scores_BU = torch.stack([(_full(targets[name]).mean(1) * cls_BD).sum(-1) for name in others], dim=1)
    if detach:
        scores_BU = scores_BU.detach()
    if convention == "paper":
        weights_BU = (scores_BU / cls_BD.shape[-1] ** 0.5).softmax(-1)
    else:
        weights_BU = scores_BU.softmax(-1)
        seen_BU = imaged(weights_BU.detach(), has_image_B)
        sums_2U = summed(torch.stack([seen_BU.sum(0), torch.full_like(seen_BU.sum(0), len(seen_BU))]))
        dominant = (sums_2U[0] / sums_2U[1].clamp_min(1)).amax() > DOMINANT
        weights_BU = torch.where(dominant, (weights_BU + 0.2).softmax(-1), weights_BU)
    return _beside_anchor(weights_BU, targets, anchor, clip_teacher_weight)


def uniform_teacher_weights(
    targets: Mapping[str, Tensor], *, anchor: str | None = CLIP, clip_teacher_weight: float = 0.8
) -> Tensor:
    """Return weights (B, K) that keep the anchor's weight and split the rest evenly: a control for ``teacher_weights``.

    Args:
        targets: Tokens (B, T, any width) by teacher; only names and the batch size are read.
        anchor: As in :func:`teacher_weights`.
        clip_teacher_weight: As in :func:`teacher_weights`.

    Raises:
        ConfigError: No target, or a weight outside [0, 1].
    """
    others = sum(name != anchor for name in targets)
    first = next(iter(targets.values()), torch.zeros(0))
    even_BU = torch.full((len(first), others), 1.0 / max(others, 1), device=first.device)
    return _beside_anchor(even_BU, targets, anchor, clip_teacher_weight)


def feature_kd(
    student_BTD: Tensor | Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    teacher_weights_BK: Tensor,
    token_weights_BT: Tensor | None = None,
    convention: Convention = "paper",
    *,
    has_image_B: Tensor | None = None,
) -> Tensor:
    """Return the squared error of the student's tokens to each teacher's, weighted: mean_b sum_k W_bk l_bk.

    Let e_bm be the mean over channels of (s - z_k)^2 at token m. Then l_bk = sum_m w_bm e_bm in ``paper``;
    l_bk = mean_m e_bm + sum_m w_bm e_bm in ``released``. Both are mean_m e_bm without token weights.

    Args:
        student_BTD: Patch tokens of the student, or one prediction for each teacher by its name.
        targets: Tokens (B, T, D) by teacher. Gradients flow into them; detach those that must not train.
        teacher_weights_BK: Weights in the order of ``targets``.
        token_weights_BT: Token weights, each row summing to 1; None for no weighting.
        convention: ``paper`` or ``released``.
        has_image_B: bool; samples without an image are ignored. None: every sample has one.

    Returns:
        Scalar, float32 or better; 0 (with a graph) if no sample has an image.

    Raises:
        ConfigError: An unknown convention, or shapes that do not match.
    """
    if teacher_weights_BK.shape[-1] != len(targets) or not targets:
        raise ConfigError(
            f"feature_kd: {teacher_weights_BK.shape[-1]} teacher weights for the teachers {list(targets)}; give one "
            "for each of at least one teacher."
        )
    errors_BK = feature_errors(student_BTD, targets, token_weights_BT, convention)
    return _mean_over_images((errors_BK * teacher_weights_BK).sum(1), has_image_B)


def feature_errors(
    student_BTD: Tensor | Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    token_weights_BT: Tensor | None = None,
    convention: Convention = "paper",
) -> Tensor:
    """Return the squared error of each image to each teacher: the terms that :func:`feature_kd` weights and sums.

    Args:
        student_BTD: See :func:`feature_kd`.
        targets: See :func:`feature_kd`.
        token_weights_BT: See :func:`feature_kd`.
        convention: See :func:`feature_kd`.

    Returns:
        (B, K) in the order of ``targets``, float32 or better.

    Raises:
        ConfigError: An unknown convention, or shapes that do not match.
    """
    _check_convention("feature_kd", convention)
    terms = []
    for name, target_BTD in targets.items():
        own_BTD = student_BTD if isinstance(student_BTD, Tensor) else student_BTD[name]
        if own_BTD.shape != target_BTD.shape:
            raise ConfigError(
                f"feature_kd: the student has tokens of shape {tuple(own_BTD.shape)}, but teacher {name!r} has "
                f"{tuple(target_BTD.shape)}; map one to the other with a KD head."
            )
        error_BT = (_full(own_BTD) - _full(target_BTD)).square().mean(-1)
        terms.append(_over_tokens(error_BT, token_weights_BT, convention))
    return torch.stack(terms, dim=1)


def gated_kd(
    student_BTD: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    gates_BTK: Tensor,
    token_weights_BT: Tensor | None = None,
    convention: Convention = "paper",
    *,
    has_image_B: Tensor | None = None,
) -> Tensor:
    """Return the squared error with gate weights at every token: mean_b sum_m w_bm sum_k g_bmk e_bmk.

    A hybrid of both methods: ToVE's token-aware gate replaces MoVE-KD's single weight per image and teacher. Equals
    :func:`feature_kd` if the gates are the same at every token.

    Args:
        student_BTD: One prediction (B, T, X) for each teacher.
        targets: Tokens of the same shapes.
        gates_BTK: Weights in the order of ``targets``, each token's summing to 1.
        token_weights_BT: Token weights, each row summing to 1; None for 1 / T.
        convention: ``paper``, or ``released``, which adds the plain mean over tokens to the weighted one.
        has_image_B: bool; samples without an image are ignored. None: every sample has one.

    Returns:
        Scalar, float32 or better; 0 (with a graph) if no sample has an image.

    Raises:
        ConfigError: An unknown convention, no teacher, or a number of gates other than the number of teachers.
    """
    _check_convention("gated_kd", convention)
    if gates_BTK.shape[-1] != len(targets) or not targets:
        raise ConfigError(
            f"gated_kd: {gates_BTK.shape[-1]} gates for the teachers {list(targets)}; give one for each of at least "
            "one teacher."
        )
    errors = [(_full(student_BTD[name]) - _full(target)).square().mean(-1) for name, target in targets.items()]
    error_BT = (torch.stack(errors, dim=-1) * gates_BTK).sum(-1)
    return _mean_over_images(_over_tokens(error_BT, token_weights_BT, convention), has_image_B)


def across_image_variance(tokens_BTD: Tensor) -> Tensor:
    """Return the variance of tokens across the images of a batch, around the mean of each position and channel.

    It falls to 0 when every image gets the same tokens, which neither the overall variance nor the distillation loss
    shows. The estimate is unbiased, so batches of different sizes are comparable.

    Args:
        tokens_BTD: Tokens of images only; leave out samples without one.

    Returns:
        Scalar without a graph, float32 or better; NaN for fewer than two images.
    """
    tokens_BTD = _full(tokens_BTD.detach())
    if len(tokens_BTD) < 2:
        return tokens_BTD.new_full((), torch.nan)
    centered_BTD = tokens_BTD - tokens_BTD.mean(0)  # Tensor.var over the first axis is ten times as slow on a CPU
    return centered_BTD.square().mean() * len(tokens_BTD) / (len(tokens_BTD) - 1)


def across_image_variances(sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return :func:`across_image_variance` of several sets of tokens (B, T, X), by name."""
    return {name: across_image_variance(tokens) for name, tokens in sides.items()}


def _over_tokens(error_BT: Tensor, token_weights_BT: Tensor | None, convention: Convention) -> Tensor:
    mean_B = error_BT.mean(1)
    if token_weights_BT is None:
        return mean_B
    weighted_B = (token_weights_BT * error_BT).sum(1)
    return weighted_B if convention == "paper" else mean_B + weighted_B


def _beside_anchor(
    shares_BU: Tensor, names: Mapping[str, Tensor], anchor: str | None, clip_teacher_weight: float
) -> Tensor:
    """Insert the anchor's share (B, K) among the weights (B, U) of the others, which are scaled to what remains."""
    if not names or not 0 <= clip_teacher_weight <= 1:
        raise ConfigError(
            f"Teacher weights need at least one teacher and clip_teacher_weight in [0, 1]; got {list(names)} and "
            f"clip_teacher_weight={clip_teacher_weight}."
        )
    if anchor is None or anchor not in names:
        return shares_BU
    fixed_B1 = shares_BU.new_full((len(shares_BU), 1), clip_teacher_weight if shares_BU.shape[1] else 1.0)
    columns: Sequence[Tensor] = ((1 - clip_teacher_weight) * shares_BU).split(1, dim=1)
    place = list(names).index(anchor)
    return torch.cat([*columns[:place], fixed_B1, *columns[place:]], dim=1)


def _mean_over_images(values_B: Tensor, has_image_B: Tensor | None) -> Tensor:
    """Return the mean over the samples with an image; 0 without any."""
    seen_B = imaged(values_B, has_image_B)
    return seen_B.sum(0) / max(len(seen_B), 1)


def _full(values: Tensor) -> Tensor:
    """Return the values in float32 or better."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_convention(owner: str, convention: str) -> None:
    if convention not in get_args(Convention):
        raise ConfigError(f"{owner}: convention={convention!r} is unknown; use 'released' or 'paper'.")
