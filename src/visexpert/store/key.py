"""What stored tokens depend on, and the types in which they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from visexpert.names import Role

StoreDtype = Literal["float16", "bfloat16", "float32", "int8"]

DTYPES: Mapping[StoreDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
"""Types of the tokens inside the files; int8 has a float32 scale for each token beside it."""

SHARD_MB = 256.0
"""Size of a shard, in millions of bytes: a killed extraction loses at most one."""


def bytes_per_image(tokens: int, width: int, dtype: StoreDtype) -> int:
    """Return the bytes that the tokens of one image take."""
    scale = 4 if dtype == "int8" else 0
    return tokens * (width * DTYPES[dtype].itemsize + scale)


@dataclass(frozen=True)
class FeatureKey:
    """Provenance of stored tokens: everything that determines their content.

    Args:
        role: Role of the encoder in the runs that read its tokens.
        data: Fingerprint of the images: files, crop, size.
        encoder: Fingerprint of the encoder: weights, preprocessing, input size, layer.
        rows: Number of images.
        tokens: Tokens per image (S, plus one for a [CLS] token).
        width: Width E.
        grid_hw: Grid to which the tokens were resampled.
        dtype: Type of the stored numbers.
    """

    role: Role
    data: str
    encoder: str
    rows: int
    tokens: int
    width: int
    grid_hw: tuple[int, int]
    dtype: StoreDtype

    @property
    def name(self) -> str:
        """Name of the folder: a hash of all fields."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()[:20]

    @property
    def row_bytes(self) -> int:
        """Bytes of the tokens of one image."""
        return bytes_per_image(self.tokens, self.width, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tokens of all images."""
        return self.rows * self.row_bytes

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "grid_hw": list(self.grid_hw)}

    def rows_per_shard(self, shard_mb: float) -> int:
        """Return the images per shard of at most ``shard_mb`` million bytes: at least one, and whole batches of 64."""
        rows = max(1, int(shard_mb * 1e6) // max(1, self.row_bytes))
        return rows - rows % 64 if rows > 64 else rows
