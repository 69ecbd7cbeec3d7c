"""How fast training runs, and how much of its time it waits for data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from visexpert.errors import ConfigError
from visexpert.methods.base import writes_row
from visexpert.methods.reduction import sums_over_processes
from visexpert.types import Batch


class ThroughputMonitor(Callback):
    """Logs ``train/images_per_s`` and ``train/data_wait_share`` whenever the trainer logs (``log_every_n_steps``).

    Both are means over the last ``window`` steps; images are those of all processes, waiting is their mean. Waiting is
    the time from the end of one batch to the start of the next; validation and the saving of checkpoints are left out
    of it. On a GPU, whose work runs behind the Python code, the share says how long the code waited, which is what more
    data workers can shorten.

    Args:
        window: Steps that a logged value is the mean of, at least 1.
    """

    def __init__(self, *, window: int = 50) -> None:
        self.clock = StepClock(window=window)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.wait_begins()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.step_begins()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clock.step_ends(image_count(batch))
        if writes_row(trainer):
            own = {"images_per_s": self.clock.images_per_s, "data_wait_share": self.clock.wait_share}
            sums = sums_over_processes(own)
            pl_module.log("train/images_per_s", sums["images_per_s"], batch_size=1)
            pl_module.log("train/data_wait_share", sums["data_wait_share"] / trainer.world_size, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.interrupt()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.interrupt()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.clock.interrupt()


class StepClock:
    """Splits the time of training into steps and the waits before them; keeps running sums over a window of steps.

    Args:
        window: Number of last steps that the figures cover, at least 1.
        now: The clock, in seconds.

    Raises:
        ConfigError: ``window`` is below 1.
    """

    def __init__(self, *, window: int, now: Callable[[], float] = time.perf_counter) -> None:
        if window < 1:
            raise ConfigError(f"window is {window}: it counts steps and must be at least 1.")
        self._window = window
        self._now = now
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._steps: deque[tuple[float, float, int]] = deque()
        self._waited = self._worked = 0.0
        self._images = 0
        self._wait_since: float | None = None
        self._work_since: float | None = None
        self._last_wait = 0.0

    def wait_begins(self) -> None:
        """From now on the loop waits for a batch."""
        self._wait_since = self._now()

    def interrupt(self) -> None:
        """Something other than waiting happens before the next step: that interval is not counted."""
        self._wait_since = None

    def step_begins(self) -> None:
        """The batch has arrived."""
        self._work_since = self._now()
        self._last_wait = 0.0 if self._wait_since is None else self._work_since - self._wait_since

    def step_ends(self, images: int) -> None:
        """The step over ``images`` images is done; waiting begins."""
        now = self._now()
        worked = 0.0 if self._work_since is None else now - self._work_since
        self._steps.append((self._last_wait, worked, images))
        self._add(self._last_wait, worked, images)
        if len(self._steps) > self._window:
            waited, worked, images = self._steps.popleft()
            self._add(-waited, -worked, -images)
        self._wait_since = now

    def _add(self, waited: float, worked: float, images: int) -> None:
        self._waited += waited
        self._worked += worked
        self._images += images

    @property
    def images_per_s(self) -> float:
        """Images per second of stepping and waiting; 0 before the first step."""
        elapsed = self._waited + self._worked
        return self._images / elapsed if elapsed > 0 else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1; 0 before the first step."""
        elapsed = self._waited + self._worked
        return max(0.0, self._waited) / elapsed if elapsed > 0 else 0.0


def image_count(batch: Any) -> int:
    """Number of images in a batch: of our :class:`Batch`, or of any collection of tensors."""
    return len(batch) if isinstance(batch, Batch) else extract_batch_size(batch)
