"""A step of several batches: gradients as of one large batch, randomness of each its own, resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.methods.helpers import bare_trainer, shake, tiny_tove
from tests.methods.movekd.helpers import tiny_movekd
from tests.methods.uneven import MODELS, STILL, ListData, batches_of, distance, gradients
from tests.two_processes import in_two_processes
from visexpert.errors import ConfigError
from visexpert.methods import Method, ToVE
from visexpert.tabletop import TabletopData
from visexpert.types import Batch

MakeData = Callable[..., TabletopData]


@pytest.mark.parametrize("accumulated", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path, name: str, accumulated: int) -> None:
    """Six batches of two: of four of them to a step, the last step has two."""
    small = gradients(tmp_path, MODELS[name](), batches_of(2), accumulate_grad_batches=accumulated)
    large = gradients(tmp_path, MODELS[name](), batches_of(2 * accumulated))
    assert len(small) == len(large) == -(-6 // accumulated)
    for found, expected in zip(small, large, strict=True):
        assert distance(found, expected) < 1e-5


def test_a_balance_that_is_not_linear_is_a_mean_over_images_of_that_of_each_batch(tmp_path: Path) -> None:
    def model() -> ToVE:
        return shake(tiny_tove(language_lr=1e-12, balance_weight=0.5, **STILL))

    batches = batches_of(2)[:4]
    (found,) = gradients(tmp_path, model(), batches, accumulate_grad_batches=4)
    expected = model()
    expected.setup("fit")
    counts = [batch.counts() for batch in batches]
    tokens, images = (sum(own[unit] for own in counts) for unit in ("token", "image"))
    for batch, own in zip(batches, counts, strict=True):
        parts = expected.train().step(batch).parts
        loss = parts["text_loss"] * own["token"] / tokens
        if "balance_loss" in parts:
            loss = loss + 0.5 * parts["balance_loss"] * own["image"] / images
        loss.backward()
    wanted = {name: value.grad for name, value in expected.named_parameters() if value.grad is not None}
    assert distance(found, wanted) < 1e-5


def test_epochs_cut_short_count_what_is_read_of_them(tmp_path: Path) -> None:
    small = gradients(tmp_path, MODELS["ToVE"](), batches_of(2), accumulate_grad_batches=4, limit_train_batches=3)
    (large,) = gradients(tmp_path, MODELS["ToVE"](), batches_of(6), limit_train_batches=1)
    # Lightning divides by 4 what it cuts to 3; a mean over the step's tokens does not depend on that.
    assert distance(small[0], large) < 1e-5


def test_batches_that_do_not_say_what_their_step_counts_are_refused(tmp_path: Path) -> None:
    data = ListData(batches_of(2), counted=False)
    bare_trainer(tmp_path, steps=1).fit(MODELS["ToVE"](), datamodule=data)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 .* visexpert\.data\.StepLoader"):
        bare_trainer(tmp_path, steps=1, accumulate_grad_batches=2).fit(MODELS["ToVE"](), datamodule=data)


class Draws(L.Callback):
    """What each batch draws first."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed(torch.initial_seed())
        self.drawn.append(float(torch.rand(())))


def test_batches_of_one_step_draw_noise_of_their_own(tmp_path: Path) -> None:
    drawn = {}
    for accumulated in (1, 3):
        draws = Draws()
        bare_trainer(
            tmp_path,
            steps=-1,
            max_epochs=2,
            callbacks=[draws],
            enable_checkpointing=False,
            accumulate_grad_batches=accumulated,
        ).fit(tiny_tove(), datamodule=ListData(batches_of(2)))
        drawn[accumulated] = draws.drawn
    assert len(set(drawn[3])) == 12
    assert drawn[3] == drawn[1]


class KilledError(Exception):
    """The run dies here."""


class SaveAndDie(L.Callback):
    """Writes a checkpoint after some batch, or in the middle of one, and dies."""

    def __init__(self, path: Path, *, batch: int, inside: bool) -> None:
        self.path, self.batch, self.inside = path, batch, inside

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.inside:
            self._save(trainer, trainer.fit_loop.total_batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.inside:
            self._save(trainer, trainer.fit_loop.total_batch_idx)

    def _save(self, trainer: L.Trainer, batch: int) -> None:
        if batch == self.batch:
            trainer.save_checkpoint(self.path)
            raise KilledError


class Rows(L.Callback):
    """Rows and losses of each batch by its number; the step that loggers would write at the end."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[tuple[int, ...], float]] = {}
        self.logged = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        rows = tuple(batch.index_B.tolist())
        self.seen[trainer.fit_loop.epoch_loop.batch_progress.total.completed] = (rows, float(outputs["loss"]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged = trainer.fit_loop.epoch_loop._batches_that_stepped


def noisy(name: str) -> Method:
    if name == "ToVE":
        return tiny_tove(noise="learned", dropout=0.1)
    return tiny_movekd(alignment="fixed", mole={"dropout": 0.1}, balance_weight=0.1)


def state(model: Method) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


Unbroken = dict[tuple[str, bool], tuple[dict[str, Tensor], Rows]]


@pytest.fixture(scope="module")
def unbroken() -> Unbroken:
    """Weights and rows of runs that nothing ended, by method and whether they were validated."""
    return {}


# Epochs of four batches in steps of three and one: batches 0-2, 3, 4-6, 7, 8-10, 11.
@pytest.mark.parametrize(
    ("name", "batch", "inside", "validated"),
    [
        ("ToVE", 0, False, True),  # in the first step of all
        ("ToVE", 2, True, False),  # all its gradients are there, but the step is not done
        ("ToVE", 3, False, False),  # at the end of an epoch
        ("ToVE", 4, False, True),  # in the first step of the second epoch
        ("ToVE", 7, True, False),  # in the last, shorter step of an epoch
        ("ToVE", 9, False, True),
        ("MoVEKD", 5, False, True),
        ("MoVEKD", 7, True, False),
    ],
)
def test_a_run_that_dies_inside_a_step_goes_on_as_if_it_had_not(
    tmp_path: Path, data: MakeData, unbroken: Unbroken, name: str, batch: int, inside: bool, validated: bool
) -> None:
    def fit(model: Method, *callbacks: L.Callback, ckpt_path: str | None = None) -> dict[str, Tensor]:
        options: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2} if validated else {}
        options |= {"limit_train_batches": 4}  # of six, which are whole steps
        trainer = bare_trainer(tmp_path, steps=6, callbacks=callbacks, accumulate_grad_batches=3, **options)
        trainer.fit(model, datamodule=data(num_train=24), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == 6
        return state(model)

    again = Rows()
    if (name, validated) not in unbroken:
        rows = Rows()
        unbroken[name, validated] = fit(noisy(name), rows), rows
    expected, whole = unbroken[name, validated]
    with pytest.raises(KilledError):
        fit(noisy(name), SaveAndDie(tmp_path / "some.ckpt", batch=batch, inside=inside))
    found = fit(noisy(name), again, ckpt_path=str(tmp_path / "some.ckpt"))
    assert again.seen == {number: seen for number, seen in whole.seen.items() if number >= min(again.seen)}
    assert again.logged == whole.logged == 6
    assert len(whole.seen) == 12 and min(again.seen) <= batch + 1
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def of_two(rank: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Gradients, as arrays, on one of two processes, whose batches are every second one of six."""
    found = {}
    for name, make in MODELS.items():
        steps = gradients(
            folder,
            make(),
            batches_of(2, rank=rank, world=2),
            accumulate_grad_batches=2,
            devices=2,
            strategy="ddp_find_unused_parameters_true",
            use_distributed_sampler=False,
        )
        found[name] = [{key: value.numpy() for key, value in step.items()} for step in steps]
    return found


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """A step of two batches on each, and one of a single batch on each, where the epoch ends."""
    first, second = in_two_processes(of_two, tmp_path)
    for name, steps in first.items():
        large = gradients(tmp_path, MODELS[name](), batches_of(8))
        assert len(steps) == len(large) == 2
        for found, other, expected in zip(steps, second[name], large, strict=True):
            own, others = ({key: torch.from_numpy(value) for key, value in step.items()} for step in (found, other))
            assert distance(own, expected) < 1e-5, name
            assert distance(others, own) == 0
