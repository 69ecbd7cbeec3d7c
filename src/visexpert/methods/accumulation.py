"""Optimizer steps over several batches and processes: loss normalization, and checkpoints between steps."""

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
    """Computes the share of a batch in the tokens and images of its optimizer step.

    Trainers divide the gradient by the number of batches and processes. The mean over a batch's tokens times
    ``share = own tokens / tokens of the step * batches * processes`` therefore adds up to the mean over all tokens of
    the step, in every precision and before clipping; likewise for images. This takes one sum over processes per step.

    It is exact for text, distillation, merging's distance and the routers' balance, which are means over tokens or
    images. What depends on a whole batch takes that of all processes (:mod:`visexpert.processes`), but of one
    accumulated batch at a time: the balance of ToVE's gate (CV^2 per batch, averaged over batches, weighted by images),
    the released rule for dominant teachers, dropped and balanced teachers, and the running statistics that standardize
    teachers. With tiles, merging's distance and the routers' balance of a batch are means over its views.
    """

    def __init__(self) -> None:
        self._totals: Mapping[Unit, int | Tensor] = {}

    def of(self, batch: Batch, trainer: L.Trainer) -> dict[Unit, float | Tensor]:
        """Return the shares of a batch; none if a step is one batch of one process. Call this once per batch, in order.

        Raises:
            ConfigError: Gradients are accumulated, but the batches do not carry the counts of their step.
        """
        batches, counts = trainer.accumulate_grad_batches, batch.step
        if batches * trainer.world_size == 1:
            return {}
        if counts is None:
            if batches > 1:
                raise ConfigError(
                    f"accumulate_grad_batches={batches} needs training batches with the counts of their optimizer "
                    "step; return visexpert.data.StepLoader(loader, trainer=self.trainer) from train_dataloader."
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
    return dict(zip(counts, totals.unbind(), strict=True))  # stays on the device, so the host does not wait


def _share(own: int, total: int | Tensor) -> float | Tensor:
    if isinstance(total, Tensor):
        return own / total.clamp_min(1).float()  # float32 also where bfloat16 is the default
    return own / max(total, 1)


def batches_done(trainer: L.Trainer) -> int:
    """Return the number of completed training batches of this process, over all epochs and restarts."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def rewind_to_step(checkpoint: dict[str, Any], trainer: L.Trainer) -> int:
    """Rewind the progress in a checkpoint written inside an optimizer step to the start of the step.

    Checkpoints hold no gradients, so those accumulated so far would be missing after a restart. The progress becomes
    that of Lightning's own checkpoint at the end of the previous step.

    Args:
        checkpoint: The checkpoint, changed in place.
        trainer: In a fit.

    Returns:
        Number of batches taken back, including a current one.
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
        return 0  # the length of the previous epoch is unknown
    if not total:
        del checkpoint["loops"]  # as before the first batch
        return inside + under_way
    if not begun:  # the end of the previous epoch
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
    """Buffers that a training forward pass changes: running statistics, which checkpoints hold.

    Args:
        buffers: Buffers by checkpoint key.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = dict(buffers)
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the values before an optimizer step."""
        self._kept = {key: value.clone() for key, value in self._buffers.items()}

    def put_back(self, state: dict[str, Any]) -> None:
        """Write the remembered values into a checkpoint's state."""
        state.update((key, value) for key, value in self._kept.items() if key in state)
