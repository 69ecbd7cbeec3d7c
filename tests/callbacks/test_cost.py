"""What training took: counted as it goes, continued with the run, and without an effect on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.callbacks.tiny import TinyModule, loader
from tests.methods.helpers import bare_trainer, noise_batch, shake, tiny_tove
from visexpert.callbacks import CostReport
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
    with pytest.raises(ConfigError, match="gflop_every=0 counts batches and must be at least 1"):
        CostReport(gflop_every=0)
