"""The cost of a run beside its scores, and a budget that ends a fit by its cost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from visexpert.callbacks.progress import image_count
from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.methods.cost import cached_gflop, first_images, measure_cost, step_counter
from visexpert.optim import cosine_factor
from visexpert.types import Batch

log = logging.getLogger(__name__)

UNLIMITED = 10**9
"""Steps of a fit that only the budget ends."""


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
            raise ConfigError(f"CostReport: gflop_every must be at least 1 batch, got {gflop_every}.")
        self.images, self.gflop_every = images, gflop_every
        self.train_images = 0
        self.train_gflop = self.train_gflop_live = 0.0
        self.batch_gflop: float | None = None
        """Of the last batch that was counted, over all processes; None before the first."""
        self.batch_gflop_live: float | None = None
        """The same, as if every encoder had run."""
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
        """Resume the counts."""
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


class TrainingBudget(Callback):
    """End a fit when its budget is spent, with the learning rate reaching zero just then.

    After every step the number of steps that the budget allows is what is done plus what is left over the cost of a
    step; it becomes the trainer's ``max_steps`` and the length of the cosine. With steps of equal cost, that is the
    same run as one with so many ``max_steps``. Whole steps are trained, so the budget is met within half a step.
    A ``max_steps`` or ``max_epochs`` in the configuration stays an upper bound. Where a run is continued, what was
    spent before counts. Lightning's own ``max_time`` ends a fit in time, too, but in the middle of the cosine.

    Args:
        gflop: Forward and backward passes of training, 10^9 operations, as :class:`CostReport` counts them, which has
            to be among the callbacks (every run of the command line has it).
        seconds: Wall clock of the fit, validation included: depends on the machine and what else it does.
        count: For ``gflop``, what counts: ``as_run`` (tokens from the feature store are free) or ``live`` (as if
            every encoder ran at each step).

    Raises:
        ConfigError: Not exactly one of ``gflop`` and ``seconds``, or one that is not above 0, or an unknown count.
    """

    def __init__(self, *, gflop: float | None = None, seconds: float | None = None, count: str = "as_run") -> None:
        given = {name: value for name, value in {"gflop": gflop, "seconds": seconds}.items() if value is not None}
        if len(given) != 1 or not all(0 < value < math.inf for value in given.values()):
            raise ConfigError(f"TrainingBudget: got {given or 'nothing'}; give one of gflop and seconds, above 0.")
        if count not in ("as_run", "live"):
            raise ConfigError(f"TrainingBudget: count={count!r} is unknown; use 'as_run' or 'live'.")
        self.gflop, self.seconds, self.count = gflop, seconds, count
        self.total = UNLIMITED
        """Optimizer steps that the budget allows, estimated from the cost of the steps so far."""
        self._limit = UNLIMITED
        self._cost: CostReport | None = None
        self._first_end: tuple[int, float] | None = None
        self._seconds = 0.0
        self._started: float | None = None
        self._seen = 0
        self._factor: tuple[int, Callable[[int], float]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the CostReport, and give a fit without a limit one that the schedule can be built for."""
        if stage != "fit":
            return
        reports = [callback for callback in trainer.callbacks if isinstance(callback, CostReport)]  # type: ignore[attr-defined]
        if self.gflop is not None and (not reports or not isinstance(pl_module, Method)):
            raise ConfigError(
                f"TrainingBudget: gflop={self.gflop} needs a method and a CostReport among the callbacks to count; add "
                "visexpert.callbacks.CostReport, or fix seconds."
            )
        self._cost = reports[0] if reports else None
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            trainer.fit_loop.epoch_loop.max_steps = UNLIMITED

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent and steps allowed; work is kept by the CostReport."""
        return {"seconds": self._seconds_spent(), "total": self.total, "budget": self._budget}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the counts; a changed budget is applied to what was already spent."""
        self._seconds = state_dict["seconds"]
        if state_dict["budget"] == self._budget:
            self.total = state_dict["total"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._first_end, self._seen = time.perf_counter(), None, trainer.global_step
        self._limit = int(trainer.estimated_stepping_batches)
        for entry in trainer.lr_scheduler_configs:
            self._take_over(trainer, pl_module, entry.scheduler)
        if trainer.global_step >= self.total or self._spent() >= self._budget:  # continued after its end
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:  # gradients are still being accumulated
            return
        self._seen = trainer.global_step
        self._allow(trainer, self._seen)
        trainer.fit_loop.epoch_loop.max_steps = self.total
        if self._seen >= self.total:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._started = self._seconds_spent(), None
        spent = f"{self._spent():.6g} GFLOP" if self.gflop is not None else f"{self._seconds:.1f} s"
        log.info("Training budget: %s spent in %d steps.", spent, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._seconds, self._started = self._seconds_spent(), None

    def _take_over(self, trainer: Trainer, module: LightningModule, scheduler: Any) -> None:
        """Let the schedule ask for its length at every step.

        Raises:
            ConfigError: A schedule of another kind than the methods'.
        """
        if not isinstance(scheduler, LambdaLR) or not isinstance(module, Method):
            raise ConfigError(
                f"TrainingBudget: cannot end a {type(scheduler).__name__} of {type(module).__name__} with the budget; "
                "use a method of visexpert, whose schedule is a cosine over all steps."
            )
        warmup = module.warmup_steps

        def factor(step: int) -> float:
            if step > 0:
                self._allow(trainer, step)
            known = self._factor
            total = min(self.total, self._limit)
            if known is None or known[0] != total:
                known = self._factor = (total, cosine_factor(warmup_steps=warmup, total_steps=total))
            return known[1](step)

        scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)

    def _allow(self, trainer: Trainer, done: int) -> None:
        """Estimate the number of steps anew after ``done`` of them; the first process decides for all."""
        step_cost = self._step_cost(trainer, done)
        if step_cost is not None and step_cost > 0:
            left = round((self._budget - self._spent()) / step_cost)
            self.total = min(self._limit, max(1, done, done + left))
        if trainer.world_size > 1:
            self.total = trainer.strategy.broadcast(self.total)

    def _stop(self, trainer: Trainer) -> None:
        trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
        trainer.should_stop = True

    @property
    def _budget(self) -> float:
        budget = self.gflop if self.gflop is not None else self.seconds
        assert budget is not None
        return budget

    def _spent(self) -> float:
        if self.gflop is None:
            return self._seconds_spent()
        assert self._cost is not None
        return self._cost.train_gflop if self.count == "as_run" else self._cost.train_gflop_live

    def _seconds_spent(self) -> float:
        return self._seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def _step_cost(self, trainer: Trainer, done: int) -> float | None:
        """Cost of an optimizer step: work of the last one that was counted, or the mean time of all but the first."""
        if self.gflop is None:
            now = self._spent()
            if self._first_end is None:
                self._first_end = (done, now)
            first, at = self._first_end
            return (now - at) / (done - first) if done > first else None
        assert self._cost is not None
        per_batch = self._cost.batch_gflop_live if self.count == "live" else self._cost.batch_gflop
        return None if per_batch is None else per_batch * trainer.accumulate_grad_batches
