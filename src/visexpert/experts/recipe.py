"""How a model's own processor prepares an image, done on the device instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from visexpert.errors import ConfigError

Interpolation = Literal["bilinear", "bicubic"]
Framing = Literal["squash", "crop", "pad", "own"]
"""What becomes of an image that is no square: ``squash`` - all of it, stretched, as ``ClipEncoder`` does, so that a
patch of every expert shows the same as CLIP's; ``crop`` - shortest edge resized, then the center; ``pad`` - longest
edge resized, then zeros to the right and below; ``own`` - what the model's own processor does."""


@dataclass(frozen=True)
class InputRecipe:
    """An image's way into a model.

    Args:
        image_size: Side of the square that the model reads, pixels.
        mean: Channel means, in [0, 1] units.
        std: Channel standard deviations, likewise.
        interpolation: Of the resize, always antialiased.
        framing: ``squash``, ``crop`` or ``pad``; ``own`` where the model's own way is none of these.
        crop_share: With ``crop``, ``image_size`` as a share of the resized shortest edge; 0 < share <= 1.
        crop_floor: Where the middle lies between two pixels, begin the crop at the lower one, as transformers; else at
            the even one, as torchvision, timm and open_clip.
    """

    image_size: int
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"
    framing: Framing = "squash"
    crop_share: float = 1.0
    crop_floor: bool = False

    def adapted(
        self, *, owner: str, image_size: int | None, framing: Framing | None, interpolation: Interpolation | None
    ) -> InputRecipe:
        """The same with what a user asked for.

        A framing of None is the model's own; where that is none of ours, images are squashed, with a warning.

        Raises:
            ConfigError: An option is unknown, or the size is no size.
        """
        for name, value, allowed in (
            ("framing", framing or "own", get_args(Framing)),
            ("interpolation", interpolation or "bicubic", get_args(Interpolation)),
        ):
            if value not in allowed:
                raise ConfigError(f"{owner}: {name}={value!r} is unknown; use one of {list(allowed)}.")
        if image_size is not None and image_size < 1:
            raise ConfigError(f"{owner}: image_size={image_size} is no side in pixels; use 1 or more.")
        if framing is None and self.framing == "own":
            rank_zero_warn(
                f"{owner}: this model frames images in a way of its own that cannot be done here; they are squashed. "
                "Write framing: squash, crop or pad."
            )
            framing = "squash"
        if framing == self.framing == "own":
            raise ConfigError(
                f"{owner}: this model frames images in a way of its own; use framing squash, crop or pad."
            )
        return replace(
            self,
            image_size=image_size or self.image_size,
            framing=self.framing if framing in (None, "own") else framing,
            interpolation=interpolation or self.interpolation,
        )

    def prepare(self, images_BCHW: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Frame and normalize.

        Args:
            images_BCHW: (B, 3, H, W), float in [0, 1], any size.
            mean: (1, 3, 1, 1), on the images' device.
            std: Likewise.

        Returns:
            (B, 3, image_size, image_size).
        """
        size = self.image_size
        if self.framing == "pad":
            height, width = images_BCHW.shape[-2:]
            scale = size / max(height, width)
            normalized = (self._resized(images_BCHW, [_half_up(height * scale), _half_up(width * scale)]) - mean) / std
            return F.pad(normalized, (0, size - normalized.shape[-1], 0, size - normalized.shape[-2]))
        if self.framing == "crop":
            # The share is a quotient of whole numbers: 224 / 0.875 must give 256, not 255.
            shortest = math.floor(size / self.crop_share + 1e-6)
            images_BCHW = self._cropped(self._resized(images_BCHW, [shortest]))
        else:
            images_BCHW = self._resized(images_BCHW, [size, size])
        return (images_BCHW - mean) / std

    def _resized(self, images_BCHW: Tensor, size: list[int]) -> Tensor:
        if list(images_BCHW.shape[-2:]) == size:
            return images_BCHW
        resized: Tensor = tv.resize(images_BCHW, size, InterpolationMode(self.interpolation), antialias=True)
        return resized.clamp(0.0, 1.0)

    def _cropped(self, images_BCHW: Tensor) -> Tensor:
        size = self.image_size
        halves = [(side - size) / 2 for side in images_BCHW.shape[-2:]]
        top, left = (math.floor(half) if self.crop_floor else round(half) for half in halves)
        return images_BCHW[..., top : top + size, left : left + size]


def _half_up(length: float) -> int:
    return max(1, int(length + 0.5))
