"""Tokens from one grid to another, and images resized once for all that read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch.nn import functional as F

from visexpert.errors import ConfigError


def resample_tokens(tokens_BSE: Tensor, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> Tensor:
    """Bring tokens from one grid to another.

    Bilinear with half-pixel centers (no align_corners); the mean over the covered area where either side shrinks by
    more than two, which bilinear would undersample.

    Args:
        tokens_BSE: (B, S, E), row-major.
        from_hw: Their grid, height x width = S.
        to_hw: The grid wanted.

    Returns:
        (B, T, E), T = height x width of ``to_hw``; the same tensor where the grids agree.

    Raises:
        ConfigError: S does not fit ``from_hw``.
    """
    if tokens_BSE.shape[1] != math.prod(from_hw):
        raise ConfigError(f"resample_tokens: {tokens_BSE.shape[1]} tokens do not fill a grid of {from_hw}.")
    if from_hw == to_hw:
        return tokens_BSE
    map_BEHW = tokens_BSE.transpose(1, 2).unflatten(2, from_hw)
    if from_hw[0] > 2 * to_hw[0] or from_hw[1] > 2 * to_hw[1]:
        resampled = F.interpolate(map_BEHW, size=to_hw, mode="area")
    else:
        resampled = F.interpolate(map_BEHW, size=to_hw, mode="bilinear", align_corners=False)
    return resampled.flatten(2).transpose(1, 2)


_RESIZED: ContextVar[dict[tuple[Tensor, Hashable], Tensor] | None] = ContextVar("resized", default=None)
"""What :func:`resized_once` has resized, by images (one tensor: tensors are hashed by identity) and form."""


@contextmanager
def resized_once() -> Iterator[None]:
    """Resize the same images to the same form once, however many encoders ask for it within the ``with``."""
    before = _RESIZED.set({})
    try:
        yield
    finally:
        _RESIZED.reset(before)


def resized_to(images_BCHW: Tensor, form: Hashable, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """Return images resized by a function, or what it returned before within :func:`resized_once`.

    Do not change the result in place, as others may get it too.

    Args:
        images_BCHW: The images.
        form: All that the result depends on besides the images: size, interpolation.
        resize: Resizes them.
    """
    shared = _RESIZED.get()
    if shared is None:
        return resize(images_BCHW)
    if (images_BCHW, form) not in shared:
        shared[images_BCHW, form] = resize(images_BCHW)
    return shared[images_BCHW, form]
