"""Cost of a run beside its scores."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from visexpert.callbacks.throughput import image_count
from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.methods.cost import cached_gflop, first_images, measure_cost, step_counter
from visexpert.types import Batch


class CostReport(Callback):
    """Logs ``cost/...`` at the end of a test: parameters, GFLOP and time at inference, and what training took.

    Of training: ``train_seconds`` (wall clock of the fit, validation included), ``train_images``, ``train_gflop``
    (forward and backward, as run: tokens read from the feature store cost nothing) and ``train_gflop_live`` (the same
    with every encoder run at each step). Filling the store is not counted, since runs share it; nor is the optimizer,
    which multiplies no matrices. All go on where a run is continued from a checkpoint, as if it had never ended. A
    method's steps are counted by torch as they happen, one in ``gflop_every``; those between cost what the last one
    did.

    Args:
        images: Images per call while measuring inference.
        gflop_every: Batches between two whose operations are counted, at least 1.

    Raises:
        ConfigError: ``gflop_every`` is below 1.
    """

    def __init__(self, *, images: int = 32, gflop_every: int = 100) -> None:
        if gflop_every < 1:
            raise ConfigError(f"CostReport: gflop_every={gflop_every} counts batches and must be at least 1.")
        self.images, self.gflop_every = images, gflop_every
        self.train_images = 0
        self.train_gflop = self.train_gflop_live = 0.0
        self.batch_gflop: float | None = None
        """Of the last batch that was counted, over all processes; None before the first."""
        self.batch_gflop_live: float | None = None
        """The same with every encoder run."""
        self._whole = False
        self._seconds = 0.0
        self._started: float | None = None
        self._counter: FlopCounterMode | None = None
        self._images_under_way: int | None = None
        self._saved_per_image = 0.0
        self._until_next = 0
        self._processes = 1
        self._sample: dict[str, Any] | None = None

    @property
    def train_seconds(self) -> float:
        """Wall clock of training so far, that of earlier starts included."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    def state_dict(self) -> dict[str, Any]:
        """What training took so far, and the batch that those to come are counted by."""
        sample = {
            "gflop": self.batch_gflop,
            "gflop_live": self.batch_gflop_live,
            "saved_per_image": self._saved_per_image,
            "until_next": self._until_next,
            "processes": self._processes,
        }
        return {
            "seconds": self.train_seconds,
            "images": self.train_images,
            "gflop": self.train_gflop,
            "gflop_live": self.train_gflop_live,
            "sample": sample,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from an earlier start."""
        self._seconds, self.train_images = state_dict["seconds"], state_dict["images"]
        self.train_gflop, self.train_gflop_live = state_dict["gflop"], state_dict["gflop_live"]
        self._whole = self.train_images > 0
        self._sample = state_dict.get("sample")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._whole = self.train_images > 0 or trainer.global_step == 0  # else an earlier start has kept no count
        self._started, self._processes = time.perf_counter(), trainer.world_size
        sample, self._sample = self._sample or {}, None
        if sample.get("processes") != self._processes:  # batches of another size
            sample = {}
        self.batch_gflop, self.batch_gflop_live = sample.get("gflop"), sample.get("gflop_live")
        self._saved_per_image, self._until_next = sample.get("saved_per_image", 0.0), sample.get("until_next", 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not isinstance(pl_module, Method) or not isinstance(batch, Batch):
            return
        self._images_under_way = image_count(batch) * trainer.world_size
        if self.batch_gflop is None:
            self._saved_per_image = cached_gflop(pl_module, first_images(batch, 2))
        if self._until_next == 0:
            self._counter, self._until_next = step_counter(), self.gflop_every
            self._counter.__enter__()
        self._until_next -= 1

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batch here, before schedules and other callbacks ask what it took."""
        self._count(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count(trainer)  # a batch without a backward pass

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._started = self.train_seconds, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave_counter()
        self._images_under_way = None
        self._seconds, self._started = self.train_seconds, None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Method):
            return
        loader = trainer.datamodule.test_dataloader()  # type: ignore[attr-defined]
        batch = first_images(next(iter(loader)), self.images).to(pl_module.device)
        costs = measure_cost(pl_module, batch)
        costs["steps"] = float(pl_module.trained_steps)
        if self._whole:
            costs["train_seconds"], costs["train_images"] = self.train_seconds, float(self.train_images)
            costs["train_gflop"], costs["train_gflop_live"] = self.train_gflop, self.train_gflop_live
        pl_module.log_dict({f"cost/{name}": value for name, value in costs.items()}, batch_size=1)

    def _count(self, trainer: Trainer) -> None:
        """Add the batch that is under way, once."""
        counted, images = self._leave_counter(), self._images_under_way
        if images is None:
            return
        if counted is not None:
            self.batch_gflop = counted * trainer.world_size
            self.batch_gflop_live = self.batch_gflop + self._saved_per_image * images
        self._images_under_way = None
        self.train_images += images
        self.train_gflop += self.batch_gflop or 0.0
        self.train_gflop_live += self.batch_gflop_live or 0.0

    def _leave_counter(self) -> float | None:
        """GFLOP of this process since the counter was entered; None where it was not."""
        if self._counter is None:
            return None
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        return counter.get_total_flops() / 1e9
