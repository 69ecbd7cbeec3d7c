"""A 2-D position code for vision tokens that a language model reads as an unordered set."""

from __future__ import annotations

import torch
from torch import Tensor

from visexpert.errors import ConfigError


def sincos_2d(grid_hw: tuple[int, int], width: int) -> Tensor:
    """Return the sine-cosine code of each cell: half of the channels for the row, half for the column.

    Args:
        grid_hw: Grid, height x width.
        width: Channels, a multiple of 4.

    Returns:
        float32 (T, width), values in [-1, 1], row-major.
    """
    if width % 4:
        raise ConfigError(f"sincos_2d: width {width} must be a multiple of 4.")
    frequencies = torch.pi * 2.0 ** torch.linspace(-1, 3, width // 4)
    rows, columns = (torch.arange(side).add(0.5).div(side) for side in grid_hw)
    codes = [
        torch.cat([torch.sin(axis[:, None] * frequencies), torch.cos(axis[:, None] * frequencies)], -1)
        for axis in (rows, columns)
    ]
    row_code = codes[0][:, None].expand(-1, grid_hw[1], -1)
    column_code = codes[1][None].expand(grid_hw[0], -1, -1)
    return torch.cat([row_code, column_code], -1).flatten(0, 1)
