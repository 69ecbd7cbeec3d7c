"""A fixed amount of training: so much work, or so much time, instead of so many steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from visexpert.callbacks.cost import CostReport
from visexpert.errors import ConfigError
from visexpert.methods import Method
from visexpert.optim import cosine_factor

log = logging.getLogger(__name__)

UNLIMITED = 10**9
"""Steps of a fit that nothing but the budget ends."""


class TrainingBudget(Callback):
    """End a fit when its budget is spent, and let the learning rate come to zero just then.

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
        """Optimizer steps that the budget allows, by what steps have cost so far."""
        self._limit = UNLIMITED
        self._cost: CostReport | None = None
        self._first_end: tuple[int, float] | None = None
        self._seconds = 0.0
        self._started: float | None = None
        self._seen = 0
        self._factor: tuple[int, Callable[[int], float]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what counts, and give a fit without an end of its own one that the schedule can be built for."""
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
        """Go on from an earlier start; another budget than before is counted anew from what was spent."""
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
