"""What a run shows while it trains: a progress bar, and how fast it goes and waits for data."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.data import extract_batch_size
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from visexpert.errors import ConfigError
from visexpert.methods.base import writes_row
from visexpert.methods.step import sums_over_processes
from visexpert.types import Batch

_BAR_WIDTH = 40

_FOREVER_S = 1e9
"""30 years: a longer time left means that no end was set."""

_NAMES = {"train": "train", "validate": "validate", "sanity_check": "check", "test": "test", "predict": "predict"}


class TrainingProgress(RichProgressBar):
    """Live bars in a terminal; elsewhere (a log file, CI) one plain line every ``line_every_s`` seconds.

    The time left is that of the whole training, validation included, not of the epoch. The loss is read from the
    device only when something is about to be shown, so the bar costs a step next to nothing.

    Args:
        updates_per_s: How often the live bars are redrawn.
        line_every_s: Seconds between two plain lines.
        window: Steps that images per second and the share of waiting are averaged over.
        interactive: Live bars (True) or plain lines (False); None asks the terminal.
    """

    def __init__(
        self,
        *,
        updates_per_s: float = 4.0,
        line_every_s: float = 10.0,
        window: int = 50,
        interactive: bool | None = None,
    ) -> None:
        super().__init__(refresh_rate=max(1, math.ceil(updates_per_s)))
        console = get_console()
        self._live = console.is_terminal or console.is_jupyter if interactive is None else interactive
        self._pause_s = 1 / updates_per_s if self._live else line_every_s
        self._clock = StepClock(window=window)
        self._shown_at = 0.0
        self._began_at = 0.0
        self._began_step = 0
        self._evaluated_since = 0.0
        self._done = 0
        self._loss: float | None = None
        self.status = ""

    @property
    def is_enabled(self) -> bool:
        """Whether the live bars are on; plain lines depend on :meth:`disable` alone."""
        return self._live and super().is_enabled

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return description, bar and count as Lightning has them, then the status of the run, all on one line."""
        described, bar, count, *_ = super().configure_columns(trainer)
        assert isinstance(described, TextColumn) and isinstance(bar, BarColumn)
        bar.bar_width, bar._table_column = None, Column(max_width=_BAR_WIDTH)  # what the texts leave of the line
        count._table_column = Column(no_wrap=True)
        return [described, bar, count, _StatusColumn(self)]

    def _init_progress(self, trainer: Trainer) -> None:
        """Start the bars, and cut what a module shows of its own where the line ends, instead of wrapping."""
        super()._init_progress(trainer)
        if self._metric_component is not None:
            self._metric_component._table_column = Column(no_wrap=True, overflow="ellipsis")

    @property
    def total_train_batches(self) -> float:
        """Batches of the epoch under way, those before a checkpoint included that training goes on from."""
        return self._epoch_batches(self.trainer, self._done)

    def _get_train_description(self, current_epoch: int) -> str:
        """Name an epoch; of how many only where that is known (Lightning writes "Epoch 0/-2" where it is not)."""
        if (self.trainer.max_epochs or -1) > 0:
            return super()._get_train_description(current_epoch)
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clock.reset()
        self._began_at = self._shown_at = time.perf_counter()
        self._began_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = 0
        super().on_train_epoch_start(trainer, pl_module)
        self._clock.wait_begins()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clock.step_begins()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._done = batch_idx + 1
        self._clock.step_ends(image_count(batch) * trainer.world_size)
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if not self._due(last and self._live):
            return
        self._loss = _loss_of(outputs)
        self.status = self._train_status(trainer)
        if self._live:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        else:
            self._line(trainer, self._done, self.total_train_batches, self._loss_text() + self.status)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._stop_progress()  # Lightning leaves it running, and the next print would break it
        if not self._live and self._enabled:
            took = _clock_time(time.perf_counter() - self._began_at)
            print(f"train: {trainer.global_step - self._began_step} steps in {took}", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._clock.interrupt()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._clock.interrupt()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._evaluated_since = time.perf_counter()
        self._clock.interrupt()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        totals = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._evaluation_line(trainer, batch_idx, totals, dataloader_idx)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._evaluated_since = self._shown_at = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._evaluation_line(trainer, batch_idx, trainer.num_test_batches, dataloader_idx)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._evaluated_since = self._shown_at = time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._evaluation_line(trainer, batch_idx, trainer.num_predict_batches, dataloader_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics that the module put on the bar, without the version number; else the loss."""
        shown: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        shown.pop("v_num", None)
        if self._loss is not None and not any("loss" in name for name in shown):
            shown = {"loss": self._loss, **shown}
        return shown

    def _due(self, now_anyway: bool = False) -> bool:
        """Return whether a line is due; if so, wait anew before the next."""
        now = time.perf_counter()
        if not now_anyway and now - self._shown_at < self._pause_s:
            return False
        self._shown_at = now
        return True

    def _epoch_batches(self, trainer: Trainer, done: int) -> float:
        """Batches of this epoch, or fewer where training ends before; Lightning's own count is of those to come."""
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        step = trainer.accumulate_grad_batches
        ends = done // step * step + (trainer.max_steps - trainer.global_step) * step
        return min(trainer.num_training_batches, max(done, ends))

    def _train_status(self, trainer: Trainer) -> str:
        done = trainer.global_step - self._began_step
        left = trainer.estimated_stepping_batches - trainer.global_step
        seconds = (time.perf_counter() - self._began_at) / done * left if done else math.inf
        return (
            f"{self._clock.images_per_s:.0f} img/s · wait {100 * self._clock.wait_share:.0f} %"
            f" · {_clock_time(seconds)} left"
        )

    def _loss_text(self) -> str:
        return "" if self._loss is None else f"loss {self._loss:.4f} · "

    def _evaluation_line(
        self, trainer: Trainer, batch_idx: int, totals: Sequence[int | float], dataloader_idx: int
    ) -> None:
        """Print a plain line of an evaluation loop, at most every ``line_every_s`` seconds, with the time left."""
        if not self._live and self._due():
            done = sum(totals[:dataloader_idx]) + batch_idx + 1
            passed = time.perf_counter() - self._evaluated_since
            left = _clock_time(_seconds_left(passed, done, sum(totals)))
            self._line(trainer, batch_idx + 1, totals[dataloader_idx], f"{left} left")

    def _line(self, trainer: Trainer, done: int, total: float, text: str) -> None:
        if not self._enabled:
            return
        name = _NAMES[trainer.state.stage.value] if trainer.state.stage else ""
        where = f"epoch {trainer.current_epoch} · step {trainer.global_step} · " if trainer.training else ""
        count = f"batch {done}/{int(total)}" if math.isfinite(total) else f"batch {done}"
        print(" · ".join(part for part in (f"{name}: {where}{count}", text) if part), flush=True)


class _StatusColumn(ProgressColumn):
    """The run's status behind the training bar, the time left behind any other."""

    def __init__(self, owner: TrainingProgress) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._owner = owner

    def render(self, task: Task) -> Text:
        if task.id == self._owner.train_progress_bar_id:
            return Text(self._owner.status)
        # Rich forgets batches after half a minute, and one that writes captions may take longer.
        seconds = _seconds_left(task.elapsed or 0.0, task.completed, math.inf if task.total is None else task.total)
        return Text(f"{_clock_time(seconds)} left")


def _seconds_left(passed: float, done: float, total: float) -> float:
    """Return the seconds left at the pace so far; infinite before the first batch."""
    return passed / done * (total - done) if done else math.inf


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds)))) if seconds < _FOREVER_S else "-:--:--"


def _loss_of(outputs: Any) -> float | None:
    """The loss in what a training step returned: a tensor, or a mapping with one under ``loss``."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return float(loss.detach()) if isinstance(loss, torch.Tensor) else None


class ThroughputMonitor(Callback):
    """Logs ``train/images_per_s`` and ``train/data_wait_share`` whenever the trainer logs (``log_every_n_steps``).

    Both are means over the last ``window`` steps; images are those of all processes, waiting is their mean. Waiting is
    the time from the end of one batch to the start of the next, without validation and the saving of checkpoints. A
    GPU works asynchronously: there the share is the time that the Python code waited, which more data workers shorten.

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
        window: Number of last steps that the means cover, at least 1.
        now: The clock, in seconds.

    Raises:
        ConfigError: ``window`` is below 1.
    """

    def __init__(self, *, window: int, now: Callable[[], float] = time.perf_counter) -> None:
        if window < 1:
            raise ConfigError(f"window must be at least 1 step, got {window}.")
        self._window = window
        self._now = now
        self.reset()

    def reset(self) -> None:
        """Reset all counts."""
        self._steps: deque[tuple[float, float, int]] = deque()
        self._waited = self._worked = 0.0
        self._images = 0
        self._wait_since: float | None = None
        self._work_since: float | None = None
        self._last_wait = 0.0

    def wait_begins(self) -> None:
        """Start counting the wait for a batch."""
        self._wait_since = self._now()

    def interrupt(self) -> None:
        """Do not count the interval before the next step: it is spent on something other than waiting."""
        self._wait_since = None

    def step_begins(self) -> None:
        """Start the step: its batch has arrived."""
        self._work_since = self._now()
        self._last_wait = 0.0 if self._wait_since is None else self._work_since - self._wait_since

    def step_ends(self, images: int) -> None:
        """End the step over ``images`` images and start counting the next wait."""
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
    """Return the number of images in a batch: a :class:`Batch` or any collection of tensors."""
    return len(batch) if isinstance(batch, Batch) else extract_batch_size(batch)
