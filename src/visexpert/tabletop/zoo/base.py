"""Base of the zoo's training modules: optimizer, image scaling, and shipping of the result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from visexpert.optim import adamw, scheduled
from visexpert.precision import ClippedModule
from visexpert.types import Batch


class ZooModule(ClippedModule, ABC):
    """Base of the zoo's LightningModules: AdamW with warm-up and cosine decay over the run's steps.

    Args:
        lr: Highest learning rate.
        weight_decay: AdamW weight decay; vectors (norms, biases) have none.
        warmup: Share of the steps in which the rate rises.
    """

    headline: str = ""
    """Name of the entry's main held-out score (a key of the validation metrics, without ``val/``)."""
    score_definition: str = ""
    """One sentence: what the headline measures, in which unit, and which direction is better."""

    def __init__(self, *, lr: float = 1.5e-3, weight_decay: float = 0.05, warmup: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup

    @abstractmethod
    def ship(self, folder: Path, name: str) -> list[Path]:
        """Write the trained weights under ``folder`` as fp16 safetensors and return the files."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what a card says about the model: kind, input, tokens, parameters, license."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW over all trained parameters, with a schedule stepped per batch."""
        trained = [value for value in self.parameters() if value.requires_grad]
        groups = [
            {"params": [value for value in trained if value.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = adamw(groups, lr=self.lr, betas=(0.9, 0.98), trainer=self.trainer)
        steps = int(self.trainer.estimated_stepping_batches)
        return scheduled(optimizer, lambda step: one_cycle(step, total=steps, warmup=self.warmup))


def one_cycle(step: int, *, total: int, warmup: float, low: float = 0.04, final: float = 4e-6) -> float:
    """Return the factor on the learning rate: a cosine up from ``low`` to 1, then a cosine down to ``final``.

    Equals torch's ``OneCycleLR``, which divides by zero if warm-up is a single step.

    Args:
        step: Steps done.
        total: Steps of the run.
        warmup: Share of the steps in which the rate rises.
        low: Factor at the first step.
        final: Factor at the last step.
    """
    top = max(warmup * total - 1, 0.0)
    if step < top:
        return low + (1 - low) * (1 - math.cos(math.pi * step / top)) / 2
    fallen = min((step - top) / max(total - 1 - top, 1.0), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * fallen)) / 2


def images_of(batch: Batch) -> Tensor:
    """Return the batch's images as float in [0, 1], for any stored type."""
    images_BCHW = batch.images_BCHW
    return images_BCHW.float() / 255 if images_BCHW.dtype == torch.uint8 else images_BCHW


def parameter_count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(value.numel() for value in module.parameters())
