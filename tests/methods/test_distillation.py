"""What distillation watches: variance across images, entropy of weights, and when either raises an alarm."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visexpert.methods.distillation import Distillation
from visexpert.transfer import make_kd_head
from visexpert.types import ExpertTokens, VisionTokens
from visexpert.vision import ClsAttention

GRID, WIDTH = (2, 2), 6


@dataclass
class Sized:
    token_dim: int = WIDTH
    grid_hw: tuple[int, int] = GRID


def distillation(*names: str, **options: Any) -> Distillation:
    """Raw heads: student and teachers live in one space."""
    heads: dict[str, nn.Module] = {
        name: make_kd_head(name, Sized(), clip_width=WIDTH, clip_grid=GRID, direction="raw") for name in names
    }
    settings = {
        "teacher_weighting": "uniform",
        "token_weighting": "uniform",
        "convention": "paper",
        "anchor_share": 0.8,
        "alarm_every": 1,
    }
    return Distillation(heads, **{**settings, **options})


def tokens(*, seed: int = 0, images: int = 4) -> Tensor:
    return torch.randn(images, 4, WIDTH, generator=torch.Generator().manual_seed(seed))


def said(clip_BTD: Tensor, cls_logits_BHN: Tensor | None = None) -> ClsAttention:
    if cls_logits_BHN is None:
        cls_logits_BHN = torch.zeros(len(clip_BTD), 2, 5)
    return ClsAttention(VisionTokens(clip_BTD, GRID, cls_BD=clip_BTD[:, 0]), cls_logits_BHN)


def run(module: Distillation, student_BTD: Tensor, teachers: dict[str, Tensor], **given: Any) -> dict[str, float]:
    experts = {name: ExpertTokens(value, GRID) for name, value in teachers.items()}
    watched = module(student_BTD, experts, given.pop("clip", None), **given).watched
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
    assert "entropy/teachers" not in run(distillation(*teachers, anchor_share=1.0), tokens(), teachers)
    assert "entropy/teachers" not in run(distillation("clip", "a"), tokens(), teachers)
    weighing = distillation(*teachers, teacher_weighting="attention")
    # [CLS] is ones: scores are 6 ln(3) / sqrt(6) apart at sqrt(6) / 6 per channel, weights 3/4 and 1/4.
    clip_BTD = torch.ones(4, 4, WIDTH)
    step = math.log(3) * WIDTH**0.5 / WIDTH
    given = {"clip": clip_BTD, "a": torch.full_like(clip_BTD, step), "b": torch.zeros_like(clip_BTD)}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert run(weighing, tokens(), given, clip=said(clip_BTD))["entropy/teachers"] == pytest.approx(entropy, abs=1e-5)


def test_entropy_is_that_of_samples_with_an_image() -> None:
    logits_BHN = torch.zeros(4, 2, 5)
    logits_BHN[2:, :, 1] = 50.0
    module = distillation("clip", token_weighting="attention")
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
    module = distillation("clip", "a", "b", teacher_weighting=weighting, token_weighting=weighting).train()
    same = tokens(seed=1)
    for _ in range(2):
        run(module, tokens(), {"clip": tokens(), "a": same, "b": same}, clip=said(tokens()))
    found = {record.message.split(" (")[0] for record in caplog.records}
    assert found == ({"Weights of teachers are uniform", "Weights of tokens are uniform"} if asked else set())
    assert len(caplog.records) == len(found)


def test_weights_that_leave_one_raise_an_alarm_and_those_between_do_not(caplog: pytest.LogCaptureFixture) -> None:
    module = distillation("clip", token_weighting="attention").train()
    logits_BHN = torch.zeros(4, 2, 5)
    logits_BHN[..., 1] = 1.0
    run(module, tokens(), {"clip": tokens()}, clip=said(tokens(), logits_BHN))
    assert not caplog.records
    run(module, tokens(), {"clip": tokens()}, clip=said(tokens(), 50 * logits_BHN))
    assert [record.message.split(" (")[0] for record in caplog.records] == ["Weights of tokens are collapsed onto one"]


def test_gates_stand_beside_the_anchor_wherever_it_stands() -> None:
    gates_BTK = torch.rand(4, 4, 2, generator=torch.Generator().manual_seed(3)).softmax(-1)
    teachers = {name: tokens(seed=seed) for seed, name in enumerate(("a", "clip", "b"), start=1)}
    errors = {name: (tokens() - value).square().mean(-1) for name, value in teachers.items()}
    a_BT, b_BT = gates_BTK.unbind(-1)
    expected = (0.2 * a_BT * errors["a"] + 0.8 * errors["clip"] + 0.2 * b_BT * errors["b"]).mean()
    module = distillation(*teachers, teacher_weighting="gate")
    experts = {name: ExpertTokens(value, GRID) for name, value in teachers.items()}
    torch.testing.assert_close(module(tokens(), experts, None, gates_BTK=gates_BTK).loss, expected)
    del teachers["clip"]
    expected = (a_BT * errors["a"] + b_BT * errors["b"]).mean()
    module = distillation(*teachers, teacher_weighting="gate")
    torch.testing.assert_close(module(tokens(), experts, None, gates_BTK=gates_BTK).loss, expected)
