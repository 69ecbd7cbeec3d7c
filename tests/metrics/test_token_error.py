"""Token errors over batches against the same on everything at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from visexpert.losses import normalized_mse
from visexpert.metrics.token_error import TokenError


def test_batches_add_up_to_the_whole() -> None:
    reference, ours = torch.randn(5, 4, 6) + 3, torch.randn(5, 4, 6) + 3
    error = TokenError()
    for part in (slice(0, 2), slice(2, 5)):
        error.update(ours[part], reference[part])
    found = error.compute()
    cosine = F.cosine_similarity(ours.double(), reference.double(), dim=-1)
    assert found["nmse"] == pytest.approx(float(normalized_mse(ours, reference)), rel=1e-5)
    rms = ((ours - reference).square().mean() / reference.square().mean()).sqrt()
    assert found["relative"] == pytest.approx(float(rms), rel=1e-5)
    assert found["mean_cosine"] == pytest.approx(float(cosine.mean()))
    assert found["min_cosine"] == pytest.approx(float(cosine.min()))
    assert found["num_images"] == 5


def test_equal_tokens_and_a_constant() -> None:
    reference, error = torch.randn(3, 4, 6), TokenError()
    error.update(reference, reference)
    assert error.compute()["nmse"] == 0 and error.compute()["min_cosine"] == pytest.approx(1)
    error.reset()
    error.update(reference.mean((0, 1)).expand_as(reference), reference)
    assert error.compute()["nmse"] == pytest.approx(1, rel=1e-5) and error.compute()["num_images"] == 3
