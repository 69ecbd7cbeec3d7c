"""Rounding of tokens to the type in which they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.store.key import DTYPES, FeatureKey, StoreDtype

MOST_LOST: Mapping[StoreDtype, float] = {"float16": 2**-8, "bfloat16": 2**-8, "float32": 2**-8, "int8": 2**-3}
"""Largest rounding error allowed in a batch, relative to the tokens' root mean square. bfloat16's is about 2e-3; int8's
is 4e-3 where a token's values are evenly spread, and grows with its outliers."""


@dataclass(frozen=True)
class Packed:
    """Rounded tokens of some images.

    Args:
        tensors: What is stored, by name; each has one entry per image.
        lost: Sum of the squared rounding errors.
        size: Sum of the squared tokens.
    """

    tensors: Mapping[str, Tensor]
    lost: float
    size: float


def layout(key: FeatureKey, rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each tensor that ``rows`` images take, in the order of the file."""
    scales = {"scale": (torch.float32, (rows, key.tokens))} if key.dtype == "int8" else {}
    return {**scales, "tokens": (DTYPES[key.dtype], (rows, key.tokens, key.width))}  # float32 has to be aligned


def pack(tokens: Tensor, dtype: StoreDtype, *, owner: str) -> Packed:
    """Round tokens to a type; int8 divides each token by a scale of its own, its largest value by 127.

    Args:
        tokens: (B, S, E), any float type.
        dtype: Type to round to.
        owner: Name of the encoder, for messages.

    Raises:
        DataError: Some tokens are NaN or infinite, or too large or too small for ``dtype``.
    """
    given = tokens.detach().float().cpu()
    largest = float(given.abs().max()) if given.numel() else 0.0
    if not math.isfinite(largest):
        raise DataError(f"{owner} gave tokens that are NaN or infinite; check its weights, images and precision.")
    tensors = _to_int8(given) if dtype == "int8" else {"tokens": given.to(DTYPES[dtype])}
    size, lost = _squares(given), _squares(unpack(tensors) - given)
    if lost > MOST_LOST[dtype] ** 2 * size:  # an infinity among the stored ones makes it infinite
        raise _unfit(owner, dtype, largest, is_small=lost <= size)
    return Packed(tensors, lost, size)


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens that :func:`pack` rounded, float32."""
    tokens = tensors["tokens"].float()
    return tokens if "scale" not in tensors else tokens * tensors["scale"].unsqueeze(-1)


def _to_int8(tokens_BSE: Tensor) -> dict[str, Tensor]:
    scale_BS = (tokens_BSE.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {"tokens": (tokens_BSE / scale_BS.unsqueeze(-1)).round().to(torch.int8), "scale": scale_BS}


def _squares(values: Tensor) -> float:
    # Summed in float64: the squares of a large batch, and those of bfloat16's range, leave float32.
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _unfit(owner: str, dtype: StoreDtype, largest: float, *, is_small: bool) -> DataError:
    others = "bfloat16 or float32" if dtype == "float16" else "float32"
    if dtype == "int8":
        most = MOST_LOST[dtype]
        what, others = f"with such outliers that int8 loses more than {most:.3g} of their size", "float16 or bfloat16"
        return DataError(f"{owner} gave tokens {what}; set store.dtype to {others}, or store.folder to null.")
    what = (
        f"so small (largest {largest:.3g}) that {dtype} keeps too few digits of them"
        if is_small
        else f"up to {largest:.3g}, but {dtype} ends at {torch.finfo(DTYPES[dtype]).max:.3g}"
    )
    return DataError(f"{owner} gave tokens {what}; set store.dtype to {others}, or store.folder to null.")
