"""What agglomeration adds to the loss of MoVE-KD, against its parts computed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.experts.tiny_models import CLIP_VISION
from tests.methods.helpers import bare_trainer, noise_batch, tiny_experts, trained_names
from tests.methods.movekd.helpers import shaken, tiny_movekd, unit
from visexpert.errors import ConfigError
from visexpert.experts import TransformersExpert
from visexpert.losses import relation_errors
from visexpert.methods import AgglomerationSettings, MoVEKD
from visexpert.methods.movekd.agglomeration import Agglomeration
from visexpert.tabletop import TabletopData
from visexpert.transfer import KDPair, PhiS
from visexpert.types import ExpertTokens

MakeData = Callable[..., TabletopData]
NAMES = ("clip", "dino", "sam")
WEIGHTS = torch.tensor([[0.2, 0.4, 0.4], [0.2, 0.4, 0.4]])
CLIP_TEACHER = {"model_type": "clip_vision_model", **CLIP_VISION, "hidden_size": 24}
ERRORS = torch.tensor([[0.1, 4.0, 1.0], [0.3, 2.0, 3.0]])


def built(**settings: Any) -> Agglomeration:
    widths = {"clip": 6, "dino": 5}
    made = AgglomerationSettings(**settings)
    return Agglomeration(NAMES, made, summary_widths=widths, student_width=6, anchor="clip").train()


def added(module: Agglomeration, errors_BK: Tensor = ERRORS, **given: Any) -> tuple[float, dict[str, float]]:
    blank = torch.zeros(len(errors_BK), 2, 6)
    pairs = given.pop("pairs", {name: KDPair(blank, blank) for name in NAMES})
    teachers = given.pop("teachers", {name: ExpertTokens(blank, (1, 2)) for name in NAMES})
    found = module(errors_BK, WEIGHTS, pairs, summary_BD=given.get("summary_BD"), teachers=teachers)
    return float(found.loss), {name: float(value) for name, value in found.watched.items()}


def kd_parts(model: MoVEKD, *, train: bool = True) -> dict[str, float]:
    return {name: float(value) for name, value in model.train(train).step(noise_batch()).parts.items()}


def test_without_settings_nothing_is_added() -> None:
    model = tiny_movekd()
    assert model.distillation.agglomeration is None
    assert not AgglomerationSettings().adds
    assert not [name for name in model.state_dict() if "agglomeration" in name]


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
def test_relations_are_added_by_the_weights_of_teachers(form: str) -> None:
    plain = kd_parts(shaken(tiny_movekd()))
    related = kd_parts(shaken(tiny_movekd(relations=2.0, relation_form=form)))
    by_teacher = sum(related[f"weight/{name}"] * related[f"relation/{name}"] for name in ("clip", *HUB))
    assert by_teacher > 0.01
    assert related["kd_loss"] == pytest.approx(plain["kd_loss"] + 2.0 * by_teacher, rel=1e-5)


HUB = ("semantic", "depth", "edges")


def test_relations_compare_predictions_with_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = {name: KDPair(*torch.randn(2, 2, 4, 6, generator=generator).unbind()) for name in NAMES}
    _, watched = added(built(relations=1.0), pairs=pairs)
    for name, pair in pairs.items():
        expected = float(relation_errors(pair.prediction_BTX, pair.target_BTX).mean())
        assert watched[f"relation/{name}"] == pytest.approx(expected)


def test_clips_summary_is_its_frozen_cls_token() -> None:
    model, batch = shaken(tiny_movekd(summary=0.5)), noise_batch()
    plain, summed = kd_parts(shaken(tiny_movekd())), kd_parts(model)
    assert model.anchor is not None
    ours, theirs = (clip(unit(batch)).cls_BD for clip in (model.clip, model.anchor))
    assert ours is not None and theirs is not None
    expected = float((1 - F.cosine_similarity(ours, theirs, dim=-1)).mean().detach())
    assert expected > 1e-3 and summed["summary/clip"] == pytest.approx(expected, rel=1e-4)
    assert summed["kd_loss"] == pytest.approx(plain["kd_loss"] + 0.5 * 0.3 * expected, rel=1e-5)


def test_an_experts_summary_is_read_through_a_head_that_trains() -> None:
    module = built(summary=1.0)
    assert list(module.summary_heads) == ["dino"]  # clip's is compared as it is, sam has none
    summary = {"clip": torch.randn(2, 6), "dino": torch.randn(2, 5)}
    student = torch.randn(2, 6)
    teachers = {name: ExpertTokens(torch.zeros(2, 2, 6), (1, 2), summary_BF=summary.get(name)) for name in NAMES}
    loss, watched = added(module, ERRORS * 0, teachers=teachers, summary_BD=student)
    head = module.summary_heads["dino"](student)
    expected = float((1 - F.cosine_similarity(head, summary["dino"], dim=-1)).mean().detach())
    assert watched["summary/dino"] == pytest.approx(expected) and "summary/sam" not in watched
    assert loss == pytest.approx(0.2 * watched["summary/clip"] + 0.4 * expected, rel=1e-5)


def test_a_summary_that_no_teacher_has_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"summary=1\.0.*semantic.*clip_teacher_weight"):
        tiny_movekd(summary=1.0, clip_teacher_weight=None)


def test_experts_of_a_library_bring_their_summary(tmp_path: Path) -> None:
    teachers = {"semantic": tiny_experts()["semantic"], "wide": TransformersExpert(config=CLIP_TEACHER)}
    model = shaken(tiny_movekd(experts=teachers, clip_teacher_weight=None, summary=0.5))
    parts = kd_parts(model)
    assert "summary/semantic" not in parts
    theirs = model.hub["wide"](unit(noise_batch())).summary_BF
    ours = model.clip(unit(noise_batch())).cls_BD
    assert theirs is not None and model.distillation.agglomeration is not None
    predicted = model.distillation.agglomeration.summary_heads["wide"](ours)
    expected = float((1 - F.cosine_similarity(predicted, theirs, dim=-1)).mean().detach())
    assert parts["summary/wide"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match=r"summary=0\.5.*store"):
        tiny_movekd(experts=teachers, clip_teacher_weight=None, summary=0.5, folder=str(tmp_path))


def test_a_store_without_summaries_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'dino'.*store\.folder"):
        teachers = {name: ExpertTokens(torch.zeros(2, 2, 6), (1, 2)) for name in NAMES}
        teachers["clip"] = ExpertTokens(torch.zeros(2, 2, 6), (1, 2), summary_BF=torch.ones(2, 6))
        added(built(summary=1.0), teachers=teachers, summary_BD=torch.ones(2, 6))


def test_dropping_keeps_the_worst_expert_and_the_anchor() -> None:
    """By hand: images keep dino (4) and sam (3), which take the experts' whole weight of .8; CLIP keeps its .2."""
    loss, watched = added(built(drop=1.0))
    assert loss == pytest.approx(((0.2 * 0.1 + 0.8 * 4) + (0.2 * 0.3 + 0.8 * 3)) / 2)
    assert watched == {"kept/dino": 0.5, "kept/sam": 0.5}


def test_balancing_makes_the_experts_weigh_alike_and_leaves_the_anchor() -> None:
    """By hand: means 3 and 2, so factors 2.5 / 3 and 2.5 / 2; the next step's means move by a tenth."""
    module = built(balance="running_mean", balance_momentum=0.9)
    loss, watched = added(module)
    assert watched == pytest.approx({"share/dino": 2.5 / 3, "share/sam": 2.5 / 2})
    assert loss == pytest.approx(0.2 * 0.2 + 0.4 * 2.5 + 0.4 * 2.5)
    _, watched = added(module, ERRORS * 2)
    assert watched["share/dino"] / watched["share/sam"] == pytest.approx(2 / 3)
    assert float(module.get_buffer("mean_loss_dino")) == pytest.approx(0.9 * 3 + 0.1 * 6)
    assert "mean_loss_clip" not in dict(module.named_buffers())


def test_a_step_that_is_not_finite_leaves_the_running_means() -> None:
    module = built(balance="running_mean")
    added(module)
    added(module, ERRORS * torch.nan)
    assert float(module.get_buffer("mean_loss_sam")) == 2.0


def test_validation_neither_drops_nor_balances() -> None:
    module = built(balance="running_mean", drop=1.0)
    added(module)
    loss, watched = added(module.eval(), ERRORS)
    assert loss == pytest.approx(float((ERRORS * WEIGHTS).sum(1).mean())) and not watched
    assert float(module.get_buffer("mean_loss_sam")) == 2.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"relations": -1.0}, "relations"),
        ({"drop": 1.5}, "drop"),
        ({"balance": "uncertainty"}, "uncertainty"),
        ({"relation_form": "both"}, "both"),
        ({"balance_momentum": 1.0}, "balance_momentum"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        AgglomerationSettings(**settings)


def test_gates_by_token_and_agglomeration_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="gate.*agglomeration"):
        tiny_movekd(teachers="gate", drop=0.5)


def test_a_run_measures_phi_s_on_training_images_and_saves_it(tmp_path: Path, data: MakeData) -> None:
    model = tiny_movekd(standardize="phi_s", use=["semantic", "depth"], balance="running_mean", drop=0.5, summary=1.0)
    assert any(name.startswith("distillation.heads") for name in trained_names(model))
    trainer = bare_trainer(tmp_path, steps=2)
    trainer.fit(model, datamodule=data())
    head = model.distillation.heads["semantic"]
    phi_s = head.standardize
    assert isinstance(phi_s, PhiS)
    images = data()
    images.prepare_data()
    images.setup("fit")
    source = images.image_sources()["train"]
    tokens = model.hub["semantic"](source.read(range(len(source))).float() / 255)
    resampled = head.resampled(tokens).flatten(0, 1)  # type: ignore[operator]
    torch.testing.assert_close(phi_s.mean_E, resampled.mean(0), atol=1e-4, rtol=1e-3)  # of all 16, not of a batch of 4
    assert float(phi_s.scale) == pytest.approx(float(resampled.var(0, correction=0).mean().rsqrt()), rel=1e-3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert bool(state["distillation.heads.semantic.standardize.fitted"])
    assert float(state["distillation.agglomeration.mean_loss_depth"]) > 0
