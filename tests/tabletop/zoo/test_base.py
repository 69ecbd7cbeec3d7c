"""What the training modules share."""

from __future__ import annotations

import pytest
import torch

from visexpert.tabletop.zoo.base import one_cycle


def test_one_cycle__equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=50, pct_start=0.1, cycle_momentum=False
    )
    for step in range(50):
        assert one_cycle(step, total=50, warmup=0.1) == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if step < 49:
            reference.step()


@pytest.mark.parametrize(("total", "warmup"), [(1, 0.1), (2, 0.5), (10, 0.1), (10, 0.0), (10, 1.0)])
def test_one_cycle__short_runs_stay_finite_and_positive(total: int, warmup: float) -> None:
    factors = [one_cycle(step, total=total, warmup=warmup) for step in range(total + 1)]
    assert all(0 < factor <= 1 for factor in factors)
