"""Memory of one GPU in training: weights, gradients, optimizer states, communication buffers, activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from visexpert.planning.machine import Precision, Strategy

OVERHEAD = 1.5 * 2**30
"""CUDA context, workspaces of cuBLAS, cuDNN and NCCL, and fragmentation; an assumption."""

BUCKET = 200_000_000
"""Numbers in a DeepSpeed bucket (Lightning's default); there is one to reduce and one to gather."""

LIVE = 1_000_000_000
"""Largest number of weights that DeepSpeed's stage 3 keeps gathered (its default)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Args:
        weights: Trained and frozen weights.
        gradients: Gradients of trained weights.
        optimizer: AdamW's two moments and, for 16-bit weights under DeepSpeed, the float32 copy.
        buffers: Gathered weights, gradient buckets, 16-bit copies kept by autocast.
        activations: Activations at the configured batch size.
        overhead: :data:`OVERHEAD`.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    overhead: float = OVERHEAD

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.overhead


def memory_per_gpu(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    *,
    strategy: Strategy,
    precision: Precision,
    gpus: int,
    activation_bytes: int,
    batch_size: int,
    packed: Mapping[int, float] | None = None,
) -> Memory:
    """Estimate the memory of one GPU.

    Args:
        model: Everything on the GPU.
        trained: Parameters that the optimizer gets.
        strategy: How tensors are sharded.
        precision: Sizes of numbers.
        gpus: Number of processes.
        activation_bytes: Activations of one sample.
        batch_size: Samples per process and step.
        packed: Bytes per number of a weight packed into fewer bits, by ``id`` of the weight.
    """
    lowered = strategy.engine == "deepspeed" and precision.compute == 2
    held = _Sizes(2 if lowered else precision.cast, packed or {})
    share = strategy.shares(gpus)
    weights = held.of(model.parameters())
    gradients = held.of(trained)
    numbers = sum(parameter.numel() for parameter in trained)
    states = 12 * numbers if lowered else 2 * gradients
    buffers = _buffers(model, trained, strategy, precision, held, gpus)
    on_host = strategy.offloads_optimizer
    return Memory(
        weights=0.0 if strategy.offloads_weights else weights / (share if strategy.shards_weights else 1),
        gradients=0.0 if on_host else gradients / (share if strategy.shards_gradients else 1),
        optimizer=0.0 if on_host else states / (share if strategy.shards_optimizer else 1),
        buffers=buffers,
        activations=float(activation_bytes * batch_size),
    )


class _Sizes:
    """Bytes of weights in memory."""

    def __init__(self, cast: int | None, packed: Mapping[int, float]) -> None:
        self._cast, self._packed = cast, packed

    def of(self, parameters: Iterable[nn.Parameter]) -> float:
        return sum(p.numel() * self._packed.get(id(p), self._cast or p.element_size()) for p in parameters)


def _buffers(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    strategy: Strategy,
    precision: Precision,
    held: _Sizes,
    gpus: int,
) -> float:
    """Return the bytes that are gathered, sent or kept twice."""
    numbers = sum(parameter.numel() for parameter in trained)
    if strategy.engine == "deepspeed":
        size = 2 if precision.compute == 2 else 4
        gathered = min(sum(p.numel() for p in model.parameters()), LIVE) if strategy.shards_weights else 0
        buckets = 2 * min(numbers, BUCKET) if gpus > 1 or strategy.offloads_optimizer else 0
        return float(size * (gathered + buckets))
    copies = sum(2.0 * p.numel() for p in trained if p.element_size() > 2) if precision.mixed else 0.0
    if strategy.engine == "fsdp":
        return copies + (_largest_units(model, strategy.units, held) if gpus > 1 else 0.0)
    return copies + (held.of(trained) if gpus > 1 else 0.0)  # DDP's buckets hold a second copy of the gradients


def _largest_units(model: nn.Module, units: tuple[str, ...], held: _Sizes) -> float:
    """Return the bytes of gathered weights: the current unit and the next, or the whole model without units."""
    wrapped = [module for module in model.modules() if type(module).__name__ in units]
    if not wrapped:
        return held.of(model.parameters())
    inside = {id(parameter) for module in wrapped for parameter in module.parameters()}
    rest = held.of(parameter for parameter in model.parameters() if id(parameter) not in inside)
    return rest + 2 * max(held.of(module.parameters()) for module in wrapped)
