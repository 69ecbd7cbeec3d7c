"""Tiles of images of any shape: which, in what order, and what is left of the padding."""

from __future__ import annotations

import pytest
import torch

from visexpert.errors import ConfigError
from visexpert.types import Batch, VisionTokens
from visexpert.vision import ClipEncoder
from visexpert.vision.anyres import TiledClipEncoder, cut

SIDE = 16
FIELDS = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def tiled(pinpoints: list[list[int]] | None = None) -> TiledClipEncoder:
    return TiledClipEncoder(config=FIELDS, pinpoints=pinpoints)


def places(vision: VisionTokens) -> list[list[float]]:
    """Which view token stands where, where tokens are their own numbers; -1 for a newline."""
    assert vision.lengths is not None and vision.newline_BT is not None
    numbers = torch.where(vision.newline_BT, -1.0, vision.tokens_BTD[..., 0])
    return [row[:length].tolist() for row, length in zip(numbers, vision.lengths, strict=True)]


def numbered(views: int) -> VisionTokens:
    """Tokens 0, 1, 2, ... over all views of 2 x 2."""
    return VisionTokens(torch.arange(4.0 * views).view(views, 4, 1), (2, 2), cls_BD=torch.arange(1.0 * views)[:, None])


def test_tiles_of_an_image_by_hand() -> None:
    """A 1 x 2 grid without padding: each tile is half of the image, twice as large here as its own size."""
    image = torch.rand(3, SIDE, 2 * SIDE)
    tiles = cut(image, (SIDE, 2 * SIDE), (1, 2), tiled())
    assert torch.equal(tiles, torch.stack([image[:, :, :SIDE], image[:, :, SIDE:]]))


def test_padding_is_black_and_centerd() -> None:
    tiles = cut(torch.ones(3, 10, 40), (10, 40), (1, 2), tiled())  # 32 wide, hence 8 of 16 rows
    assert tiles.shape == (2, 3, SIDE, SIDE)
    rows = tiles[0, 0].mean(1).round(decimals=5)
    assert rows.tolist() == [0.0] * 4 + [1.0] * 8 + [0.0] * 4


def test_order_unpadding_and_newlines_by_hand() -> None:
    clip = tiled([[1, 2]])
    views = clip.views_of(Batch(torch.rand(2, 3, SIDE, 2 * SIDE), torch.tensor([7, 9]), "train"))
    assert views.batch.images_BCHW.shape == (2 + 4, 3, SIDE, SIDE) and views.batch.split == ""
    assert views.batch.index_B.tolist() == [7, 9, 7, 7, 9, 9]
    # Whole image, then the rows of both tiles side by side, each with its newline.
    assert places(views.join(numbered(6))) == [
        [0, 1, 2, 3, 8, 9, 12, 13, -1, 10, 11, 14, 15, -1],
        [4, 5, 6, 7, 16, 17, 20, 21, -1, 18, 19, 22, 23, -1],
    ]
    whole = views.whole(numbered(6))
    assert whole.tokens_BTD[:, 0, 0].tolist() == [0, 4] and whole.cls_BD is not None
    assert whole.cls_BD.flatten().tolist() == [0, 1]


def test_padded_rows_of_tokens_are_left_out() -> None:
    """An image twice as wide as tall in a 2 x 2 grid fills the middle half: one row of tokens of each tile."""
    clip = tiled([[2, 2]])
    views = clip.views_of(Batch(torch.rand(1, 3, 40, 80), torch.arange(1), "train"))
    assert places(views.join(numbered(5))) == [[0, 1, 2, 3, 6, 7, 10, 11, -1, 12, 13, 16, 17, -1]]


def test_true_sizes_decide_not_the_frame() -> None:
    clip = tiled([[1, 2], [2, 1]])
    sizes = torch.tensor([[20, 40], [40, 20]])
    batch = Batch(torch.rand(2, 3, 30, 30), torch.arange(2), "train", original_hw_B2=sizes)
    views = clip.views_of(batch)
    upright = cut(batch.images_BCHW[1], (40, 20), (2, 1), clip)
    assert torch.equal(views.batch.images_BCHW[4:], upright)
    first, second = places(views.join(numbered(6)))
    assert first.count(-1) == 2 and second.count(-1) == 4


def test_samples_without_an_image_get_no_tokens() -> None:
    there = torch.tensor([True, False])
    batch = Batch(torch.rand(2, 3, SIDE, SIDE), torch.arange(2), "train", has_image_B=there)
    plain = ClipEncoder(config=FIELDS).views_of(batch)
    assert plain.batch is batch and plain.join(numbered(2)).lengths == (4, 0)
    tiles = tiled([[1, 1]]).views_of(batch)
    assert tiles.batch.has_image_B is not None and tiles.batch.has_image_B.tolist() == [True, False, True, False]
    assert [len(row) for row in places(tiles.join(numbered(4)))] == [4 + 6, 0]


def test_a_plain_clip_changes_nothing() -> None:
    batch = Batch(torch.rand(2, 3, SIDE, SIDE), torch.arange(2), "train")
    views, seen = ClipEncoder(config=FIELDS).views_of(batch), numbered(2)
    assert views.batch is batch and views.whole(seen) is seen
    assert views.join(seen) == seen


def test_impossible_pinpoints_are_refused() -> None:
    for pinpoints in ([], [[1]], [[0, 2]]):
        with pytest.raises(ConfigError, match="at least one grid of tiles as .rows, columns."):
            tiled(pinpoints)
