"""Read image files of any kind as RGB squares of one size, or explain in one sentence why that fails."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import IMAGE_FORMATS, check_regular
from visexpert.typed import typed

MAX_PIXELS = 64_000_000
"""Largest image that is decoded by default (192 MB as RGB); a small file can declare any size."""

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_UNSCALED_MODES = ("I", "F")


@typed
def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image file.

    Args:
        path: The file.
        max_pixels: Largest width x height that is decoded.

    Returns:
        uint8 RGB (3, H, W).

    Raises:
        DataError: See :func:`read_rgb`.
    """
    return to_tensor(read_rgb(path, name=str(path), max_pixels=max_pixels))


def read_rgb(source: str | Path | bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image from a file or from bytes.

    Gray, palette, CMYK and 16-bit images are converted, transparent ones are composited over white, and the EXIF
    rotation is applied. For an animation, the first frame is read.

    Args:
        source: Path, or the bytes of a file.
        name: Name of the image in messages.
        max_pixels: Largest width x height that is decoded.

    Raises:
        DataError: If the file is missing, not a regular file, damaged, in none of :data:`.IMAGE_FORMATS`,
            truncated, too large, or of a type (32-bit, floating point) whose values have no agreed range.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images; the size is checked below, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if not isinstance(source, bytes):
                check_regular(source)
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
        with image:
            return to_rgb(image, name=name, max_pixels=max_pixels)
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(name, "more pixels than Pillow opens", max_pixels)) from error
    except FileNotFoundError as error:
        raise DataError(f"The image {name} does not exist; correct the path.") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"The image {name} cannot be read: it is damaged, or its format is not one of {', '.join(IMAGE_FORMATS)}; "
            "replace the file or leave it out."
        ) from error
    except (DataError, MemoryError):  # running out of memory does not make an image broken
        raise
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error
        told = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"The image {name} cannot be read ({told}); replace the file or leave it out.") from error


def to_rgb(image: Image.Image, *, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Convert an image that another library opened, as :func:`read_rgb` does.

    Raises:
        DataError: It is too large, or of a type whose values have no agreed range.
    """
    _check(image, name, max_pixels)
    return _to_rgb(ImageOps.exif_transpose(image))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@cache
def _formats() -> list[str]:
    """Return the formats that this build of Pillow supports."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _check(image: Image.Image, path: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise DataError(_too_large(path, f"{image.width} x {image.height} pixels", max_pixels))
    if image.mode in _UNSCALED_MODES:
        raise DataError(
            f"The image {path} has 32-bit values (Pillow's mode {image.mode}), whose range is unknown; "
            "save it with 8 or 16 bits."
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        # Pillow would clip 16-bit values at 255; round(value / 257) maps 65535 to 255.
        gray = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _too_large(path: str, size: str, max_pixels: int) -> str:
    return f"The image {path} has {size}, but at most {max_pixels} are decoded; shrink it or raise max_pixels."


Resize = Literal["crop", "stretch", "pad"]

PAD_COLOR = (122, 116, 104)
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
    """Reads images and resizes them to squares (bicubic, antialiased).

    Args:
        size: Side of the square, pixels.
        resize: ``crop`` - resize the shorter side to ``size``, then crop the center (as CLIP does); ``stretch`` - the
            whole image, distorted; ``pad`` - the whole image, padded to a square with CLIP's mean color (as LLaVA
            does).
        crop_scale: Smallest share of the area that a random crop keeps in training; None for no random crops.
        flip: Mirror half of the images at random in training, which makes left and right meaningless.
        max_pixels: Largest width x height that is decoded.

    Raises:
        ConfigError: A value is out of range.
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
            raise ConfigError(f"crop_scale is {self.crop_scale}, but must be in (0, 1]; null turns random crops off.")

    @property
    def augments(self) -> bool:
        """Whether training images are augmented at random."""
        return self.crop_scale is not None or self.flip

    def read(self, source: str | bytes, *, name: str, rng: np.random.Generator | None = None) -> Picture:
        """Read one image.

        Args:
            source: Path, or the bytes of a file.
            name: Its name in messages.
            rng: Draws the augmentation; None for no augmentation.

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
        return ImageOps.pad(image, side, Image.Resampling.BICUBIC, color=PAD_COLOR)


def _random_crop(image: Image.Image, least: float, rng: np.random.Generator) -> Image.Image:
    """Draw a crop as RandomResizedCrop does: ``least`` to 1 of the area, 3:4 to 4:3; the whole image if none fits."""
    for _ in range(10):
        area = image.width * image.height * rng.uniform(least, 1.0)
        ratio = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            return image.crop((left, top, left + width, top + height))
    return image
