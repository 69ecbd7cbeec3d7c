"""The smallest module that trains: one weight per input, for tests of callbacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from visexpert.types import Batch


class TinyModule(LightningModule):
    """Fits four pixels to zero; logs ``train/loss``, ``val/loss`` and ``test/loss``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def _loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self.layer(batch.images_BCHW.flatten(1)).square().mean()
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), batch_size=len(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test/loss", self._loss(batch), batch_size=len(batch))
        self.log("test/vqa/accuracy", 0.25, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(batches: int = 4, size: int = 3) -> DataLoader[Any]:
    """A loader of ready batches of ``size`` images."""
    generator = torch.Generator().manual_seed(0)
    made = [
        Batch(images_BCHW=torch.rand(size, 1, 2, 2, generator=generator), index_B=torch.arange(size), split="train")
        for _ in range(batches)
    ]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def trainer(**kwargs: Any) -> Trainer:
    """A quiet trainer on the CPU; ``kwargs`` override."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }
    return Trainer(**{**settings, **kwargs})
