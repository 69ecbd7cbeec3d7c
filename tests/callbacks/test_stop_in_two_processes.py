"""SIGTERM in a fit of two processes: both end after the same step, whichever of them was sent it, and when."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tests.callbacks.tiny import TinyModule, loader, trainer
from tests.two_processes import in_two_processes
from visexpert.callbacks import StopOnSignal
from visexpert.interruption import Interrupted, stoppable

STEP = 2
"""Step in which the signal comes."""


class Signal(Callback):
    """Sends this process SIGTERM before its forward pass, after its backward pass, or never."""

    def __init__(self, when: str) -> None:
        self.when = when

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *others: object) -> None:
        self._send(trainer, "before")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send(trainer, "after")

    def _send(self, trainer: Trainer, when: str) -> None:
        if trainer.global_step == STEP and when == self.when:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped(rank: int, folder: Path, when: tuple[str, str]) -> tuple[int, int, Tensor]:
    """Exit code and steps of a process, and its weights."""
    module, callbacks = TinyModule(), [StopOnSignal(checkpoint=folder / "last.ckpt"), Signal(when[rank])]
    fitting = trainer(callbacks=callbacks, devices=2, strategy="ddp", use_distributed_sampler=False)
    with stoppable(go_on="go on"):
        try:
            fitting.fit(module, loader())
        except Interrupted as end:
            return end.exit_code, fitting.global_step, module.layer.weight.detach().clone()
    raise AssertionError("it was not stopped")


@pytest.mark.parametrize("when", [("before", "never"), ("never", "after"), ("after", "before")])
def test_both_end_after_the_same_step(tmp_path: Path, when: tuple[str, str]) -> None:
    first, second = in_two_processes(stopped, tmp_path, when)
    assert first[:2] == second[:2] == (143, STEP + 1) and torch.equal(first[2], second[2])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == STEP + 1
