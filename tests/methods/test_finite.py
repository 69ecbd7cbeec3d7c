"""NaN and infinity never reach the weights: the run stops, or passes over the step, and says which rows it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.methods.helpers import tiny_tove
from tests.two_processes import in_two_processes
from visexpert.errors import ConfigError, DataError
from visexpert.methods import ToVE
from visexpert.methods.step import MOST_IN_A_ROW, LossTerm, StepOutput, refuse_engines
from visexpert.tabletop import TabletopData
from visexpert.types import Batch

MakeData = Callable[..., TabletopData]


class Spoilt(ToVE):
    """Its loss or gradient is spoilt at some batches, counted from 0."""

    spoil: Callable[[Tensor], Tensor]
    at: frozenset[int] = frozenset()
    batches = 0

    def step(self, batch: Batch) -> StepOutput:
        output = super().step(batch)
        self.batches += 1
        if self.batches - 1 not in self.at:
            return output
        text = output.terms["text_loss"]
        return StepOutput({**output.terms, "text_loss": LossTerm(self.spoil(text.value), text.unit)}, len(batch))


def no_number(loss: Tensor) -> Tensor:
    """No number."""
    return loss * float("nan")


def spoilt(at: set[int], spoil: Callable[[Tensor], Tensor] = no_number, **options: Any) -> Spoilt:
    model = tiny_tove(**options)
    model.__class__ = Spoilt
    assert isinstance(model, Spoilt)
    model.at, model.spoil = frozenset(at), spoil
    return model


def endless_slope(loss: Tensor) -> Tensor:
    """The same value, with an infinite gradient."""
    return loss + torch.sqrt(loss - loss.detach())


class Weights(L.Callback):
    """Keeps the trained weights after each step."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *rest: Any) -> None:
        parts = [p.detach().flatten() for p in module.parameters() if p.requires_grad]
        self.after.append(torch.cat(parts).clone())


def fit(model: ToVE, data: TabletopData, folder: Path, *, steps: int = 4, **options: Any) -> Weights:
    seen = Weights()
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True, every_n_train_steps=1)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[seen, saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(model, datamodule=data)
    return seen


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "not_finite.jsonl").read_text(encoding="utf-8").splitlines()]


def saved(folder: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


@pytest.mark.parametrize(
    ("spoil", "what", "loss"), [(lambda loss: loss * float("inf"), "a loss", "inf"), (endless_slope, "a gradient", "")]
)
def test_it_stops_before_the_step_is_taken(
    tmp_path: Path, data: MakeData, spoil: Callable[[Tensor], Tensor], what: str, loss: str
) -> None:
    with pytest.raises(DataError, match=rf"Step 2 has {what} that is NaN or infinite.*on_nan: skip"):
        fit(spoilt({2}, spoil), data(), tmp_path)
    newest = saved(tmp_path)
    assert newest["global_step"] == 2
    assert all(bool(value.isfinite().all()) for value in newest["state_dict"].values() if value.is_floating_point())
    (row,) = rows(tmp_path)
    assert row["step"] == 2 and row["split"] == "train" and len(row["rows"]) == 4
    assert {"text_loss", "balance_loss"} <= row["parts"].keys() and loss in row["loss"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_passes_over_a_step_and_leaves_the_weights_alone(tmp_path: Path, data: MakeData, precision: Any) -> None:
    seen = fit(spoilt({1}, on_nan="skip"), data(), tmp_path, precision=precision).after
    assert torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])
    assert bool(torch.stack(seen).isfinite().all()) and [row["step"] for row in rows(tmp_path)] == [1]


def test_one_bad_batch_of_an_accumulated_step_spoils_it_all(tmp_path: Path, data: MakeData) -> None:
    model = spoilt({2}, on_nan="skip")
    seen = fit(model, data(), tmp_path, steps=3, accumulate_grad_batches=2).after
    assert torch.equal(seen[3], seen[1]) and not torch.equal(seen[5], seen[3])
    assert [row["step"] for row in rows(tmp_path)] == [1, 1]
    assert [row["loss"] == "nan" for row in rows(tmp_path)] == [True, False]


def test_too_many_in_a_row_end_the_run(tmp_path: Path, data: MakeData) -> None:
    model = spoilt(set(range(1, 99)), on_nan="skip")
    with pytest.raises(DataError, match=rf"{MOST_IN_A_ROW} skipped steps"):
        fit(model, data(), tmp_path, steps=99)
    assert len(rows(tmp_path)) == MOST_IN_A_ROW + 1
    assert saved(tmp_path)["global_step"] == MOST_IN_A_ROW + 1


def test_a_sound_run_is_the_same_with_either(tmp_path: Path, data: MakeData) -> None:
    runs = [fit(spoilt(set(), on_nan=word), data(), tmp_path / word, steps=2).after for word in ("stop", "skip")]
    assert torch.equal(runs[0][-1], runs[1][-1]) and not list(tmp_path.rglob("not_finite*"))


def test_weights_that_a_step_spoilt_are_not_saved(tmp_path: Path, data: MakeData) -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        fit(tiny_tove(lr=1e38, language_lr=1e38, warmup_steps=0), data(), tmp_path, steps=40)
    if (tmp_path / "checkpoints" / "last.ckpt").is_file():
        state = saved(tmp_path)["state_dict"]
        assert all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())


def test_engines_that_step_by_themselves_cannot_skip() -> None:
    with pytest.raises(ConfigError, match="FSDPStrategy"):
        refuse_engines(strategies.FSDPStrategy(), on_nan="skip", frozen_steps=0)
    refuse_engines(strategies.FSDPStrategy(), on_nan="stop", frozen_steps=0)
    refuse_engines(strategies.DDPStrategy(), on_nan="skip", frozen_steps=0)


def test_a_method_that_does_not_split_itself_needs_a_strategy_that_does() -> None:
    with pytest.raises(ConfigError, match=r"ModelParallelStrategy.*configure_model.*use strategy fsdp"):
        refuse_engines(strategies.ModelParallelStrategy(), on_nan="stop", frozen_steps=0)
    refuse_engines(strategies.ModelParallelStrategy(), on_nan="stop", frozen_steps=0, splits_itself=True)


def one_spoilt_rank(rank: int, folder: Path, cache: Path, on_nan: Any) -> tuple[list[Tensor], str]:
    """The second process alone has a batch without a number; weights of this one after each step, and its end."""
    data = TabletopData(num_train=16, num_val=4, num_test=4, batch_size=4, eval_batch_size=4, root=str(cache))
    model = spoilt({1} if rank == 1 else set(), on_nan=on_nan, noise="none")
    seen = Weights()
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        default_root_dir=folder,
        callbacks=[seen],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    try:
        trainer.fit(model, datamodule=data)
    except DataError as error:
        return seen.after, str(error)
    return seen.after, ""


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_processes_agree_on_a_step_that_one_of_them_spoilt(tmp_path: Path, data: MakeData, on_nan: str) -> None:
    made = data()
    made.prepare_data()
    (first, told), (second, told_too) = in_two_processes(one_spoilt_rank, tmp_path, Path(made.root), on_nan)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert bool(torch.stack(first).isfinite().all())
    if on_nan == "stop":
        assert len(first) == 1 and "Step 1" in told and "Step 1" in told_too
    else:
        assert len(first) == 2 and torch.equal(first[1], first[0]) and told == told_too == ""
    spoilt_rows = (tmp_path / "not_finite.rank1.jsonl").read_text(encoding="utf-8")
    assert json.loads(spoilt_rows)["loss"] == "nan" and json.loads(spoilt_rows)["step"] == 1
