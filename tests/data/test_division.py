"""A step of a fixed number of images, on any number of processes: what follows, what is refused, and who keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from tests.data.formats import tokenizer_folder, write_karpathy, write_shards
from tests.data.recorder import Recorder, trainer
from tests.tabletop.quiet import QUIET
from visexpert.cli import main
from visexpert.data import CC3M, COCOCaptions, MixedData
from visexpert.data.base import DataModule
from visexpert.data.division import Division, StepSize
from visexpert.errors import ConfigError
from visexpert.planning import Asked, make_plan, read_configs
from visexpert.planning.amount import amount_of
from visexpert.planning.show import other_gpus
from visexpert.tabletop import TabletopData

SMOKE = "configs/tove/smoke.yaml"


@pytest.mark.parametrize(
    ("size", "processes", "accumulate", "expected"),
    [
        (StepSize(), 4, 3, Division(32, 4, 3)),
        (StepSize(8), 4, 3, Division(8, 4, 3)),
        (StepSize(None, 256), 1, 1, Division(256, 1, 1)),
        (StepSize(None, 256), 8, 1, Division(32, 8, 1)),
        (StepSize(None, 256), 8, 4, Division(8, 8, 4)),
        (StepSize(16, 256), 16, 1, Division(16, 16, 1)),
        (StepSize(16, 256), 4, 1, Division(16, 4, 4)),
        (StepSize(16, 256), 4, 4, Division(16, 4, 4)),
        (StepSize(None, 96), 3, 1, Division(32, 3, 1)),
    ],
)
def test_what_is_not_given_follows(size: StepSize, processes: int, accumulate: int, expected: Division) -> None:
    division = size.divided(processes=processes, accumulate=accumulate)
    assert division == expected
    assert size.global_batch_size in (None, division.step_size)


@pytest.mark.parametrize(
    ("size", "processes", "accumulate", "told"),
    [
        (StepSize(None, 256), 3, 1, ["256", "multiple of 3 (3 processes)", "255, or 258."]),
        (StepSize(16, 256), 3, 1, ["256", "48 (3 processes x batch_size 16)", "240, or 288."]),
        (StepSize(None, 100), 1, 8, ["100", "8 (1 process x accumulate_grad_batches 8)", "96, or 104."]),
        (StepSize(32, 64), 4, 1, ["64", "128 (4 processes x batch_size 32)", "set it to 128, or take batch_size 16."]),
        (StepSize(16, 256), 4, 2, ["256", "4 processes x batch_size 16 x accumulate_grad_batches 2 are 128"]),
    ],
)
def test_a_remainder_or_a_contradiction_is_refused_in_a_sentence(
    size: StepSize, processes: int, accumulate: int, told: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        size.divided(processes=processes, accumulate=accumulate)
    message = str(refusal.value)
    assert all(words in message for words in told) and "\n" not in message and message.count(". ") == 0


def coco(root: Path, **options: Any) -> COCOCaptions:
    images = [("train", "train2014", "red", ["a dog"])] * 9
    write_karpathy(root / "coco", [*images, *((part, "val2014", "red", ["a dog"]) for part in ("val", "test"))])
    settings = {"tokenizer": tokenizer_folder(root / "words"), "image_size": 8, "num_workers": 0, "order_seed": 3}
    return COCOCaptions(root=str(root / "coco"), **{**settings, **options})


def cc3m(root: Path, **options: Any) -> CC3M:
    write_shards(root / "cc3m", [8, 8])
    settings = {"tokenizer": tokenizer_folder(root / "words"), "image_size": 8, "num_workers": 0, "order_seed": 3}
    return CC3M(root=str(root / "cc3m"), train="{00000..00001}.tar", **{**settings, **options})


def mixed(root: Path, **options: Any) -> MixedData:
    return MixedData(sources={"a": coco(root), "b": cc3m(root)}, train={"a": None, "b": None}, **options)


def tabletop(root: Path, **options: Any) -> TabletopData:
    return TabletopData(root=str(root), num_train=10, num_val=4, num_test=4, rendering=QUIET, **options)


MODULES: dict[str, Callable[..., DataModule]] = {"rows": coco, "shards": cc3m, "mixed": mixed, "tabletop": tabletop}


@pytest.mark.parametrize("kind", MODULES)
def test_a_fit_takes_steps_of_so_many_images(tmp_path: Path, kind: str) -> None:
    recorder = Recorder()
    data = MODULES[kind](tmp_path, batch_size=2, global_batch_size=4)
    fitting = trainer(tmp_path / "run", max_epochs=1, limit_val_batches=0)
    fitting.fit(recorder, data)
    assert fitting.accumulate_grad_batches == 2
    assert {len(rows) for _, rows in recorder.shown} == {2}
    assert fitting.global_step == len(recorder.shown) // 2 > 1


def test_the_same_images_make_a_step_however_it_is_divided(tmp_path: Path) -> None:
    shown = {}
    for batch in (None, 4, 2, 1):
        recorder = Recorder()
        data = tabletop(tmp_path, batch_size=batch, global_batch_size=4)
        trainer(tmp_path / "run", max_epochs=1, limit_val_batches=0).fit(recorder, data)
        rows = [row for _, rows in recorder.shown for row in rows]
        shown[batch] = [sorted(rows[start : start + 4]) for start in range(0, 8, 4)]
    assert shown[None] == shown[4] == shown[2] == shown[1]


@pytest.mark.parametrize("kind", MODULES)
def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    data = MODULES[kind](tmp_path, batch_size=3, global_batch_size=4)
    with pytest.raises(
        ConfigError,
        match=r"global_batch_size is 4, .* 3 \(1 process x batch_size 3\); set it to 3, or 6, or take batch_size 2",
    ):
        trainer(tmp_path / "run", max_epochs=1).fit(Recorder(), data)
    contradictory = MODULES[kind](tmp_path, batch_size=2, global_batch_size=4)
    with pytest.raises(ConfigError, match="accumulate_grad_batches 3 are 6"):
        trainer(tmp_path / "run", max_epochs=1, accumulate_grad_batches=3).fit(Recorder(), contradictory)
    with pytest.raises(ConfigError, match="global_batch_size is 0|global_batch_size must be"):
        MODULES[kind](tmp_path, global_batch_size=0)


def test_sources_of_unlike_steps_are_refused(tmp_path: Path) -> None:
    sources = {"a": coco(tmp_path, global_batch_size=4), "b": cc3m(tmp_path)}
    data = MixedData(sources=dict(sources), train={"a": None, "b": None})
    with pytest.raises(ConfigError, match=r"a steps of 4, b batches of 32.*on MixedData"):
        trainer(tmp_path / "run", max_epochs=1).fit(Recorder(), data)


class Manual(Recorder):
    """Takes its steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_a_module_that_cannot_accumulate_is_refused(tmp_path: Path) -> None:
    module: LightningModule = Manual()
    with pytest.raises(ConfigError, match="Manual takes its steps itself.*set batch_size to 4"):
        trainer(tmp_path, max_epochs=1).fit(module, tabletop(tmp_path, batch_size=2, global_batch_size=4))


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_callback_that_changes_accumulation_is_refused(tmp_path: Path, batch_size: int) -> None:
    data = tabletop(tmp_path, batch_size=batch_size, global_batch_size=4)
    schedule = GradientAccumulationScheduler({0: 2})
    with pytest.raises(ConfigError, match="global_batch_size is 4, but GradientAccumulationScheduler.*leave out one"):
        trainer(tmp_path, max_epochs=1, callbacks=[schedule]).fit(Recorder(), data)


def test_plan_counts_it_on_any_number_of_gpus() -> None:
    own = ("--trainer.devices=4", "--trainer.max_steps=5", "--data.init_args.global_batch_size=8")
    planned = read_configs([SMOKE], (*own, "--data.init_args.batch_size=2"))
    alone, four = make_plan(planned, Asked(gpus=1, text_tokens=60)), amount_of(planned.data, planned.trainer, gpus=4)
    assert alone.amount.per_step == four.per_step == 8
    assert alone.amount.samples == four.samples == 40
    assert (alone.amount.accumulated(1), four.accumulated(4)) == (4, 1)
    assert alone.configured is not None
    assert other_gpus(alone, alone.configured) == "The configuration asks for 4 GPUs; a step has 8 samples there, too."
    free = read_configs([SMOKE], (*own, "--data.init_args.batch_size=null"))
    assert [amount_of(free.data, free.trainer, gpus=gpus).batch_size for gpus in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(ConfigError, match="multiple of 3"):
        amount_of(free.data, free.trainer, gpus=3)


def test_the_command_line_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--data.init_args.batch_size", "3", "--data.init_args.global_batch_size", "8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", SMOKE, "--run", str(tmp_path / "run"), *sizes])
    assert end.value.code == 2 and "set it to 6, or 9, or take batch_size 2" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run")
