"""What figures of images share: pixels as floats, values of tokens laid over them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from visexpert.report.palette import Floats, blend


def as_float(images_NHW3: NDArray[Any]) -> Floats:
    """RGB in [0, 1] of uint8 0-255 or of floats."""
    scale = 255.0 if images_NHW3.dtype == np.uint8 else 1.0
    images: Floats = images_NHW3.astype(np.float64) / scale
    return images


def gray(image_HW3: Floats) -> Floats:
    """The image without its colors, so that those laid over it stand out."""
    pale: Floats = image_HW3.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return pale


def overlay(image_HW3: Floats, color_hw3: Floats, share_hw: Floats) -> Floats:
    """Color the image's tokens, at most 85 % opaque so that the image stays visible."""
    size = (image_HW3.shape[0], image_HW3.shape[1])
    return blend(image_HW3, upsample(color_hw3, size), 0.85 * upsample(share_hw[..., None], size))


def upsample(grid_hwC: Floats, size: tuple[int, int]) -> Floats:
    """Nearest: a token's true extent stays visible."""
    rows = np.arange(size[0]) * grid_hwC.shape[0] // size[0]
    columns = np.arange(size[1]) * grid_hwC.shape[1] // size[1]
    upsampled: Floats = grid_hwC[rows][:, columns]
    return upsampled
