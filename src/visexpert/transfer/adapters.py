"""Adapters that bring expert tokens to CLIP's grid and the width of the fused tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.errors import ConfigError
from visexpert.grids import resample_tokens
from visexpert.precision import like_weights
from visexpert.types import ExpertTokens


class TokenAdapter(nn.Module):
    """P_k in ToVE's eq. 1: a per-expert MLP from width E to the width of the fused tokens.

    Tokens on another grid are resampled first (unconfirmed: the paper does not say how grids are matched). A map
    (``tokens: prediction``) passes through a small convolutional stem instead, as in Prismer. The last layer starts at
    zero, so a residual model equals plain CLIP at step 0, while gradients reach that layer immediately.

    Args:
        in_dim: Width E of the expert's tokens.
        out_dim: Width of the fused tokens.
        out_grid: Grid of CLIP's patch tokens, height x width.
        hidden_dim: Hidden width of the MLP; default ``out_dim``.
        map_grid: Grid of a predicted map; builds the stem. None for encoder tokens.
        zero_init: Start the last layer at zero. Needs a residual path: without one the output would be zero.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        out_grid: tuple[int, int],
        hidden_dim: int | None = None,
        map_grid: tuple[int, int] | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden_dim or out_dim
        self.out_grid = out_grid
        self.stem = None if map_grid is None else MapStem(in_dim, hidden, map_grid=map_grid, out_grid=out_grid)
        mlp_in = in_dim if self.stem is None else hidden
        self.norm = nn.LayerNorm(mlp_in)
        self.hidden = nn.Linear(mlp_in, hidden)
        self.out = nn.Linear(hidden, out_dim)
        if zero_init:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, expert: ExpertTokens) -> Tensor:
        """Map expert tokens (B, S, E) of any grid to (B, T, out_dim) on CLIP's grid."""
        if self.stem is not None:
            tokens_BTE = self.stem(expert)
        else:
            tokens_BTE = resample_tokens(expert.tokens_BSE, expert.grid_hw, self.out_grid)
        out: Tensor = self.out(F.gelu(self.hidden(self.norm(tokens_BTE.to(self.norm.weight.dtype)))))
        return out


class MapStem(nn.Module):
    """Turns a predicted map into patch tokens: two 3x3 convolutions on the map's grid, then a patch convolution.

    Args:
        in_channels: Channels of the map.
        width: Width of the patch tokens.
        map_grid: Grid of the map, at least ``out_grid``.
        out_grid: Grid of the patch tokens.
    """

    def __init__(self, in_channels: int, width: int, *, map_grid: tuple[int, int], out_grid: tuple[int, int]) -> None:
        super().__init__()
        if map_grid[0] < out_grid[0] or map_grid[1] < out_grid[1]:
            raise ConfigError(
                f"MapStem: a map of {map_grid[0]}x{map_grid[1]} cells is coarser than CLIP's grid "
                f"{out_grid[0]}x{out_grid[1]}; use tokens: features for this expert."
            )
        patch = (round(map_grid[0] / out_grid[0]), round(map_grid[1] / out_grid[1]))
        self.grid = (patch[0] * out_grid[0], patch[1] * out_grid[1])
        channels = max(8, width // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, width, kernel_size=patch, stride=patch),
        )

    def forward(self, expert: ExpertTokens) -> Tensor:
        """Map cells (B, S, C) to patch tokens (B, T, width)."""
        cells_BSC = resample_tokens(expert.tokens_BSE, expert.grid_hw, self.grid)
        map_BCHW = cells_BSC.transpose(1, 2).reshape(cells_BSC.shape[0], -1, *self.grid)
        patches: Tensor = self.layers(like_weights(map_BCHW, self.layers))
        return patches.flatten(2).transpose(1, 2)
