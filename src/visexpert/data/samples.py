"""Annotations of a split, one compact record per image, and the batches built from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
import torch

from visexpert.data.images import Picture
from visexpert.data.packing import IntArray, pack_encoded
from visexpert.types import Batch, EncodedText, Skipped, TextEncoder, TextItem


@dataclass(frozen=True)
class Sample:
    """One image with its texts, or texts without an image.

    Args:
        key: Name of the sample in messages.
        image: Path of its file, or its name if there is none; empty without an image.
        items: Texts of the image.
        lost: Reasons for leaving out parts of its record, one sentence each; not kept in tables.
        label: Class of the image, for probes; empty if it has none.
        content: Bytes of the image file, where they are part of the record; not kept in tables.
    """

    key: str
    image: str
    items: tuple[TextItem, ...]
    lost: tuple[str, ...] = ()
    label: str = ""
    content: bytes | None = None


class Rows(Protocol):
    """The samples of a split, by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample:
        """Return a sample.

        Raises:
            DataError: Its record is broken.
        """

    def __iter__(self) -> Iterator[Sample]: ...

    def key(self, row: int) -> str:
        """Return the name of a sample in messages, even of a broken one."""

    def identity(self) -> Iterator[str]:
        """Yield what changes whenever a file of an image may have changed."""


class SampleTable:
    """The samples of a split in one byte array, which workers share: reference counts would copy Python objects.

    Args:
        samples: The samples.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        lines = [to_line(sample) for sample in samples]
        self._bytes = np.frombuffer(b"".join(lines), dtype=np.uint8)
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Sample:
        start = int(self._ends[row - 1]) if row else 0
        return from_line(self._bytes[start : int(self._ends[row])].tobytes())

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def key(self, row: int) -> str:
        """Return the name of a sample in messages."""
        return self[row].key

    def identity(self) -> Iterator[str]:
        """Yield name, size and modification time of each image file."""
        return (f"{sample.image}\0{file_facts(sample.image)}" for sample in self)


@dataclass(frozen=True)
class Loaded:
    """One row of a batch.

    Args:
        row: Its row in the split.
        picture: Its image; None without an image.
        items: The chosen texts.
        encoded: The texts as token ids; None if the batch has no text.
        prompts: For each text, the ids that precede its answer; empty if nothing is generated.
        key: Name of its image in the source.
        label: Class of its image; empty if it has none.
    """

    row: int
    picture: Picture | None
    items: tuple[TextItem, ...]
    encoded: tuple[EncodedText, ...] | None
    prompts: tuple[tuple[int, ...], ...] = ()
    key: str = ""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchForm:
    """Settings common to all batches of a split.

    Args:
        split: Name of the split that rows refer to.
        source: Name of the source, if a run reads several.
        image_size: Side of the images, pixels.
        pad_id: Id that pads short rows of text.
        with_items: Include texts, names of images and classes as strings in batches.
    """

    split: str
    source: str
    image_size: int
    pad_id: int
    with_items: bool

    def batch(self, rows: Sequence[Loaded], skipped: Sequence[Skipped]) -> Batch:
        """Combine rows into a batch; rows without an image get a black one."""
        size = self.image_size
        images = [
            torch.zeros(3, size, size, dtype=torch.uint8) if r.picture is None else r.picture.image_CHW for r in rows
        ]
        texts = [row.encoded for row in rows if row.encoded is not None]
        has_image = [row.picture is not None for row in rows]
        return Batch(
            images_BCHW=torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8),
            index_B=torch.tensor([row.row for row in rows], dtype=torch.int64),
            split=self.split,
            text=pack_encoded(texts, self.pad_id) if len(texts) == len(rows) else None,
            items=tuple(row.items for row in rows) if self.with_items else (),
            prompts=tuple(row.prompts for row in rows) if self.with_items else (),
            has_image_B=None if all(has_image) else torch.tensor(has_image),
            original_hw_B2=torch.tensor(
                [(size, size) if row.picture is None else row.picture.original_hw for row in rows], dtype=torch.int64
            ).reshape(-1, 2),
            source=self.source,
            skipped=tuple(skipped),
            keys=tuple(row.key for row in rows) if self.with_items else (),
            labels=tuple(row.label for row in rows) if self.with_items and any(row.label for row in rows) else (),
        )


def encode_items(
    items: Sequence[TextItem], packer: TextEncoder | None, *, has_image: bool
) -> tuple[EncodedText, ...] | None:
    """Tokenize the texts of one row; None without a packer."""
    return None if packer is None else tuple(packer.encode(item, has_image=has_image) for item in items)


def prompts_of(
    items: Sequence[TextItem], packer: TextEncoder | None, *, has_image: bool
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids that precede the answer to each text of one row; empty without a packer."""
    if packer is None:
        return ()
    return tuple(tuple(packer.prompt(item.prompt, history=item.history, has_image=has_image)) for item in items)


def words_of(sample: Sample) -> int:
    """Return the number of words in a sample's texts."""
    turns = [turn for item in sample.items for turn in (*item.history, (item.prompt, item.answer))]
    return sum(len(text.split()) for turn in turns for text in turn)


def subset(rows: int, *, share: float, most: int | None, seed: int) -> IntArray:
    """Choose rows in ascending order; with the same seed, smaller choices are subsets of larger ones.

    Args:
        rows: Number of rows.
        share: Share of rows to choose, in (0, 1]; at least one row is chosen.
        most: Maximum number of rows; None for no limit.
        seed: Seed of the choice.
    """
    number = max(1, round(share * rows)) if rows else 0
    number = number if most is None else min(number, most)
    if number == rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).permutation(rows)[:number])


def file_facts(path: str) -> str:
    """Return size and modification time of a file; empty if it is missing."""
    try:
        facts = os.stat(path)
    except OSError:
        return ""
    return f"{facts.st_size}/{facts.st_mtime_ns}"


def to_line(sample: Sample) -> bytes:
    """Return a sample as bytes, without its content and lost parts; :func:`from_line` reads them."""
    return json.dumps([sample.key, sample.image, [astuple(item) for item in sample.items], sample.label]).encode()


def from_line(line: bytes) -> Sample:
    """Return the sample that :func:`to_line` wrote."""
    key, image, items, label = json.loads(line)
    return Sample(key, image, tuple(_to_item(fields) for fields in items), label=label)


def _to_item(fields: list[object]) -> TextItem:
    kind, prompt, answer, family, references, history, generate, scored_as = fields
    return TextItem(
        str(kind),
        str(prompt),
        str(answer),
        str(family),
        tuple(references),  # type: ignore[arg-type]
        tuple((question, reply) for question, reply in history),  # type: ignore[attr-defined]
        bool(generate),
        str(scored_as),
    )
