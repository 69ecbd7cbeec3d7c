"""MoVE-KD: its loss by hand, what trains in each stage, what a checkpoint holds and settings that cannot work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F

from tests.methods.helpers import (
    WIDTH,
    bare_trainer,
    noise_batch,
    tiny_experts,
    trained_names,
)
from tests.methods.movekd.helpers import (
    MOLE,
    PAPER,
    STAGE_1,
    MakeData,
    shaken,
    tiny_movekd,
    unit,
)
from tests.methods.test_training import KilledError, Recorder
from visexpert.errors import ConfigError
from visexpert.language import NoLanguage
from visexpert.methods import MoVEKD
from visexpert.tabletop.datamodule import TextSettings
from visexpert.types import Batch
from visexpert.vision import collect_routing

UNREAD = re.compile(r"^clip\.model\.(encoder\.layers\.2|post_layernorm)\.")


def kd_by_hand(model: MoVEKD, batch: Batch, *, released: bool) -> Tensor:
    """methods.md B1 and B2, one image and one teacher after the other."""
    images_BCHW = unit(batch)
    assert model.anchor is not None
    seen = model.anchor.attend(images_BCHW)
    student_BTD, experts = model.clip(images_BCHW).tokens_BTD, model.hub(replace(batch, split=""))
    total = torch.zeros(())
    for row in range(len(batch)):
        logits_HN = seen.logits_BHN[row]
        tokens_T = logits_HN.softmax(-1).mean(0)[1:].softmax(-1) if released else logits_HN[:, 1:].softmax(-1).mean(0)
        assert seen.tokens.cls_BD is not None
        cls_D = seen.tokens.cls_BD[row]
        targets = [model.distillation.heads[name].adapter(experts[name].tokens_BSE)[row] for name in model.hub.names]  # type: ignore[operator]
        scores = torch.stack([target_TD.mean(0) @ cls_D for target_TD in targets])
        shares = (scores if released else scores / len(cls_D) ** 0.5).softmax(0)
        targets.insert(0, seen.tokens.tokens_BTD[row])
        for weight, target_TD in zip([0.8, *(0.2 * shares)], targets, strict=True):
            error_T = (student_BTD[row] - target_TD).square().mean(-1)
            total = total + weight * ((error_T.mean() if released else 0) + tokens_T @ error_T)
    return total / len(batch)


def balance_by_hand(model: MoVEKD, batch: Batch) -> Tensor:
    with collect_routing(model.clip) as routing:
        model.clip(unit(batch))
    record = routing.record()
    assert record is not None
    losses = []
    for row in range(len(batch)):
        probs_NE, choice_N = record.probs_LBNE[:, row].flatten(0, 1), record.choice_LBN[:, row].flatten()
        losses.append(sum(probs_NE[:, e].mean() * (choice_N == e).float().mean() for e in range(probs_NE.shape[1])))
    return torch.stack(losses).mean()  # type: ignore[arg-type]


@pytest.mark.parametrize("convention", ["paper", "released"])
def test_the_loss_is_text_plus_distillation_plus_balance(convention: str) -> None:
    weights: dict[str, Any] = {"lm_weight": 0.7, "kd_weight": 0.5, "balance_weight": 0.3}
    model = shaken(tiny_movekd(convention=convention, **PAPER, **weights), std=0.05)
    model.setup("fit")
    model.train()
    batch = noise_batch()
    output = model.step(batch)
    assert batch.text is not None
    wanted_BN = batch.text.labels_BN != -100
    logits_MV = model.language(model.encode(batch), batch.text).logits_MV
    text = F.cross_entropy(logits_MV, batch.text.labels_BN[wanted_BN])
    kd, balance = kd_by_hand(model, batch, released=convention == "released"), balance_by_hand(model, batch)
    torch.testing.assert_close(output.parts["text_loss"], text)
    torch.testing.assert_close(output.parts["kd_loss"], kd, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.parts["balance_loss"], balance)
    torch.testing.assert_close(output.loss, 0.7 * text + 0.5 * kd + 0.3 * balance, rtol=1e-4, atol=1e-6)


def test_the_student_starts_as_clip_to_the_bit() -> None:
    model = tiny_movekd().eval()
    assert model.anchor is not None and model.clip.mole_layers() and not model.anchor.mole_layers()
    images_BCHW = unit(noise_batch())
    student, clip = model.clip(images_BCHW), model.anchor(images_BCHW)
    assert student.cls_BD is not None and clip.cls_BD is not None
    assert torch.equal(student.tokens_BTD, clip.tokens_BTD) and torch.equal(student.cls_BD, clip.cls_BD)
    released = tiny_movekd(mole={"init": "released"}).eval()
    assert not torch.equal(released.clip(images_BCHW).tokens_BTD, clip.tokens_BTD)


def stage_names(model: MoVEKD, stage: int) -> set[str]:
    """What the issue says: MoLE, adapters and projector; then all but the teachers (and what no gradient reaches)."""
    names = {name for name, _ in model.named_parameters()}
    if stage == 1:
        return {name for name in names if MOLE.match(name) or name.startswith(("distillation.", "projector."))}
    return {name for name in names if not name.startswith(("hub.", "anchor.")) and not UNREAD.match(name)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("alignment", ["to_student", "to_teacher", "fixed"])
def test_what_trains_in_a_stage_is_exact_and_nothing_else_gets_a_gradient(stage: int, alignment: str) -> None:
    model = shaken(tiny_movekd(alignment=alignment, **(STAGE_1 if stage == 1 else {})))
    model.setup("fit")
    model.train()
    expected = stage_names(model, stage)
    assert trained_names(model) == expected
    assert any(MOLE.match(name) for name in expected)
    model.step(noise_batch()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected
    # A bias of all keys shifts each row of scores alike, which the softmax does not see.
    still = [name for name, grad in gradients.items() if not grad.abs().max() > 0 and not name.endswith("k_proj.bias")]
    assert still == []


def test_a_router_that_nothing_teaches_and_parts_that_no_loss_reaches_stay_out() -> None:
    assert not any(".router." in name for name in trained_names(tiny_movekd(balance_weight=0.0)))
    scaled = tiny_movekd(balance_weight=0.0, mole={"router": "scaled"})
    assert any(".router." in name for name in trained_names(scaled))
    textless = tiny_movekd(lm_weight=0.0)
    assert not any(name.startswith(("language.", "projector.")) for name in trained_names(textless))
    textless.setup("fit")
    assert not any(p.requires_grad for part in (textless.language, textless.projector) for p in part.parameters())
    alone = tiny_movekd(kd_weight=0.0)
    assert not any(name.startswith("distillation.") for name in trained_names(alone))


def test_rates_of_the_groups() -> None:
    model = tiny_movekd(lr=1.0, clip_lr=2.0, mole_lr=3.0, language_lr=4.0)
    assert {group.name: group.lr for group in model.trained_groups()} == {
        "fusion": 1.0,
        "clip": 2.0,
        "mole": 3.0,
        "language": 4.0,
    }
    assert next(group.lr for group in tiny_movekd(lr=5.0).trained_groups() if group.name == "mole") == 5.0


def test_the_variance_of_the_student_is_logged_without_distillation_too() -> None:
    model, batch = tiny_movekd(kd_weight=0.0), noise_batch()
    tokens_BTD = model.clip(unit(batch)).tokens_BTD
    parts = model.step(batch).parts
    torch.testing.assert_close(parts["variance/student"], tokens_BTD.var(0).mean().detach())
    assert "kd_loss" not in parts


def test_no_teacher_is_in_a_checkpoint_or_needed_at_inference(tmp_path: Path, data: MakeData) -> None:
    model = tiny_movekd()
    trainer = bare_trainer(tmp_path, steps=1)
    trainer.fit(model, datamodule=data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    keys = set(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    assert keys == {key for key in model.state_dict() if not key.startswith(("hub.", "anchor."))}
    assert any(MOLE.match(key) for key in keys)

    def refuse(*_: Any) -> None:
        raise AssertionError("a teacher ran")

    for module in [model.anchor, *model.hub.experts.values()]:
        assert module is not None
        module.register_forward_hook(refuse)
    assert model.eval().encode(noise_batch()).tokens_BTD.shape == (2, 16, WIDTH)
    with pytest.raises(AssertionError, match="a teacher ran"):
        model.step(noise_batch())
    deployed = {id(p) for p in model.parameters()} - {id(p) for m in model.unused_modules() for p in m.parameters()}
    kept = {name.split(".")[0] for name, p in model.named_parameters() if id(p) in deployed}
    assert kept == {"clip", "projector", "language"}


def test_an_interrupted_run_ends_with_the_weights_of_one_never_interrupted(tmp_path: Path, data: MakeData) -> None:
    """MoLE's dropout, the targets' statistics and the start of the variances must go on as they would have."""

    def make() -> MoVEKD:
        return tiny_movekd(mole={"dropout": 0.2})

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, every_n_train_steps=2)

    whole = make()
    bare_trainer(tmp_path, steps=5).fit(whole, datamodule=data())
    with pytest.raises(KilledError):
        killed = [saving(), Recorder(die_after=3)]
        bare_trainer(tmp_path, steps=5, callbacks=killed).fit(make(), datamodule=data())
    second = shaken(make())
    bare_trainer(tmp_path, steps=5, callbacks=[saving()]).fit(
        second, datamodule=data(), ckpt_path="last", weights_only=True
    )
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not torch.equal(
        whole.clip.model.state_dict()["embeddings.class_embedding"],
        make().clip.model.state_dict()["embeddings.class_embedding"],
    )


@pytest.mark.parametrize("alignment", ["to_student", "to_teacher"])
def test_samples_without_an_image_take_no_part_in_distillation_and_balance(alignment: str) -> None:
    whole = noise_batch()
    first = replace(whole, images_BCHW=whole.images_BCHW[:1], index_B=whole.index_B[:1], text=None)
    mixed = replace(whole, has_image_B=torch.tensor([True, False]))
    options: dict[str, Any] = {"alignment": alignment, "tokens": "attention", "lm_weight": 0.0}

    def parts(batch: Batch) -> Mapping[str, Tensor]:
        model = shaken(tiny_movekd(**options))
        model.setup("fit")
        return model.train().step(batch).parts

    alone, masked = parts(first), parts(mixed)
    assert {"kd_loss", "balance_loss", "entropy/tokens"} <= masked.keys()
    torch.testing.assert_close(masked["kd_loss"], alone["kd_loss"])
    torch.testing.assert_close(masked["balance_loss"], alone["balance_loss"])
    torch.testing.assert_close(masked["entropy/tokens"], alone["entropy/tokens"])
    assert not torch.isclose(parts(whole)["kd_loss"], alone["kd_loss"])
    none = parts(replace(whole, has_image_B=torch.tensor([False, False])))
    assert none["kd_loss"] == 0 and none["balance_loss"] == 0


def test_distillation_without_a_language_model_trains_and_is_probed(tmp_path: Path, data: MakeData) -> None:
    model = tiny_movekd(language=NoLanguage(), lm_weight=0.0)
    before = model.clip.model.state_dict()["embeddings.class_embedding"].clone()
    trainer = bare_trainer(tmp_path, steps=2, limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None)
    source = data(texts=TextSettings(train={}), num_test=20)
    trainer.fit(model, datamodule=source)
    assert not torch.equal(before, model.clip.model.state_dict()["embeddings.class_embedding"])
    batch = noise_batch()
    assert torch.equal(model.eval().encode(batch).tokens_BTD, model.clip(unit(batch)).tokens_BTD)
    (scores,) = trainer.test(model, datamodule=source, verbose=False)
    assert scores and {name.split("/")[1] for name in scores} == {"probe"}


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"use": ["sematic"]},
        r"use names \['sematic'\], which are not among the experts \['depth', 'edges', 'semantic'\]",
    ),
    ({"kd_weight": -0.1}, "at least 0.*-0.1"),
    ({"lm_weight": 0.0, "kd_weight": 0.0}, "kd_weight or lm_weight above 0"),
    ({"language": NoLanguage()}, "NoLanguage reads no text; set lm_weight to 0"),
    ({"use": [], "clip_teacher_weight": None}, "there must be at least one"),
    ({"clip_teacher_weight": 1.5}, r"clip_teacher_weight is 1.5"),
    ({"teachers": "some"}, "teachers='some' is unknown; use one of attention, uniform, gate"),
    ({"tokens": "gate"}, "tokens='gate' is unknown; use one of attention, uniform"),
    ({"convention": "draft"}, "convention='draft' is unknown"),
    ({"alignment": "back"}, "alignment='back' is unknown"),
    ({"alignment": "fixed", "adapter": "mlp"}, "has no adapter='mlp'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(list(options)) for options, _ in BAD])
def test_settings_that_cannot_work_are_refused_before_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_movekd(**options)


def test_names_of_our_own_are_no_names_of_experts() -> None:
    for name in ("clip", "student"):
        with pytest.raises(ConfigError, match=f"'{name}'.*rename"):
            tiny_movekd(experts={name: tiny_experts()["edges"]})


def test_weights_that_compare_spaces_of_unlike_widths_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"\[CLS\] token, 16 wide, .* as wide as \{'semantic': 12.*; use to_student or"
    ):
        tiny_movekd(teachers="attention")
    tiny_movekd(teachers="attention", alignment="fixed")


def test_text_without_texts_is_refused() -> None:
    with pytest.raises(ConfigError, match="lm_weight is above 0, but there is no text"):
        tiny_movekd().step(replace(noise_batch(), text=None))


@pytest.mark.parametrize("form", [{}, PAPER])
def test_cached_teachers_give_the_loss_of_live_ones(tmp_path: Path, data: MakeData, form: Mapping[str, Any]) -> None:
    live, cached = Recorder(), Recorder()
    bare_trainer(tmp_path, steps=2, callbacks=[live]).fit(tiny_movekd(**form), datamodule=data())
    model = tiny_movekd(folder=str(tmp_path / "store"), dtype="float32", **form)
    assert model.anchor is not None
    teachers = [model.anchor, *(model.hub[name] for name in model.hub.names)]
    calls: list[int] = []
    for number, teacher in enumerate(teachers):
        teacher.register_forward_hook(lambda *_, number=number: calls.append(number))
    bare_trainer(tmp_path, steps=2, callbacks=[cached]).fit(model, datamodule=data())
    assert cached.losses == pytest.approx(live.losses, abs=1e-5)
    assert len(calls) == 2 * len(teachers)  # train and validation images: one batch of each; no step runs a teacher


@pytest.mark.parametrize("clip_lr", [0.0, 1e-3])
@pytest.mark.parametrize("depth", [3, 4])
def test_with_mole_behind_the_tokens_all_that_is_to_train_has_a_gradient_and_nothing_else(
    clip_lr: float, depth: int
) -> None:
    """The released form: what DDP would wait for is exactly what the balance loss reaches behind the tokens."""
    model = shaken(tiny_movekd(depth=depth, mole={"layers": "all"}, clip_lr=clip_lr))
    if depth == 4:
        model.clip.layer = -3  # two blocks behind: the first one's experts are read by the second one's router
    model.setup("fit")
    model.train()
    model.step(noise_batch()).loss.backward()
    trained = {id(p) for group in model.trained_groups() for m in group.modules for p in m.parameters()}
    own = {name: p for name, p in model.named_parameters() if name.split(".")[0] not in model.frozen_modules()}
    reached = {name for name, p in own.items() if p.grad is not None}
    assert reached == {name for name, p in own.items() if id(p) in trained and p.requires_grad}
    last = f"clip.model.encoder.layers.{depth - 1}.mlp"
    assert f"{last}.router.weight" in reached and not any(name.startswith(f"{last}.fc") for name in reached)


def test_mole_that_no_loss_reaches_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="behind the tokens, which only auxiliary.balance_weight reaches, and it is 0"
    ):
        tiny_movekd(mole={"layers": "all"}, balance_weight=0.0)
