"""What networks hand on, as maps (B, E, h, w)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def map_of(
    features: Tensor, *, prefix: int | None = None, suffix: int = 0, channels_last: bool | None = None
) -> Tensor:
    """Bring the features of a square image into the form (B, E, h, w).

    Args:
        features: Tokens (B, N, E), row-major after those without a place ([CLS], registers), or a map.
        prefix: How many have none; None for as few as leave a square.
        suffix: How many behind the grid have none (YOLOS' detection tokens).
        channels_last: Of a map: (B, h, w, E) instead of (B, E, h, w); None where nothing says so, then the two equal
            sides tell (SAM keeps maps so between its blocks, SAM 2 everywhere).

    Raises:
        ValueError: The tokens are not ``prefix`` and a square grid, or there are neither tokens nor a map.
    """
    if features.ndim == 4:
        if channels_last is None:
            channels_last = bool(features.shape[1] == features.shape[2] != features.shape[3])
        return features.permute(0, 3, 1, 2) if channels_last else features
    if features.ndim != 3:
        raise ValueError(f"features of shape {tuple(features.shape)} are neither tokens nor a map")
    count = features.shape[1]
    side = math.isqrt(max(0, count - (prefix or 0) - suffix))
    first = count - suffix - side * side if prefix is None else prefix
    if side == 0 or first + side * side + suffix != count:
        raise ValueError(f"{count} tokens are not {first + suffix} without a place and a square grid")
    return features[:, first : first + side * side].transpose(1, 2).reshape(len(features), -1, side, side)


def resize_map(map_BEHW: Tensor, side: int | None) -> Tensor:
    """A map of ``side`` x ``side`` cells: the mean over what a cell covers where it shrinks, else bilinear.

    Args:
        map_BEHW: (B, E, h, w).
        side: None leaves it as it is.
    """
    if side is None or map_BEHW.shape[-2:] == (side, side):
        return map_BEHW
    if max(map_BEHW.shape[-2:]) > side:
        return F.interpolate(map_BEHW, size=(side, side), mode="area")
    return F.interpolate(map_BEHW, size=(side, side), mode="bilinear", align_corners=False)
