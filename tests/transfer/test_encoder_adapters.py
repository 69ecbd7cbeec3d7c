"""Where student and teacher meet: sizes, which side learns, and what the targets look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.grids import resample_tokens
from visexpert.transfer.kd_heads import (
    Alignment,
    FixedHead,
    KDHead,
    KDPair,
    ReleasedAdapter,
    make_kd_head,
)
from visexpert.transfer.standardize import Standardize
from visexpert.types import ExpertTokens

CLIP: dict[str, Any] = {"clip_width": 8, "clip_grid": (3, 3)}


@dataclass
class Sizes:
    """All that a head asks of a teacher."""

    token_dim: int
    grid_hw: tuple[int, int]

    def tokens(self, batch: int = 2, shift: float = 5.0, scale: float = 3.0) -> ExpertTokens:
        count = self.grid_hw[0] * self.grid_hw[1]
        return ExpertTokens(torch.randn(batch, count, self.token_dim) * scale + shift, self.grid_hw)


WIDE, NARROW, TWIN = Sizes(12, (4, 4)), Sizes(5, (6, 6)), Sizes(8, (3, 3))
FORMS: list[tuple[Sizes, Alignment, str | None]] = [
    (TWIN, "raw", None),
    *((teacher, "to_student", kind) for teacher in (WIDE, NARROW) for kind in ("released", "linear", "mlp")),
    *((teacher, "to_teacher", kind) for teacher in (WIDE, NARROW) for kind in ("linear", "mlp")),
    *((teacher, "fixed", None) for teacher in (WIDE, NARROW)),
]


def make(teacher: Sizes, alignment: Alignment, adapter: Any = None, **options: Any) -> KDHead:
    return make_kd_head("eva", teacher, alignment=alignment, adapter=adapter, **CLIP, **options)


def student(batch: int = 2) -> Tensor:
    return torch.randn(batch, 9, 8, requires_grad=True)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("width", "side", "millions"), [(1024, 64, 3.41), (3072, 32, 3.74), (256, 64, 2.62)], ids=["eva", "convnext", "sam"]
)
def test_the_released_adapter_has_the_size_of_the_release(width: int, side: int, millions: float) -> None:
    with torch.device("meta"):
        head = make_kd_head("t", Sizes(width, (side, side)), clip_width=1024, clip_grid=(24, 24))
    assert round(count(head) / 1e6, 2) == millions


def test_the_released_adapter_is_channels_then_gelu_then_tokens() -> None:
    adapter = ReleasedAdapter(in_dim=5, in_tokens=6, out_dim=8, out_tokens=4)
    tokens_BSE = torch.randn(2, 6, 5)
    wide = torch.einsum("bse,de->bsd", tokens_BSE, adapter.channels.weight) + adapter.channels.bias
    wide = 0.5 * wide * (1 + torch.erf(wide / 2**0.5))
    expected = torch.einsum("bsd,ts->btd", wide, adapter.tokens.weight) + adapter.tokens.bias[:, None]
    torch.testing.assert_close(adapter(tokens_BSE), expected)


@pytest.mark.parametrize(("teacher", "alignment", "adapter"), FORMS)
def test_both_sides_meet_in_one_shape(teacher: Sizes, alignment: Alignment, adapter: str | None) -> None:
    head = make(teacher, alignment, adapter)
    pair = head(student(), teacher.tokens())
    assert isinstance(pair, KDPair)
    width = teacher.token_dim if alignment == "to_teacher" else 8
    assert pair.prediction_BTX.shape == pair.target_BTX.shape == (2, 9, width)


@pytest.mark.parametrize(("teacher", "alignment", "adapter"), FORMS)
def test_who_gets_gradient(teacher: Sizes, alignment: Alignment, adapter: str | None) -> None:
    head, student_BTD, tokens = make(teacher, alignment, adapter), student(), teacher.tokens()
    tokens.tokens_BSE.requires_grad_()
    pair = head(student_BTD, tokens)
    F.mse_loss(pair.prediction_BTX, pair.target_BTX).backward()
    assert student_BTD.grad is not None and student_BTD.grad.abs().max() > 0
    assert tokens.tokens_BSE.grad is None  # the teacher never does
    trained = alignment in ("to_student", "to_teacher")
    assert (count(head) > 0) == trained
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    assert pair.target_BTX.requires_grad == (alignment == "to_student")  # only there the target is trained, too
    assert (pair.prediction_BTX is student_BTD) == (alignment != "to_teacher")


def test_linear_adapters_map_resampled_tokens() -> None:
    head, tokens = make(WIDE, "to_student", "linear"), WIDE.tokens()
    moved = resample_tokens(tokens.tokens_BSE, (4, 4), (3, 3))
    weight, bias = head.get_parameter("adapter.weight"), head.get_parameter("adapter.bias")
    torch.testing.assert_close(head(student(), tokens).target_BTX, moved @ weight.T + bias)


def test_raw_is_the_teacher_itself_on_the_students_grid() -> None:
    tokens = TWIN.tokens()
    assert torch.equal(make(TWIN, "raw")(student(), tokens).target_BTX, tokens.tokens_BSE)
    larger = Sizes(8, (6, 6))
    tokens = larger.tokens()
    expected = resample_tokens(tokens.tokens_BSE, (6, 6), (3, 3))
    assert torch.equal(make(larger, "raw")(student(), tokens).target_BTX, expected)


@pytest.mark.parametrize("alignment", ["to_teacher", "fixed"])
def test_targets_are_standardized_and_settle_with_training(alignment: Alignment) -> None:
    teacher = Sizes(8, (3, 3))
    head = make(teacher, alignment)
    for _ in range(30):
        pair = head(student(32), teacher.tokens(32))
    means, variances = pair.target_BTX.mean((0, 1)), pair.target_BTX.var((0, 1))
    assert means.abs().max() < 0.2 and (variances - 1).abs().max() < 0.3
    tokens = teacher.tokens()
    before = head.eval()(student(), tokens).target_BTX
    head(student(), teacher.tokens(shift=100.0))  # nothing is learned in evaluation
    assert torch.equal(head(student(), tokens).target_BTX, before)
    alone = head(student(1), ExpertTokens(tokens.tokens_BSE[:1], (3, 3))).target_BTX
    torch.testing.assert_close(alone, before[:1])  # and a target does not depend on its batch


def test_statistics_are_the_mean_over_batches_and_travel_in_the_checkpoint() -> None:
    standardize = Standardize(2)
    batches = [torch.randn(4, 5, 2) * scale + shift for scale, shift in ((1.0, 3.0), (2.0, -1.0))]
    for batch in batches:
        last = standardize(batch)
    mean = torch.stack([batch.mean((0, 1)) for batch in batches]).mean(0)
    var = torch.stack([batch.flatten(0, 1).var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(last, (batches[1] - mean) / (var + 1e-5).sqrt())
    fresh = Standardize(2)
    fresh.load_state_dict(standardize.state_dict())
    torch.testing.assert_close(fresh.eval()(batches[1]), last)


def test_before_any_training_the_batch_standardizes_itself() -> None:
    out = Standardize(4).eval()(torch.randn(16, 9, 4) * 7 - 2)
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 1)), torch.ones(4), atol=1e-3, rtol=0)


def test_a_batch_without_tokens_leaves_the_statistics_alone() -> None:
    standardize = Standardize(4)
    assert standardize(torch.zeros(0, 9, 4)).shape == (0, 9, 4)
    assert int(standardize.statistics.state_dict()["num_batches_tracked"]) == 0


@pytest.mark.parametrize("teacher", [NARROW, TWIN, WIDE], ids=["narrower", "as wide", "wider"])
def test_the_fixed_map_is_orthogonal_seeded_and_saved(teacher: Sizes) -> None:
    head = make(teacher, "fixed")
    assert isinstance(head, FixedHead)
    gram = head.map_ED @ head.map_ED.T if teacher.token_dim <= 8 else head.map_ED.T @ head.map_ED
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=1e-5)
    same, other = make(teacher, "fixed"), make(teacher, "fixed", seed=1)
    named = make_kd_head("sam", teacher, alignment="fixed", **CLIP)
    assert torch.equal(same.get_buffer("map_ED"), head.map_ED)
    assert not torch.allclose(other.get_buffer("map_ED"), head.map_ED)
    assert not torch.allclose(named.get_buffer("map_ED"), head.map_ED)
    assert "map_ED" in head.state_dict()


def test_a_fixed_map_of_a_narrow_teacher_keeps_distances() -> None:
    head = make(NARROW, "fixed").train()
    tokens = NARROW.tokens()
    target = head(student(), tokens).target_BTX
    standardized = head.eval().get_submodule("standardize")(resample_tokens(tokens.tokens_BSE, (6, 6), (3, 3)))
    torch.testing.assert_close(torch.cdist(target, target), torch.cdist(standardized, standardized), atol=1e-4, rtol=0)


def test_statistics_go_on_as_those_of_batch_norm_after_loading_them() -> None:
    """What is loaded replaces the count of batches, too."""
    batches = [torch.randn(4, 5, 3) * scale + scale for scale in (1.0, 2.0, 4.0, 8.0)]
    reference, ours, other = nn.BatchNorm1d(3, affine=False, momentum=None), Standardize(3), Standardize(3)
    other(batches[3])
    for batch in batches[:2]:
        reference(batch.flatten(0, 1)), ours(batch)
    other.load_state_dict(ours.state_dict())
    reference(batches[2].flatten(0, 1)), other(batches[2])
    for key, value in reference.state_dict().items():
        assert torch.equal(other.statistics.state_dict()[key], value), key


def test_the_width_of_what_is_compared() -> None:
    assert make(WIDE, "to_teacher").width == 12
    assert {make(WIDE, alignment).width for alignment in ("to_student", "fixed")} == {8} == {make(TWIN, "raw").width}


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="'eva' has tokens of width 12, the student of 8, so they cannot be compared"):
        make(WIDE, "raw")
    head = make(WIDE, "to_student")
    with pytest.raises(ConfigError, match=r"teacher 'eva' got teacher tokens \(36, 5\) on grid \(6, 6\)"):
        head(student(), NARROW.tokens())
    with pytest.raises(ConfigError, match=r"student tokens \(4, 8\), but was built for \(16, 12\) on \(4, 4\)"):
        head(torch.randn(2, 4, 8), WIDE.tokens())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"alignment": "sideways"}, "alignment='sideways' is unknown; use one of raw, to_student, to_teacher, fixed"),
        ({"alignment": "to_teacher", "adapter": "released"}, "has no adapter='released'; use one of mlp, linear"),
        ({"alignment": "fixed", "adapter": "mlp"}, "has no adapter='mlp'; leave adapter out"),
        ({"alignment": "raw", "hidden_dim": 4}, "hidden_dim=4 needs adapter='mlp'"),
        ({"alignment": "to_student", "hidden_dim": 4}, "hidden_dim=4 needs adapter='mlp'"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(TWIN, **words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 1])
def test_a_batch_that_is_not_finite_teaches_nothing(bad: float, when: int) -> None:
    """``on_nan: skip`` passes over the step; the statistics must be those of the other batches alone."""
    batches = [torch.randn(4, 5, 3) * scale + scale for scale in (1.0, 2.0, 3.0)]
    sound, met = Standardize(3).train(), Standardize(3).train()
    for number, batch in enumerate(batches):
        sound(batch)
        if number == when:
            spoilt = torch.randn(4, 5, 3)
            spoilt[1, 2, 0] = bad
            met(spoilt)
        met(batch)
    for name, value in sound.state_dict().items():
        torch.testing.assert_close(met.state_dict()[name], value)
