"""Cost of a run beside its scores."""

from __future__ import annotations

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from visexpert.methods import Method
from visexpert.methods.cost import first_images, measure_cost


class CostReport(Callback):
    """Logs ``cost/...`` at the end of a test: parameters, GFLOP and images per second; and seconds of training.

    Args:
        images: Images per call while measuring.
    """

    def __init__(self, *, images: int = 32) -> None:
        self.images = images
        self._started: float | None = None
        self._train_seconds: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started is not None:
            self._train_seconds = time.perf_counter() - self._started

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Method):
            return
        loader = trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
        batch = first_images(next(iter(loader)), self.images).to(pl_module.device)
        costs = measure_cost(pl_module, batch)
        costs["steps"] = float(pl_module.trained_steps)
        if self._train_seconds is not None:
            costs["train_seconds"] = self._train_seconds
        pl_module.log_dict({f"cost/{name}": value for name, value in costs.items()}, batch_size=1)
