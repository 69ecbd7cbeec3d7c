"""Resampling of tokens against hand-computed grids and an interpolation written in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.grids import resample_tokens


def tokens(map_HW: list[list[float]]) -> Tensor:
    """One image, width 1, row-major."""
    return torch.tensor(map_HW).reshape(1, -1, 1)


def test_the_same_grid_is_the_same_tensor() -> None:
    tokens_BSE = torch.randn(2, 6, 3)
    assert resample_tokens(tokens_BSE, (2, 3), (2, 3)) is tokens_BSE


def test_growing_by_two_by_hand() -> None:
    # Half-pixel centers: a new cell's center lies a quarter of a cell from the nearer old center; ends are held.
    out = resample_tokens(tokens([[0.0, 4.0]]), (1, 2), (1, 4))
    assert out.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
    out = resample_tokens(tokens([[0.0], [8.0]]), (2, 1), (4, 2))
    assert out.flatten().tolist() == [0.0, 0.0, 2.0, 2.0, 6.0, 6.0, 8.0, 8.0]


def test_shrinking_by_two_is_the_mean_of_four() -> None:
    out = resample_tokens(tokens([[1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 0.0, 8.0]]), (2, 4), (1, 2))
    assert out.flatten().tolist() == [4.0, 2.0]


def test_shrinking_by_three_is_the_mean_of_nine() -> None:
    map_HW = [[float(9 * row + column) for column in range(6)] for row in range(6)]
    out = resample_tokens(tokens(map_HW), (6, 6), (2, 2))
    # Centers of the blocks: rows 1 and 4, columns 1 and 4 (the map is linear).
    assert out.flatten().tolist() == [10.0, 13.0, 37.0, 40.0]


def test_shrinking_by_more_than_two_loses_no_token() -> None:
    """Bilinear would never look at the cell that holds the only signal."""
    map_HW = [[0.0] * 8 for _ in range(8)]
    map_HW[0][0] = 16.0
    assert resample_tokens(tokens(map_HW), (8, 8), (2, 2)).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("from_hw", "to_hw"), [((5, 7), (8, 4)), ((3, 3), (7, 5)), ((4, 6), (2, 3)), ((8, 8), (6, 6))])
def test_bilinear_equals_two_passes_of_linear_interpolation(from_hw: tuple[int, int], to_hw: tuple[int, int]) -> None:
    tokens_BSE = torch.randn(2, from_hw[0] * from_hw[1], 3)
    maps = tokens_BSE.numpy().reshape(2, *from_hw, 3)
    for axis in (1, 2):
        old, new = from_hw[axis - 1], to_hw[axis - 1]
        places = (np.arange(new) + 0.5) * old / new - 0.5

        def line(values: NDArray[np.floating], places: NDArray[np.floating] = places, old: int = old) -> Any:
            return np.interp(places, np.arange(old), values)

        maps = np.apply_along_axis(line, axis, maps)
    out = resample_tokens(tokens_BSE, from_hw, to_hw)
    np.testing.assert_allclose(out.numpy(), maps.reshape(2, -1, 3), atol=1e-5)


@pytest.mark.parametrize(("from_hw", "to_hw"), [((9, 9), (4, 4)), ((7, 5), (3, 5)), ((6, 8), (9, 11))])
def test_equals_torch_without_align_corners(from_hw: tuple[int, int], to_hw: tuple[int, int]) -> None:
    tokens_BSE = torch.randn(2, from_hw[0] * from_hw[1], 3)
    map_BEHW = tokens_BSE.transpose(1, 2).unflatten(2, from_hw)
    if max(from_hw[0] / to_hw[0], from_hw[1] / to_hw[1]) > 2:
        expected = F.adaptive_avg_pool2d(map_BEHW, to_hw)
    else:
        expected = F.interpolate(map_BEHW, size=to_hw, mode="bilinear", align_corners=False)
    out_BHWE = resample_tokens(tokens_BSE, from_hw, to_hw).unflatten(1, to_hw)
    assert torch.equal(out_BHWE.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("to_hw", [(2, 2), (3, 5), (7, 8), (12, 1)])
def test_a_constant_stays_constant(to_hw: tuple[int, int]) -> None:
    out = resample_tokens(torch.full((1, 42, 2), 3.25), (6, 7), to_hw)
    assert out.shape == (1, to_hw[0] * to_hw[1], 2)
    torch.testing.assert_close(out, torch.full_like(out, 3.25))


def test_tokens_that_do_not_fill_the_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 tokens do not fill a grid of \(2, 3\)"):
        resample_tokens(torch.zeros(1, 5, 2), (2, 3), (1, 1))


@pytest.mark.parametrize("to_hw", [(4, 6), (1, 1), (3, 2)])
def test_no_images_stay_none(to_hw: tuple[int, int]) -> None:
    assert resample_tokens(torch.zeros(0, 6, 5), (2, 3), to_hw).shape == (0, to_hw[0] * to_hw[1], 5)
