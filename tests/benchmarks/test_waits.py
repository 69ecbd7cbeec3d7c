"""What makes the host wait for the device is seen on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.waits import Waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda values: values[0].item(),
        lambda values: bool((values > 0).any()),
        lambda values: values.tolist(),
        lambda values: values.cpu().numpy(),
        lambda values: values.nonzero(),
        lambda values: values[values > 0],
        lambda values: values.masked_select(values > 0),
        lambda values: values.long().bincount(),
        lambda values: values.unique(),
        lambda values: torch.equal(values, values),
        lambda values: values.long().repeat_interleave(values.long()),
        lambda values: values.clone().requires_grad_()[values > 0].sum().backward(),
    ],
)
def test_each_way_to_wait_is_seen(wait: Callable[[Tensor], object]) -> None:
    values, waits = torch.arange(4.0), Waits()
    with waits:
        wait(values)
    assert waits.found and all("test_waits.py" in found.where for found in waits.found)


def test_what_the_host_knows_is_free() -> None:
    values, rows = torch.arange(4.0), torch.arange(2)
    waits = Waits(host=[rows])
    with waits:
        made = torch.tensor([3, 1])
        assert rows.tolist() == [0, 1] and made.tolist() == [3, 1] and len(values) == 4
        values.index_select(0, made.to(values.device)).sum()
        values.repeat_interleave(2), values[torch.tensor([0, 1])], torch.where(values > 1, values, 0)
    assert not waits.found
    with waits:
        made.to("cpu", non_blocking=True).tolist()  # moved to the device, and read from there
    assert len(waits.found) == 1
