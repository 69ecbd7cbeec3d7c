"""Scores and logged losses of two processes are those of one, of unevenly many images, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from tests.methods.helpers import bare_trainer, merging_of, shake, tiny_tove
from tests.methods.movekd.helpers import shaken, tiny_movekd
from tests.tabletop.quiet import QUIET
from tests.two_processes import in_two_processes
from visexpert.methods import Method
from visexpert.noise import hide_noise
from visexpert.tabletop import TabletopData

KINDS: dict[str, Callable[[], Method]] = {
    "tove": lambda: shake(tiny_tove(caption_images=7, meteor=False)),
    "movekd": lambda: shaken(
        tiny_movekd(caption_images=7, meteor=False, plain=True, standardize="phi_s", use=["semantic", "depth"])
    ),
    "merging": lambda: merging_of(
        teacher=shake(tiny_tove()), caption_images=3, meteor=False, lm_weight=0.5, language_lr=1e-3
    ),
}


class Losses(L.Callback):
    """What the logger would get at each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def scored(folder: Path, scenes: Path, kind: str, *, batch_size: int, **options: Any) -> dict[str, Any]:
    """The losses of two steps of one kind, then metrics of validation and test."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    data = TabletopData(
        root=str(scenes),
        rendering=QUIET,
        num_train=8,
        num_val=11,
        num_test=11,
        batch_size=batch_size,
        eval_batch_size=4,
    )
    found: dict[str, Any] = {}
    losses = Losses()
    bare_trainer(folder, steps=2, callbacks=[losses], log_every_n_steps=1, enable_checkpointing=False, **options).fit(
        model, datamodule=data
    )
    for step, row in enumerate(losses.rows):
        # What is only watched, such as variance across images, is a mean over processes.
        own = [name for name in row if "variance" in name or name == "train/nmse"]
        found |= {f"{name} of step {step}": value for name, value in row.items() if name not in own}
    for stage in ("validate", "test"):
        trainer = bare_trainer(folder, steps=2, limit_val_batches=1.0, **options)
        getattr(trainer, stage)(model, datamodule=data, verbose=False)
        found |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return found


def score_all(rank: int, folder: Path, scenes: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Scores by kind, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        hide_noise()
        found = {kind: scored(folder, scenes, kind, batch_size=4, devices=2, strategy="ddp") for kind in KINDS}
    return found, [f"{one.filename}: {one.message}" for one in warned]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return {kind: scored(folder, scenes, kind, batch_size=8) for kind in KINDS}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, scenes: Path, alone: Any) -> list[Any]:
    return in_two_processes(score_all, tmp_path_factory.mktemp("two"), scenes)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_process(alone: dict[str, dict[str, Any]], outcomes: list[Any], kind: str) -> None:
    for together, _ in outcomes:
        assert together[kind] == pytest.approx(alone[kind], rel=1e-5, abs=1e-6)


def test_several_processes_cause_no_warnings(outcomes: list[Any]) -> None:
    assert [warned for _, warned in outcomes] == [[], []]


def test_what_is_compared_is_there(alone: dict[str, dict[str, Any]]) -> None:
    assert {"test/probe/depth", "test/caption/cider", "val/nll/nll", "train/loss of step 1"} <= alone["tove"].keys()
    assert {"val/kd_loss", "val/kd/depth", "train/kd_loss of step 0"} <= alone["movekd"].keys()
    assert {"val/nmse", "train/token_loss of step 1"} <= alone["merging"].keys()
