"""Interface of a frozen vision expert, be it an expert of ToVE or a teacher of MoVE-KD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError, require_channels
from visexpert.grids import resized_to
from visexpert.io.first_use import ReadsWeights, described
from visexpert.io.weights import weights_digest
from visexpert.precision import like_weights
from visexpert.typed import typed
from visexpert.types import IMAGES_ARE_CHECKED, ExpertTokens, check_images

TokenKind = Literal["features", "prediction"]


@typed
class VisionExpert(ReadsWeights, ABC):
    """A frozen encoder that turns images into tokens.

    A subclass builds its network in ``__init__`` without downloading or reading weights, fills it in
    :meth:`load_weights`, and implements :meth:`encode`. Images are resized and normalized here, on the device, so that
    data modules need not know about experts. Adapters and gates read sizes from the expert; no YAML file repeats them.

    Args:
        image_size: Side of the images that :meth:`encode` expects, in pixels.
        token_dim: Width E of a token.
        grid_hw: Grid of the tokens, (height, width), with height x width = S.
        license: License of the weights (SPDX identifier, or the vendor's name for it).
        mean: Channel means for normalization, for pixels in [0, 1].
        std: Channel standard deviations, in the same units.
        tokens: ``features`` - tokens of the encoder; ``prediction`` - the predicted map, one token per cell, E = number
            of its channels (Prismer's low-level experts; a conv stem in the adapter turns it into patch tokens).
    """

    mean: Tensor
    std: Tensor

    summary_dim: int | None = None
    """Width of its own summary of the image ([CLS] or pooled output); None if it gives patch tokens only."""

    summarizes: bool = False
    """Whether the summary is asked for; without it, an expert need not compute it."""

    def __init__(
        self,
        *,
        image_size: int,
        token_dim: int,
        grid_hw: tuple[int, int],
        license: str,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        tokens: TokenKind = "features",
    ) -> None:
        super().__init__()
        if tokens not in ("features", "prediction"):
            raise ConfigError(f"{type(self).__name__}: tokens={tokens!r} is unknown; use 'features' or 'prediction'.")
        require_channels(type(self).__name__, mean=mean, std=std)
        self.image_size = image_size
        self.token_dim = token_dim
        self.grid_hw = grid_hw
        self.license = license
        self.tokens: TokenKind = tokens
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @abstractmethod
    def load_weights(self) -> None:
        """Fill the network with its pretrained weights (safetensors or ``weights_only=True``).

        Raises:
            WeightsError: The weights are missing or do not fit; the message names the file and the next step.
        """

    @property
    def weights_from(self) -> str | None:
        """Folder, file or Hugging Face id that :meth:`load_weights` reads; None if it reads none, or does not say."""
        return None

    @abstractmethod
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Map normalized pixels (B, 3, image_size, image_size) to tokens (B, S, E), row-major."""

    def summary_width(self) -> int | None:
        """Return the width of its own summary of the image, found without weights; None if it gives none."""
        return self.summary_dim

    def fingerprint(self) -> str:
        """Return a hash of all that the tokens depend on besides the image, weights included; a feature store's key."""
        facts = [type(self).__qualname__, self.image_size, self.tokens, self.mean.tolist(), self.std.tolist()]
        return weights_digest(self, facts=repr(facts))

    def preprocess(self, images_BCHW: Tensor) -> Tensor:
        """Resize (bilinear, antialiased) and normalize images (B, 3, H, W) in [0, 1]."""
        if images_BCHW.shape[-2:] != (self.image_size, self.image_size):
            images_BCHW = resize_images(images_BCHW, self.image_size)
        return (images_BCHW - self.mean) / self.std

    def __call__(self, images_BCHW: Tensor) -> ExpertTokens:
        if not IMAGES_ARE_CHECKED.get():
            check_images(images_BCHW, owner=type(self).__name__, device=self.mean.device)
        tokens: ExpertTokens = super().__call__(images_BCHW)
        return tokens

    def __repr__(self) -> str:
        height, width = self.grid_hw
        facts = [f"{height}x{width} {self.tokens} of width {self.token_dim}", f"{self.image_size} px", self.license]
        return described(self, self.weights_from, facts)

    def forward(self, images_BCHW: Tensor) -> ExpertTokens:
        """Encode images (B, 3, H, W), float in [0, 1], any size.

        Calling the expert checks the images, and loads the weights if they have not been loaded yet.

        Raises:
            DataError: The images have another shape, dtype or range (checked when the expert is called).
            WeightsError: The weights are missing, or do not fit (on the first call).
        """
        return ExpertTokens(self.encode(like_weights(self.preprocess(images_BCHW), self)), self.grid_hw)


def resize_images(images_BCHW: Tensor, size: int) -> Tensor:
    """Resize images to squares of ``size`` px: bilinear, half-pixel centers, antialiased when shrinking."""

    def resize(given_BCHW: Tensor) -> Tensor:
        # torch resizes no half on CPUs
        given_BCHW = given_BCHW.to(torch.promote_types(given_BCHW.dtype, torch.float32))
        return F.interpolate(given_BCHW, size=(size, size), mode="bilinear", align_corners=False, antialias=True)

    return resized_to(images_BCHW, size, resize)
