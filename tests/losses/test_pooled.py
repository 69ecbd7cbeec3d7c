"""The distance of pooled embeddings against torch's own loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.losses import pooled_distance


def test_equals_torchs_cosine_loss_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, generator=generator, requires_grad=True)
    frozen = torch.randn(4, 6, generator=generator, requires_grad=True)
    there = torch.tensor([True, False, True, True])
    found = pooled_distance(student, frozen, has_image_B=there)
    torch.testing.assert_close(found, F.cosine_embedding_loss(student[there], frozen[there], torch.ones(3)))
    found.backward()
    assert student.grad is not None and student.grad[1].abs().sum() == 0 and student.grad[0].abs().sum() > 0
    assert frozen.grad is None
    torch.testing.assert_close(pooled_distance(3 * frozen, frozen), torch.zeros(()), atol=1e-6, rtol=0)


def test_no_image_gives_zero_with_a_graph() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    loss = pooled_distance(student, torch.randn(2, 3), has_image_B=torch.tensor([False, False]))
    loss.backward()
    assert loss == 0 and student.grad is not None and not student.grad.any()


def test_other_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 3\).*\(2, 4\)"):
        pooled_distance(torch.zeros(2, 3), torch.zeros(2, 4))
