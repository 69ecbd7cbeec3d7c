"""Tokens as the store's files hold them: two- or four-byte numbers, checked when packed."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visexpert.errors import DataError

StoreDtype = Literal["float16", "bfloat16", "float32"]

DISK: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
"""Types inside the files; numpy has no bfloat16, so its two bytes are stored as an integer."""

MOST_LOST = 2**-8
"""Largest rounding error allowed for float16, relative to the tokens' root mean square; bfloat16's is about 2e-3."""


def pack(tokens: Tensor, dtype: StoreDtype, *, owner: str) -> NDArray[Any]:
    """Round tokens to the type used on disk.

    Args:
        tokens: Any float type, any shape.
        dtype: Type to round to.
        owner: Name of the encoder, for messages.

    Returns:
        Array of type ``DISK[dtype]`` and the same shape.

    Raises:
        DataError: Some tokens are NaN or infinite, or too large or too small for ``dtype``.
    """
    given = tokens.detach().float().cpu()
    stored = given.to(getattr(torch, dtype))
    largest = float(given.abs().max()) if given.numel() else 0.0
    if not np.isfinite(largest):
        raise DataError(f"{owner} gave tokens that are NaN or infinite; check its weights, images and precision.")
    size, lost = float(given.norm()), float((stored.float() - given).norm())
    if lost > MOST_LOST * size:  # an infinity in `stored` makes it infinite
        reach = torch.finfo(stored.dtype)
        small = lost <= size
        what = (
            f"so small (largest {largest:.3g}) that {dtype} keeps too few digits of them"
            if small
            else f"up to {largest:.3g}, but {dtype} ends at {reach.max:.3g}"
        )
        others = "bfloat16 or float32" if dtype == "float16" else "float32"
        raise DataError(f"{owner} gave tokens {what}; set store.dtype to {others}, or store.folder to null.")
    if dtype == "bfloat16":
        return stored.view(torch.int16).numpy().view(DISK[dtype])
    return stored.numpy().astype(DISK[dtype], copy=False)


def unpack(values: NDArray[Any], dtype: StoreDtype) -> Tensor:
    """Return the tokens that :func:`pack` stored, float32."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(values)).float()
