"""The progress bar: what it says, when it says it, and that validation is no waiting."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import Progress

from tests.callbacks.tiny import TinyModule, loader, trainer
from visexpert.callbacks import RunLogger, ThroughputMonitor, TrainingProgress
from visexpert.callbacks.progress import StepClock, _clock_time, _loss_of, _StatusColumn, image_count
from visexpert.errors import ConfigError
from visexpert.report import read_metrics
from visexpert.types import Batch

STATUS = re.compile(r"\d+ img/s · wait \d+ % · \d+:\d\d:\d\d left")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """Rich's console as a wide terminal that writes into memory; Lightning reconfigures it without harm."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    return console


def _fit(bar: TrainingProgress, **kwargs: Any) -> None:
    trainer(callbacks=[bar], enable_progress_bar=True, **kwargs).fit(TinyModule(), loader(), loader(batches=2))


def test_plain_lines_carry_step_loss_speed_wait_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    _fit(TrainingProgress(line_every_s=0, interactive=False))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train: epoch")]
    assert len(lines) == 8
    assert lines[2].startswith("train: epoch 0 · step 3 · batch 3/4 · loss 0.")
    assert all(STATUS.search(line) for line in lines)
    assert lines[-1].endswith("0:00:00 left")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_count_of_batches_ends_with_training(capsys: pytest.CaptureFixture[str], accumulated: int) -> None:
    """4 batches an epoch; 6 of them are taken: all of the first epoch, two of the second."""
    ends = {"max_epochs": -1, "max_steps": 6 // accumulated, "accumulate_grad_batches": accumulated}
    _fit(TrainingProgress(line_every_s=0, interactive=False), **ends)
    counts = re.findall(r"batch (\d/\d)", "\n".join(re.findall(r"train: .*", capsys.readouterr().out)))
    assert counts == ["1/4", "2/4", "3/4", "4/4", "1/2", "2/2"]


def test_plain_lines_are_rate_limited_and_the_end_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    _fit(TrainingProgress(line_every_s=1000, interactive=False))
    lines = [line for line in capsys.readouterr().out.splitlines() if "train" in line]
    assert lines == ["train: 8 steps in 0:00:00"]


def test_evaluation_has_its_own_lines_with_the_time_left_of_it_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes a minute, as captions may: two are left after the first of three."""
    bar = TrainingProgress(line_every_s=0, interactive=False)
    module, at = TinyModule(), [0.0]

    def slow(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        at[0] += 60

    monkeypatch.setattr(module, "test_step", slow)
    monkeypatch.setattr("visexpert.callbacks.progress.time.perf_counter", lambda: at[0])
    trainer(callbacks=[bar], enable_progress_bar=True).test(module, [loader(batches=2), loader(batches=1)])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("test:")] == [
        "test: batch 1/2 · 0:02:00 left",
        "test: batch 2/2 · 0:01:00 left",
        "test: batch 1/1 · 0:00:00 left",
    ]


def test_the_live_bar_knows_the_time_left_of_batches_that_take_minutes() -> None:
    """Rich itself gives up here: its window of half a minute holds one batch alone."""
    at = [0.0]
    progress = Progress(get_time=lambda: at[0], auto_refresh=False)
    progress.add_task("Testing", total=5)
    (task,) = progress.tasks
    column = _StatusColumn(TrainingProgress(interactive=True))
    assert column.render(task).plain == "-:--:-- left"
    for _ in range(2):
        at[0] += 90
        progress.update(task.id, advance=1)
    assert column.render(task).plain == "0:04:30 left"


@pytest.mark.parametrize("ends", [{"max_epochs": -1, "max_steps": 7}, {"max_epochs": 2}])
def test_the_live_bar_counts_the_batches_before_a_continuation(
    terminal: Console, tmp_path: Path, ends: dict[str, int]
) -> None:
    """4 batches an epoch, stopped after one of the second, which has 3 batches up to step 7, or all of its 4."""
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5)
    trainer(callbacks=[saves], enable_checkpointing=True, max_steps=7).fit(TinyModule(), loader())
    bar = TrainingProgress(updates_per_s=10_000, interactive=True)
    again = trainer(callbacks=[bar], enable_progress_bar=True, **ends)
    again.fit(TinyModule(), loader(), ckpt_path=tmp_path / "step=5.ckpt")
    assert bar.progress is not None
    task = bar.progress.tasks[-1]
    of = 3 if "max_steps" in ends else 4
    assert (task.completed, task.total) == (of, of)


def test_a_disabled_bar_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    bar = TrainingProgress(line_every_s=0, interactive=False)
    bar.disable()
    _fit(bar)
    assert "train:" not in capsys.readouterr().out


def test_the_live_bar_shows_loss_and_status(terminal: Console) -> None:
    bar = TrainingProgress(updates_per_s=100, interactive=True)
    _fit(bar)
    assert isinstance(terminal.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())
    assert STATUS.search(shown)
    assert re.search(r"loss: 0\.\d+", shown)
    assert "v_num" not in shown


@pytest.mark.parametrize(
    "ends", [{"max_epochs": -1, "max_steps": 6}, {"max_epochs": 2}, {"max_epochs": None, "max_steps": 6}]
)
def test_the_live_bars_stay_on_one_line_of_80_columns(terminal: Console, ends: dict[str, int]) -> None:
    terminal.width = 80
    bar = TrainingProgress(updates_per_s=100, interactive=True)
    _fit(bar, **ends)
    assert isinstance(terminal.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert len(lines) > 3 and max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines} <= {"Epoch", "Validation", "Sanity"}  # no rest of a line before it
    assert "/-2" not in shown and any(STATUS.search(line) and re.search(r"loss: 0\.\d+", line) for line in lines)


def test_the_terminal_decides_when_nothing_is_said(terminal: Console) -> None:
    assert TrainingProgress().is_enabled
    terminal._force_terminal = False
    assert not TrainingProgress().is_enabled


def test_time_left_is_of_the_whole_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One second a step by a hand-moved clock: after step n of 8, 8 - n seconds are left, across the epochs."""
    bar = TrainingProgress(line_every_s=0, interactive=False)
    seconds = iter(range(10**6))
    monkeypatch.setattr(bar, "_due", lambda now_anyway=False: True)
    fitted = trainer(callbacks=[bar], enable_progress_bar=True)
    module = TinyModule()
    step = module.training_step

    def second_long_step(batch: Any, batch_idx: int) -> torch.Tensor:
        at = float(next(seconds)) + 1
        monkeypatch.setattr("visexpert.callbacks.progress.time.perf_counter", lambda: bar._began_at + at)
        return step(batch, batch_idx)

    monkeypatch.setattr(module, "training_step", second_long_step)
    fitted.fit(module, loader())
    left = re.findall(r"0:00:0(\d) left", capsys.readouterr().out)
    assert left == ["7", "6", "5", "4", "3", "2", "1", "0"]


def test_endless_training_has_no_time_left() -> None:
    assert _clock_time(float("inf")) == "-:--:--"
    assert _clock_time(3725.4) == "1:02:05"


def test_the_loss_is_found_in_each_form_of_step_output() -> None:
    assert _loss_of(torch.tensor(2.5)) == 2.5
    assert _loss_of({"loss": torch.tensor(1.5, requires_grad=True)}) == 1.5
    assert _loss_of(None) is None


@pytest.mark.parametrize(("max_epochs", "expected"), [(-1, "Epoch 3"), (None, "Epoch 3"), (5, "Epoch 3/4")])
def test_an_epoch_is_named_of_how_many_only_where_that_is_known(max_epochs: int | None, expected: str) -> None:
    bar = TrainingProgress(interactive=True)
    bar._trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    bar._trainer.fit_loop.max_epochs = max_epochs
    assert bar._get_train_description(3).strip() == expected


class _HandClock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def _step(clock: StepClock, hand: _HandClock, *, wait: float, work: float, images: int) -> None:
    hand.seconds += wait
    clock.step_begins()
    hand.seconds += work
    clock.step_ends(images)


def test_rates_over_waits_and_steps() -> None:
    hand = _HandClock()
    clock = StepClock(window=10, now=hand)
    clock.wait_begins()
    _step(clock, hand, wait=1.0, work=3.0, images=32)
    _step(clock, hand, wait=0.5, work=3.5, images=32)
    assert clock.images_per_s == pytest.approx(64 / 8)
    assert clock.wait_share == pytest.approx(1.5 / 8)


def test_only_the_window_counts() -> None:
    hand = _HandClock()
    clock = StepClock(window=2, now=hand)
    for work, images in [(100.0, 1), (1.0, 10), (3.0, 20)]:
        _step(clock, hand, wait=0.0, work=work, images=images)
    assert clock.images_per_s == pytest.approx(30 / 4)


def test_an_interrupted_wait_is_not_counted() -> None:
    hand = _HandClock()
    clock = StepClock(window=10, now=hand)
    _step(clock, hand, wait=0.0, work=1.0, images=4)
    clock.interrupt()  # validation begins
    _step(clock, hand, wait=500.0, work=1.0, images=4)
    assert clock.wait_share == 0.0
    assert clock.images_per_s == pytest.approx(8 / 2)


def test_before_the_first_step_the_rates_are_zero() -> None:
    clock = StepClock(window=1)
    assert (clock.images_per_s, clock.wait_share) == (0.0, 0.0)


def test_a_window_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="window must be at least 1 step, got 0"):
        ThroughputMonitor(window=0)


def test_images_are_counted_in_batches_of_any_kind() -> None:
    images = torch.zeros(5, 3, 2, 2)
    assert image_count(Batch(images_BCHW=images, index_B=torch.arange(5), split="x")) == 5
    assert image_count((images, torch.zeros(5))) == 5


def test_a_fit_logs_both_figures_when_the_trainer_logs(tmp_path: Path) -> None:
    fitted = trainer(logger=RunLogger(str(tmp_path)), callbacks=[ThroughputMonitor()], log_every_n_steps=3)
    fitted.fit(TinyModule(), loader(batches=4))
    logged = read_metrics(tmp_path / "metrics.csv")
    steps, speeds = logged["train/images_per_s"]
    assert steps.tolist() == logged["train/loss"][0].tolist() == [2, 5]
    assert (speeds > 0).all()
    assert ((logged["train/data_wait_share"][1] >= 0) & (logged["train/data_wait_share"][1] < 1)).all()
