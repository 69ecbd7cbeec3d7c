"""Frozen tokens on disk: one memory-mapped file per (images, encoder), shared by every run that needs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visexpert.errors import DataError

StoreDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class FeatureKey:
    """Provenance of a file: everything its content depends on.

    Args:
        data: Fingerprint of the images.
        encoder: Fingerprint of the encoder: weights, input size, layer.
        rows: Number of images.
        tokens: Tokens per image (S, plus one for a [CLS] token).
        width: Width E.
        grid_hw: Grid that the tokens were resampled to.
        dtype: ``float16`` or ``float32``.
    """

    data: str
    encoder: str
    rows: int
    tokens: int
    width: int
    grid_hw: tuple[int, int]
    dtype: StoreDtype

    @property
    def name(self) -> str:
        """File stem, a hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:20]

    @property
    def num_bytes(self) -> int:
        """Size of the tokens."""
        return self.rows * self.tokens * self.width * np.dtype(self.dtype).itemsize


class FeatureFile:
    """Tokens of every image of a split, read by row.

    Args:
        values: (rows, tokens, width), memory-mapped.
    """

    def __init__(self, values: NDArray[np.floating]) -> None:
        self._values = values

    def read(self, index_B: Tensor) -> Tensor:
        """Tokens (B, tokens, width), float32, on the device of ``index_B``."""
        rows = self._values[index_B.cpu().numpy()]
        return torch.from_numpy(np.ascontiguousarray(rows)).float().to(index_B.device)


def open_features(root: Path, key: FeatureKey) -> FeatureFile | None:
    """Open the file of ``key``, or None where it was not written yet.

    Raises:
        DataError: The file is there but is not what its key says.
    """
    path = root / f"{key.name}.npy"
    if not path.is_file():
        return None
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The feature file {path} is damaged ({error}); delete it, it is computed again.") from error
    if values.shape != (key.rows, key.tokens, key.width) or values.dtype != np.dtype(key.dtype):
        raise DataError(
            f"The feature file {path} holds {values.shape} {values.dtype}, "
            f"{(key.rows, key.tokens, key.width)} {key.dtype} is needed; delete it, it is computed again."
        )
    return FeatureFile(values)


def write_features(root: Path, key: FeatureKey, batches: Iterable[Tensor]) -> FeatureFile:
    """Write the tokens of all images and open them; atomic: a killed writer leaves no file of that name.

    Args:
        root: Folder of the store.
        key: Provenance; gives the shape.
        batches: Tokens (B, tokens, width) in row order.

    Raises:
        DataError: The disk is too full, or the batches do not add up to ``key.rows``.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise DataError(
            f"The feature store cannot use {root} ({error}); set feature_cache to another folder."
        ) from error
    if free < key.num_bytes:
        raise DataError(
            f"The feature store in {root} needs {key.num_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
            "free some space, or set feature_cache to null to run the experts live."
        )
    scratch = root / f".{key.name}.{os.getpid()}.npy"
    try:
        _fill(scratch, key, batches)
        scratch.replace(root / f"{key.name}.npy")
        (root / f"{key.name}.json").write_text(json.dumps(asdict(key), indent=2), encoding="utf-8")
    finally:
        scratch.unlink(missing_ok=True)
    written = open_features(root, key)
    assert written is not None
    return written


def _fill(path: Path, key: FeatureKey, batches: Iterable[Tensor]) -> None:
    shape = (key.rows, key.tokens, key.width)
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(key.dtype), shape=shape)
    done = 0
    for batch in batches:
        if done + len(batch) <= key.rows:
            values[done : done + len(batch)] = batch.detach().cpu().numpy().astype(key.dtype)
        done += len(batch)
    if done != key.rows:
        raise DataError(f"The feature store got tokens of {done} images, the split has {key.rows}.")
    values.flush()
