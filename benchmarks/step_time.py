"""Time a training step, without logging, checkpoints or validation."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L

from visexpert.callbacks.phase import PhaseSettings


def seconds_per_step(model: L.LightningModule, data: L.LightningDataModule, *, steps: int, folder: Path) -> float:
    """Return the mean seconds of ``steps`` steps, after two that warm up."""
    clock = _Clock()
    trainer = L.Trainer(
        accelerator=PhaseSettings().accelerator,
        max_steps=steps + 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[clock],
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data)
    return (clock.times[-1] - clock.times[1]) / steps


class _Clock(L.Callback):
    """Record when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.perf_counter())
