"""What training took: counted as it goes, continued with the run, and without an effect on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.callbacks.tiny import TinyModule, loader
from tests.methods.helpers import bare_trainer, noise_batch, shake, tiny_tove
from visexpert.callbacks import CostReport
from visexpert.callbacks.cost import TrainingBudget
from visexpert.errors import ConfigError
from visexpert.methods import ToVE
from visexpert.methods.cost import step_counter


def noise(batches: int = 4) -> DataLoader[Any]:
    """The same two images ``batches`` times over."""
    return DataLoader([noise_batch()] * batches, batch_size=None)  # type: ignore[arg-type]


def fit(folder: Path, model: ToVE, *callbacks: Callback, steps: int, ckpt_path: str | None = None) -> ToVE:
    bare_trainer(folder, steps=steps, callbacks=callbacks).fit(model, noise(), ckpt_path=ckpt_path, weights_only=True)
    return model


def step_gflop() -> float:
    """Forward and backward of one batch, outside any trainer."""
    model, batch = tiny_tove(), noise_batch()
    for module in model.frozen_modules().values():
        module.requires_grad_(False)
    with step_counter() as counter:
        model.train().step(batch).loss.backward()
    return float(counter.get_total_flops()) / 1e9


def test_training_costs_its_steps(tmp_path: Path) -> None:
    report = CostReport(gflop_every=3)
    fit(tmp_path, tiny_tove(), report, steps=5)
    assert report.train_images == 10
    assert report.train_gflop == pytest.approx(5 * step_gflop()) == pytest.approx(report.train_gflop_live)
    assert 0 < report.train_seconds == report.train_seconds


def test_counting_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    options: dict[str, Any] = {"noise": "learned", "dropout": 0.1}
    counted = fit(tmp_path, shake(tiny_tove(**options)), CostReport(gflop_every=2), steps=4).state_dict()
    plain = fit(tmp_path, shake(tiny_tove(**options)), steps=4).state_dict()
    assert all(torch.equal(value, counted[key]) for key, value in plain.items())


def test_a_language_model_that_joins_later_costs_more_from_then_on(tmp_path: Path) -> None:
    report, cheap = CostReport(gflop_every=2), CostReport(gflop_every=2)
    fit(tmp_path, tiny_tove(language_frozen_steps=2), report, steps=4)
    fit(tmp_path, tiny_tove(language_frozen_steps=2), cheap, steps=2)
    assert report.train_gflop == pytest.approx(cheap.train_gflop + 2 * step_gflop())
    assert cheap.train_gflop < 2 * step_gflop()


def test_a_continued_run_goes_on_counting(tmp_path: Path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    first, second = CostReport(), CostReport()
    fit(tmp_path, tiny_tove(), first, saving, steps=2)
    fit(tmp_path, tiny_tove(), second, steps=5, ckpt_path=str(tmp_path / "last.ckpt"))
    assert second.train_images == 10
    assert second.train_gflop == pytest.approx(5 * step_gflop())
    assert second.train_seconds > first.train_seconds * 0.5


def test_a_continued_run_counts_the_batches_that_the_whole_one_counts(tmp_path: Path) -> None:
    """Steps get dearer at the third; batches 0 and 4 of 6 are counted, wherever the run is cut."""

    def report() -> CostReport:
        return CostReport(gflop_every=4)

    options: dict[str, Any] = {"language_frozen_steps": 2}
    whole, continued, cheap = report(), report(), report()
    fit(tmp_path, tiny_tove(**options), whole, steps=6)
    fit(tmp_path, tiny_tove(**options), cheap, steps=1)
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=3)
    fit(tmp_path, tiny_tove(**options), report(), saving, steps=3)
    fit(tmp_path, tiny_tove(**options), continued, steps=6, ckpt_path=str(tmp_path / "last.ckpt"))
    expected = 4 * cheap.train_gflop + 2 * step_gflop()
    assert expected == pytest.approx(whole.train_gflop) == pytest.approx(continued.train_gflop)
    assert continued.train_gflop_live == pytest.approx(whole.train_gflop_live)


def test_other_modules_are_timed_but_not_counted(tmp_path: Path) -> None:
    report = CostReport()
    bare_trainer(tmp_path, steps=2, callbacks=[report]).fit(TinyModule(), loader())
    assert report.train_seconds > 0 and report.train_gflop == 0 and report.train_images == 0


def test_a_period_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="gflop_every must be at least 1 batch, got 0"):
        CostReport(gflop_every=0)


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
    monkeypatch.setattr("visexpert.callbacks.cost.time.perf_counter", lambda: now[0])

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
