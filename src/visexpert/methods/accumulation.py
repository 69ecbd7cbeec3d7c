"""Optimizer steps of several batches and processes: what losses are divided by, and checkpoints between steps only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.types import Batch, StepCounts, Unit


class StepShares:
    """The share that a batch has in what its optimizer step counts, over all its batches and processes.

    Trainers divide the gradient by the number of batches and processes. A mean over one batch's tokens times
    ``share = own tokens / tokens of the step * batches * processes`` therefore adds up to the mean over all tokens of
    the step, in every precision and before any clipping; likewise for images. One sum over processes a step.

    This is exact for text, distillation, merging's distance and the routers' balance, which are means over tokens or
    images. It cannot be for what a batch decides as a whole: the balance of ToVE's gate (its CV^2 is that of a batch;
    a step has the mean over batches, each weighed by its images), the released rule for dominant teachers, and the
    running statistics that standardize teachers. With tiles merging's distance and the routers' balance of a batch
    are means over its views.
    """

    def __init__(self) -> None:
        self._totals: Mapping[Unit, int | Tensor] = {}

    def of(self, batch: Batch, trainer: L.Trainer) -> dict[Unit, float | Tensor]:
        """The shares of a batch, none where a step is one batch of one process; called once for each batch, in order.

        Raises:
            ConfigError: Gradients are accumulated over batches that do not say what their step counts.
        """
        batches, counts = trainer.accumulate_grad_batches, batch.step
        if batches * trainer.world_size == 1:
            return {}
        if counts is None:
            if batches > 1:
                raise ConfigError(
                    f"accumulate_grad_batches={batches} needs training batches that say what their optimizer step "
                    "counts; return visexpert.data.StepLoader(loader, trainer=self.trainer) from train_dataloader."
                )
            own = batch.counts()
            counts = StepCounts(batch=own, step=own, place=0)
        if counts.place == 0 or not self._totals:
            self._totals = _over_processes(counts.step, trainer)
        parts = batches * trainer.world_size
        return {unit: _share(counts.batch[unit] * parts, total) for unit, total in self._totals.items()}


def _over_processes(counts: Mapping[Unit, int], trainer: L.Trainer) -> Mapping[Unit, int | Tensor]:
    if trainer.world_size == 1:
        return counts
    counted = torch.tensor(list(counts.values()), device=trainer.strategy.root_device)
    totals = trainer.strategy.reduce(counted, reduce_op="sum")
    assert isinstance(totals, Tensor)
    return dict(zip(counts, totals.unbind(), strict=True))  # left on the device, which is not waited for


def _share(own: int, total: int | Tensor) -> float | Tensor:
    if isinstance(total, Tensor):
        return own / total.clamp_min(1).float()  # float32 also where bfloat16 is the default
    return own / max(total, 1)


def batches_done(trainer: L.Trainer) -> int:
    """Number of training batches of this process that are done, over all epochs and starts of the run."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def rewind_to_step(checkpoint: dict[str, Any], trainer: L.Trainer) -> int:
    """Let a checkpoint that is written inside an optimizer step say that the step has not begun.

    Gradients are in no checkpoint, so those accumulated so far would be missing after a restart. The progress written
    down is that of Lightning's own checkpoint at the end of the step before, which it knows how to continue.

    Args:
        checkpoint: What is to be written, changed in place.
        trainer: In a fit.

    Returns:
        How many batches were taken back, one that is under way included.
    """
    loops = checkpoint.get("loops")
    if loops is None or not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
        return 0
    fit = loops["fit_loop"]
    progress, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]
    current, size = progress["current"], trainer.accumulate_grad_batches
    under_way = int(current["ready"] - current["processed"])
    is_last = progress["is_last_batch"] or current["ready"] == trainer.num_training_batches
    inside = 0 if is_last and not under_way else int(current["processed"]) % size
    if not inside and not under_way:
        return 0
    begun, total = current["processed"] - inside, progress["total"]["processed"] - inside
    if not begun and total and math.isinf(trainer.num_training_batches):
        return 0  # nothing says where the epoch before ended
    if not total:
        del checkpoint["loops"]  # as before the first batch
        return inside + under_way
    if not begun:  # the end of the epoch before
        begun = int(trainer.num_training_batches)
        for counts in epochs.values():
            counts["ready"] = counts["started"] = counts["processed"]
            counts["processed"] = counts["completed"] = counts["completed"] - 1
    for counts, batches in ((current, begun), (progress["total"], total)):
        counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)
    progress["is_last_batch"] = begun == trainer.num_training_batches
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    return inside + under_way


class MovingBuffers:
    """What a forward pass in training changes beside gradients: running statistics that checkpoints hold.

    Args:
        buffers: By their keys in a checkpoint.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = dict(buffers)
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Keep them as they are before an optimizer step."""
        self._kept = {key: value.clone() for key, value in self._buffers.items()}

    def put_back(self, state: dict[str, Any]) -> None:
        """Write what was kept into a checkpoint's state."""
        state.update((key, value) for key, value in self._kept.items() if key in state)
