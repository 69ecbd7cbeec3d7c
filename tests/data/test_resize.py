"""Images of any size to one size: which pixels stay, by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.formats import jpeg_bytes
from visexpert.data.resize import PAD_COLOUR, ImageReader
from visexpert.errors import ConfigError, DataError

LEFT, RIGHT = (250, 0, 0), (0, 0, 250)


def halves(width: int = 24, height: int = 8) -> bytes:
    """Red on the left half, blue on the right one."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = LEFT, RIGHT
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def near(pixels: Any, colour: tuple[int, int, int]) -> bool:
    """Equal but for what a bicubic filter overshoots at an edge."""
    return bool((np.abs(pixels.astype(int) - np.array(colour)) < 30).all())


def read(source: bytes, rng: np.random.Generator | None = None, **options: Any) -> Any:
    reader = ImageReader(**({"size": 8} | options))
    return np.asarray(reader.read(source, name="a.png", rng=rng).image_CHW.permute(1, 2, 0))


def test_crop_takes_the_center() -> None:
    image_HW3 = read(halves())
    assert image_HW3.shape == (8, 8, 3)
    assert (image_HW3[:, :4] == LEFT).all() and (image_HW3[:, 4:] == RIGHT).all()  # columns 8 to 16 of 24, not resized


def test_stretch_takes_everything() -> None:
    image_HW3 = read(halves(32), resize="stretch")
    assert near(image_HW3[:, :3], LEFT) and near(image_HW3[:, 5:], RIGHT)


def test_pad_adds_clips_mean_colour() -> None:
    image_HW3 = read(halves(16), resize="pad")
    assert (image_HW3[[0, 1, 6, 7]] == PAD_COLOUR).all()
    assert near(image_HW3[2:6, :3], LEFT)


def test_the_original_size_is_kept() -> None:
    picture = ImageReader(size=4).read(jpeg_bytes("red", size=(30, 20)), name="a")
    assert picture.original_hw == (20, 30) and picture.image_CHW.shape == (3, 4, 4)


def test_augmentation_is_drawn_from_the_generator_alone() -> None:
    source = halves(64, 64)
    options = {"crop_scale": 0.2, "size": 16}
    first, again = (read(source, np.random.default_rng(3), **options) for _ in range(2))
    assert (first == again).all()
    others = [read(source, np.random.default_rng(seed), **options) for seed in range(8)]
    assert any((first != other).any() for other in others)
    assert (read(source, None, **options) == read(source, size=16)).all()  # evaluation: none


def test_random_crops_keep_their_share() -> None:
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(ramp[None, :, None], 256, 0).repeat(3, 2)).save(buffer, "PNG")
    spans = []
    for seed in range(30):
        image_HW3 = read(buffer.getvalue(), np.random.default_rng(seed), crop_scale=0.5, size=256)
        spans.append(int(image_HW3[..., 0].max()) - int(image_HW3[..., 0].min()))
    # 50 to 100 % of the area at 3:4 to 4:3: at least sqrt(0.5 * 0.75) of the width, and rarely all of the 256 px.
    assert min(spans) >= 256 * np.sqrt(0.5 * 0.75) * 0.95 and min(spans) < 230 and max(spans) > 200


def test_flips_come_half_of_the_time() -> None:
    mirrored = [bool(read(halves(8), np.random.default_rng(seed), flip=True)[0, 0, 2] > 100) for seed in range(60)]
    assert 18 < sum(mirrored) < 42


def test_a_broken_image_is_named() -> None:
    with pytest.raises(DataError, match="The image shard/03 cannot be read"):
        ImageReader(size=8).read(jpeg_bytes("red")[:90], name="shard/03")


@pytest.mark.parametrize("options", [{"resize": "squash"}, {"size": 0}, {"crop_scale": 0.0}])
def test_settings_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ImageReader(**({"size": 8} | options))
