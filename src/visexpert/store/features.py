"""Frozen tokens on disk: one memory-mapped file per (images, encoder), shared by all runs that need it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visexpert.errors import DataError
from visexpert.io.files import whole_file
from visexpert.io.reading import read_json
from visexpert.names import Role

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


@dataclass(frozen=True)
class FeatureKey:
    """Provenance of a file: everything that determines its content.

    Args:
        role: Role of the encoder in the runs that read its tokens.
        data: Fingerprint of the images.
        encoder: Fingerprint of the encoder: weights, input size, layer.
        rows: Number of images.
        tokens: Tokens per image (S, plus one for a [CLS] token).
        width: Width E.
        grid_hw: Grid to which the tokens were resampled.
        dtype: ``float16``, ``bfloat16`` or ``float32``.
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
        """File stem: a hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:20]

    @property
    def num_bytes(self) -> int:
        """Size of the tokens."""
        return self.rows * self.tokens * self.width * DISK[self.dtype].itemsize


class FeatureFile:
    """Tokens of all images of a split, read by row.

    Args:
        values: (rows, tokens, width), memory-mapped.
        dtype: Type of the tokens.
    """

    def __init__(self, values: NDArray[Any], dtype: StoreDtype) -> None:
        self._values, self._dtype = values, dtype

    def read(self, index_B: Tensor) -> Tensor:
        """Return tokens (B, tokens, width), float32, on the device of ``index_B``."""
        return unpack(self._values[index_B.cpu().numpy()], self._dtype).to(index_B.device)


def open_features(root: Path, key: FeatureKey) -> FeatureFile | None:
    """Open the file of ``key``; return None if it has not been written yet.

    Raises:
        DataError: The file exists but does not match its key.
    """
    path = root / f"{key.name}.npy"
    if not path.is_file():
        return None
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"The feature file {path} is damaged ({error}); delete it to have it computed again."
        ) from error
    if values.shape != (key.rows, key.tokens, key.width) or values.dtype != DISK[key.dtype]:
        raise DataError(
            f"The feature file {path} holds {values.shape} {values.dtype}, "
            f"{(key.rows, key.tokens, key.width)} {key.dtype} is needed; delete it to have it computed again."
        )
    return FeatureFile(values, key.dtype)


def write_features(root: Path, key: FeatureKey, batches: Iterable[Tensor], *, owner: str = "An encoder") -> FeatureFile:
    """Write the tokens of all images and open the file; atomic: a killed writer leaves no file of that name.

    Leftovers of killed writers are removed first, and the space is reserved before the first batch is computed.

    Args:
        root: Folder of the store.
        key: Provenance; gives the shape.
        batches: Tokens (B, tokens, width) in row order.
        owner: Name of the encoder, for messages.

    Raises:
        DataError: The disk is full or cannot be written, the batches do not add up to ``key.rows``, or tokens do
            not fit ``key.dtype``.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise DataError(f"The feature store cannot use {root} ({error}); set store.folder to another one.") from error
    if free < key.num_bytes:
        raise _too_full(root, key, f"{free / 1e6:.0f} MB are free")
    try:
        with _scratch(root, key) as file:
            _reserve(file, key)
            _fill(file, key, batches, owner=owner)
            os.replace(file.name, root / f"{key.name}.npy")
        with whole_file(root / f"{key.name}.json") as part:
            part.write_text(json.dumps(asdict(key), indent=2), encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _too_full(root, key, f"cannot reserve them: {error.strerror}") from error
        raise DataError(
            f"The feature store in {root} cannot be written ({error}); set store.folder to another one."
        ) from error
    written = open_features(root, key)
    assert written is not None
    return written


def of_earlier_versions(root: Path) -> list[Path]:
    """Return token files whose provenance has no role: nothing reads them anymore."""
    found = []
    for facts in sorted(root.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            if "role" not in read_json(facts) and (tokens := facts.with_suffix(".npy")).is_file():
                found.append(tokens)
    return found


def remove_leftovers(root: Path) -> None:
    """Remove unfinished files that no writer on any machine has locked."""
    for path in root.glob(".*.npy"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def _scratch(root: Path, key: FeatureKey) -> Iterator[BinaryIO]:
    """Open a temporary file beside those of the store, locked while it is written and removed at the end."""
    while True:
        # Closed below: the lock lasts as long as the file is open.
        file = open(root / f".{key.name}.{uuid4().hex[:12]}.npy", "xb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:  # nobody removed it as a leftover before it was locked
            break
        file.close()
    try:
        yield file
    finally:
        Path(file.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # from flushing the rest; the file is gone
            file.close()


def _reserve(file: BinaryIO, key: FeatureKey) -> None:
    """Write the header and reserve space for all tokens, if the file system can."""
    shape = (key.rows, key.tokens, key.width)
    header = {"descr": DISK[key.dtype].str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    allocate = getattr(os, "posix_fallocate", None)  # not on macOS
    if allocate is None or not key.num_bytes:
        return
    try:
        allocate(file.fileno(), file.tell(), key.num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _fill(file: BinaryIO, key: FeatureKey, batches: Iterable[Tensor], *, owner: str) -> None:
    # Written sequentially, not through a memory map: a full disk raises an error here, but a bus error there.
    done = 0
    for batch in batches:
        if done + len(batch) <= key.rows:
            file.write(pack(batch, key.dtype, owner=owner).tobytes())
        done += len(batch)
    if done != key.rows:
        raise DataError(f"The feature store got tokens of {done} images, but the split has {key.rows}.")
    file.flush()
    os.fsync(file.fileno())


def _too_full(root: Path, key: FeatureKey, found: str) -> DataError:
    return DataError(
        f"The feature store in {root} needs {key.num_bytes / 1e6:.0f} MB, but {found}; free some space, or set "
        "store.folder to null to run the experts live."
    )
