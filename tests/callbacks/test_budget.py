"""A budget ends a fit, and the learning rate with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.test_cost import fit, step_gflop
from tests.callbacks.tiny import TinyModule, loader
from tests.methods.helpers import bare_trainer, shake, tiny_tove
from visexpert.callbacks import CostReport
from visexpert.callbacks.budget import TrainingBudget
from visexpert.errors import ConfigError


class Rates(Callback):
    """Keeps the learning rate of the first group after each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("share", [8.0, 7.6, 8.4])
def test_a_budget_of_work_is_the_run_of_so_many_steps(tmp_path: Path, share: float) -> None:
    """Steps of equal cost: a budget of about eight of them trains as ``max_steps: 8`` does, rate by rate."""
    budget = TrainingBudget(gflop=share * step_gflop())
    rates, expected = Rates(), Rates()
    trained = fit(tmp_path, shake(tiny_tove()), CostReport(), budget, rates, steps=-1)
    plain = fit(tmp_path, shake(tiny_tove()), expected, steps=8)
    assert rates.rates == pytest.approx(expected.rates, rel=1e-12, abs=1e-12)
    assert len(rates.rates) == 8 and rates.rates[-1] == 0.0
    state = trained.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)


def test_it_does_not_matter_which_callback_comes_first(tmp_path: Path) -> None:
    rates = Rates()
    fit(tmp_path, tiny_tove(), TrainingBudget(gflop=4 * step_gflop()), rates, CostReport(), steps=-1)
    assert len(rates.rates) == 4


def test_steps_that_get_dearer_are_fewer_and_end_at_zero_all_the_same(tmp_path: Path) -> None:
    rates, report = Rates(), CostReport(gflop_every=10)
    budget = TrainingBudget(gflop=32 * step_gflop())
    fit(tmp_path, tiny_tove(language_frozen_steps=30), report, budget, rates, steps=-1)
    assert len(rates.rates) > 32 and rates.rates[-1] == 0.0
    assert abs(report.train_gflop - 32 * step_gflop()) <= step_gflop() / 2


def test_a_continued_run_spends_what_is_left(tmp_path: Path) -> None:
    def budget() -> TrainingBudget:
        return TrainingBudget(gflop=8 * step_gflop())

    class Die(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                raise MemoryError

    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=5)
    with pytest.raises(MemoryError):
        fit(tmp_path, shake(tiny_tove()), CostReport(), budget(), saving, Die(), steps=-1)
    rates, whole = Rates(), Rates()
    last = str(tmp_path / "last.ckpt")
    fit(tmp_path, tiny_tove(), CostReport(), budget(), rates, saving, steps=-1, ckpt_path=last)
    fit(tmp_path, shake(tiny_tove()), whole, steps=8)
    assert rates.rates == pytest.approx(whole.rates[5:], rel=1e-12, abs=1e-12)


def test_a_spent_budget_trains_no_further(tmp_path: Path) -> None:
    class SaveAtEnd(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    budget = 3 * step_gflop()
    fit(tmp_path, tiny_tove(), CostReport(), TrainingBudget(gflop=budget), SaveAtEnd(), steps=-1)
    rates, end = Rates(), str(tmp_path / "end.ckpt")
    fit(tmp_path, tiny_tove(), CostReport(), TrainingBudget(gflop=budget), rates, steps=-1, ckpt_path=end)
    assert rates.rates == []
    more = TrainingBudget(gflop=2 * budget)
    fit(tmp_path, tiny_tove(), CostReport(), more, rates, steps=-1, ckpt_path=end)
    assert len(rates.rates) == 3


def test_a_budget_of_time_ends_in_time_with_the_rate_near_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a step moves by one second: ten of eleven seconds are left after the first step."""
    now = [0.0]
    monkeypatch.setattr("visexpert.callbacks.budget.time.perf_counter", lambda: now[0])

    class Tick(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            now[0] += 1.0

    rates, expected = Rates(), Rates()
    fit(tmp_path, tiny_tove(), Tick(), TrainingBudget(seconds=11.0), rates, steps=-1)
    fit(tmp_path, tiny_tove(), expected, steps=11)
    assert len(rates.rates) == 11
    assert rates.rates[3:] == pytest.approx(expected.rates[3:], abs=1e-12)


def test_max_steps_stays_an_upper_bound(tmp_path: Path) -> None:
    rates, expected = Rates(), Rates()
    fit(tmp_path, tiny_tove(), CostReport(), TrainingBudget(gflop=100 * step_gflop()), rates, steps=6)
    fit(tmp_path, tiny_tove(), expected, steps=6)
    assert rates.rates == expected.rates


@pytest.mark.parametrize("options", [{}, {"gflop": 1.0, "seconds": 1.0}, {"gflop": 0.0}, {"seconds": math.inf}])
def test_one_budget_above_zero_is_wanted(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give one of gflop and seconds, above 0"):
        TrainingBudget(**options)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="count='all' is unknown; use 'as_run' or 'live'"):
        TrainingBudget(gflop=1.0, count="all")
    with pytest.raises(ConfigError, match="needs a method and a CostReport among the callbacks"):
        fit(tmp_path, tiny_tove(), TrainingBudget(gflop=1.0), steps=2)
    with pytest.raises(ConfigError, match="needs a method and a CostReport"):
        bare_trainer(tmp_path, steps=2, callbacks=[CostReport(), TrainingBudget(gflop=1.0)]).fit(TinyModule(), loader())
