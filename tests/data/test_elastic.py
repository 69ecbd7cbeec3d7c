"""A fit that stops within an epoch and goes on with another number of processes: each image once, in the same steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.data.formats import tokenizer_folder, write_json, write_karpathy, write_shards
from tests.data.recorder import Recorder, trainer
from tests.tabletop.quiet import QUIET
from tests.two_processes import in_processes
from visexpert.data import CC3M, COCOCaptions, LLaVAInstruct, MixedData
from visexpert.data.base import DataModule
from visexpert.data.shard_loader import ShardLoader, ShardStream
from visexpert.errors import ConfigError
from visexpert.language import LlavaTemplate
from visexpert.tabletop import TabletopData

STEP, STOP, EPOCHS = 4, 3, 2
"""Images of a step; steps before the interruption; epochs, of four steps each, or of eight where data is mixed."""

IMAGES = 18

Shown = list[tuple[str, list[int]]]
"""What one process was shown: source and rows of each batch."""

Step = list[tuple[str, int]]
"""The images of a step: source and row, sorted."""


def coco(root: Path, **options: Any) -> COCOCaptions:
    images = [("train", "train2014", "red", ["a dog"])] * IMAGES
    write_karpathy(root / "coco", [*images, *((part, "val2014", "red", ["a dog"]) for part in ("val", "test"))])
    return COCOCaptions(root=str(root / "coco"), tokenizer=tokenizer_folder(root / "words"), **(PLAIN | options))


def cc3m(root: Path, **options: Any) -> CC3M:
    write_shards(root / "cc3m", [4, 9, 5])
    tokenizer = tokenizer_folder(root / "words")
    return CC3M(root=str(root / "cc3m"), train="{00000..00002}.tar", tokenizer=tokenizer, **(PLAIN | options))


def llava(root: Path, **options: Any) -> LLaVAInstruct:
    said = [[("human", "what is it ?"), ("gpt", "a dog " * (1 + number % 5))] for number in range(IMAGES)]
    records = [
        {"id": str(number), "conversations": [{"from": who, "value": text} for who, text in turns]}
        for number, turns in enumerate(said)
    ]
    write_json(root / "llava" / "chats.json", records)
    return LLaVAInstruct(
        root=str(root / "llava"),
        annotations="chats.json",
        tokenizer=tokenizer_folder(root / "words"),
        template=partial(LlavaTemplate, style="vicuna_v1"),
        **(PLAIN | options),
    )


def mixed(root: Path, **options: Any) -> MixedData:
    sources = {"coco": coco(root), "cc3m": cc3m(root)}
    return MixedData(sources=dict(sources), train={"coco": None, "cc3m": None}, **options)


def tabletop(root: Path, **options: Any) -> TabletopData:
    sizes = {"num_train": IMAGES, "num_val": 1, "num_test": 1, "order_seed": PLAIN["order_seed"]}
    return TabletopData(root=str(root), rendering=QUIET, **(sizes | options))


PLAIN: dict[str, Any] = {"image_size": 8, "num_workers": 0, "order_seed": 3}
TWO, FREE = {"batch_size": STEP // 2, "global_batch_size": STEP}, {"global_batch_size": STEP}
"""Batches of two images, accumulated in one process; and batches as large as the number of processes allows."""

KINDS: dict[str, Callable[..., DataModule]] = {
    "rows": coco,
    "grouped rows": llava,
    "shards": cc3m,
    "shards, free batches": cc3m,
    "mixed": mixed,
    "scenes": tabletop,
}


def made(root: Path, kind: str, *, processes: int) -> DataModule:
    """Data of a kind, whose batches are free or at most those of :data:`TWO`."""
    free = kind in ("shards, free batches", "scenes")
    return KINDS[kind](root, **(FREE if free else TWO | {"batch_size": min(STEP // 2, STEP // processes)}))


ONE_ORDER = ("rows", "grouped rows", "scenes")
"""Kinds whose order is the same for any number of processes from the start, not only after an interruption."""


class Planner(Recorder):
    """Asks for the number of steps before the checkpoint is restored, as a cosine schedule does."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class PowerCutError(Exception):
    """What ends a fit."""


class Stop(Callback):
    """Saves a checkpoint after a step, and ends the fit.

    Args:
        path: The checkpoint.
        after: Steps.
    """

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *others: Any) -> None:
        if trainer.global_step == self.after and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)
            raise PowerCutError


def fit(
    root: Path, kind: str, *, processes: int = 1, start: Path | None = None, save: Path | None = None, stop: int = STOP
) -> Shown:
    """What this process is shown by a fit: from ``start`` to the end, or until it saves ``save`` and stops."""
    recorder = Planner()
    options: dict[str, Any] = {} if processes == 1 else {"devices": processes, "strategy": "ddp"}
    callbacks = [] if save is None else [Stop(save, stop)]
    fitting = trainer(root / "run", max_epochs=EPOCHS, limit_val_batches=0, callbacks=callbacks, **options)
    try:
        fitting.fit(recorder, made(root, kind, processes=processes), ckpt_path=start, weights_only=True)
    except PowerCutError:
        assert save is not None
    return recorder.shown


def fit_in_two(rank: int, root: Path) -> dict[str, list[Shown]]:
    """Of each kind: a whole fit, one that stops, and one that goes on from one process."""
    return {
        kind: [
            fit(root / str(place), kind, processes=2),
            fit(root / str(place), kind, processes=2, save=root / f"two{place}.ckpt"),
            fit(root / str(place), kind, processes=2, start=root / f"one{place}.ckpt"),
        ]
        for place, kind in enumerate(KINDS)
    }


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Step]]]:
    """The steps of each kind of data, by what ran: ``1`` and ``2`` processes, ``1 2`` and ``2 1`` one after another."""
    root, found = tmp_path_factory.mktemp("elastic"), {}
    alone = {}
    for place, kind in enumerate(KINDS):
        whole = fit(root / str(place), kind)
        alone[kind] = [whole, fit(root / str(place), kind, save=root / f"one{place}.ckpt")]
    together = in_processes(2, fit_in_two, root)
    for place, kind in enumerate(KINDS):
        one, until = ([shown] for shown in alone[kind])
        two, paused, resumed = ([rank[kind][run] for rank in together] for run in range(3))
        rest = [fit(root / str(place), kind, start=root / f"two{place}.ckpt")]
        found[kind] = {
            "1": steps_of(one),
            "2": steps_of(two),
            "1 2": steps_of(until) + steps_of(resumed),
            "2 1": steps_of(paused) + steps_of(rest),
        }
    return found


def steps_of(shown: Sequence[Shown]) -> list[Step]:
    """The steps of what all processes were shown."""
    together = [[(split, row) for split, rows in batches for row in rows] for batches in zip(*shown, strict=True)]
    each = STEP // len(together[0])
    return [
        sorted(image for batch in together[start : start + each] for image in batch)
        for start in range(0, len(together), each)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runs", ["1", "2", "1 2", "2 1"])
def test_each_image_comes_once_in_an_epoch(shown: dict[str, dict[str, list[Step]]], kind: str, runs: str) -> None:
    steps = shown[kind][runs]
    each = len(steps) // EPOCHS
    assert each == (8 if kind == "mixed" else 4)
    for epoch in range(EPOCHS):
        images = [image for step in steps[epoch * each : (epoch + 1) * each] for image in step]
        assert len(images) == each * STEP and set(Counter(images).values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_goes_on_in_the_order_it_began(shown: dict[str, dict[str, list[Step]]], kind: str) -> None:
    assert shown[kind]["1 2"] == shown[kind]["1"]
    assert shown[kind]["2 1"] == shown[kind]["2"]


@pytest.mark.parametrize("kind", ONE_ORDER)
def test_the_order_does_not_depend_on_the_number_of_processes(
    shown: dict[str, dict[str, list[Step]]], kind: str
) -> None:
    assert shown[kind]["1"] == shown[kind]["2"]


def go_on(root: Path, data: DataModule, *, start: Path, kind: type[Recorder] = Planner, **options: Any) -> Shown:
    """What this process is shown by a fit of other settings that goes on from a checkpoint."""
    recorder = kind()
    fitting = trainer(root / "run", **{"max_epochs": EPOCHS, "limit_val_batches": 0, **options})
    fitting.fit(recorder, data, ckpt_path=start, weights_only=True)
    return recorder.shown


@pytest.mark.parametrize("steps", [STOP, 4, 5])
def test_other_batches_of_the_same_step_go_on_where_max_steps_ended_a_fit(tmp_path: Path, steps: int) -> None:
    whole, first = fit(tmp_path, "rows"), Planner()
    ended = trainer(tmp_path / "run", max_steps=steps, limit_val_batches=0)
    ended.fit(first, coco(tmp_path, **TWO))
    ended.save_checkpoint(tmp_path / "last.ckpt")
    rest = go_on(tmp_path, coco(tmp_path, **FREE), start=tmp_path / "last.ckpt", max_epochs=-1, max_steps=8)
    assert [len(rows) for _, rows in rest] == [STEP] * (8 - steps)
    assert steps_of([first.shown]) + steps_of([rest]) == steps_of([whole])


class LateStrategy(SingleDeviceStrategy):
    """Restores a checkpoint when all is set up, as those do that shard the model."""

    restore_checkpoint_after_setup = True


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", [Recorder, Planner])
def test_the_order_is_restored_whenever_the_loader_and_the_checkpoint_come(
    tmp_path: Path, kind: type[Recorder], late: bool
) -> None:
    whole, first = fit(tmp_path, "shards"), fit(tmp_path, "shards", save=tmp_path / "last.ckpt")
    options: dict[str, Any] = {"strategy": LateStrategy(torch.device("cpu"))} if late else {}
    rest = go_on(tmp_path, cc3m(tmp_path, **FREE), start=tmp_path / "last.ckpt", kind=kind, **options)
    assert steps_of([first]) + steps_of([rest]) == steps_of([whole])


def test_another_step_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, "rows", save=tmp_path / "last.ckpt")
    took = r"4 images a step \(1 process x batch_size 2 x accumulate_grad_batches 2\)"
    with pytest.raises(ConfigError, match=rf"{took}, this one would take 8 .* global_batch_size to 4\.$"):
        go_on(tmp_path, coco(tmp_path, batch_size=8), start=tmp_path / "last.ckpt")


class SaveInside(Callback):
    """Saves a checkpoint after the first batch, which is half a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *others: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 0:
            trainer.save_checkpoint(self.path)


def test_half_a_step_is_not_gone_on_from_otherwise(tmp_path: Path) -> None:
    """A method rewinds to the step; a module that does not is told."""
    inside = SaveInside(tmp_path / "half.ckpt")
    saving = trainer(tmp_path / "run", max_epochs=1, limit_val_batches=0, callbacks=[inside])
    saving.fit(Planner(), coco(tmp_path, **TWO))
    assert len(go_on(tmp_path, coco(tmp_path, **TWO), start=inside.path)) == 15
    with pytest.raises(ConfigError, match="inside an optimizer step.* only 1 process x batch_size 2"):
        go_on(tmp_path, coco(tmp_path, **FREE), start=inside.path)


@pytest.mark.parametrize("make", [coco, cc3m])
def test_less_than_a_step_is_not_gone_on_with_otherwise(tmp_path: Path, make: Callable[..., DataModule]) -> None:
    large = {"global_batch_size": 2 * IMAGES}
    ended = trainer(tmp_path / "run", max_epochs=1, limit_val_batches=0)
    ended.fit(Planner(), make(tmp_path, batch_size=2, **large))
    ended.save_checkpoint(tmp_path / "last.ckpt")
    go_on(tmp_path, make(tmp_path, batch_size=2, **large), start=tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match=r"data of less than a step \(36 images\)"):
        go_on(tmp_path, make(tmp_path, batch_size=4, **large), start=tmp_path / "last.ckpt")


Layout = tuple[int, int, int]
"""Processes, images of a batch, workers."""

EIGHT = 8
"""Images of a step of the shards below."""


def shards(root: Path, layout: Layout, *, step: int = 0) -> list[ShardLoader]:
    """The loaders of all processes, ``step`` steps into the first epoch."""
    processes, batch, workers = layout
    options = PLAIN | {"num_workers": workers, "batch_size": batch, "global_batch_size": EIGHT, "shuffle_window": 6}
    data, made = CC3M(root=str(root), train="{00000..00003}.tar", **options), []
    for rank in range(processes):
        data.__class__ = type("Placed", (CC3M,), {"process": (rank, processes)})
        made.append(data.loader("train", position=lambda: step * data.division().accumulate))
    return made


def read(loaders: Sequence[ShardLoader]) -> list[list[int]]:
    """The rows of each step that is left of the first epoch, sorted; workers take turns in this process."""
    of_processes = []
    for loader in loaders:
        assert loader.position is not None
        done, workers = loader.position(), max(1, loader.num_workers)
        stream = ShardStream(loader, 0, done, len(loader))
        readers = [stream.worker(worker) for worker in range(workers)]
        numbers = range(len(loader) - done)
        of_processes.append([next(readers[number % workers]).index_B.tolist() for number in numbers])
    each = loaders[0].division.accumulate
    batches = [[row for rows in together for row in rows] for together in zip(*of_processes, strict=True)]
    return [sorted(chain.from_iterable(batches[start : start + each])) for start in range(0, len(batches), each)]


LAYOUTS: list[Layout] = [(1, 8, 2), (2, 4, 1), (2, 2, 3), (1, 2, 4), (4, 1, 2), (8, 1, 1), (1, 1, 3)]


@pytest.mark.parametrize("before", LAYOUTS)
def test_shards_go_on_in_whatever_layout(tmp_path: Path, before: Layout) -> None:
    write_shards(tmp_path, [14, 25, 0, 21])
    whole, state = read(shards(tmp_path, before)), shards(tmp_path, before)[0].state_dict()
    assert len(whole) == 60 // EIGHT and len({row for step in whole for row in step}) == EIGHT * len(whole)
    for after in LAYOUTS:
        loaders = shards(tmp_path, after, step=3)
        for loader in loaders:
            loader.load_state_dict(state)
        assert read(loaders) == whole[3:]


def test_other_processes_do_not_go_on_where_batches_were_empty(tmp_path: Path) -> None:
    write_shards(tmp_path, [14, 25, 0, 21])
    state = shards(tmp_path, (2, 4, 1))[0].state_dict() | {"empty": [2]}
    shards(tmp_path, (2, 4, 2))[0].load_state_dict(state)
    with pytest.raises(ConfigError, match=r"left out batches.* only 2 processes x batch_size 4"):
        shards(tmp_path, (1, 8, 1))[0].load_state_dict(state)


def all_kinds(
    rank: int, root: Path, processes: int, *, start: str = "", save: str = "", stop: int = STOP
) -> dict[str, Shown]:
    """What this process is shown of each kind of data; checkpoints are files of ``root``."""
    return {
        kind: fit(
            root / str(place),
            kind,
            processes=processes,
            start=root / f"{start}{place}.ckpt" if start else None,
            save=root / f"{save}{place}.ckpt" if save else None,
            stop=stop,
        )
        for place, kind in enumerate(KINDS)
    }


@pytest.mark.long
def test_a_fit_goes_on_in_two_then_one_then_four_processes(tmp_path: Path) -> None:
    whole = in_processes(2, all_kinds, tmp_path, 2)
    two = in_processes(2, all_kinds, tmp_path, 2, save="two", stop=2)
    one = [all_kinds(0, tmp_path, 1, start="two", save="one", stop=5)]
    four = in_processes(4, all_kinds, tmp_path, 4, start="one")
    for kind in KINDS:
        steps = [steps_of([rank[kind] for rank in ranks]) for ranks in (two, one, four)]
        assert [len(part) for part in steps[:2]] == [2, 3]
        assert [step for part in steps for step in part] == steps_of([rank[kind] for rank in whole])
