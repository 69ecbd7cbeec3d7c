"""Memory of one GPU while training: weights, gradients, optimizer, what is gathered and sent, activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from visexpert.planning.machine import Precision, Strategy

OVERHEAD = 1.5 * 2**30
"""CUDA's context, workspaces of cuBLAS, cuDNN and NCCL, and what the allocator cannot use; an assumption."""

BUCKET = 200_000_000
"""Numbers in one of DeepSpeed's buckets (Lightning's default); there is one to reduce and one to gather."""

LIVE = 1_000_000_000
"""Most weights that DeepSpeed's third stage keeps gathered (its default)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Args:
        weights: Trained and frozen ones.
        gradients: Of trained weights.
        optimizer: AdamW's two moments and, where weights are in 16 bits under DeepSpeed, the float32 copy.
        buffers: Gathered weights, buckets of gradients, 16-bit copies that autocast keeps.
        activations: At the batch size of the configuration.
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
        """All of it."""
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
    """Memory of one GPU.

    Args:
        model: All that lies on the GPU.
        trained: What the optimizer gets.
        strategy: How it is shared.
        precision: How large numbers are.
        gpus: Number of processes.
        activation_bytes: Of one sample.
        batch_size: Samples per process and step.
        packed: Bytes of each number of a weight that is held in fewer bits, by ``id`` of the weight.
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
    """Bytes of weights as they are held."""

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
    """What is gathered, sent or kept twice."""
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
    """Gathered weights: of the unit that runs and of the next; with no units, of the whole model."""
    wrapped = [module for module in model.modules() if type(module).__name__ in units]
    if not wrapped:
        return held.of(model.parameters())
    inside = {id(parameter) for module in wrapped for parameter in module.parameters()}
    rest = held.of(parameter for parameter in model.parameters() if id(parameter) not in inside)
    return rest + 2 * max(held.of(module.parameters()) for module in wrapped)
