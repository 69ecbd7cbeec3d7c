"""One shard: a safetensors file with the tokens of consecutive images and their checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visexpert.errors import DataError
from visexpert.io.reading import parse_json
from visexpert.store.key import FeatureKey
from visexpert.store.packing import layout, pack

HEADER = 1024
"""Bytes in front of the tensors: the length of the JSON, the JSON, and spaces. Fixed, because the checksum inside is
known last."""

_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}


@dataclass(frozen=True)
class Shard:
    """A shard of a key.

    Args:
        key: Provenance of its tokens.
        number: Its place among the shards of the key.
        rows: Its images.
    """

    key: FeatureKey
    number: int
    rows: range

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"shard-{self.number:06}.safetensors"

    @property
    def part(self) -> str:
        """Name of its file while it is written."""
        return f".{self.name}.part"

    @property
    def num_bytes(self) -> int:
        """Size of its file."""
        return HEADER + sum(end - begin for begin, end in self._offsets().values())

    @property
    def begin(self) -> int:
        """Place of the tokens in the file; what belongs to them is in front of it."""
        return HEADER + self._offsets()["tokens"][0]

    def header(self, facts: Mapping[str, str]) -> bytes:
        """Return what stands in front of the tensors.

        Args:
            facts: Metadata.
        """
        offsets = self._offsets()
        text = json.dumps(
            {
                "__metadata__": dict(sorted(facts.items())),  # safetensors does not keep their order
                **{
                    name: {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": list(offsets[name])}
                    for name, (dtype, shape) in layout(self.key, len(self.rows)).items()
                },
            }
        ).encode()
        length = HEADER - 8
        assert len(text) <= length
        return length.to_bytes(8, "little") + text.ljust(length)

    def facts(self, *, lost: float, size: float) -> dict[str, str]:
        """Return the metadata, but for the checksum.

        Args:
            lost: Sum of the squared rounding errors.
            size: Sum of the squared tokens.
        """
        return {**self.identity(), "lost": repr(lost), "size": repr(size)}

    def identity(self) -> dict[str, str]:
        """Return the part of the metadata that says which shard it is."""
        return {"key": self.key.name, "first": str(self.rows.start), "rows": str(len(self.rows))}

    def _offsets(self) -> dict[str, tuple[int, int]]:
        found, begin = {}, 0
        for name, (dtype, shape) in layout(self.key, len(self.rows)).items():
            found[name] = (begin, begin := begin + math.prod(shape) * dtype.itemsize)
        return found


def shards_of(key: FeatureKey, rows_per_shard: int) -> list[Shard]:
    """Return the shards of a key in row order."""
    starts = range(0, key.rows, rows_per_shard)
    return [Shard(key, at, range(start, min(start + rows_per_shard, key.rows))) for at, start in enumerate(starts)]


def write_shard(file: BinaryIO, shard: Shard, batches: Iterable[Tensor], *, owner: str) -> None:
    """Write a shard from the beginning of a file and flush it to disk; space is reserved before the first batch.

    Memory holds one batch at a time.

    Args:
        file: Open for writing.
        shard: What to write.
        batches: Tokens (B, tokens, width) in row order.
        owner: Name of the encoder, for messages.

    Raises:
        DataError: The batches are not of the shard's size, or tokens do not fit the key's dtype.
        OSError: The disk is full or cannot be written.
    """
    file.truncate(0)
    _reserve(file, shard.num_bytes)
    file.seek(shard.begin)
    # Written sequentially, not through a memory map: a full disk raises an error here, but a bus error there.
    done, lost, size, digest = 0, 0.0, 0.0, hashlib.sha256()
    rest: dict[str, list[Tensor]] = {name: [] for name in layout(shard.key, 1) if name != "tokens"}
    for batch in batches:
        if tuple(batch.shape[1:]) != (shard.key.tokens, shard.key.width):
            found, needed = tuple(batch.shape[1:]), (shard.key.tokens, shard.key.width)
            raise DataError(f"{owner} gave {found} tokens per image, but its settings say {needed}; check its grid.")
        done += len(batch)
        if done > len(shard.rows):
            continue
        packed = pack(batch, shard.key.dtype, owner=owner)
        lost, size = lost + packed.lost, size + packed.size
        _append(file, packed.tensors["tokens"], digest)
        for name, parts in rest.items():
            parts.append(packed.tensors[name])
    if done != len(shard.rows):
        raise DataError(f"The feature store got tokens of {done} images, but {len(shard.rows)} are to be stored.")
    file.seek(HEADER)
    for parts in rest.values():
        for part in parts:
            _append(file, part, digest)
    facts = shard.facts(lost=lost, size=size)
    file.seek(0)
    file.write(shard.header({**facts, "sha256": _sealed(digest, facts)}))
    file.flush()
    os.fsync(file.fileno())


def map_shard(path: Path, shard: Shard) -> dict[str, Tensor]:
    """Return the tensors of a shard, memory-mapped: rows are read from disk when they are indexed.

    Raises:
        DataError: The file is damaged, or another shard's.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            facts = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    expected = layout(shard.key, len(shard.rows))
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise _damaged(path, f"it holds {_told(found)}, but {_told(expected)} is needed")
    wrong = [name for name, value in shard.identity().items() if facts.get(name) != value]
    if wrong:
        raise _damaged(path, f"it is another shard's: {', '.join(f'{name} {facts.get(name)}' for name in wrong)}")
    return tensors


def fault_of(path: Path, shard: Shard) -> str | None:
    """Read a whole shard and return what is wrong with it; None if it is as it was written."""
    try:
        map_shard(path, shard)
        with path.open("rb") as file:
            header, front = file.read(HEADER), file.read(shard.begin - HEADER)
            facts = shard_facts(header, path)
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            digest.update(front)
    except (DataError, OSError) as error:
        return str(error)
    seal = facts.pop("sha256", "")
    if seal != _sealed(digest, facts) or header != shard.header({**facts, "sha256": seal}):
        return "its checksum does not match its content"
    return None


def shard_facts(header: bytes, name: Path | str) -> dict[str, str]:
    """Return the metadata of a shard.

    Args:
        header: Its first :data:`HEADER` bytes.
        name: Its name in messages.

    Raises:
        DataError: The file is damaged.
    """
    try:
        facts = parse_json(header[8:])["__metadata__"]
        return {str(key): str(value) for key, value in facts.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(name, repr(error)) from error


def _sealed(digest: hashlib._Hash, facts: Mapping[str, str]) -> str:
    """Return the checksum of tensors and metadata."""
    whole = digest.copy()
    whole.update(json.dumps(facts, sort_keys=True).encode())
    return whole.hexdigest()


def _append(file: BinaryIO, tensor: Tensor, digest: hashlib._Hash) -> None:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    file.write(data)
    digest.update(data)


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserve space, if the file system can."""
    allocate = getattr(os, "posix_fallocate", None)  # not on macOS
    if allocate is None:
        return
    try:
        allocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _told(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {shape} {str(dtype)[6:]}" for name, (dtype, shape) in tensors.items()) or "nothing"


def _damaged(path: Path | str, why: str) -> DataError:
    return DataError(f"The feature file {path} is damaged ({why}); delete it to have it computed again.")
