"""The language loss against logarithms worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.losses import text_loss, token_nll


def test_nll_is_minus_the_log_of_the_probability() -> None:
    logits_MV = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log() + 3.0  # a shift of logits changes nothing
    targets_M = torch.tensor([1, 2])
    expected = [-math.log(0.25), -math.log(0.8)]
    assert token_nll(logits_MV, targets_M).tolist() == pytest.approx(expected)
    assert text_loss(logits_MV, targets_M).item() == pytest.approx(sum(expected) / 2)


def test_equal_logits_cost_log_of_the_vocabulary() -> None:
    assert text_loss(torch.zeros(3, 17), torch.tensor([0, 5, 16])).item() == pytest.approx(math.log(17))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits_MV = torch.zeros(1, 1000, dtype=torch.bfloat16)
    nll_M = token_nll(logits_MV, torch.tensor([3]))
    assert nll_M.dtype == torch.float32
    assert nll_M.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_nothing_supervised_is_zero_with_a_graph() -> None:
    logits_MV = torch.zeros(0, 5, requires_grad=True)
    loss = text_loss(logits_MV, torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0.0
    loss.backward()
    assert logits_MV.grad is not None and logits_MV.grad.shape == (0, 5)
