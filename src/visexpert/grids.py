"""Tokens from one grid to another."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError


def resample_tokens(tokens_BSE: Tensor, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> Tensor:
    """Bring tokens from one grid to another.

    Bilinear with half-pixel centers (no align_corners); the mean over the covered area where either side shrinks by
    more than two, which bilinear would undersample.

    Args:
        tokens_BSE: (B, S, E), row-major.
        from_hw: Their grid, height x width = S.
        to_hw: The grid wanted.

    Returns:
        (B, T, E), T = height x width of ``to_hw``; the same tensor where the grids agree.

    Raises:
        ConfigError: S does not fit ``from_hw``.
    """
    if tokens_BSE.shape[1] != math.prod(from_hw):
        raise ConfigError(f"resample_tokens: {tokens_BSE.shape[1]} tokens do not fill a grid of {from_hw}.")
    if from_hw == to_hw:
        return tokens_BSE
    map_BEHW = tokens_BSE.transpose(1, 2).unflatten(2, from_hw)
    if from_hw[0] > 2 * to_hw[0] or from_hw[1] > 2 * to_hw[1]:
        resampled = F.interpolate(map_BEHW, size=to_hw, mode="area")
    else:
        resampled = F.interpolate(map_BEHW, size=to_hw, mode="bilinear", align_corners=False)
    return resampled.flatten(2).transpose(1, 2)
