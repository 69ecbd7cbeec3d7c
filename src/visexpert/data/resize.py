"""Images of any size to one size, with or without augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from visexpert.data.images import MAX_PIXELS, read_rgb, to_tensor
from visexpert.errors import ConfigError

Resize = Literal["crop", "stretch", "pad"]

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean color, as LLaVA pads (llava/mm_utils.py, ``expand2square``)."""

_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Args:
        image_CHW: RGB (3, size, size), uint8 or float in [0, 1].
        original_hw: Height and width before resizing, pixels.
    """

    image_CHW: Tensor
    original_hw: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Reads images into squares; bicubic, antialiased.

    Args:
        size: Side of the square, pixels.
        resize: ``crop`` - the shorter side to ``size``, then the center (CLIP's own way); ``stretch`` - the whole
            image, its aspect ratio not kept; ``pad`` - the whole image on a square of CLIP's mean color (LLaVA).
        crop_scale: Least share of the area that a random crop keeps, in training; None takes no random crops.
        flip: Mirror every other image at random, in training. It makes left and right meaningless.
        max_pixels: Largest image that is decoded, width x height.

    Raises:
        ConfigError: A value cannot be.
    """

    size: int
    resize: Resize = "crop"
    crop_scale: float | None = None
    flip: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise ConfigError(f"resize is {self.resize!r}, but must be one of {', '.join(get_args(Resize))}.")
        if self.size < 1:
            raise ConfigError(f"image_size is {self.size}, but must be at least 1 pixel; raise it.")
        if self.crop_scale is not None and not 0 < self.crop_scale <= 1:
            raise ConfigError(f"crop_scale is {self.crop_scale}, but must lie in (0, 1]; null takes no random crops.")

    @property
    def augments(self) -> bool:
        """Whether an image looks different each time."""
        return self.crop_scale is not None or self.flip

    def read(self, source: str | bytes, *, name: str, rng: np.random.Generator | None = None) -> Picture:
        """Read one image.

        Args:
            source: Path, or the bytes of a file.
            name: What to call it in messages.
            rng: Draws the augmentation; None for none.

        Raises:
            DataError: It cannot be read.
        """
        image = read_rgb(source, name=name, max_pixels=self.max_pixels)
        original_hw = (image.height, image.width)
        if rng is not None and self.crop_scale is not None:
            image = _random_crop(image, self.crop_scale, rng)
        image = self.square(image)
        if rng is not None and self.flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return Picture(to_tensor(image), original_hw)

    def square(self, image: Image.Image) -> Image.Image:
        """Return an RGB image as a square, without augmentation."""
        side = (self.size, self.size)
        if self.resize == "stretch":
            return image.resize(side, Image.Resampling.BICUBIC)
        if self.resize == "crop":
            return ImageOps.fit(image, side, Image.Resampling.BICUBIC)
        return ImageOps.pad(image, side, Image.Resampling.BICUBIC, color=PAD_COLOUR)


def _random_crop(image: Image.Image, least: float, rng: np.random.Generator) -> Image.Image:
    """Return a crop of ``least`` to all of the area, 3:4 to 4:3, as RandomResizedCrop draws it; else the whole."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(least, 1.0)
        ratio = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            return image.crop((left, top, left + width, top + height))
    return image
