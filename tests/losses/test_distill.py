"""Distillation weights and loss against values worked out by hand and against limit cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.losses import (
    across_image_variance,
    cls_token_weights,
    feature_kd,
    gated_kd,
    teacher_weights,
    uniform_teacher_weights,
)
from visexpert.losses.distill import Convention

BOTH: tuple[Convention, ...] = ("released", "paper")
LN2, LN3 = math.log(2), math.log(3)


def softmax(*values: float) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_token_weights_of_the_paper_are_one_softmax_over_the_patches_then_the_mean_over_heads() -> None:
    # [CLS] itself has a large score that must not matter. Head 1: (1, 3) / 4; head 2: (2, 1) / 3.
    logits_BHN = torch.tensor([[[5.0, 0.0, LN3], [-1.0, LN2, 0.0]]])
    expected = torch.tensor([[(1 / 4 + 2 / 3) / 2, (3 / 4 + 1 / 3) / 2]])
    torch.testing.assert_close(cls_token_weights(logits_BHN, "paper"), expected)


def test_released_token_weights_are_a_softmax_of_the_mean_probabilities() -> None:
    # Head 1 over [CLS] and patches: (2, 1, 3) / 6; head 2: (1, 2, 1) / 4.
    logits_BHN = torch.tensor([[[LN2, 0.0, LN3], [0.0, LN2, 0.0]]])
    expected = torch.tensor([softmax((1 / 6 + 2 / 4) / 2, (3 / 6 + 1 / 4) / 2)])
    torch.testing.assert_close(cls_token_weights(logits_BHN, "released"), expected)


@pytest.mark.parametrize("convention", BOTH)
def test_token_weights_of_uniform_attention_are_uniform(convention: Convention) -> None:
    logits_BHN = torch.full((2, 3, 6), 7.0)
    torch.testing.assert_close(cls_token_weights(logits_BHN, convention), torch.full((2, 5), 0.2))


def test_released_token_weights_stay_nearly_uniform_where_the_papers_do_not() -> None:
    """The largest weight is at most e^p times the smallest, p being the largest probability."""
    logits_BHN = torch.zeros(1, 1, 577)
    logits_BHN[0, 0, 9] = 100.0
    released = cls_token_weights(logits_BHN, "released")
    assert float(released.max() / released.min()) == pytest.approx(math.e, rel=1e-5)
    assert float(cls_token_weights(logits_BHN, "paper").max()) == pytest.approx(1.0)


@pytest.mark.parametrize("convention", BOTH)
def test_token_weights_are_detached_unless_asked_otherwise(convention: Convention) -> None:
    logits_BHN = torch.randn(2, 3, 6, requires_grad=True)
    assert not cls_token_weights(logits_BHN, convention).requires_grad
    cls_token_weights(logits_BHN, convention, detach=False)[:, 0].sum().backward()
    assert logits_BHN.grad is not None and logits_BHN.grad.abs().max() > 0


@pytest.mark.parametrize("convention", BOTH)
def test_token_weights_of_half_precision_are_lifted(convention: Convention) -> None:
    weights = cls_token_weights(torch.randn(1, 2, 577).bfloat16(), convention)
    assert weights.dtype == torch.float32 and float(weights.sum()) == pytest.approx(1.0, abs=1e-6)


def constant(*values: float, tokens: int = 2) -> Tensor:
    """Target tokens (B, T, 1): one value per image, whose mean score is that value where [CLS] is 1."""
    return torch.tensor(values).view(-1, 1, 1).expand(-1, tokens, 1)


def test_teacher_weights_of_the_paper_are_a_softmax_of_scaled_mean_scores_beside_the_anchor() -> None:
    cls_BD = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    first = torch.tensor([[[LN3, 9.0, 9.0, 9.0], [LN3, -4.0, 0.0, 0.0]]])  # mean <cls, z> = 2 ln 3, over sqrt(4)
    second = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]])  # 0
    targets = {"clip": torch.randn(1, 2, 4), "eva": first, "sam": second}
    weights = teacher_weights(cls_BD, targets, convention="paper")
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.2 * 3 / 4, 0.2 / 4]]))


def test_released_teacher_weights_are_not_scaled() -> None:
    cls_BD = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    first = torch.tensor([[[LN3, 0.0, 0.0, 0.0]]])
    targets = {"clip": torch.randn(1, 1, 4), "eva": first, "sam": torch.zeros(1, 1, 4)}
    weights = teacher_weights(cls_BD, targets, convention="released")
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.2 * 3 / 4, 0.2 / 4]]))


def test_released_teacher_weights_flatten_the_whole_batch_where_one_teacher_dominates_its_mean() -> None:
    high, even = 50.0, math.log(0.7 / 0.3)
    cls_BD = torch.ones(2, 1)
    targets = {"a": constant(high, even), "b": constant(0.0, 0.0)}  # mean of u_a: (1 + .7) / 2 = .85 > .8
    weights = teacher_weights(cls_BD, targets, convention="released")
    torch.testing.assert_close(weights, torch.tensor([softmax(1.2, 0.2), softmax(0.9, 0.5)]))
    torch.testing.assert_close(weights[0], torch.tensor([0.7311, 0.2689]), atol=1e-4, rtol=0)  # methods.md B2, 4
    torch.testing.assert_close(
        teacher_weights(cls_BD, targets, convention="paper")[1], torch.tensor([0.7, 0.3])
    )  # each image for itself


def test_released_teacher_weights_leave_the_batch_alone_below_that() -> None:
    even = math.log(0.55 / 0.45)
    targets = {"a": constant(50.0, even), "b": constant(0.0, 0.0)}  # mean .775
    weights = teacher_weights(torch.ones(2, 1), targets, convention="released")
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [0.55, 0.45]]))


def test_samples_without_an_image_do_not_enter_the_mean_of_the_batch() -> None:
    even = math.log(0.55 / 0.45)
    targets = {"a": constant(50.0, even), "b": constant(0.0, 0.0)}
    mask = torch.tensor([True, False])
    weights = teacher_weights(torch.ones(2, 1), targets, convention="released", has_image_B=mask)
    torch.testing.assert_close(weights[0], torch.tensor(softmax(1.0, 0.0)))


@pytest.mark.parametrize("convention", BOTH)
def test_teacher_weights_follow_the_order_of_the_teachers(convention: Convention) -> None:
    cls_BD = torch.randn(3, 4)
    targets = {name: torch.randn(3, 5, 4) for name in ("eva", "clip", "sam", "depth")}
    backwards = dict(reversed(targets.items()))
    weights = teacher_weights(cls_BD, targets, convention=convention)
    torch.testing.assert_close(teacher_weights(cls_BD, backwards, convention=convention).flip(1), weights)
    torch.testing.assert_close(weights[:, 1], torch.full((3,), 0.8))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("convention", BOTH)
def test_teacher_weights_where_some_are_missing(convention: Convention) -> None:
    cls_BD, target = torch.randn(2, 4), torch.randn(2, 5, 4)

    def weights(names: str, **options: Any) -> Tensor:
        targets = dict.fromkeys(names.split(), target)
        return teacher_weights(cls_BD, targets, convention=convention, **options)

    half = torch.full((2, 2), 0.5)
    torch.testing.assert_close(weights("eva sam"), half)  # no CLIP: they share everything
    torch.testing.assert_close(weights("clip sam", anchor=None), half)
    torch.testing.assert_close(weights("clip"), torch.ones(2, 1))  # only CLIP
    torch.testing.assert_close(weights("eva"), torch.ones(2, 1))  # only one other
    torch.testing.assert_close(
        weights("eva sam", anchor="sam", clip_teacher_weight=0.3), torch.tensor([[0.7, 0.3]] * 2)
    )


@pytest.mark.parametrize("convention", BOTH)
def test_teacher_weights_are_detached_unless_asked_otherwise(convention: Convention) -> None:
    cls_BD, target = torch.randn(2, 4), torch.randn(2, 5, 4, requires_grad=True)
    targets = {"clip": torch.randn(2, 5, 4), "eva": target, "sam": torch.randn(2, 5, 4)}
    assert not teacher_weights(cls_BD, targets, convention=convention).requires_grad
    teacher_weights(cls_BD, targets, convention=convention, detach=False)[:, 1].sum().backward()
    assert target.grad is not None and target.grad.abs().max() > 0


def test_what_cannot_be_weighed_is_refused() -> None:
    cls_BD = torch.randn(2, 4)
    with pytest.raises(ConfigError, match=r"teacher 'eva' has targets of width 7, but \[CLS\] has 4; map it into"):
        teacher_weights(cls_BD, {"eva": torch.randn(2, 5, 7)}, convention="paper")
    with pytest.raises(ConfigError, match="at least one teacher"):
        teacher_weights(cls_BD, {}, convention="paper")
    with pytest.raises(ConfigError, match="clip_teacher_weight=1.2"):
        teacher_weights(cls_BD, {"clip": torch.randn(2, 5, 4)}, clip_teacher_weight=1.2, convention="paper")


def test_uniform_teacher_weights_keep_the_anchors_share() -> None:
    targets = {"eva": torch.randn(2, 5, 7), "clip": torch.randn(2, 5, 4), "sam": torch.randn(2, 5, 3)}
    torch.testing.assert_close(uniform_teacher_weights(targets), torch.tensor([[0.1, 0.8, 0.1]] * 2))
    torch.testing.assert_close(uniform_teacher_weights(targets, anchor=None), torch.full((2, 3), 1 / 3))
    with pytest.raises(ConfigError, match="at least one teacher"):
        uniform_teacher_weights({})


def two_teachers() -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """One image, two tokens of two channels. Errors per token: (1, 4) to ``a``, (0, 2) to ``b``."""
    student_BTD = torch.zeros(1, 2, 2)
    targets = {"a": torch.tensor([[[1.0, -1.0], [2.0, 2.0]]]), "b": torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])}
    return student_BTD, targets, torch.tensor([[0.75, 0.25]]), torch.tensor([[0.9, 0.1]])


def test_kd_of_the_paper_is_the_weighted_sum_alone() -> None:
    expected = 0.75 * (0.9 * 1 + 0.1 * 4) + 0.25 * (0.9 * 0 + 0.1 * 2)
    assert float(feature_kd(*two_teachers(), "paper")) == pytest.approx(expected)


def test_released_kd_adds_the_plain_mean() -> None:
    weighted = 0.75 * (0.9 * 1 + 0.1 * 4) + 0.25 * (0.9 * 0 + 0.1 * 2)
    assert float(feature_kd(*two_teachers(), "released")) == pytest.approx(0.75 * 2.5 + 0.25 * 1 + weighted)


@pytest.mark.parametrize("convention", BOTH)
def test_kd_without_token_weights_is_the_mean(convention: Convention) -> None:
    student, targets, teachers, _ = two_teachers()
    assert float(feature_kd(student, targets, teachers, convention=convention)) == pytest.approx(2.125)


def test_released_kd_with_uniform_token_weights_is_twice_the_mean() -> None:
    student, targets, teachers, _ = two_teachers()
    uniform = torch.full((1, 2), 0.5)
    assert float(feature_kd(student, targets, teachers, uniform, "released")) == pytest.approx(2 * 2.125)
    assert float(feature_kd(student, targets, teachers, uniform, "paper")) == pytest.approx(2.125)


@pytest.mark.parametrize("convention", BOTH)
def test_kd_does_not_depend_on_the_order_of_the_teachers(convention: Convention) -> None:
    student, targets, teachers, tokens = two_teachers()
    backwards = dict(reversed(targets.items()))
    torch.testing.assert_close(
        feature_kd(student, backwards, teachers.flip(1), tokens, convention),
        feature_kd(student, targets, teachers, tokens, convention),
    )


@pytest.mark.parametrize("convention", BOTH)
def test_samples_without_an_image_take_no_part(convention: Convention) -> None:
    def batch(value: float) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        student, targets, teachers, tokens = two_teachers()
        blank = {name: torch.cat([t, torch.full_like(t, value)]) for name, t in targets.items()}
        student_BTD = torch.cat([student, student + value]).requires_grad_()
        return student_BTD, blank, teachers.repeat(2, 1), tokens.repeat(2, 1)

    arguments = batch(3.0)
    loss = feature_kd(*arguments, convention, has_image_B=torch.tensor([True, False]))
    torch.testing.assert_close(loss, feature_kd(*two_teachers(), convention))
    loss.backward()
    assert arguments[0].grad is not None
    assert arguments[0].grad[0].abs().max() > 0 and not arguments[0].grad[1].any()
    none = feature_kd(*arguments, convention, has_image_B=torch.zeros(2, dtype=torch.bool))
    assert float(none.detach()) == 0 and none.requires_grad


def test_kd_gradient_reaches_student_and_targets_that_have_a_graph() -> None:
    student, targets, teachers, tokens = two_teachers()
    student.requires_grad_()
    targets["a"].requires_grad_()
    feature_kd(student, targets, teachers, tokens).backward()
    assert student.grad is not None and targets["a"].grad is not None
    # d/ds of W w_m mean_d (s - z)^2 = W w_m (s - z), two channels: token 0 of teacher a has weight .75 x .9.
    torch.testing.assert_close(targets["a"].grad[0, 0], torch.tensor([0.675, -0.675]))


def test_each_teacher_may_have_a_prediction_of_its_own_width() -> None:
    predictions = {"a": torch.zeros(1, 2, 3), "b": torch.ones(1, 2, 5)}
    targets = {"a": torch.full((1, 2, 3), 2.0), "b": torch.ones(1, 2, 5)}
    assert float(feature_kd(predictions, targets, torch.tensor([[0.5, 0.5]]))) == pytest.approx(2.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    student, targets, teachers, _ = two_teachers()
    with pytest.raises(ConfigError, match=r"\(1, 2, 2\), but teacher 'b' has \(1, 3, 2\);"):
        feature_kd(student, {"a": targets["a"], "b": torch.zeros(1, 3, 2)}, teachers)
    with pytest.raises(ConfigError, match=r"2 teacher weights for the teachers \['a'\]"):
        feature_kd(student, {"a": targets["a"]}, teachers)


CALLS: tuple[Callable[[Any], Tensor], ...] = (
    lambda word: cls_token_weights(torch.zeros(1, 1, 3), word),
    lambda word: teacher_weights(torch.zeros(1, 2), {"a": torch.zeros(1, 3, 2)}, convention=word),
    lambda word: feature_kd(*two_teachers(), word),
)


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_convention_is_refused(call: Callable[[Any], Tensor]) -> None:
    with pytest.raises(ConfigError, match="convention='upstream' is unknown; use .*released.*paper"):
        call("upstream")


def test_variance_is_taken_around_each_position_and_channel() -> None:
    # Position 0: channels (1, 3) and (0, 0); position 1: (5, 5) and (2, 6). Unbiased variances 2, 0, 0, 8.
    tokens_BTD = torch.tensor([[[1.0, 0.0], [5.0, 2.0]], [[3.0, 0.0], [5.0, 6.0]]])
    assert float(across_image_variance(tokens_BTD)) == pytest.approx(2.5)


def test_variance_sees_a_collapse_that_the_overall_variance_does_not() -> None:
    one_image = torch.randn(1, 36, 8)
    same = one_image.repeat(16, 1, 1)
    assert float(same.var()) > 0.5 and float(across_image_variance(same)) < 1e-12


def test_variance_compares_between_batches_of_unlike_sizes() -> None:
    many = torch.randn(64, 50, 16)
    halves = torch.stack([across_image_variance(pair) for pair in many.split(2)]).mean()
    assert float(halves) == pytest.approx(float(across_image_variance(many)), rel=0.02)


def test_variance_of_one_image_is_not_a_number() -> None:
    assert torch.isnan(across_image_variance(torch.randn(1, 4, 3)))


def test_a_gate_weighs_each_token_of_each_teacher() -> None:
    student = {"a": torch.zeros(1, 2, 1), "b": torch.zeros(1, 2, 3)}  # predictions of unlike widths
    targets = {"a": torch.tensor([[[1.0], [2.0]]]), "b": torch.full((1, 2, 3), 3.0)}  # errors (1, 4) and (9, 9)
    gates_BTK = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
    first, second = 0.25 * 1 + 0.75 * 9, 4.0
    assert float(gated_kd(student, targets, gates_BTK)) == pytest.approx((first + second) / 2)
    tokens_BT = torch.tensor([[0.9, 0.1]])
    weighted = 0.9 * first + 0.1 * second
    assert float(gated_kd(student, targets, gates_BTK, tokens_BT)) == pytest.approx(weighted)
    released = gated_kd(student, targets, gates_BTK, tokens_BT, "released")
    assert float(released) == pytest.approx((first + second) / 2 + weighted)


@pytest.mark.parametrize("convention", BOTH)
def test_a_gate_alike_at_every_token_is_a_weight_per_image(convention: Convention) -> None:
    student = {"a": torch.randn(3, 4, 2), "b": torch.randn(3, 4, 5)}
    targets = {name: torch.randn_like(value) for name, value in student.items()}
    weights_BK, tokens_BT = torch.randn(3, 2).softmax(-1), torch.randn(3, 4).softmax(-1)
    gates_BTK = weights_BK[:, None].expand(-1, 4, -1)
    has_image_B = torch.tensor([True, False, True])
    torch.testing.assert_close(
        gated_kd(student, targets, gates_BTK, tokens_BT, convention, has_image_B=has_image_B),
        feature_kd(student, targets, weights_BK, tokens_BT, convention, has_image_B=has_image_B),
    )


def test_gated_distillation_without_images_is_zero_and_refuses_what_does_not_fit() -> None:
    student = {"a": torch.ones(2, 3, 1, requires_grad=True)}
    targets = {"a": torch.zeros(2, 3, 1)}
    loss = gated_kd(student, targets, torch.ones(2, 3, 1), has_image_B=torch.tensor([False, False]))
    loss.backward()
    assert float(loss.detach()) == 0 and student["a"].grad is not None and not student["a"].grad.any()
    with pytest.raises(ConfigError, match=r"2 gates for the teachers \['a'\]; give one for each"):
        gated_kd(student, targets, torch.ones(2, 3, 2))
    with pytest.raises(ConfigError, match="convention='both' is unknown"):
        gated_kd(student, targets, torch.ones(2, 3, 1), None, "both")  # type: ignore[arg-type]
