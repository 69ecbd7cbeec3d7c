"""Distilling a student with MoLE into a plain CLIP: what moves, where to, and what takes no part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tests.methods.helpers import CLIP_FIELDS, bare_trainer, noise_batch
from visexpert.export.flattening import Flattening, RouterUse, images_of
from visexpert.metrics.tokens import TokenError
from visexpert.tabletop import TabletopData
from visexpert.vision import ClipEncoder, MoLESettings, equipped_blocks, fold

MakeData = Callable[..., TabletopData]


def student() -> ClipEncoder:
    """A tiny CLIP with MoLE that gives each token one of two unlike experts."""
    clip = ClipEncoder(config=CLIP_FIELDS, mole=MoLESettings(num_experts=2, rank=4, dropout=0.5)).eval()
    for mole in equipped_blocks(clip).values():
        for module in mole.added_modules():
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.5)
    return clip.requires_grad_(False)


def test_from_usage_to_a_plain_clip_that_comes_closer(tmp_path: Path, data: MakeData) -> None:
    clip, source = student(), data(num_train=4, batch_size=4)
    before = copy.deepcopy(clip.state_dict())
    use = RouterUse(clip)
    bare_trainer(tmp_path, steps=1, limit_val_batches=2).validate(use, datamodule=source, verbose=False)
    usage = use.meter.usage()
    assert usage.num_images > 0 and all(0 < float(gates_E.max()) < 1 for gates_E in usage.gates.values())
    plain = fold(clip, usage)
    start = copy.deepcopy(plain.state_dict())
    work = Flattening(student=clip, plain=plain, lr=1e-2, warmup_steps=2)
    bare_trainer(tmp_path, steps=1, limit_val_batches=2).validate(work, datamodule=source, verbose=False)
    assert work.error.compute()["num_images"] == usage.num_images
    source.setup("fit")
    batch, errors = next(iter(source.train_dataloader())), []
    for steps in (0, 80):
        if steps:
            bare_trainer(tmp_path, steps=steps).fit(work, datamodule=source)
        work.on_validation_epoch_start()
        with torch.no_grad():
            work.validation_step(batch, 0)
        errors.append(work.error.compute()["nmse"])
    assert errors[1] < 0.6 * errors[0]
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())
    moved = {key for key, value in plain.state_dict().items() if not torch.equal(value, start[key])}
    assert moved and not any("layers.1" in key or "post_layernorm" in key for key in moved)  # behind what is read


def test_the_error_is_that_of_patch_tokens() -> None:
    clip, batch = student(), noise_batch()
    plain = ClipEncoder(config=CLIP_FIELDS).eval()
    work = Flattening(student=clip, plain=plain)
    work.validation_step(batch, 0)
    expected = TokenError()
    expected.update(*(part(batch.images_01()).tokens_BTD for part in (plain, clip)))
    assert work.error.compute() == expected.compute()


def test_the_student_keeps_its_dropout_off() -> None:
    clip = student()
    work = Flattening(student=clip, plain=ClipEncoder(config=CLIP_FIELDS)).train()
    assert not clip.training and work.plain.training


def test_samples_without_an_image_take_no_part() -> None:
    batch = noise_batch()
    some, none = (replace(batch, has_image_B=torch.tensor(has)) for has in ([False, True], [False, False]))
    assert torch.equal(images_of(some), batch.images_01()[1:]) and len(images_of(none)) == 0
    assert Flattening(student=student(), plain=ClipEncoder(config=CLIP_FIELDS)).training_step(none, 0) is None
    use = RouterUse(student())
    use.validation_step(none, 0)
    use.validation_step(some, 1)
    assert use.meter.usage().num_images == 1
