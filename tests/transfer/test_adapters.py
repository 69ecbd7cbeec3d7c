"""Adapters: zero at the start yet trainable at once, on CLIP's grid whatever the expert's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.grids import resample_tokens
from visexpert.transfer import MapStem, TokenAdapter
from visexpert.types import ExpertTokens


def expert_tokens(grid_hw: tuple[int, int], width: int) -> ExpertTokens:
    return ExpertTokens(torch.randn(2, grid_hw[0] * grid_hw[1], width), grid_hw)


@pytest.mark.parametrize("map_grid", [None, (8, 8)])
def test_starts_at_zero_and_its_last_layer_hears_the_loss_at_once(map_grid: tuple[int, int] | None) -> None:
    adapter = TokenAdapter(in_dim=5, out_dim=6, out_grid=(4, 4), map_grid=map_grid)
    out_BTD = adapter(expert_tokens((8, 8), 5))
    assert out_BTD.shape == (2, 16, 6)
    assert torch.count_nonzero(out_BTD) == 0
    (out_BTD * torch.randn_like(out_BTD)).sum().backward()
    weight, bias = adapter.out.weight.grad, adapter.out.bias.grad
    assert weight is not None and bias is not None
    assert weight.abs().max() > 0 and bias.abs().max() > 0


def test_the_layers_before_hear_it_from_the_second_step() -> None:
    adapter = TokenAdapter(in_dim=5, out_dim=6, out_grid=(2, 2))
    tokens = expert_tokens((4, 4), 5)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    target_BTD = torch.randn(2, 4, 6)
    for expected in (False, True):
        optimizer.zero_grad()
        F.mse_loss(adapter(tokens), target_BTD).backward()
        assert adapter.hidden.weight.grad is not None
        assert bool(adapter.hidden.weight.grad.abs().max() > 0) is expected
        optimizer.step()


def test_is_the_mlp_of_the_resampled_tokens() -> None:
    adapter = TokenAdapter(in_dim=3, out_dim=4, out_grid=(2, 2), hidden_dim=7, zero_init=False)
    tokens = expert_tokens((6, 6), 3)
    x_BTE = resample_tokens(tokens.tokens_BSE, (6, 6), (2, 2))
    centered = x_BTE - x_BTE.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    hidden = normed @ adapter.hidden.weight.T + adapter.hidden.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ adapter.out.weight.T + adapter.out.bias
    torch.testing.assert_close(adapter(tokens), expected)
    assert adapter.hidden.out_features == 7


@pytest.mark.parametrize("map_grid", [(4, 4), (8, 8), (9, 12), (24, 24)])
def test_a_map_becomes_patch_tokens(map_grid: tuple[int, int]) -> None:
    stem = MapStem(2, 12, map_grid=map_grid, out_grid=(4, 4))
    out_BTD = stem(expert_tokens(map_grid, 2))
    assert out_BTD.shape == (2, 16, 12)


def test_a_patch_token_sees_its_own_patch_and_two_cells_around() -> None:
    """Row-major order through the stem: a change at the map's top right reaches the top right token only."""
    stem = MapStem(1, 8, map_grid=(16, 16), out_grid=(2, 2))
    quiet, loud = torch.zeros(1, 16, 16, 1), torch.zeros(1, 16, 16, 1)
    loud[0, 2, 13] = 5.0
    before = stem(ExpertTokens(quiet.flatten(1, 2), (16, 16)))
    after = stem(ExpertTokens(loud.flatten(1, 2), (16, 16)))
    changed = (after - before).abs().sum(-1)[0] > 0
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("map_grid", [(3, 8), (8, 3)])
def test_a_map_coarser_than_clip_is_refused(map_grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="coarser than CLIP's grid 4x4; use tokens: features"):
        TokenAdapter(in_dim=2, out_dim=4, out_grid=(4, 4), map_grid=map_grid)


def test_tokens_of_another_grid_than_they_say_are_refused() -> None:
    adapter = TokenAdapter(in_dim=2, out_dim=4, out_grid=(4, 4))
    with pytest.raises(ConfigError, match="do not fill a grid"):
        adapter(ExpertTokens(torch.zeros(1, 15, 2), (4, 4)))
