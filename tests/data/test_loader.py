"""The order of batches: the same for any number of workers, and the same after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from visexpert.data import StepLoader, pack
from visexpert.data.loader import BatchKey, BatchLoader
from visexpert.errors import ConfigError
from visexpert.types import Batch


class Numbers:
    """A source whose images tell the row and whose split tells the epoch."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: BatchKey) -> Batch:
        rows_B = torch.from_numpy(key.rows.copy())
        return Batch(images_BCHW=rows_B[:, None, None, None].float(), index_B=rows_B, split=f"epoch{key.epoch}")


def seen(loader: BatchLoader) -> list[tuple[str, list[int]]]:
    return [(batch.split, batch.index_B.tolist()) for batch in loader]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers: int) -> None:
    here = BatchLoader(Numbers(22), batch_size=4, shuffle=True, seed=3)
    there = BatchLoader(Numbers(22), batch_size=4, shuffle=True, seed=3, num_workers=num_workers)
    for epoch in (0, 3):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        assert seen(here) == seen(there)


def test_each_epoch_has_each_row_once_in_its_own_order() -> None:
    loader = BatchLoader(Numbers(22), batch_size=4, shuffle=True, seed=3)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = seen(loader)
        assert {split for split, _ in batches} == {f"epoch{epoch}"}
        assert [len(rows) for _, rows in batches] == [4, 4, 4, 4, 4, 2]
        orders.append([row for _, rows in batches for row in rows])
        assert sorted(orders[-1]) == list(range(22))
    assert orders[0] != orders[1] != orders[2]
    other = BatchLoader(Numbers(22), batch_size=4, shuffle=True, seed=4)
    assert [row for _, rows in seen(other) for row in rows] != orders[0]


def test_without_shuffling_rows_come_in_order() -> None:
    assert seen(BatchLoader(Numbers(5), batch_size=2)) == [("epoch0", [0, 1]), ("epoch0", [2, 3]), ("epoch0", [4])]


@pytest.mark.parametrize(("size", "lengths"), [(10, [4, 4]), (8, [4, 4]), (3, [3])])
def test_a_short_last_batch_is_dropped_unless_it_is_the_only_one(size: int, lengths: list[int]) -> None:
    loader = BatchLoader(Numbers(size), batch_size=4, shuffle=True, drop_last=True)
    assert [len(rows) for _, rows in seen(loader)] == lengths
    assert len(loader) == len(lengths)


def test_processes_share_an_epoch_without_overlap() -> None:
    loaders = [
        BatchLoader(Numbers(22), batch_size=4, shuffle=True, drop_last=True, rank=rank, world_size=2) for rank in (0, 1)
    ]
    rows = [[row for _, batch in seen(loader) for row in batch] for loader in loaders]
    assert [len(loader) for loader in loaders] == [2, 2]
    assert len(set(rows[0]) | set(rows[1])) == 16


@pytest.mark.parametrize(("size", "lengths"), [(5, [2, 1, 1, 1]), (15, [4, 4, 4, 3]), (4, [1, 1, 1, 1])])
def test_processes_share_less_than_a_batch_each(size: int, lengths: list[int]) -> None:
    """None goes without: it would wait for the others at its end, and they for it."""
    loaders = [
        BatchLoader(Numbers(size), batch_size=4, shuffle=True, drop_last=True, rank=rank, world_size=4)
        for rank in range(4)
    ]
    rows = [[rows for _, rows in seen(loader)] for loader in loaders]
    assert [len(batches) for batches in rows] == [1] * 4 and [len(rows) for (rows,) in rows] == lengths
    assert sorted(row for (rows,) in rows for row in rows) == list(range(size))


@pytest.mark.parametrize(("size", "world"), [(22, 3), (9, 2), (64, 4)])
def test_processes_evaluate_equally_many_batches_and_each_row_once(size: int, world: int) -> None:
    loaders = [BatchLoader(Numbers(size), batch_size=4, rank=rank, world_size=world) for rank in range(world)]
    rows = [[row for _, batch in seen(loader) for row in batch] for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1
    assert sorted(row for part in rows for row in part) == list(range(size))
    assert max(len(batch) for loader in loaders for _, batch in seen(loader)) <= 4


def test_an_order_of_ones_own() -> None:
    loader = BatchLoader(
        Numbers(6),
        batch_size=2,
        shuffle=True,
        order=lambda epoch: np.array([5, 4, 3, 2, 1, 0]) if epoch else np.arange(6),
    )
    assert [rows for _, rows in seen(loader)] == [[0, 1], [2, 3], [4, 5]]
    loader.set_epoch(1)
    assert [rows for _, rows in seen(loader)] == [[5, 4], [3, 2], [1, 0]]


def test_it_continues_from_its_state() -> None:
    loader = BatchLoader(Numbers(22), batch_size=4, shuffle=True, seed=3)
    loader.set_epoch(2)
    whole = seen(loader)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()

    again = BatchLoader(Numbers(22), batch_size=4, shuffle=True, seed=3)
    again.load_state_dict(state)
    again.set_epoch(2)
    assert seen(again) == whole[2:]
    assert seen(again) == whole  # only once


def test_a_finished_epoch_is_not_continued() -> None:
    loader = BatchLoader(Numbers(8), batch_size=4, shuffle=True)
    whole = seen(loader)
    again = BatchLoader(Numbers(8), batch_size=4, shuffle=True)
    again.load_state_dict(loader.state_dict())
    assert seen(again) == whole
    again.load_state_dict(loader.state_dict() | {"images": 4})
    again.set_epoch(1)
    assert len(seen(again)) == 2


def test_an_iteration_from_within_an_epoch_runs_on_into_the_next() -> None:
    loader = BatchLoader(Numbers(22), batch_size=4, shuffle=True, drop_last=True, position=lambda: 13)
    expected = [(f"epoch{key.epoch}", key.rows.tolist()) for key in loader.keys(2)[3:] + loader.keys(3)[:3]]
    assert seen(loader) == expected


def test_another_order_than_the_interrupted_one_is_told() -> None:
    state = BatchLoader(Numbers(8), batch_size=4, shuffle=True).state_dict()
    with pytest.warns(UserWarning, match="'step_size': 4.*'step_size': 2"):
        BatchLoader(Numbers(8), batch_size=2, shuffle=True).load_state_dict(state)


def test_a_batch_holds_at_least_one_image() -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        BatchLoader(Numbers(8), batch_size=0)


class Recorder(LightningModule):
    """Learns one number and notes what it is shown."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.shown: list[tuple[str, list[int]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.shown.append((batch.split, batch.index_B.tolist()))
        return (self.weight - batch.images_BCHW.mean()) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.index_B.tolist() in ([0, 1, 2, 3], [4, 5])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NumbersData(LightningDataModule):
    """The loader as TabletopData sets it up."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> BatchLoader:
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return BatchLoader(
            Numbers(22),
            batch_size=4,
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
            position=lambda: progress.total.completed,
        )

    def val_dataloader(self) -> BatchLoader:
        return BatchLoader(Numbers(6), batch_size=4)


def trainer(folder: Path, *callbacks: Callback, max_epochs: int = 4, max_steps: int = -1) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_epochs=max_epochs,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    module = Recorder()
    trainer(tmp_path_factory.mktemp("whole")).fit(module, NumbersData())
    assert len(module.shown) == 20
    assert [split for split, _ in module.shown] == [f"epoch{k // 5}" for k in range(20)]
    return module


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="step", every_n_train_steps=1, enable_version_counter=False)


@pytest.mark.parametrize(("stop", "num_workers"), [(1, 0), (7, 0), (10, 0), (13, 0), (13, 2)])
def test_a_stopped_run_goes_on_with_the_same_batches(
    tmp_path: Path, uninterrupted: Recorder, stop: int, num_workers: int
) -> None:
    first = Recorder()
    stopped = trainer(tmp_path, max_steps=stop)
    stopped.fit(first, NumbersData(num_workers))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    second = Recorder()
    goes_on = trainer(tmp_path, max_epochs=-1, max_steps=20)
    goes_on.fit(second, NumbersData(num_workers), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert first.shown + second.shown == uninterrupted.shown
    assert torch.equal(second.weight, uninterrupted.weight)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("fail_at", [3, 5, 9])
def test_a_run_that_died_goes_on_from_its_last_checkpoint(
    tmp_path: Path, uninterrupted: Recorder, fail_at: int
) -> None:
    first = Recorder(fail_at=fail_at)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, every_step(tmp_path)).fit(first, NumbersData())
    second = Recorder()
    trainer(tmp_path).fit(second, NumbersData(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    assert first.shown + second.shown == uninterrupted.shown
    assert torch.equal(second.weight, uninterrupted.weight)


@pytest.mark.filterwarnings("ignore:.*ckpt_path=")
@pytest.mark.parametrize("fail_at", [3, 5, 9])
def test_a_batch_that_was_fetched_but_not_finished_is_shown_again(
    tmp_path: Path, uninterrupted: Recorder, fail_at: int
) -> None:
    first = Recorder(fail_at=fail_at)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, OnExceptionCheckpoint(tmp_path, filename="died")).fit(first, NumbersData())
    second = Recorder()
    trainer(tmp_path).fit(second, NumbersData(), ckpt_path=tmp_path / "died.ckpt", weights_only=True)
    assert first.shown + second.shown == uninterrupted.shown


def test_keys_are_plain_rows() -> None:
    keys = BatchLoader(Numbers(5), batch_size=2).keys(7)
    assert [key.epoch for key in keys] == [7, 7, 7]
    assert np.concatenate([key.rows for key in keys]).tolist() == [0, 1, 2, 3, 4]


def batch_of(tokens: int, images: int) -> Batch:
    """Two samples: so many supervised tokens on the first, so many images among them."""
    there_B = torch.arange(2) < images
    text = pack([[(range(5, 6 + tokens), 1)] if tokens else [], []], 0)
    return Batch(torch.zeros(2, 3, 4, 4), torch.arange(2), "train", text=text, has_image_B=there_B)


class Source:
    """Batches with 1, 2, ... tokens; counts how many were read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.length):
            self.read += 1
            yield batch_of(number + 1, number % 3)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}


def trainer_at(done: int, *, of: float, accumulated: int) -> L.Trainer:
    """A trainer that has done so many batches of an epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=done))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    made = SimpleNamespace(fit_loop=loops, num_training_batches=of, accumulate_grad_batches=accumulated)
    return cast(L.Trainer, made)


def steps(loader: StepLoader) -> list[tuple[int, int, int]]:
    """Place, and tokens and images of the step, of each batch."""
    told = []
    for batch in loader:
        assert batch.step is not None and batch.step.batch == batch.counts()
        told.append((batch.step.place, batch.step.step["token"], batch.step.step["image"]))
    return told


def test_batches_know_the_counts_of_their_whole_step() -> None:
    """Tokens 1 to 5, images 0, 1, 2, 0, 1: a step of three and one of two."""
    loader = StepLoader(Source(5), trainer=trainer_at(0, of=5, accumulated=3))
    assert steps(loader) == [(0, 6, 3), (1, 6, 3), (2, 6, 3), (0, 9, 1), (1, 9, 1)]


@pytest.mark.parametrize("length", [4.0, float("inf")])
def test_an_epoch_ends_where_the_trainer_ends_it(length: float) -> None:
    source = Source(4 if length == float("inf") else 9)
    assert [tokens for _, tokens, _ in steps(StepLoader(source, trainer=trainer_at(0, of=length, accumulated=3)))] == [
        6,
        6,
        6,
        4,
    ]
    assert source.read == 4


def test_an_epoch_goes_on_where_steps_begin() -> None:
    loader = StepLoader(Source(5), trainer=trainer_at(2, of=7, accumulated=2))
    assert [place for place, _, _ in steps(loader)] == [0, 1, 0, 1, 0]
    late = StepLoader(Source(4), trainer=trainer_at(3, of=7, accumulated=2))  # inside a step: what is left of it
    assert steps(late)[:2] == [(0, 1, 0), (0, 5, 3)]


@pytest.mark.parametrize("accumulated", [1, 4])
def test_batches_are_read_a_step_ahead_and_one_at_a_time(accumulated: int) -> None:
    source = Source(20)
    given = 0
    for _ in StepLoader(source, trainer=trainer_at(0, of=20, accumulated=accumulated)):
        given += 1
        assert source.read == min(20, given + accumulated - 1)


def test_all_else_is_the_loaders_own() -> None:
    loader = StepLoader(Source(3), trainer=None)
    assert len(loader) == 3 and loader.state_dict() == {"read": 0}
    assert [batch.step for batch in loader] == [None] * 3
    assert not hasattr(loader, "load_state_dict")
