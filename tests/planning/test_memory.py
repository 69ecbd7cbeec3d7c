"""Memory of one GPU against hand counts: 10^6 trained and 3 10^6 frozen weights."""

from __future__ import annotations

import pytest
from torch import nn

from visexpert.errors import ConfigError
from visexpert.planning.machine import Precision, Strategy
from visexpert.planning.memory import Memory, memory_per_gpu
from visexpert.planning.meta import weightless

M = 10**6


def plan(strategy: object, precision: str, gpus: int = 4) -> Memory:
    with weightless():
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(3000, 1000, bias=False))
    trained = list(model[0].parameters())
    return memory_per_gpu(
        model,
        trained,
        strategy=Strategy.of(strategy),
        precision=Precision.of(precision),
        gpus=gpus,
        activation_bytes=1000,
        batch_size=8,
    )


@pytest.mark.parametrize(
    ("strategy", "precision", "gpus", "weights", "gradients", "optimizer", "buffers"),
    [
        ("auto", "32-true", 1, 16, 4, 8, 0),
        ("ddp", "32-true", 4, 16, 4, 8, 4),  # buckets hold the gradients again
        ("ddp_find_unused_parameters_true", "bf16-mixed", 4, 16, 4, 8, 2 + 4),  # autocast keeps 16-bit copies
        ("ddp", "bf16-true", 4, 8, 2, 4, 2),
        ("fsdp", "32-true", 4, 4, 1, 2, 16),  # one unit: all is gathered
        ("deepspeed_stage_1", "bf16-mixed", 4, 8, 2, 3, 4),
        ("deepspeed_stage_2", "bf16-mixed", 4, 8, 0.5, 3, 4),  # ZeRO (arXiv 1910.02054): 2 + 2/N + 12/N bytes
        ("deepspeed_stage_3", "bf16-mixed", 4, 2, 0.5, 3, 8 + 4),
        ("deepspeed_stage_2_offload", "bf16-mixed", 4, 8, 0, 0, 4),
    ],
)
def test_bytes_by_strategy_and_precision(
    strategy: str, precision: str, gpus: int, weights: float, gradients: float, optimizer: float, buffers: float
) -> None:
    memory = plan(strategy, precision, gpus)
    found = (memory.weights, memory.gradients, memory.optimizer, memory.buffers)
    assert found == pytest.approx((weights * M, gradients * M, optimizer * M, buffers * M))
    assert memory.activations == 8000
    assert memory.total == sum(found) + 8000 + memory.overhead


def test_fsdp_gathers_the_unit_that_runs_and_the_next() -> None:
    unit = {"class_path": "lightning.pytorch.strategies.FSDPStrategy", "init_args": {"auto_wrap_policy": ["x.Linear"]}}
    assert plan(unit, "32-true").buffers == 2 * 12 * M
    hybrid = {"class_path": "x.FSDPStrategy", "init_args": {"sharding_strategy": "HYBRID_SHARD"}}
    assert plan(hybrid, "32-true", 32).weights == 16 * M / 8  # inside a node of eight


def test_classes_and_their_arguments_are_read() -> None:
    settings = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    memory = plan({"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": settings}, "bf16-mixed")
    assert (memory.weights, memory.gradients, memory.optimizer) == (0, 0, 0)


@pytest.mark.parametrize(("strategy", "precision"), [("xla", "32-true"), ("ddp", "transformer-engine")])
def test_what_is_not_known_is_refused(strategy: str, precision: str) -> None:
    with pytest.raises(ConfigError, match=strategy if strategy == "xla" else precision):
        plan(strategy, precision)
