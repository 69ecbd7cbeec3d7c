"""The projector and the 2-D position code."""

from __future__ import annotations

import math

import pytest
import torch

from visexpert.errors import ConfigError
from visexpert.language import Projector, sincos_2d


def test_position_code_by_hand() -> None:
    # Width 4 has one frequency, pi / 2; rows of a 2 x 1 grid lie at 1/4 and 3/4, the only column at 1/2.
    top, bottom = sincos_2d((2, 1), 4).tolist()
    half = math.sqrt(0.5)
    assert top == pytest.approx([math.sin(math.pi / 8), math.cos(math.pi / 8), half, half])
    assert bottom == pytest.approx([math.sin(3 * math.pi / 8), math.cos(3 * math.pi / 8), half, half])


def test_half_of_the_code_is_the_row_half_the_column() -> None:
    code = sincos_2d((3, 5), 24).view(3, 5, 24)
    assert torch.equal(code[:, :, :12], code[:, :1, :12].expand(3, 5, 12))
    assert torch.equal(code[:, :, 12:], code[:1, :, 12:].expand(3, 5, 12))
    assert code.abs().max() <= 1


@pytest.mark.parametrize("grid_hw", [(2, 2), (8, 8), (24, 24), (5, 9)])
def test_every_cell_has_its_own_code_of_one_length(grid_hw: tuple[int, int]) -> None:
    code_TD = sincos_2d(grid_hw, 32)
    torch.testing.assert_close(code_TD.norm(dim=1), torch.full((len(code_TD),), 4.0))  # 16 pairs sin^2 + cos^2
    distances = torch.cdist(code_TD, code_TD) + 9 * torch.eye(len(code_TD))
    assert distances.min() > 0.05


def test_a_width_without_four_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 6 must be a multiple of 4"):
        sincos_2d((2, 2), 6)


def test_projector_kinds() -> None:
    tokens_BTD = torch.randn(2, 3, 4)
    linear = Projector(in_dim=4, out_dim=6, kind="linear")
    assert isinstance(linear.layers, torch.nn.Linear)
    torch.testing.assert_close(linear(tokens_BTD), tokens_BTD @ linear.layers.weight.T + linear.layers.bias)
    assert Projector(in_dim=4, out_dim=6)(tokens_BTD).shape == (2, 3, 6)
    assert torch.equal(Projector(in_dim=4, out_dim=4, kind="identity")(tokens_BTD), tokens_BTD)
    normed = Projector(in_dim=4, out_dim=4, kind="identity", norm=True)(tokens_BTD)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(tokens_BTD, (4,)))


@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_a_projector_that_cannot_map_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"kind='{kind}' .*linear.*mlp2x_gelu"):
        Projector(in_dim=4, out_dim=6, kind=kind)  # type: ignore[arg-type]
