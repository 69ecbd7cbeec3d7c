"""Experts around a network that gives a feature map (B, E, h, w), and such maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.experts.base import TokenKind, VisionExpert
from visexpert.experts.preprocessing import Preprocessing
from visexpert.experts.probe import probe_map
from visexpert.io.weights import weights_digest

RANDOM = "random"
"""What is written in place of weights for a network that keeps its random ones."""


class MapExpert(VisionExpert):
    """An expert around a network that maps pixels to a feature map, which becomes tokens in row-major order.

    Width and grid are read from the network itself at the size asked for, also on the ``meta`` device.

    Args:
        network: Maps normalized pixels (B, 3, H, W) to (B, E, h, w).
        preprocessing: How images get there.
        license: Of the weights; None says "not stated".
        facts: What the tokens depend on beside weights and preprocessing, such as the layer.
        tokens: See :class:`~visexpert.experts.base.VisionExpert`.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        preprocessing: Preprocessing,
        license: str | None,
        facts: Mapping[str, object],
        tokens: TokenKind = "features",
    ) -> None:
        shape = probe_map(network, preprocessing.image_size, owner=type(self).__name__)
        super().__init__(
            image_size=preprocessing.image_size,
            token_dim=shape[1],
            grid_hw=(shape[2], shape[3]),
            license=license or "not stated",
            mean=preprocessing.mean,
            std=preprocessing.std,
            tokens=tokens,
        )
        self.preprocessing = preprocessing
        self.network = network
        self.facts = dict(facts)

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Frame and normalize images (B, 3, H, W) in [0, 1] as the preprocessing says, on their device."""
        return self.preprocessing.prepare(images_BCHW, self.mean, self.std)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Map normalized pixels (B, 3, image_size, image_size) to tokens (B, S, E), row-major."""
        map_BEHW: Tensor = self.network(pixels_BCHW)
        return map_BEHW.flatten(2).transpose(1, 2)

    def fingerprint(self) -> str:
        """Hash of weights, preparation of images, layer and kind of token."""
        preprocessing = asdict(self.preprocessing) | {
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }
        facts = [type(self).__qualname__, self.tokens, sorted(preprocessing.items()), sorted(self.facts.items())]
        return weights_digest(self.network, facts=repr(facts))


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
