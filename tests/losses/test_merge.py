"""Distances of knowledge merging against hand-computed values and limit cases."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.errors import ConfigError
from visexpert.losses import normalized_mse, token_distance
from visexpert.losses.terms import TokenDistance

TARGET = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
STUDENT = torch.tensor([[[4.0, -3.0], [0.0, 1.5]]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mse", (1 + 49 + 0 + 0.25) / 4),
        ("smooth_l1", (0.5 + 6.5 + 0 + 0.125) / 4),
        ("cosine", (1 + 0) / 2),  # the first pair is orthogonal, the second parallel
    ],
)
def test_hand_computed(kind: str, expected: float) -> None:
    assert float(token_distance(STUDENT, TARGET, kind)) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("normalize", [False, True])
def test_zero_where_both_agree(kind: str, normalize: bool) -> None:
    tokens = torch.randn(2, 5, 8)
    assert float(token_distance(tokens, tokens, kind, normalize=normalize)) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]


def test_normalized_distances_do_not_see_shift_and_scale() -> None:
    target = torch.randn(2, 5, 64)
    moved = 3 * target + 7
    assert float(token_distance(moved, target, "mse", normalize=True)) == pytest.approx(0, abs=1e-3)
    assert float(token_distance(moved, target, "mse")) > 10


def test_no_gradient_reaches_the_target() -> None:
    student, target = STUDENT.clone().requires_grad_(), TARGET.clone().requires_grad_()
    token_distance(student, target).backward()
    assert target.grad is None and student.grad is not None
    assert torch.allclose(student.grad, 2 * (STUDENT - TARGET) / 4)


def test_half_precision_is_computed_in_single() -> None:
    student = torch.full((1, 1, 4), 300.0, dtype=torch.float16)
    assert float(token_distance(student, torch.zeros_like(student))) == 90_000.0  # float16 ends at 65504


def test_normalized_mse_is_one_for_the_mean_and_zero_for_the_target() -> None:
    target = torch.randn(3, 7, 5)
    mean = target.mean((0, 1), keepdim=True).expand_as(target)
    assert float(normalized_mse(mean, target)) == pytest.approx(1.0, rel=1e-5)
    assert float(normalized_mse(target, target)) == 0.0
    assert math.isfinite(float(normalized_mse(target, torch.ones_like(target))))  # targets without variance


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind='l1' is unknown; use one of mse, cosine, smooth_l1"):
        token_distance(STUDENT, TARGET, "l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
def test_samples_without_an_image_take_no_part(kind: TokenDistance) -> None:
    student_BTD, target_BTD = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    there_B = torch.tensor([True, False, True])
    found = token_distance(student_BTD, target_BTD, kind, has_image_B=there_B)
    assert torch.equal(found, token_distance(student_BTD[[0, 2]], target_BTD[[0, 2]], kind))
    error = normalized_mse(student_BTD, target_BTD, has_image_B=there_B)
    assert torch.equal(error, normalized_mse(student_BTD[[0, 2]], target_BTD[[0, 2]]))
    none = token_distance(student_BTD, target_BTD, kind, has_image_B=torch.zeros(3, dtype=torch.bool))
    none.backward()
    assert none.item() == 0 and student_BTD.grad is not None and not student_BTD.grad.any()
