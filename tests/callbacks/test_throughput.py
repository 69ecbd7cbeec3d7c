"""Throughput against a clock that the test moves by hand, and in a real fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.callbacks.tiny import TinyModule, loader, trainer
from visexpert.callbacks import RunLogger, ThroughputMonitor
from visexpert.callbacks.throughput import StepClock, image_count
from visexpert.errors import ConfigError
from visexpert.report import read_metrics
from visexpert.types import Batch


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
    with pytest.raises(ConfigError, match="window is 0"):
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
