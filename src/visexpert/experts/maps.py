"""Experts whose network gives a feature map (B, E, h, w), and helpers for such maps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor, nn
from torch.nn import functional as F

from visexpert.experts.base import TokenKind, VisionExpert
from visexpert.experts.probe import on_meta, probe_map
from visexpert.io.weights import weights_digest
from visexpert.networks.preprocessing import Preprocessing
from visexpert.precision import like_weights
from visexpert.types import ExpertTokens


class SummarizedMap(nn.Module, ABC):
    """Maps pixels to features, and gives the model's own summary of the image where it has one."""

    @abstractmethod
    def read(self, pixels_BCHW: Tensor, *, summarize: bool) -> tuple[Tensor, Tensor | None]:
        """Return features (B, E, h, w), and the model's summary (B, F) if it is asked for and there is one."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the features (B, E, h, w)."""
        return self.read(pixels_BCHW, summarize=False)[0]


class Summary(nn.Module):
    """Gives the summary alone.

    Args:
        network: Network that has it.
    """

    def __init__(self, network: SummarizedMap) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels_BCHW: Tensor) -> Tensor | None:
        """Return the summary (B, F); None if there is none."""
        return self.network.read(pixels_BCHW, summarize=True)[1]


class MapExpert(VisionExpert):
    """Expert whose network maps pixels to a feature map; its cells become tokens in row-major order.

    Width and grid are found by running the network on the ``meta`` device at the configured image size.

    Args:
        network: Maps normalized pixels (B, 3, H, W) to (B, E, h, w).
        preprocessing: How images are framed, resized and normalized.
        license: License of the weights; None for "not stated".
        facts: What the tokens depend on besides weights and preprocessing, such as the layer.
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
        return rows_of(self.network(pixels_BCHW))

    def forward(self, images_BCHW: Tensor) -> ExpertTokens:
        """See :meth:`VisionExpert.forward`; with the model's own summary where it is asked for."""
        if not self.summarizes or not isinstance(self.network, SummarizedMap):
            return super().forward(images_BCHW)
        map_BEHW, summary_BF = self.network.read(like_weights(self.preprocess(images_BCHW), self), summarize=True)
        return ExpertTokens(rows_of(map_BEHW), self.grid_hw, summary_BF)

    def summary_width(self) -> int | None:
        """See :meth:`VisionExpert.summary_width`; the network is run on ``meta``."""
        if not isinstance(self.network, SummarizedMap):
            return super().summary_width()
        found = on_meta(Summary(self.network), self.image_size)
        return None if found is None else int(found.shape[-1])

    def fingerprint(self) -> str:
        """Return a hash of weights, preprocessing, facts and kind of tokens."""
        preprocessing = asdict(self.preprocessing) | {
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }
        facts = [type(self).__qualname__, self.tokens, sorted(preprocessing.items()), sorted(self.facts.items())]
        return weights_digest(self.network, facts=repr(facts))


def map_of(
    features: Tensor, *, prefix: int | None = None, suffix: int = 0, channels_last: bool | None = None
) -> Tensor:
    """Return the features of a square image as a map (B, E, h, w).

    Args:
        features: Tokens (B, N, E), with the patch grid in row-major order; or a map.
        prefix: Number of tokens before the grid ([CLS], registers); None for the least that leaves a square.
        suffix: Number of tokens after the grid (YOLOS' detection tokens).
        channels_last: For a map: whether it is (B, h, w, E) rather than (B, E, h, w); None if unknown, then the two
            equal sides decide (SAM has such maps between its blocks, SAM 2 everywhere).

    Raises:
        ValueError: The tokens are not ``prefix``, a square grid and ``suffix``, or there are neither tokens nor a map.
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
        raise ValueError(f"{count} tokens are not a square grid and {first + suffix} others")
    return features[:, first : first + side * side].transpose(1, 2).reshape(len(features), -1, side, side)


def rows_of(map_BEHW: Tensor) -> Tensor:
    """Return the cells of a map (B, E, h, w) as tokens (B, h w, E), row by row."""
    return map_BEHW.flatten(2).transpose(1, 2)


def resize_map(map_BEHW: Tensor, side: int | None) -> Tensor:
    """Resize a map to ``side`` x ``side`` cells: by the mean over each cell if it shrinks, otherwise bilinear.

    Args:
        map_BEHW: Map (B, E, h, w).
        side: Side in cells; None leaves the map as it is.
    """
    if side is None or map_BEHW.shape[-2:] == (side, side):
        return map_BEHW
    if max(map_BEHW.shape[-2:]) > side:
        return F.interpolate(map_BEHW, size=(side, side), mode="area")
    return F.interpolate(map_BEHW, size=(side, side), mode="bilinear", align_corners=False)
