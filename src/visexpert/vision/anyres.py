"""Images in tiles: any resolution through a CLIP of one input size (LLaVA-NeXT's AnyRes).

Letters beside those of types.py: V views (whole images and tiles of a batch), M largest number of tokens of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from visexpert.errors import ConfigError
from visexpert.typed import typed
from visexpert.types import Batch
from visexpert.vision.clip import ClipEncoder
from visexpert.vision.encoder import NEWLINE, Views

PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
"""LLaVA-NeXT's grids of tiles, rows x columns."""


@typed
class TiledClipEncoder(ClipEncoder):
    """A CLIP that sees an image whole and, enlarged, in tiles of its input size, cut by :meth:`views_of`.

    Otherwise it is a :class:`ClipEncoder`; its copy among MoVE-KD's teachers sees whole images only.

    Args:
        pinpoints: Grids of tiles, rows and columns; each image uses the one that keeps most of its pixels and wastes
            fewest. Null for LLaVA-NeXT's five.
        kwargs: See :class:`ClipEncoder`.
    """

    reads_tiles = True

    def __init__(self, *, pinpoints: list[list[int]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pinpoints = PINPOINTS if pinpoints is None else pinpoints
        if not self.pinpoints or any(len(grid) != 2 or min(grid) < 1 for grid in self.pinpoints):
            raise ConfigError(
                f"TiledClipEncoder: pinpoints={pinpoints} must name at least one grid of tiles as [rows, columns], "
                "both from 1."
            )

    def views_of(self, batch: Batch) -> Views:
        """Cut images into views: the whole ones, then their tiles.

        Images of different shapes must be stretched to one frame (``resize: stretch`` of the data), with their true
        height and width in ``batch.original_hw_B2``. Samples without an image get no tokens.
        """
        there_B = batch.has_image_B
        images_BCHW = batch.images_01()
        sizes = _true_sizes(batch)
        grids = [_best_grid(size, self) for size in sizes]
        side = (self.image_size, self.image_size)
        whole_BCSS = _resized(images_BCHW, side)
        tiles = [cut(image, size, grid, self) for image, size, grid in zip(images_BCHW, sizes, grids, strict=True)]
        there = [True] * len(batch) if there_B is None else there_B.tolist()
        rows, first = [], len(tiles)
        for number, (size, grid) in enumerate(zip(sizes, grids, strict=True)):
            order = (
                _order(number, first, size, grid, self.grid_hw) if there[number] else torch.zeros(0, dtype=torch.long)
            )
            rows.append(order)
            first += math.prod(grid)
        views_VCSS = torch.cat([whole_BCSS, *tiles])
        owners = [*range(len(tiles)), *(number for number, part in enumerate(tiles) for _ in part)]
        index_V = batch.index_B[owners]
        there_V = None if there_B is None else torch.tensor([there[number] for number in owners])
        # No split name: a store may hold tokens of whole images, which are not these.
        seen = Batch(views_VCSS, index_V, split="", has_image_B=there_V)
        index_BM = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(images_BCHW.device, non_blocking=True)
        return Views(seen, index_BM, tuple(len(row) for row in rows))


def cut(image_CHW: Tensor, size_hw: tuple[int, int], grid: tuple[int, int], clip: ClipEncoder) -> Tensor:
    """Return tiles (rows x columns, 3, S, S) in reading order of an image, enlarged to fill a grid and centered in it.

    Args:
        image_CHW: The image, float in [0, 1], in any frame.
        size_hw: True height and width.
        grid: Rows and columns.
        clip: The encoder, which defines S.
    """
    side = clip.image_size
    frame_hw = grid[0] * side, grid[1] * side
    scale = min(frame_hw[0] / size_hw[0], frame_hw[1] / size_hw[1])
    height, width = (min(math.ceil(length * scale), most) for length, most in zip(size_hw, frame_hw, strict=True))
    resized = _resized(image_CHW[None], (height, width))[0]
    top, left = (frame_hw[0] - height) // 2, (frame_hw[1] - width) // 2
    padded: Tensor = F.pad(resized, (left, frame_hw[1] - width - left, top, frame_hw[0] - height - top))
    apart_CRSKS: Tensor = padded.unflatten(2, (grid[1], side)).unflatten(1, (grid[0], side))
    return apart_CRSKS.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _order(whole: int, first: int, size_hw: tuple[int, int], grid: tuple[int, int], tokens: tuple[int, int]) -> Tensor:
    """Return tokens of one image, int64: the whole view, then each row of tiles without padding and a newline.

    Args:
        whole: Row of the whole image among the views.
        first: Row of its first tile.
        size_hw: True height and width of the image.
        grid: Rows and columns of tiles.
        tokens: Height and width of a view in tokens.
    """
    count = math.prod(tokens)
    start = torch.arange(whole * count, (whole + 1) * count)
    inner = torch.arange(count).view(tokens)
    tile = (first + torch.arange(math.prod(grid)).view(grid)) * count
    plane = (tile[:, None, :, None] + inner[None, :, None, :]).flatten(2).flatten(0, 1)
    kept: Tensor = unpad_image(plane[None], size_hw)[0]
    return torch.cat([start, F.pad(kept, (0, 1), value=NEWLINE).flatten()])


def _best_grid(size_hw: tuple[int, int], clip: TiledClipEncoder) -> tuple[int, int]:
    side = clip.image_size
    height, width = select_best_resolution(size_hw, [(rows * side, columns * side) for rows, columns in clip.pinpoints])
    return height // side, width // side


def _true_sizes(batch: Batch) -> Sequence[tuple[int, int]]:
    if batch.original_hw_B2 is None:
        height, width = batch.images_BCHW.shape[-2:]
        return [(height, width)] * len(batch)
    return [(int(height), int(width)) for height, width in batch.original_hw_B2.tolist()]


def _resized(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as CLIP's processor does: bicubic, antialiased."""
    if images_BCHW.shape[-2:] == size:
        return images_BCHW
    return F.interpolate(images_BCHW, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0.0, 1.0)
