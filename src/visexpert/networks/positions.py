"""Position embeddings for an image size other than the one used in training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import WeightsError


def resize_positions(positions_ND: Tensor, *, to_hw: tuple[int, int], prefix: int, antialias: bool = False) -> Tensor:
    """Interpolate learned position embeddings to another grid, bicubic with half-pixel centers.

    Without antialias this equals transformers' ``interpolate_pos_encoding``, with it open_clip and timm.

    Args:
        positions_ND: (N, D), first those of ``prefix`` tokens without a position ([CLS], registers), then those of a
            square grid, row-major.
        to_hw: Target grid.
        prefix: Number of tokens without a position.
        antialias: Low-pass filter if the grid shrinks.

    Returns:
        (prefix + height x width, D), of the same dtype.

    Raises:
        WeightsError: N - prefix is not a square.
    """
    side = math.isqrt(max(0, len(positions_ND) - prefix))
    if side * side + prefix != len(positions_ND) or side == 0:
        raise WeightsError(
            f"{len(positions_ND)} position embeddings are not {prefix} and a square grid; keep the model's image size."
        )
    if (side, side) == to_hw:
        return positions_ND
    map_DHW = positions_ND[prefix:].float().reshape(side, side, -1).permute(2, 0, 1)
    resized = F.interpolate(map_DHW[None], size=to_hw, mode="bicubic", align_corners=False, antialias=antialias)[0]
    return torch.cat([positions_ND[:prefix], resized.flatten(1).T.to(positions_ND.dtype)])


def fit_positions(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, antialias: bool = False
) -> dict[str, Tensor]:
    """Return weights with position embeddings interpolated to the shapes a network expects; the rest is unchanged.

    Learned positions follow transformers' ``interpolate_pos_encoding`` (with ``antialias``, open_clip and timm); SAM's
    relative ones follow its ``get_rel_pos``.
    """
    fitted = dict(state)
    for key, target in expected.items():
        value = fitted.get(key)
        if value is None or value.shape == target.shape or value.shape[-1] != target.shape[-1]:
            continue
        if "rel_pos" in key:
            fitted[key] = F.interpolate(value.T[None], size=len(target), mode="linear")[0].T.contiguous()
        elif "position" in key or "pos_embed" in key:
            count = target.shape[:-1].numel()
            side = math.isqrt(count)
            resized = resize_positions(
                value.flatten(0, -2), to_hw=(side, side), prefix=count - side * side, antialias=antialias
            )
            fitted[key] = resized.view(target.shape)
    return fitted
