"""What distillation watches: variance across images, entropy of weights, and when either raises an alarm."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visexpert.errors import DataError
from visexpert.methods.movekd.distillation import Distillation, Distilled
from visexpert.methods.settings import WeightingSettings
from visexpert.transfer import Alignment, make_kd_head
from visexpert.types import ExpertTokens, VisionTokens, imaged
from visexpert.vision import Saliency

GRID, WIDTH = (2, 2), 6
SETTINGS: dict[str, Any] = {
    "teachers": "uniform",
    "tokens": "uniform",
    "convention": "paper",
    "clip_teacher_weight": 0.8,
}


@dataclass
class Sized:
    token_dim: int = WIDTH
    grid_hw: tuple[int, int] = GRID


def distillation(*names: str, **options: Any) -> Distillation:
    """Raw heads: student and teachers live in one space."""
    heads: dict[str, nn.Module] = {
        name: make_kd_head(name, Sized(), clip_width=WIDTH, clip_grid=GRID, alignment="raw") for name in names
    }
    every = options.pop("alarm_every", 1)
    return Distillation(heads, WeightingSettings(**{**SETTINGS, **options}), alarm_every=every)


def tokens(*, seed: int = 0, images: int = 4) -> Tensor:
    return torch.randn(images, 4, WIDTH, generator=torch.Generator().manual_seed(seed))


def said(clip_BTD: Tensor, cls_logits_BHN: Tensor | None = None) -> Saliency:
    if cls_logits_BHN is None:
        cls_logits_BHN = torch.zeros(len(clip_BTD), 2, 5)
    return Saliency(VisionTokens(clip_BTD, GRID, cls_BD=clip_BTD[:, 0]), cls_logits_BHN)


def distil(module: Distillation, student_BTD: Tensor, teachers: dict[str, Tensor], **given: Any) -> Distilled:
    experts = {name: ExpertTokens(value, GRID) for name, value in teachers.items()}
    distilled: Distilled = module(student_BTD, experts, given.pop("clip", None), **given)
    return distilled


def run(module: Distillation, student_BTD: Tensor, teachers: dict[str, Tensor], **given: Any) -> dict[str, float]:
    watched = distil(module, student_BTD, teachers, **given).watched
    return {name: float(value) for name, value in watched.items()}


@pytest.mark.parametrize(("share", "alarms"), [(0.34, 0), (0.33, 1), (0.01, 1)])
def test_variance_under_a_third_of_its_start_raises_one_alarm(
    share: float, alarms: int, caplog: pytest.LogCaptureFixture
) -> None:
    module, clip_BTD = distillation("clip").train(), tokens(seed=1)
    for scale in (1.0, share**0.5, share**0.5):
        run(module, scale * tokens() + 5.0, {"clip": clip_BTD})  # the constant part does not count
    found = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(found) == alarms
    assert all(message.startswith("Variance of student's tokens across images fell") for message in found)


@pytest.mark.parametrize(("share", "alarms"), [(0.34, 0), (0.33, 1)])
def test_fixed_maps_give_the_student_their_scale_which_raises_no_alarm(
    share: float, alarms: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Standardized targets vary less than CLIP's tokens: following them is no collapse, falling below them is."""
    clip_BTD, depth_BTD = 3 * tokens(seed=1), tokens(seed=2)
    alignments: dict[str, Alignment] = {"clip": "raw", "depth": "fixed"}
    heads = {
        name: make_kd_head(name, Sized(), clip_width=WIDTH, clip_grid=GRID, alignment=alignment)
        for name, alignment in alignments.items()
    }
    module = Distillation(heads, WeightingSettings(**{**SETTINGS, "clip_teacher_weight": 0.2}), alarm_every=1).train()
    given = {"clip": clip_BTD, "depth": depth_BTD}
    target_BTD = heads["depth"](clip_BTD, ExpertTokens(depth_BTD, GRID)).target_BTX
    asked_BTD = 0.2 * clip_BTD + 0.8 * target_BTD
    assert asked_BTD.var(0).mean() < clip_BTD.var(0).mean() / 3
    for student_BTD in (clip_BTD, asked_BTD, share**0.5 * asked_BTD):
        run(module, student_BTD, given)
    assert [record.message.split("'")[0] for record in caplog.records] == ["Variance of student"] * alarms


def test_alarms_wait_for_their_turn(caplog: pytest.LogCaptureFixture) -> None:
    module, clip_BTD = distillation("clip", alarm_every=3).train(), tokens(seed=1)
    counts = []
    for scale in (1.0, 0.1, 0.1, 0.1):
        run(module, scale * tokens(), {"clip": clip_BTD})
        counts.append(len(caplog.records))
    assert counts == [0, 0, 0, 1]


def test_targets_are_watched_as_the_student_is_and_evaluation_is_not(caplog: pytest.LogCaptureFixture) -> None:
    module = distillation("clip", "depth").train()
    run(module, tokens(), {"clip": tokens(seed=1), "depth": tokens(seed=2)})
    run(module.eval(), 0 * tokens(), {"clip": tokens(seed=1), "depth": 0.1 * tokens(seed=2)})
    assert not caplog.records
    run(module.train(), tokens(), {"clip": tokens(seed=1), "depth": 0.1 * tokens(seed=2)})
    assert [record.message.split("'")[0] for record in caplog.records] == ["Variance of depth"]


def test_the_start_is_the_first_batch_with_two_images_and_travels_with_the_weights() -> None:
    module = distillation("clip").train()
    one = torch.tensor([True, False, False, False])
    assert math.isnan(run(module, tokens(), {"clip": tokens()}, has_image_B=one)["variance/student"])
    assert module.get_buffer("variance_start_student").isnan()
    run(module, 2 * tokens(), {"clip": tokens()})
    run(module, tokens(), {"clip": tokens()})
    torch.testing.assert_close(module.get_buffer("variance_start_student"), 4 * tokens().var(0).mean())
    other = distillation("clip", "depth")
    other.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(other.get_buffer("variance_start_student"), module.get_buffer("variance_start_student"))
    assert other.get_buffer("variance_start_depth").isnan()
    module.forget_start()
    assert module.get_buffer("variance_start_student").isnan()


def test_entropy_of_teachers_leaves_out_the_share_that_is_fixed() -> None:
    """With CLIP at .8 the entropy of all weights could never come near that of uniform ones."""
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(("clip", "a", "b"))}
    assert run(distillation(*teachers), tokens(), teachers)["entropy/teachers"] == pytest.approx(1.0)
    assert "entropy/teachers" not in run(distillation(*teachers, clip_teacher_weight=1.0), tokens(), teachers)
    assert "entropy/teachers" not in run(distillation("clip", "a"), tokens(), teachers)
    weighing = distillation(*teachers, teachers="attention")
    # [CLS] is ones: scores are 6 ln(3) / sqrt(6) apart at sqrt(6) / 6 per channel, weights 3/4 and 1/4.
    clip_BTD = torch.ones(4, 4, WIDTH)
    step = math.log(3) * WIDTH**0.5 / WIDTH
    given = {"clip": clip_BTD, "a": torch.full_like(clip_BTD, step), "b": torch.zeros_like(clip_BTD)}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert run(weighing, tokens(), given, clip=said(clip_BTD))["entropy/teachers"] == pytest.approx(entropy, abs=1e-5)


def test_entropy_is_that_of_samples_with_an_image() -> None:
    logits_BHN = torch.zeros(4, 2, 5)
    logits_BHN[2:, :, 1] = 50.0
    module = distillation("clip", tokens="attention")
    first = torch.tensor([True, True, False, False])
    watched = run(module, tokens(), {"clip": tokens()}, clip=said(tokens(), logits_BHN), has_image_B=first)
    assert watched["entropy/tokens"] == pytest.approx(1.0)
    watched = run(module, tokens(), {"clip": tokens()}, clip=said(tokens(), logits_BHN), has_image_B=~first)
    assert watched["entropy/tokens"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("asked", [True, False])
def test_uniform_weights_raise_an_alarm_only_where_others_were_asked_for(
    asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    weighting = "attention" if asked else "uniform"
    module = distillation("clip", "a", "b", teachers=weighting, tokens=weighting).train()
    same = tokens(seed=1)
    for _ in range(2):
        run(module, tokens(), {"clip": tokens(), "a": same, "b": same}, clip=said(tokens()))
    found = {record.message.split(" (")[0] for record in caplog.records}
    assert found == ({"Weights of teachers are uniform", "Weights of tokens are uniform"} if asked else set())
    assert len(caplog.records) == len(found)


def test_weights_that_leave_one_raise_an_alarm_and_those_between_do_not(caplog: pytest.LogCaptureFixture) -> None:
    module = distillation("clip", tokens="attention").train()
    logits_BHN = torch.zeros(4, 2, 5)
    logits_BHN[..., 1] = 1.0
    for _ in range(2):
        run(module, tokens(), {"clip": tokens()}, clip=said(tokens(), logits_BHN))
    assert not caplog.records
    run(module, tokens(), {"clip": tokens()}, clip=said(tokens(), 50 * logits_BHN))
    assert [record.message.split(" (")[0] for record in caplog.records] == ["Weights of tokens are collapsed onto one"]


def test_teachers_that_leave_one_raise_an_alarm(caplog: pytest.LogCaptureFixture) -> None:
    module = distillation("clip", "a", "b", teachers="attention").train()
    clip_BTD = torch.ones(4, 4, WIDTH)
    for _ in range(2):
        run(module, tokens(), {"clip": clip_BTD, "a": 9 * clip_BTD, "b": -clip_BTD}, clip=said(clip_BTD))
    found = [record.message.split(" (")[0] for record in caplog.records]
    assert "Weights of teachers are collapsed onto one" in found


def test_weights_at_the_very_start_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """Fresh adapters give tokens near zero, which no [CLS] token tells apart."""
    module, same = distillation("clip", "a", "b", teachers="attention").train(), tokens(seed=1)
    run(module, tokens(), {"clip": tokens(), "a": same, "b": same}, clip=said(tokens()))
    assert not caplog.records


def test_weights_are_logged_by_teacher_and_so_is_the_heaviest_token() -> None:
    step = math.log(3) * WIDTH**0.5 / WIDTH  # weights 3/4 and 1/4, as above
    clip_BTD = torch.ones(4, 4, WIDTH)
    given = {"a": torch.full_like(clip_BTD, step), "clip": clip_BTD, "b": torch.zeros_like(clip_BTD)}
    logits_BHN = torch.zeros(4, 2, 5)
    logits_BHN[:2, :, 1] = math.log(3)  # of four tokens the first has 3 / 6 in two of four images
    module = distillation(*given, teachers="attention", tokens="attention")
    watched = run(module, tokens(), given, clip=said(clip_BTD, logits_BHN))
    found = [watched[f"weight/{name}"] for name in given]
    assert found == pytest.approx([0.2 * 0.75, 0.8, 0.2 * 0.25], abs=1e-5)
    assert watched["peak/tokens"] == pytest.approx((2.0 + 1.0) / 2)
    first = torch.tensor([True, False, False, False])
    watched = run(module, tokens(), given, clip=said(clip_BTD, logits_BHN), has_image_B=first)
    assert watched["peak/tokens"] == pytest.approx(2.0)
    assert "peak/tokens" not in run(distillation("clip"), tokens(), {"clip": tokens()})


def test_gates_are_logged_as_their_mean_over_tokens() -> None:
    gates_BTK = torch.rand(4, 4, 2, generator=torch.Generator().manual_seed(3)).softmax(-1)
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(("clip", "a", "b"))}
    watched = run(distillation(*teachers, teachers="gate"), tokens(), teachers, gates_BTK=gates_BTK)
    expected = [0.8, *(0.2 * gates_BTK.mean((0, 1))).tolist()]
    assert [watched[f"weight/{name}"] for name in teachers] == pytest.approx(expected)


@pytest.mark.parametrize("convention", ["paper", "released"])
def test_distances_are_plain_errors_in_evaluation_alone(convention: str) -> None:
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(("clip", "a", "b"), start=1)}
    module = distillation(*teachers, tokens="attention", convention=convention)
    some = torch.tensor([True, True, False, True])
    given: dict[str, Any] = {"clip": said(tokens(), torch.randn(4, 2, 5)), "has_image_B": some}
    assert not distil(module.train(), tokens(), teachers, **given).distances
    given = {"clip": said(tokens(), torch.randn(4, 2, 5)), "has_image_B": some}
    distances = distil(module.eval(), tokens(), teachers, **given).distances
    for name, value in teachers.items():
        torch.testing.assert_close(distances[name], (tokens() - value)[some].square().mean())
    plain = distil(distillation(*teachers).eval(), tokens(), teachers)
    shares = {"clip": 0.8, "a": 0.1, "b": 0.1}
    expected = sum(share * plain.distances[name] for name, share in shares.items())
    torch.testing.assert_close(plain.loss, expected)


NOT_FINITE = "Teacher 'a' gave tokens that are NaN or infinite; look at its weights"


def spoilt(value: float = math.nan) -> dict[str, Tensor]:
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(("clip", "a", "b"))}
    teachers["a"][3, 2, 1] = value
    return teachers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_that_is_not_finite_is_named(training: bool, value: float) -> None:
    module = distillation("clip", "a", "b").train(training)
    with pytest.raises(DataError, match=NOT_FINITE):
        distil(module, tokens(), spoilt(value))
    without = torch.tensor([True, True, True, False])
    with pytest.raises(DataError, match=NOT_FINITE):  # masked, too
        distil(module, tokens(), spoilt(value), has_image_B=without)


def test_tokens_that_are_not_finite_are_remembered_until_the_next_look() -> None:
    def after_one() -> Distillation:
        module = distillation("clip", "a", "b", alarm_every=3).train()
        distil(module, tokens(), {**spoilt(), "a": tokens()})
        distil(module, tokens(), spoilt())
        return module

    sound = {**spoilt(), "a": tokens()}
    module = after_one()
    distil(module, tokens(), sound)
    with pytest.raises(DataError, match=NOT_FINITE):
        distil(module, tokens(), sound)
    distil(module, tokens(), sound)  # told once
    module = after_one()
    module.eval()
    distil(module, tokens(), sound)  # an evaluation looks at its own
    with pytest.raises(DataError, match=NOT_FINITE):
        module.check_finite()
    module.check_finite()
    with pytest.raises(DataError, match="Teacher 'clip' and 'b' gave"):
        both = {name: math.nan * value if name != "a" else value for name, value in sound.items()}
        distil(distillation(*both).train(), tokens(), both)


def test_large_half_precision_tokens_are_not_mistaken_for_infinite() -> None:
    large = torch.full((4, 4, WIDTH), 6e4, dtype=torch.float16)
    assert math.isfinite(run(distillation("clip"), tokens(), {"clip": large})["variance/clip"])


ALIGNMENTS: dict[str, Alignment] = {"clip": "raw", "a": "to_teacher", "b": "fixed", "c": "to_student"}


def test_between_looks_nothing_waits_for_the_device() -> None:
    """Tensors of the meta device have no values: whatever asks for one raises."""
    heads: dict[str, nn.Module] = {
        name: make_kd_head(name, Sized(), clip_width=WIDTH, clip_grid=GRID, alignment=alignment)
        for name, alignment in ALIGNMENTS.items()
    }
    weighting = WeightingSettings(
        teachers="attention", tokens="attention", convention="released", clip_teacher_weight=0.3
    )
    module = Distillation(heads, weighting).train()
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(heads)}
    run(module, tokens(), teachers, clip=said(tokens()))  # the first step looks
    module.to("meta")
    module._finite = {}
    distilled = distil(
        module,
        tokens().to("meta"),
        {name: value.to("meta") for name, value in teachers.items()},
        clip=said(tokens().to("meta"), torch.zeros(4, 2, 5, device="meta")),
    )
    assert distilled.loss.is_meta and len(distilled.watched) == 5 + 2 + 4 + 1
    with pytest.raises(RuntimeError, match="meta"):
        module.check_finite()


def test_gates_stand_beside_the_anchor_wherever_it_stands() -> None:
    gates_BTK = torch.rand(4, 4, 2, generator=torch.Generator().manual_seed(3)).softmax(-1)
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(("a", "clip", "b"), start=1)}
    errors = {name: (tokens() - value).square().mean(-1) for name, value in teachers.items()}
    a_BT, b_BT = gates_BTK.unbind(-1)
    expected = (0.2 * a_BT * errors["a"] + 0.8 * errors["clip"] + 0.2 * b_BT * errors["b"]).mean()
    module = distillation(*teachers, teachers="gate")
    experts = {name: ExpertTokens(value, GRID) for name, value in teachers.items()}
    torch.testing.assert_close(module(tokens(), experts, None, gates_BTK=gates_BTK).loss, expected)
    del teachers["clip"]
    expected = (a_BT * errors["a"] + b_BT * errors["b"]).mean()
    module = distillation(*teachers, teachers="gate")
    torch.testing.assert_close(module(tokens(), experts, None, gates_BTK=gates_BTK).loss, expected)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_adapters_get_the_gradient_of_the_released_code(scale: float) -> None:
    """The released formulas, written down again: softmax of <cls, z> with a graph, flattened where one dominates."""
    sizes = Sized()
    alignments: dict[str, Alignment] = {"clip": "raw", "eva": "to_student", "sam": "to_student"}
    heads = {
        name: make_kd_head(name, sizes, clip_width=WIDTH, clip_grid=GRID, alignment=alignment).double()
        for name, alignment in alignments.items()
    }
    options = {"clip_teacher_weight": 0.8, "convention": "released", "teachers": "attention"}
    weighting = WeightingSettings(**{**SETTINGS, **options, "detach": False})
    module = Distillation(heads, weighting, alarm_every=1).double().train()
    given = {name: scale * tokens(seed=seed).double() for seed, name in enumerate(heads, start=1)}
    student_BTD = tokens(seed=9).double()
    clip = said(given["clip"])
    distil(module, student_BTD, given, clip=clip).loss.backward()
    trained = [p for p in module.heads.parameters() if p.requires_grad]
    found = [p.grad for p in trained]

    cls_BD = clip.tokens.cls_BD
    assert cls_BD is not None
    z = {name: heads[name].adapter(given[name]) for name in ("eva", "sam")}  # type: ignore[operator]
    scores_BU = torch.stack([(cls_BD[:, None] * z[name]).sum(-1).mean(1) for name in z], dim=1)
    u_BU = torch.softmax(scores_BU, dim=1)
    if u_BU.mean(0).max() > 0.8:
        u_BU = torch.softmax(u_BU + 0.2, dim=1)
    errors = [((student_BTD - target) ** 2).mean(-1).mean(1) for target in (given["clip"], *z.values())]
    loss = (0.8 * errors[0] + 0.2 * (u_BU * torch.stack(errors[1:], dim=1)).sum(1)).mean()
    expected = torch.autograd.grad(loss, trained)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("how", ["uniform", "attention", "gate"])
def test_samples_without_an_image_count_as_if_they_were_not_there(how: str) -> None:
    """Neither loss, logs and gradients nor the statistics that standardize a teacher depend on them."""
    there = torch.tensor([True, False, True, True])
    clip, gates_BTK = said(tokens(seed=2), torch.randn(4, 2, 5)), torch.rand(4, 4, 1).softmax(-1)
    found = []
    for masked in (True, False):
        torch.manual_seed(0)
        alignment: Alignment = "fixed" if how == "attention" else "to_teacher"
        sizes: dict[str, Any] = {"clip_width": WIDTH, "clip_grid": GRID}
        heads: dict[str, nn.Module] = {
            "clip": make_kd_head("clip", Sized(), alignment="raw", **sizes),
            "a": make_kd_head("a", Sized(), alignment=alignment, **sizes),
        }
        weighting = WeightingSettings(**{**SETTINGS, "teachers": how, "tokens": "attention"})
        module = Distillation(heads, weighting, alarm_every=5).train()
        rows = slice(None) if masked else there
        student_BTD = tokens()[rows].requires_grad_()
        seen = clip if masked else clip.mapped(partial(imaged, has_image_B=there))
        given = {"has_image_B": there if masked else None, "gates_BTK": gates_BTK[rows] if how == "gate" else None}
        teachers = {"clip": tokens(seed=1)[rows], "a": tokens(seed=3)[rows]}
        distilled = distil(module, student_BTD, teachers, clip=seen, **given)
        distilled.loss.backward()
        assert student_BTD.grad is not None
        gradient = student_BTD.grad[there] if masked else student_BTD.grad
        found.append((distilled.loss, distilled.watched, gradient, module.state_dict()))
    torch.testing.assert_close(*found)
