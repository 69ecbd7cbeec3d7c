"""The plan of a configuration: parameters, compute, memory, disk and hours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from visexpert.errors import ConfigError
from visexpert.methods import ROLES
from visexpert.planning.amount import Amount, DataNeed
from visexpert.planning.machine import USUAL_MFU, Gpu, Precision, Strategy
from visexpert.planning.memory import Memory

TEXT_TOKENS = 124
"""With the 576 image tokens of CLIP L/14-336 this makes 700 tokens, about LLaVA's mean."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is asked for beside its configuration.

    Args:
        gpus: Number of accelerators, one process each.
        gpu: Name of one (:data:`~visexpert.planning.machine.GPUS`).
        mfu: Share of the peak that is reached, in (0, 1].
        samples: Training images, where the data is not here to be counted.
        text_tokens: Tokens of an image's texts.
        answer_tokens: Those of them that are supervised; None for half.
    """

    gpus: int = 1
    gpu: str = "h100"
    mfu: float = USUAL_MFU
    samples: int | None = None
    text_tokens: int = TEXT_TOKENS
    answer_tokens: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            f"--gpus {self.gpus}, but must be at least 1": self.gpus < 1,
            f"--mfu {self.mfu}, but must be a share of the peak in (0, 1]": not 0 < self.mfu <= 1,
            f"--samples {self.samples}, but must be at least 1": self.samples is not None and self.samples < 1,
        }
        if told := [text for text, is_wrong in wrong.items() if is_wrong]:
            raise ConfigError(f"visexpert plan was given {'; '.join(told)}.")


@dataclass(frozen=True)
class Configured:
    """What the configuration itself asks for, where the plan is for another number of GPUs.

    Args:
        gpus: Its ``devices`` times ``num_nodes``.
        amount: What it reads on as many.
    """

    gpus: int
    amount: Amount


@dataclass(frozen=True)
class Row:
    """A part in the plan.

    Args:
        name: Its name.
        role: What it is for; empty for losses.
        trained: Parameters that train.
        frozen: Parameters that do not.
        forward: GFLOP per sample in the forward pass.
        backward: GFLOP per sample in the backward pass; 0 where no gradient passes.
        is_stored: A feature store holds its output: its forward pass runs once per image, not at each step.
    """

    name: str
    role: str
    trained: int
    frozen: int
    forward: float
    backward: float
    is_stored: bool

    @property
    def training(self) -> float:
        """GFLOP per sample of both passes, encoders live."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Args:
        checkpoint: One checkpoint with the optimizer's states; the trainer keeps two.
        frozen: Frozen weights as they are built, which come from their own files.
        store: Tokens in the feature store; None where the number of images is not known, 0 without a store.
        data: What the data needs.
    """

    checkpoint: float
    frozen: float
    store: float | None
    data: list[DataNeed]


@dataclass(frozen=True)
class Plan:
    """What a configuration will cost.

    Args:
        method: Name of its class.
        rows: Its parts.
        amount: What it reads.
        memory: Of one GPU.
        disk: On disk.
        gpu: The accelerator.
        asked: What was asked.
        strategy: How memory is shared.
        precision: How large numbers are.
        activation_bytes: Activations of one sample.
        image_size: Side of the sample's image, as the data gives it.
        configured: The configuration's own number of GPUs, where the plan is for another.
    """

    method: str
    rows: list[Row]
    amount: Amount
    memory: Memory
    disk: Disk
    gpu: Gpu
    asked: Asked
    strategy: Strategy
    precision: Precision
    activation_bytes: int
    image_size: int
    configured: Configured | None = None

    @property
    def gflop_live(self) -> float:
        """GFLOP of a training sample with every encoder run."""
        return sum(row.training for row in self.rows)

    @property
    def gflop(self) -> float:
        """GFLOP of a training sample as configured: what the store holds is not run."""
        return self.gflop_live - self.gflop_stored

    @property
    def gflop_stored(self) -> float:
        """GFLOP of an image's way into the feature store."""
        return sum(row.forward for row in self.rows if row.is_stored)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each role in a live training sample."""
        return {role: sum(r.training for r in self.rows if r.role == role) / self.gflop_live for role in ROLES}

    @property
    def hours(self) -> float | None:
        """Hours of the fit, filling the store included; None where the amount is not known."""
        if self.amount.samples is None or (self.gflop_stored and self.amount.rows is None):
            return None
        gflop = self.gflop * self.amount.samples + self.gflop_stored * (self.amount.rows or 0)
        return gflop / (self.asked.gpus * self.gpu.tflops[self.precision.peak_bits] * self.asked.mfu * 1e3) / 3600

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return self.memory.total <= self.gpu.memory_bytes

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = [asdict(row) | {"training": row.training} for row in self.rows]
        return {
            "method": self.method,
            "asked": asdict(self.asked),
            "parts": rows,
            "amount": asdict(self.amount),
            "parameters": {key: sum(getattr(row, key) for row in self.rows) for key in ("trained", "frozen")},
            "gflop_per_sample": {"training": self.gflop, "live": self.gflop_live, "stored": self.gflop_stored},
            "shares": self.shares,
            "memory_per_gpu": asdict(self.memory) | {"total": self.memory.total},
            "activation_bytes_per_sample": self.activation_bytes,
            "image_size": self.image_size,
            "fits": self.fits,
            "gpu": asdict(self.gpu),
            "strategy": asdict(self.strategy),
            "precision": self.precision.name,
            "disk": asdict(self.disk),
            "hours": self.hours,
            "configured": None if self.configured is None else asdict(self.configured),
        }
