"""What a training step logs, over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from visexpert.metrics.records import gathered
from visexpert.types import StepOutput, Unit

_Key = TypeVar("_Key")


def loss_over_processes(output: StepOutput, counts: Mapping[Unit, int]) -> Tensor:
    """The loss that the batches of all processes have as one; one sum over processes, which the host does not wait for.

    Args:
        output: Of this process.
        counts: What its terms are means over, by unit.
    """
    own = output.loss.detach().float()
    units: tuple[Unit, ...] = get_args(Unit)
    sums = {unit: torch.zeros_like(own) for unit in units}
    for term in output.terms.values():
        sums[term.unit] = sums[term.unit] + term.weight * term.value.detach().float()
    counted = own.new_tensor([counts[unit] for unit in units])
    totals = torch.cat([torch.stack([sums[unit] for unit in units]) * counted, counted])
    dist.all_reduce(totals)
    summed, counted = totals.chunk(2)
    return (summed / counted.clamp_min(1)).sum()


def parts_over_processes(output: StepOutput, counts: Mapping[Unit, int]) -> dict[str, float]:
    """What else there is to log, each a mean over the units of all processes; watched values count by images.

    Processes need not have the same parts: a batch without an image has no balance, and no distillation either. What
    nobody has a number for is left out: a watched value is NaN where there are too few images for it.
    """
    values = on_host(output.parts)
    own = {name: (values[name], counts[term.unit]) for name, term in output.terms.items()}
    own |= {name: (values[name], 0 if math.isnan(values[name]) else counts["image"]) for name in output.watched}
    sums: dict[str, tuple[float, int]] = {}
    for parts in gathered(own):
        for name, (value, count) in parts.items():
            total, counted = sums.get(name, (0.0, 0))
            sums[name] = (total + value * count, counted + count) if count else (total, counted)
    return {name: total / counted for name, (total, counted) in sums.items() if counted}


def on_host(values: Mapping[_Key, Tensor]) -> dict[_Key, float]:
    """Scalars as numbers; the device is waited for once."""
    if not values:
        return {}
    together = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, together.tolist(), strict=True))


def sums_over_processes(own: Mapping[str, float]) -> dict[str, float]:
    """Sums of values that every process has under the same names."""
    everything = gathered(dict(own))
    return {name: sum(values[name] for values in everything) for name in own}
