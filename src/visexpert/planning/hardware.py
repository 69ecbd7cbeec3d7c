"""What accelerators can do, by their makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from visexpert.errors import ConfigError

USUAL_MFU = 0.4
"""Share of the peak that is reached: 0.35 to 0.5 is usual for transformers of this size on a well-fed machine."""


@dataclass(frozen=True)
class Gpu:
    """An accelerator.

    Args:
        label: Its full name.
        tflops: Peak of dense products in 10^12 FLOP/s by bits: 16 (bfloat16 or float16, float32 sums) and 32.
        memory_bytes: Its memory.
    """

    label: str
    tflops: Mapping[int, float]
    memory_bytes: float


# NVIDIA's data sheets, dense (without structured sparsity). 32 is float32 proper: torch leaves TF32 off for products.
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
    """The accelerator of a name.

    Raises:
        ConfigError: It is not in the table.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name} is not in the table; use one of {', '.join(GPUS)}.")
    return GPUS[name.lower()]
