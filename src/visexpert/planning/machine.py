"""The machine and how a fit is spread over it: accelerators, the trainer's strategy, its precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from visexpert.errors import ConfigError

USUAL_MFU = 0.4
"""Model FLOP utilization: 0.35 to 0.5 is usual for transformers of this size if data arrives in time."""


@dataclass(frozen=True)
class Gpu:
    """An accelerator.

    Args:
        label: Full name.
        tflops: Peak of dense products in 10^12 FLOP/s by bits: 16 (bfloat16 or float16, float32 sums) and 32.
        memory_bytes: Memory.
    """

    label: str
    tflops: Mapping[int, float]
    memory_bytes: float


# NVIDIA's data sheets, dense (without structured sparsity). 32 is plain float32: torch disables TF32 for products.
GPUS: Mapping[str, Gpu] = {
    "h200": Gpu("NVIDIA H200 SXM", {16: 989.4, 32: 66.9}, 141e9),
    "h100": Gpu("NVIDIA H100 SXM 80 GB", {16: 989.4, 32: 66.9}, 80e9),
    "h800": Gpu("NVIDIA H800 SXM 80 GB", {16: 989.4, 32: 66.9}, 80e9),
    "a100": Gpu("NVIDIA A100 80 GB", {16: 312.0, 32: 19.5}, 80e9),
    "a100-40": Gpu("NVIDIA A100 40 GB", {16: 312.0, 32: 19.5}, 40e9),
    "a800": Gpu("NVIDIA A800 80 GB", {16: 312.0, 32: 19.5}, 80e9),
    "l40s": Gpu("NVIDIA L40S", {16: 362.0, 32: 91.6}, 48e9),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", {16: 165.2, 32: 82.6}, 24e9),
    "v100": Gpu("NVIDIA V100 SXM2 32 GB", {16: 125.0, 32: 15.7}, 32e9),
}


def gpu_named(name: str) -> Gpu:
    """Return the accelerator of this name.

    Raises:
        ConfigError: The name is not in the table.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"gpu is {name!r}, which is not in the table; use one of {', '.join(GPUS)}.")
    return GPUS[name.lower()]


Engine = Literal["ddp", "fsdp", "deepspeed"]

NODE = 8
"""GPUs per node; FSDP's HYBRID_SHARD shards within a node."""


@dataclass(frozen=True)
class Strategy:
    """How weights, gradients and optimizer states are distributed over the processes.

    Args:
        engine: The engine behind the strategy.
        shards_weights: Each process holds a shard of the weights and gathers what it needs.
        shards_gradients: Each process holds a shard of the gradients.
        shards_optimizer: Each process holds a shard of the optimizer states.
        offloads_optimizer: Optimizer states and gradients are in host memory.
        offloads_weights: Weights are in host memory.
        within_node: Shards are spread over the GPUs of one node, at most :data:`NODE`.
        units: Names of the classes that FSDP wraps one by one; empty if it wraps the whole model as one unit.
    """

    engine: Engine
    shards_weights: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    within_node: bool = False
    units: tuple[str, ...] = ()

    @classmethod
    def of(cls, setting: Any) -> Strategy:
        """Parse the trainer's ``strategy``: one of Lightning's short names, or a class with its arguments.

        Raises:
            ConfigError: The strategy is unknown.
        """
        if isinstance(setting, Mapping):
            name = str(setting.get("class_path", "")).rsplit(".", 1)[-1]
            return _of_class(name, dict(setting.get("init_args") or {}))
        name = str(setting or "auto")
        if name in ("auto", "single_device") or name.split("_")[0] == "ddp":
            return cls("ddp")
        if name in ("fsdp", "fsdp_cpu_offload"):
            return replace(_fsdp({}), offloads_weights="offload" in name, offloads_optimizer="offload" in name)
        if name.startswith("deepspeed"):
            stage = next((int(word) for word in name.split("_") if word.isdigit()), 2)
            return _deepspeed(stage, optimizer="offload" in name, weights="offload" in name and stage == 3)
        raise _unknown(name)

    def shares(self, gpus: int) -> int:
        """Return the number of processes that what is sharded is spread over."""
        return min(gpus, NODE) if self.within_node else gpus


def _of_class(name: str, options: dict[str, Any]) -> Strategy:
    if name in ("SingleDeviceStrategy", "DDPStrategy"):
        return Strategy("ddp")
    if name == "FSDPStrategy":
        return _fsdp(options)
    if name == "DeepSpeedStrategy":
        return _deepspeed(
            int(options.get("stage") or 2),
            optimizer=bool(options.get("offload_optimizer")),
            weights=bool(options.get("offload_parameters")),
        )
    raise _unknown(name)


def _fsdp(options: Mapping[str, Any]) -> Strategy:
    kind = str(options.get("sharding_strategy") or "FULL_SHARD").upper()
    if kind == "NO_SHARD":
        return Strategy("ddp")
    offload = bool(options.get("cpu_offload"))
    policy = options.get("auto_wrap_policy") or ()
    units = tuple(str(unit).rsplit(".", 1)[-1] for unit in policy) if isinstance(policy, list | set | tuple) else ()
    return Strategy(
        "fsdp",
        shards_weights="GRAD_OP" not in kind and "ZERO2" not in kind,
        shards_gradients=True,
        shards_optimizer=True,
        offloads_optimizer=offload,
        offloads_weights=offload,
        within_node="HYBRID" in kind,
        units=units,
    )


def _deepspeed(stage: int, *, optimizer: bool, weights: bool) -> Strategy:
    return Strategy(
        "deepspeed",
        shards_weights=stage >= 3,
        shards_gradients=stage >= 2,
        shards_optimizer=stage >= 1,
        offloads_optimizer=optimizer,
        offloads_weights=weights,
    )


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        f"plan cannot estimate the memory of trainer.strategy={name!r}; use auto, ddp, fsdp, deepspeed_stage_1 to _3 "
        "(also _offload) or one of the classes DDPStrategy, FSDPStrategy and DeepSpeedStrategy."
    )


@dataclass(frozen=True)
class Precision:
    """Sizes of numbers.

    Args:
        name: Name in the trainer's settings.
        compute: Bytes per activation.
        cast: Bytes per weight, whatever its dtype when built; None keeps the dtype.
        mixed: Whether products are in 16 bits while weights keep their dtype.
    """

    name: str
    compute: int
    cast: int | None
    mixed: bool

    @classmethod
    def of(cls, setting: Any) -> Precision:
        """Parse the trainer's ``precision``.

        Raises:
            ConfigError: The precision is unknown.
        """
        name = str(setting or "32-true")
        known = {
            "32": (4, None, False),
            "32-true": (4, None, False),
            "64": (8, 8, False),
            "64-true": (8, 8, False),
            "16": (2, None, True),
            "16-mixed": (2, None, True),
            "bf16": (2, None, True),
            "bf16-mixed": (2, None, True),
            "16-true": (2, 2, False),
            "bf16-true": (2, 2, False),
        }
        if name not in known:
            raise ConfigError(f"trainer.precision={name!r} is unknown to plan; use one of {', '.join(known)}.")
        return cls(name, *known[name])

    @property
    def peak_bits(self) -> int:
        """Bits of the accelerator's peak that applies."""
        return 16 if self.compute == 2 else 32
