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
    """Options of a plan beside its configuration.

    Args:
        gpus: Number of accelerators, one process each.
        gpu: Name of the accelerator (:data:`~visexpert.planning.machine.GPUS`).
        mfu: Model FLOP utilization, in (0, 1].
        samples: Number of training images, if the data is not here to be counted.
        text_tokens: Tokens of an image's texts.
        answer_tokens: Supervised tokens among them; None for half.
    """

    gpus: int = 1
    gpu: str = "h100"
    mfu: float = USUAL_MFU
    samples: int | None = None
    text_tokens: int = TEXT_TOKENS
    answer_tokens: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            f"gpus must be at least 1, got {self.gpus}": self.gpus < 1,
            f"mfu must be in (0, 1], got {self.mfu}": not 0 < self.mfu <= 1,
            f"samples must be at least 1, got {self.samples}": self.samples is not None and self.samples < 1,
        }
        if told := [text for text, is_wrong in wrong.items() if is_wrong]:
            raise ConfigError(f"visexpert plan: {'; '.join(told)}.")


@dataclass(frozen=True)
class Configured:
    """What the configuration itself asks for, if the plan is for another number of GPUs.

    Args:
        gpus: ``devices`` x ``num_nodes`` of the configuration.
        amount: What a fit reads on that many GPUs.
    """

    gpus: int
    amount: Amount


@dataclass(frozen=True)
class Row:
    """A part in the plan.

    Args:
        name: Name of the part.
        role: Role in the method; empty for losses.
        trained: Number of trained parameters.
        frozen: Number of frozen parameters.
        forward: GFLOP per sample of the forward pass.
        backward: GFLOP per sample of the backward pass; 0 if no gradient passes.
        is_stored: Whether a feature store holds its output: its forward pass runs once per image, not at each step.
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
        """GFLOP per sample of both passes, with live encoders."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Args:
        checkpoint: One checkpoint with optimizer states; the trainer keeps two.
        frozen: Frozen weights in the dtype they are built in; they come from their own files.
        store: Tokens in the feature store; None if the number of images is unknown, 0 without a store.
        data: Files that the data needs.
    """

    checkpoint: float
    frozen: float
    store: float | None
    data: list[DataNeed]


@dataclass(frozen=True)
class Plan:
    """Cost of a configuration.

    Args:
        method: Class name of the method.
        rows: Parts of the method.
        amount: What the fit reads.
        memory: Memory of one GPU.
        disk: Space on disk.
        gpu: The accelerator.
        asked: Options of the plan.
        strategy: How tensors are distributed.
        precision: Sizes of numbers.
        activation_bytes: Activations of one sample.
        image_size: Side of a sample's image in pixels, as the data gives it.
        configured: What the configuration itself asks for, if the plan is for another number of GPUs.
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
        """GFLOP of a training sample if every encoder runs."""
        return sum(row.training for row in self.rows)

    @property
    def gflop(self) -> float:
        """GFLOP of a training sample as configured: encoders whose tokens are stored do not run."""
        return self.gflop_live - self.gflop_stored

    @property
    def gflop_stored(self) -> float:
        """GFLOP to fill the feature store, per image."""
        return sum(row.forward for row in self.rows if row.is_stored)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each role in the GFLOP of a live training sample."""
        return {role: sum(r.training for r in self.rows if r.role == role) / self.gflop_live for role in ROLES}

    @property
    def hours(self) -> float | None:
        """Hours of the fit, including filling the store; None if the amount is unknown."""
        if self.amount.samples is None or (self.gflop_stored and self.amount.rows is None):
            return None
        gflop = self.gflop * self.amount.samples + self.gflop_stored * (self.amount.rows or 0)
        return gflop / (self.asked.gpus * self.gpu.tflops[self.precision.peak_bits] * self.asked.mfu * 1e3) / 3600

    @property
    def warning(self) -> str | None:
        """What ``max_steps`` reads if that is not what ``max_epochs`` or ``samples`` asks; None if it is."""
        is_asked = self.asked.samples is not None or self.amount.epochs is not None
        return self.amount.uneven if is_asked else None

    @property
    def fits(self) -> bool:
        """Whether the plan fits into the memory of a GPU."""
        return self.memory.total <= self.gpu.memory_bytes

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
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
            "warning": self.warning,
            "configured": None if self.configured is None else asdict(self.configured),
        }
