"""Knowledge merging: what trains, what it is drawn to, and that a plain CLIP is what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.helpers import bare_trainer, logits_of, merging_of, noise_batch, shake, tiny_tove
from visexpert.errors import ConfigError
from visexpert.losses import token_distance
from visexpert.losses.terms import router_balance
from visexpert.methods import MergeStudent, ToVE
from visexpert.tabletop import TabletopData
from visexpert.vision import MoLESettings, collect_routing, equipped_blocks

MakeData = Callable[..., TabletopData]


def teacher(**options: Any) -> ToVE:
    return shake(tiny_tove(**options)).eval()


@pytest.mark.parametrize("space", ["language", "clip"])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_the_student_starts_as_clip_only(space: Any, adaptation: Any) -> None:
    model, batch = teacher(fusion_space=space), noise_batch()
    student = merging_of(teacher=model, adaptation=adaptation).eval()
    alone = teacher(fusion_space=space)
    for name in alone.hub.names:
        alone.hub.detach(name)
    assert torch.allclose(student.encode(batch).tokens_BTD, alone.encode(batch).tokens_BTD, atol=1e-6)


@pytest.mark.parametrize("space", ["language", "clip"])
def test_the_loss_is_the_distance_to_the_fused_tokens(space: Any) -> None:
    model, batch = teacher(fusion_space=space), noise_batch()
    student = merging_of(teacher=model, distance="smooth_l1", token_weight=2.0).eval()
    clip_BTD = model.clip(batch.images_BCHW.float() / 255).tokens_BTD
    own_BTD = clip_BTD if space == "clip" else model.projector(clip_BTD)
    expected = 2 * token_distance(own_BTD, model.transferred(batch).tokens_BTD, "smooth_l1")
    output = student.step(batch)
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    assert "text_loss" not in output.parts


def test_text_alone_is_the_language_loss_of_the_students_tokens() -> None:
    model, batch = teacher(), noise_batch()
    student = merging_of(teacher=model, token_weight=0.0, lm_weight=1.0).eval()
    twin = teacher()
    for name in twin.hub.names:
        twin.hub.detach(name)
    assert float(student.step(batch).loss) == pytest.approx(float(twin.step(batch).parts["text_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"clip", "projector"}),
        ({"adaptation": "lora"}, {"clip", "projector"}),
        ({"language_lr": 1e-3, "lm_weight": 1.0}, {"clip", "projector", "language"}),
    ],
)
def test_the_trained_set_is_exact_and_all_of_it_moves(
    tmp_path: Path, data: MakeData, options: dict[str, Any], expected: set[str]
) -> None:
    model = teacher()
    before_teacher = copy.deepcopy(model.state_dict())
    student = merging_of(teacher=model, warmup_steps=1, **options)
    chosen = {id(p) for group in student.trained_groups() for m in group.modules for p in m.parameters()}
    names = {name for name, p in student.named_parameters() if id(p) in chosen}
    assert {name.split(".")[0] for name in names} == expected
    if options.get("adaptation") == "lora":
        assert all("lora" in name for name in names if name.startswith("clip."))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    bare_trainer(tmp_path, steps=3).fit(student, datamodule=data())
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= names
    assert {n for n in names if "k_proj.bias" not in n} - moved <= {n for n in names if "lora_A" in n}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before_teacher[key]), key


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_what_comes_out_is_a_plain_clip(tmp_path: Path, data: MakeData, adaptation: Any) -> None:
    model, batch = teacher(), noise_batch()
    shapes = {key: value.shape for key, value in model.clip.state_dict().items()}
    student = merging_of(teacher=model, adaptation=adaptation, warmup_steps=1, lr=1e-2)
    bare_trainer(tmp_path, steps=3).fit(student, datamodule=data())
    tokens_BTD = student.eval().encode(batch).tokens_BTD
    merged = student.merged().eval()
    assert isinstance(merged, ToVE) and merged.hub.names == () and merged.gate is None
    assert {key: value.shape for key, value in merged.clip.state_dict().items()} == shapes
    assert torch.allclose(merged.encode(batch).tokens_BTD, tokens_BTD, atol=1e-5)
    assert not torch.allclose(tokens_BTD, model.projector(model.clip(batch.images_BCHW.float() / 255).tokens_BTD))
    assert set(merged.frozen_modules()) == {"hub"}  # so that CLIP's weights are saved


def with_mole(**settings: Any) -> MergeStudent:
    return MergeStudent(mole=MoLESettings(num_experts=2, rank=3, dropout=0.0), **settings)


@pytest.mark.parametrize("adaptation", ["full", "lora", "none"])
def test_merging_into_mole(tmp_path: Path, data: MakeData, adaptation: Any) -> None:
    model, batch = teacher(), noise_batch()
    student = merging_of(teacher=model, student=with_mole(), adaptation=adaptation, warmup_steps=1, lr=1e-2)
    alone = merging_of(teacher=teacher()).eval().encode(batch).tokens_BTD
    assert torch.allclose(student.eval().encode(batch).tokens_BTD, alone, atol=1e-6)  # MoLE starts as nothing
    chosen = {id(p) for group in student.trained_groups() for m in group.modules for p in m.parameters()}
    names = {name for name, p in student.named_parameters() if id(p) in chosen}
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    bare_trainer(tmp_path, steps=3).fit(student, datamodule=data())
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= names and any("router" in name for name in moved)
    added = {name for name in names if ".mlp." in name and ("router" in name or "experts" in name)}
    assert added <= moved  # each learns
    if adaptation == "none":
        assert {name for name in names if name.startswith("clip.")} == added
    merged = student.merged().eval()
    tokens_BTD = student.eval().encode(batch).tokens_BTD
    assert torch.allclose(merged.encode(batch).tokens_BTD, tokens_BTD, atol=1e-5)
    assert not torch.allclose(tokens_BTD, alone, atol=1e-4) and equipped_blocks(merged.clip)
    assert not equipped_blocks(model.clip) and not any("lora" in key for key in merged.state_dict())


def test_the_routers_of_the_student_are_balanced() -> None:
    model, batch = teacher(), noise_batch()
    torch.manual_seed(2)
    student = merging_of(teacher=model, student=with_mole(balance_weight=0.5, balance_form="per_layer")).eval()
    with collect_routing(student.clip) as routing:
        student.clip(batch.images_01())
    record = routing.record()
    assert record is not None
    expected = router_balance(record.probs_LBNE, record.choice_LBN, "per_layer")
    output = student.step(batch)
    assert float(output.parts["balance_loss"]) == pytest.approx(float(expected), rel=1e-5)
    whole = output.parts["token_loss"] + 0.5 * output.parts["balance_loss"]
    assert float(output.loss) == pytest.approx(float(whole), rel=1e-5)


def test_rate_and_balance_decide_what_learns_of_mole() -> None:
    student = merging_of(teacher=teacher(), student=with_mole(mole_lr=0.25, balance_weight=0.0), lr=0.5)
    (group,) = [group for group in student.trained_groups() if group.name == "mole"]
    routers = {id(mole.router) for mole in equipped_blocks(student.clip).values()}
    assert group.lr == 0.25 and routers and not routers & {id(module) for module in group.modules}
    assert "balance_loss" not in student.eval().step(noise_batch()).parts
    student = merging_of(teacher=teacher(), student=with_mole(), lr=0.5)
    (group,) = [group for group in student.trained_groups() if group.name == "mole"]
    routers = {id(mole.router) for mole in equipped_blocks(student.clip).values()}
    assert group.lr == 0.5 and routers <= {id(module) for module in group.modules}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance_weight": -1.0}, "balance_weight is -1.0, but must be .* at least 0"),
        ({"mole_lr": 0.0}, "mole_lr must be above 0, or null.*0.0"),
        ({"balance_form": "mean"}, "balance_form='mean' is unknown; use one of pooled, per_layer"),
    ],
)
def test_students_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_mole(**settings)


def test_tokens_from_disk_give_the_loss_of_live_ones(
    tmp_path: Path, data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path))
    losses = {}
    for targets in ("live", "store"):
        student = merging_of(teacher=teacher(), targets=targets, warmup_steps=1)
        trainer = bare_trainer(tmp_path, steps=3, callbacks=[])
        trainer.fit(student, datamodule=data())
        losses[targets] = float(trainer.callback_metrics["train/token_loss"])
    assert losses["store"] == pytest.approx(losses["live"], rel=2e-3)  # kept as float16
    assert len(list((tmp_path / "features").glob("*/shard-*"))) == 2
    other = merging_of(teacher=shake(tiny_tove(), seed=9), targets="store", warmup_steps=1)
    bare_trainer(tmp_path, steps=1).fit(other, datamodule=data())
    assert len(list((tmp_path / "features").glob("*/shard-*"))) == 4  # another teacher, other tokens


def test_no_expert_runs_when_the_targets_are_on_disk(
    tmp_path: Path, data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path))
    bare_trainer(tmp_path, steps=1).fit(merging_of(teacher=teacher(), targets="store"), datamodule=data())
    model = teacher()
    sizes: list[int] = []
    model.hub["edges"].register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    bare_trainer(tmp_path, steps=2).fit(merging_of(teacher=model, targets="store"), datamodule=data())
    assert sizes == []


def test_merging_draws_the_student_to_its_teacher(tmp_path: Path, data: MakeData) -> None:
    model = teacher()
    source = data(num_train=4, batch_size=4)
    source.prepare_data()
    source.setup("fit")
    student = merging_of(teacher=model, warmup_steps=1, lr=1e-2)
    batch = next(iter(source.train_dataloader()))
    before = float(student.eval().step(batch).parts["nmse"])
    bare_trainer(tmp_path, steps=120).fit(student, datamodule=source)
    assert float(student.eval().step(batch).parts["nmse"]) < 0.7 * before


def test_the_teacher_is_in_no_checkpoint(tmp_path: Path, data: MakeData) -> None:
    student = merging_of(teacher=teacher())
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(student, datamodule=data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in state} == {"clip", "projector", "language"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptation": "adapter"}, "adaptation='adapter' is unknown; use one of full, lora"),
        ({"distance": "l1"}, "distance='l1' is unknown"),
        ({"targets": "disk"}, "targets='disk' is unknown; use one of live, store"),
        ({"token_weight": 0.0}, "one must be above 0"),
        ({"lm_weight": -1.0}, "lm_weight is -1.0, .*at least 0"),
        ({"adaptation": "none"}, "adaptation='none' leaves a plain encoder nothing to learn"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merging_of(teacher=teacher(), **options)


def test_dropping_experts_equals_detaching_them() -> None:
    batch = noise_batch()
    for gone in (["depth"], ["semantic", "edges"], ["semantic", "depth", "edges"]):
        detached, dropped = teacher(hidden=6, noise="learned"), teacher(hidden=6, noise="learned")
        for name in gone:
            detached.hub.detach(name)
        dropped.drop_experts(gone)
        assert torch.allclose(logits_of(dropped, batch), logits_of(detached, batch), atol=1e-6)
        assert not any(name in key for key in dropped.state_dict() for name in gone)
        assert (dropped.gate is None) == (len(gone) == 3)
        counts = [sum(p.numel() for p in model.parameters()) for model in (dropped, detached)]
        assert counts[0] < counts[1]


def test_an_unfrozen_clip_trains_and_is_saved(tmp_path: Path, data: MakeData) -> None:
    model = tiny_tove(use=[], clip_lr=1e-2, warmup_steps=1)
    before = {name: p.detach().clone() for name, p in model.clip.named_parameters()}
    trainer = bare_trainer(tmp_path, steps=2)
    trainer.fit(shake(model), datamodule=data())
    moved = {name for name, p in model.clip.named_parameters() if not torch.equal(p, before[name])}
    assert "model.embeddings.patch_embedding.weight" in moved
    assert not any("layers.1" in name or "post_layernorm" in name for name in moved)  # nothing reads them
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert any(key.startswith("clip.") for key in state)
