"""Fits of two processes: losses and final weights of one process with batches twice as large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from tests.methods.helpers import bare_trainer, merging_of, shake, tiny_tove
from tests.methods.movekd.helpers import PAPER, shaken, tiny_movekd
from tests.methods.uneven import ListData, batches_of
from tests.two_processes import in_two_processes
from visexpert.methods import MergeStudent, Method
from visexpert.vision import MoLESettings

Fit = tuple[list[dict[str, float]], dict[str, Tensor]]
"""What is logged at each step, and the weights at the end."""

RATES: dict[str, Any] = {"lr": 1e-2, "language_lr": 1e-2, "warmup_steps": 0}


def tove(**options: Any) -> Method:
    return shake(tiny_tove(clip_lr=1e-2, balance_weight=0.5, **RATES, **options))


def movekd(*, std: float = 0.2, **options: Any) -> Method:
    return shaken(tiny_movekd(clip_lr=1e-2, balance_weight=0.3, **RATES, **options), std=std)


def merging(**options: Any) -> Method:
    student = MergeStudent(mole=MoLESettings(num_experts=3, rank=2, dropout=0.0, init="released"), balance_weight=0.3)
    return merging_of(teacher=shake(tiny_tove()), student=student, lm_weight=0.7, **RATES, **options)


KINDS: dict[str, Callable[[], Method]] = {
    "tove": tove,
    "tove, switch": lambda: tove(balance_form="switch"),
    "tove, two batches a step": tove,
    "movekd": movekd,
    "movekd, released": lambda: movekd(std=0.7, **PAPER, convention="released"),  # one teacher dominates on one process
    "movekd, phi_s": lambda: movekd(standardize="phi_s", use=["semantic", "depth"]),
    "movekd, balanced teachers": lambda: movekd(balance="running_mean", drop=1.0, relations=0.5),
    "merging": merging,
}


class Watch(L.Callback):
    """Keeps what is logged at each step; steadies Adam, which would blow up rounding errors where a gradient is 0."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["eps"] = 1e-3

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def fitted(folder: Path, kind: str, *, size: int, rank: int = 0, world: int = 1, **options: Any) -> Fit:
    model, watch = KINDS[kind](), Watch()
    trainer = bare_trainer(
        folder,
        steps=3,
        callbacks=[watch],
        enable_checkpointing=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        accumulate_grad_batches=2 if "two batches" in kind else 1,
        **options,
    )
    trainer.fit(model, datamodule=ListData(batches_of(size, rank=rank, world=world)))
    return watch.rows, {key: value.clone() for key, value in model.state_dict().items() if compared(key)}


def compared(name: str) -> bool:
    """Whether this must be the same: all but what is only watched, variance across the images of one process."""
    return "variance" not in name and name != "train/nmse"


def fit_all(rank: int, folder: Path) -> dict[str, Fit]:
    return {kind: fitted(folder, kind, size=2, rank=rank, world=2, devices=2, strategy="ddp") for kind in KINDS}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Fit]]:
    return in_two_processes(fit_all, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(tmp_path: Path, together: list[dict[str, Fit]], kind: str) -> None:
    rows, weights = fitted(tmp_path, kind, size=4)
    assert len(rows) == (5 if "two batches" in kind else 3)
    for found_rows, found in (fit[kind] for fit in together):
        for row, found_row in zip(rows, found_rows, strict=True):
            assert {k: v for k, v in found_row.items() if compared(k)} == pytest.approx(
                {k: v for k, v in row.items() if compared(k)}, rel=1e-5, abs=1e-6
            )
        assert found.keys() == weights.keys()
        apart = {k: float((found[k].double() - v.double()).abs().max()) for k, v in weights.items()}
        assert {k: v for k, v in apart.items() if not v < 1e-5} == {}
