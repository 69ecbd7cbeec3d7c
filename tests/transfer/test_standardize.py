"""PHI-S: what the paper says of it, against numpy and by hand, and where its statistics come from."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.transfer.kd_heads import Alignment, FixedHead, ToTeacherHead, make_kd_head
from visexpert.transfer.standardize import PhiS, Standardize, hadamard

WIDTHS_OF_VITS = (192, 384, 768, 1024, 1152, 1280, 1408, 1664)


def tokens(width: int = 12, *, images: int = 64, seed: int = 0) -> Tensor:
    """Correlated channels of very different variance, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, 2, width)
    return torch.randn(images, 9, width, generator=generator) @ mix + 300.0


def fitted(width: int = 12) -> PhiS:
    phi_s = PhiS(width)
    phi_s.fit(tokens(width).split(16))
    return phi_s.eval()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 48, 64, 80, 96])
def test_hadamard_is_orthogonal_with_entries_of_one_size(size: int) -> None:
    found = hadamard(size).numpy()
    np.testing.assert_allclose(found @ found.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(found), size**-0.5)


def test_the_widths_of_vision_transformers_have_one() -> None:
    for width in WIDTHS_OF_VITS:
        row = hadamard(width)[1]
        assert float(row.square().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("width", [3, 6, 13, 50])
def test_a_width_without_one_is_refused_when_the_head_is_built(width: int) -> None:
    with pytest.raises(ConfigError, match=rf"{width} channels.*channel"):
        PhiS(width)


def test_each_channel_has_mean_0_and_variance_1() -> None:
    out = fitted()(tokens()).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(12), atol=1e-3, rtol=0)


def test_the_map_is_orthogonal_up_to_one_scale_and_standardizing_channels_is_not() -> None:
    phi_s, channel = fitted(), Standardize(12).train()
    channel(tokens())
    pairs = torch.randperm(64 * 9, generator=torch.Generator().manual_seed(1)).view(-1, 2).T
    rows = tokens().flatten(0, 1)

    def stretch(out_BTE: Tensor) -> Tensor:
        out = out_BTE.flatten(0, 1)
        apart_N: Tensor = (out[pairs[0]] - out[pairs[1]]).norm(dim=1) / (rows[pairs[0]] - rows[pairs[1]]).norm(dim=1)
        return apart_N

    ours, others = stretch(phi_s(tokens())), stretch(channel.eval()(tokens()))
    assert float(ours.max() / ours.min()) < 1.001
    assert float(others.max() / others.min()) > 1.5
    spread = rows.numpy().astype(np.float64).var(0).mean()  # the mean eigenvalue is the mean variance
    assert float(ours.mean()) == pytest.approx(spread**-0.5, rel=1e-4)


def test_the_map_can_be_undone() -> None:
    phi_s = fitted()
    torch.testing.assert_close(phi_s.restore(phi_s(tokens())), tokens(), rtol=1e-4, atol=0.05)


def test_two_channels_by_hand() -> None:
    """Variances 9 and 1 along the axes: H U^T gives (x + y, x - y) / sqrt 2 up to signs, the scale 1 / sqrt 5."""
    rows = torch.tensor([[[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]])
    phi_s = PhiS(2)
    phi_s.fit([rows + 7.0])
    found = phi_s(rows + 7.0)[0].abs().sort(dim=1).values  # which channel comes first is the eigenvectors' choice
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0]]).expand(4, 2) / 10**0.5)


def test_statistics_over_batches_equal_those_of_all_tokens_at_once() -> None:
    once, often = PhiS(12), PhiS(12)
    once.fit([tokens()])
    often.fit([tokens()[:5], tokens()[5:6], tokens()[6:]])
    torch.testing.assert_close(once.scale, often.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(once(tokens()), often(tokens()), rtol=0, atol=1e-3)


def test_the_first_finite_batch_of_training_settles_the_map() -> None:
    phi_s = PhiS(12).train()
    assert not phi_s.ready()
    phi_s(torch.full((2, 9, 12), torch.nan))
    assert not phi_s.ready()
    first = phi_s(tokens())
    phi_s(tokens(seed=1) * 5)
    torch.testing.assert_close(phi_s(tokens()), first)


def test_before_training_the_batch_is_its_own_measure() -> None:
    out = PhiS(12).eval()(tokens())
    torch.testing.assert_close(out.flatten(0, 1).var(0, correction=0), torch.ones(12), atol=1e-3, rtol=0)


def test_a_checkpoint_carries_the_map() -> None:
    phi_s, other, file = fitted(), PhiS(12), io.BytesIO()
    torch.save(phi_s.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.train()(tokens(seed=2)), phi_s(tokens(seed=2)))


def test_half_precision_leaves_the_statistics_alone() -> None:
    phi_s = fitted()
    before = phi_s(tokens())
    torch.testing.assert_close(phi_s.bfloat16()(tokens()), before)


@pytest.mark.parametrize("alignment", ["raw", "to_student"])
def test_alignments_that_standardize_nothing_refuse_it(alignment: str) -> None:
    sizes = PhiSizes()
    with pytest.raises(ConfigError, match=rf"{alignment}.*phi_s"):
        make_kd_head("dino", sizes, clip_width=12, clip_grid=(3, 3), alignment=alignment, standardize="phi_s")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [FixedHead, ToTeacherHead])
def test_heads_compare_with_the_rotated_target(kind: type) -> None:
    alignment: Alignment = "fixed" if kind is FixedHead else "to_teacher"
    head = make_kd_head("dino", PhiSizes(), clip_width=12, clip_grid=(3, 3), alignment=alignment, standardize="phi_s")
    assert isinstance(head, kind)
    assert isinstance(head.standardize, PhiS)


class PhiSizes:
    token_dim = 12
    grid_hw = (3, 3)
