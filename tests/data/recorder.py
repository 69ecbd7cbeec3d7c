"""A module that learns one number and notes what it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from visexpert.types import Batch


class Recorder(LightningModule):
    """Notes source and rows of each batch.

    Args:
        fail_at: Step at which the power goes.
    """

    def __init__(self, *, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.shown: list[tuple[str, list[int]]] = []
        self.scored: list[tuple[str, list[int]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.shown.append((batch.split, batch.index_B.tolist()))
        return (self.weight - batch.images_BCHW.float().mean() / 255) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.scored.append((batch.source, batch.index_B.tolist()))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.scored.append((batch.source, batch.index_B.tolist()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options: Any) -> Trainer:
    """A quiet trainer on the CPU whose run folder is ``folder``."""
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
