"""MoVE-KD watched: teachers that fail, distances in validation, what happens inside the encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.methods.helpers import (
    bare_trainer,
    noise_batch,
    tiny_tove,
)
from tests.methods.movekd.helpers import (
    MakeData,
    as_teacher,
    shaken,
    tiny_movekd,
    unit,
)
from tests.methods.test_training import Recorder
from visexpert.errors import DataError
from visexpert.methods import MoVEKD
from visexpert.vision import collect_routing


def test_a_teacher_that_gives_nan_stops_training_with_its_name(tmp_path: Path, data: MakeData) -> None:
    model = tiny_movekd()
    for parameter in model.hub["semantic"].parameters():
        nn.init.constant_(parameter, torch.nan)
    with pytest.raises(DataError, match="Teacher 'semantic' gave tokens that are NaN or infinite"):
        bare_trainer(tmp_path, steps=1).fit(model, datamodule=data())


class Faltering(L.Callback):
    """From a step on the expert named edges gives NaN."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoVEKD)
        if trainer.global_step == self._step:
            for parameter in pl_module.hub["edges"].parameters():
                nn.init.constant_(parameter, torch.nan)


def test_no_checkpoint_holds_what_a_teacher_has_spoilt(tmp_path: Path, data: MakeData) -> None:
    """The look at teachers is every 50 steps, but also before a checkpoint is written."""
    saving = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_train_steps=2)
    with pytest.raises(DataError, match="Teacher 'edges' gave .*; look at .* continue from the last checkpoint"):
        bare_trainer(tmp_path, steps=6, callbacks=[saving, Faltering(2)]).fit(tiny_movekd(), datamodule=data())
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    second = tiny_movekd()
    bare_trainer(tmp_path, steps=3).fit(
        second, datamodule=data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert second.trained_steps == 3


def test_the_end_of_training_looks_at_the_teachers_too(tmp_path: Path, data: MakeData) -> None:
    with pytest.raises(DataError, match="Teacher 'edges'"):
        trainer = bare_trainer(tmp_path, steps=2, callbacks=[Faltering(1)], enable_checkpointing=False)
        trainer.fit(tiny_movekd(), datamodule=data())


def test_validation_logs_distances_and_leaves_training_as_it_was(tmp_path: Path, data: MakeData) -> None:
    options: dict[str, Any] = {"mole": {"dropout": 0.2}, "tokens": "attention"}
    without, models = Recorder(), [tiny_movekd(**options), tiny_movekd(**options)]
    bare_trainer(tmp_path, steps=4, callbacks=[without], enable_checkpointing=False).fit(models[0], datamodule=data())
    watching, source = Recorder(), data(num_val=6, eval_batch_size=4)
    trainer = bare_trainer(
        tmp_path,
        steps=4,
        callbacks=[watching],
        enable_checkpointing=False,
        limit_val_batches=1.0,
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    trainer.fit(models[1], datamodule=source)
    assert watching.losses == without.losses
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key
    assert models[0].distillation._steps == models[1].distillation._steps == 4

    model, logged = models[1].eval(), trainer.callback_metrics
    errors: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in source.val_dataloader():
            student_BTD = model.clip(unit(batch)).tokens_BTD
            assert model.anchor is not None
            teachers = {"clip": as_teacher(model.anchor, unit(batch))} | model.hub(replace(batch, split=""))
            for name, head in model.distillation.heads.items():
                pair = head(student_BTD, teachers[name])
                errors.setdefault(name, []).extend((pair.prediction_BTX - pair.target_BTX).square().mean((1, 2)))
    for name, values in errors.items():
        assert len(values) == 6
        torch.testing.assert_close(logged[f"val/kd/{name}"], torch.stack(values).mean(), rtol=1e-4, atol=1e-6)
    assert logged["val/kd_loss"] > 0 and "val/nll/nll" in logged


def test_without_distillation_validation_asks_no_teacher(tmp_path: Path, data: MakeData) -> None:
    (scores,) = bare_trainer(tmp_path, steps=1, limit_val_batches=1).validate(
        tiny_movekd(kd_weight=0.0), datamodule=data(), verbose=False
    )
    assert scores and not any("kd" in name for name in scores)


def test_samples_without_an_image_do_not_count_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_movekd(tokens="uniform").eval()
    whole = noise_batch()
    logged: list[tuple[dict[str, Tensor], int]] = []
    model.on_validation_epoch_start()
    monkeypatch.setattr(model.evaluators["val"], "add_means", lambda values, images: logged.append((values, images)))
    monkeypatch.setattr(model, "score", lambda *_: None)
    model.validation_step(replace(whole, has_image_B=torch.tensor([True, False])), 0)
    model.validation_step(replace(whole, images_BCHW=whole.images_BCHW[:1], index_B=whole.index_B[:1]), 0)
    (masked, count), (alone, one) = logged
    assert count == one == 1
    torch.testing.assert_close(masked["kd/clip"], alone["kd/clip"])


def test_views_are_attention_and_choices_of_images_alone() -> None:
    model = shaken(tiny_movekd()).eval()
    batch = noise_batch()
    views = model.views(batch)
    assert set(views.attention) == {"clip", "student"} and views.routing is not None
    with collect_routing(model.clip) as routing:
        seen = model.clip.attend(unit(batch))
    shares_BT = seen.logits_BHN[..., 1:].softmax(-1).mean(1)
    torch.testing.assert_close(views.attention["student"].flatten(1), shares_BT)
    record = routing.record()
    assert record is not None and views.routing.layers == record.layers == (0, 1)
    assert views.routing.choice_BLHW.shape == (2, 2, 4, 4)
    for layer in range(2):
        assert torch.equal(views.routing.choice_BLHW[:, layer].flatten(1), record.choice_LBN[layer, :, 1:])
        assert torch.equal(views.routing.probs_BLHWE.argmax(-1), views.routing.choice_BLHW)
    second = model.views(replace(batch, has_image_B=torch.tensor([False, True])))
    torch.testing.assert_close(second.attention["clip"], views.attention["clip"][1:])
    plain = tiny_movekd(plain=True, clip_teacher_weight=None).eval().views(batch)
    assert plain.routing is None and set(plain.attention) == {"student"}
    assert tiny_tove().views(batch) is None
