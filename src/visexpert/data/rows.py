"""Sources with one file per image, so that any row can be read at any time."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, replace
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visexpert.data.annotations import slow
from visexpert.data.division import Division
from visexpert.data.images import ImageReader, Picture
from visexpert.data.index import IndexRows
from visexpert.data.loader import BatchKey, BatchLoader, BatchSource
from visexpert.data.needs import missing_images
from visexpert.data.packing import IntArray
from visexpert.data.samples import BatchForm, Loaded, Rows, Sample, SampleTable, encode_items, prompts_of, subset
from visexpert.data.source import SourceData, no_fixed_images
from visexpert.errors import ConfigError, DataError
from visexpert.types import Batch, ImageSource, Skipped, TextEncoder, TextItem


class RowData(SourceData):
    """A source of image files: one row per image, with all its texts.

    Args:
        texts_per_image: Maximum number of texts per image in a training batch, drawn anew each epoch; null for all.
            Evaluation uses all.
        draw_answers: In training, draw each text's answer from all accepted ones; otherwise use the first.
        kwargs: See :class:`~visexpert.data.source.SourceData`.
    """

    looked_for, looked_into = 2000, 100
    """Images of each part that ``visexpert data check`` looks for, unless all are asked for, and those it decodes."""

    has_files = True
    """Whether each image is a file of its own; if not, ``visexpert data check`` decodes all that are asked for."""

    def __init__(self, *, texts_per_image: int | None = None, draw_answers: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if texts_per_image is not None and texts_per_image < 1:
            raise ConfigError(f"texts_per_image is {texts_per_image}, but must be at least 1; null uses all.")
        self.texts_per_image = texts_per_image
        self.draw_answers = draw_answers
        self._tables: dict[str, Rows] = {}
        self._images: dict[str, RowImages] = {}

    @abstractmethod
    def read(self, part: str) -> Iterable[Sample]:
        """Read the annotations of a part: one sample per image.

        Raises:
            DataError: They cannot be read, or too many are broken.
        """

    def open(self, part: str) -> None:
        """Read the annotations of a part, once."""
        if part in self._tables:
            return
        before = len(self.fault_logs)
        samples: IndexRows | list[Sample] | None = self.indexed(part)
        if samples is None:
            samples = list(self.read(part))
        broken = [log for log in self.fault_logs[before:] if len(log)]
        if not samples and broken:
            raise DataError(
                f"{self.called}: none of the {sum(log.total for log in broken)} records of {part} can be used; "
                f"repair the file, or name the right one (the first fault: {broken[0].first.rstrip('.')})."
            )
        if not samples:
            raise DataError(
                f"{self.called}: the annotations of {part} name no images; check that they are the right files."
            )
        for name, rows in self.rows_in_use(part, len(samples)).items():
            in_use = samples.only(rows) if isinstance(samples, IndexRows) else SampleTable(samples[row] for row in rows)
            self._tables[name] = in_use

    def indexed(self, part: str) -> IndexRows | None:
        """Return what :meth:`read` yields from an index on disk, and report its faults; None to read into memory."""
        return None

    def rows_in_use(self, part: str, number: int) -> dict[str, IntArray]:
        """Choose the rows in use of a part, and of the other parts that are read with it.

        Args:
            part: The part that is opened.
            number: Number of rows read.

        Returns:
            Rows by part, int64, ascending.
        """
        return {part: self.used(part, number)}

    def used(self, part: str, number: int) -> IntArray:
        """Choose the rows in use of ``number`` ones of a part."""
        settings = self.settings
        return subset(number, share=settings.share(part), most=settings.most(part), seed=settings.seed)

    def table(self, part: str) -> Rows:
        """Return the rows of a part that are in use, read on first use."""
        self.open(part)
        return self._tables[part]

    def loader(
        self, part: str, *, position: Callable[[], int] | None = None, plain: bool = False, most: int | None = None
    ) -> BatchLoader:
        """See :meth:`SourceData.loader`."""
        training = part == "train" and not plain
        settings = self.settings
        rank, world = self.process
        division = self.division() if training else Division(settings.eval_batch_size, world)
        table = self.table(part)
        dataset: BatchSource = self.dataset(part, plain=plain)
        if plain:
            dataset = ChosenRows(dataset, subset(len(table), share=1.0, most=most, seed=settings.seed))
        return BatchLoader(
            dataset,
            batch_size=division.batch_size,
            shuffle=training,
            drop_last=training,
            step_size=division.step_size,
            seed=settings.order_seed,
            rank=rank,
            world_size=world,
            num_workers=settings.num_workers,
            worker_timeout=settings.worker_timeout,
            position=position,
            order=self.order(part) if training else None,
            inspect=self.faults(part, total=len(table), shared=True).note,
        )

    def images_missing(self, part: str, rows: Sequence[int]) -> list[str]:
        """Return the image files of some rows that do not exist."""
        table = self.table(part)
        return missing_images([image for image in (table[row].image for row in rows) if image])

    def images_broken(self, part: str, rows: Sequence[int]) -> list[str]:
        """Return one sentence for each of some rows whose image is there, but cannot be used; each is decoded."""
        table, reader, broken = self.table(part), self.settings.reader(), []
        for row in slow(rows, doing=f"reading {part}", unit="image"):
            try:
                sample = table[row]
                if sample.image and (sample.content is not None or os.path.exists(sample.image)):
                    read_picture(reader, sample)
            except DataError as error:
                broken.append(str(error))
        return broken

    def order(self, part: str) -> Callable[[int], IntArray] | None:
        """Return a function from epoch to order of a part's rows; None for plain shuffling."""
        return None

    def dataset(self, part: str, *, plain: bool = False) -> RowDataset:
        """Return the data set that builds the batches of a part."""
        packer = self.packer
        training = part == "train" and not plain
        return RowDataset(
            table=self.table(part),
            reader=self.settings.reader(),
            packer=packer,
            form=BatchForm(
                split=self.split_of(part),
                source=self.label,
                image_size=self.settings.image_size,
                pad_id=0 if packer is None else packer.pad_id,
                with_items=not training,
            ),
            choice_seed=self.settings.order_seed if training else None,
            texts_per_image=self.texts_per_image,
            draw_answers=self.draw_answers,
        )

    def training_rows(self) -> int | None:
        """Return the number of training images; None if a file is missing."""
        is_here = all(need.found is not None for need in self.needs("train"))
        return len(self.table("train")) if is_here else None

    def image_sources(self) -> dict[str, ImageSource]:
        """Return the images of the opened parts by row, for the feature store."""
        reader = self.settings.reader()
        for part, table in self._tables.items():
            changing = part == "train" and reader.augments
            self._images.setdefault(part, RowImages(table, reader, source=self.called, changing=changing))
        return {self.split_of(part): images for part, images in self._images.items()}


class RowDataset:
    """Builds a batch from a :class:`~visexpert.data.loader.BatchKey`; it has no state, so every worker builds the same.

    Args:
        table: The rows.
        reader: Decodes images.
        packer: Tokenizes texts; None for batches without text.
        form: Settings common to all batches.
        choice_seed: Seed of the choice of texts and of augmentation, which then change with the epoch; None uses all
            texts unchanged, without augmentation.
        texts_per_image: With ``choice_seed``: maximum number of texts per image; None for all.
        draw_answers: With ``choice_seed``: draw each answer from the accepted ones.
    """

    def __init__(
        self,
        *,
        table: Rows,
        reader: ImageReader,
        packer: TextEncoder | None,
        form: BatchForm,
        choice_seed: int | None,
        texts_per_image: int | None,
        draw_answers: bool,
    ) -> None:
        self.table, self.reader, self.packer, self.form = table, reader, packer, form
        self.choice_seed, self.texts_per_image, self.draw_answers = choice_seed, texts_per_image, draw_answers

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: BatchKey) -> Batch:
        loaded, skipped = [], []
        for row in key.rows.tolist():
            try:
                loaded.append(self._load(row, self.table[row], key.epoch))
            except DataError as error:
                skipped.append(Skipped(self.table.key(row), str(error)))
        return self.form.batch(loaded, skipped)

    def _load(self, row: int, sample: Sample, epoch: int) -> Loaded:
        rng = None if self.choice_seed is None else np.random.default_rng([self.choice_seed, epoch, row])
        items = sample.items if rng is None else self._choose(sample.items, rng)
        encoded = encode_items(items, self.packer, has_image=bool(sample.image))
        picture = read_picture(self.reader, sample, rng=rng) if sample.image else None
        prompts = prompts_of(items, self.packer, has_image=bool(sample.image)) if self.form.with_items else ()
        return Loaded(row, picture, items, encoded, prompts, sample.key, sample.label)

    def _choose(self, items: Sequence[TextItem], rng: np.random.Generator) -> tuple[TextItem, ...]:
        order = rng.permutation(len(items))[: self.texts_per_image]
        chosen = [items[index] for index in order]
        if self.draw_answers:
            chosen = [
                replace(item, answer=item.references[rng.integers(len(item.references))]) if item.references else item
                for item in chosen
            ]
        return tuple(chosen)


class ChosenRows:
    """Some rows of a data set, numbered anew.

    Args:
        source: The data set.
        rows: int64, its rows in use.
    """

    def __init__(self, source: BatchSource, rows: IntArray) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: BatchKey) -> Batch:
        return self.source[BatchKey(key.epoch, self.rows[key.rows])]


def read_picture(reader: ImageReader, sample: Sample, *, rng: np.random.Generator | None = None) -> Picture:
    """Read the image of a sample.

    Args:
        reader: Decodes it.
        sample: A sample with an image.
        rng: Draws the augmentation; None for none.

    Raises:
        DataError: It cannot be read.
    """
    source = sample.image if sample.content is None else sample.content
    return reader.read(source, name=sample.image, rng=rng)


class RowImages:
    """The images of some rows, as the feature store reads them (:class:`~visexpert.types.ImageSource`).

    Args:
        table: The rows.
        reader: Decodes them; rows whose image is missing or broken are black.
        source: Name of their source in messages.
        changing: Whether images are augmented, so that their tokens cannot be stored.
    """

    def __init__(self, table: Rows, reader: ImageReader, *, source: str, changing: bool) -> None:
        self._table, self._reader, self._source, self._changing = table, reader, source, changing
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels: names, sizes and modification times of the files, and how images are resized."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(astuple(self._reader)).encode())
            for facts in self._table.identity():
                digest.update(f"{facts}\0".encode("utf-8", "surrogateescape"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return images (len(rows), 3, H, W), uint8.

        Raises:
            ConfigError: Images are augmented, so stored tokens would not match the training images.
        """
        if self._changing:
            raise no_fixed_images(self._source)
        return torch.stack([self._image(row) for row in rows])

    def _image(self, row: int) -> Tensor:
        try:
            sample = self._table[row]
            if sample.image:
                return read_picture(self._reader, sample).image_CHW
        except DataError:  # batches skip and report it
            pass
        return torch.zeros(3, self._reader.size, self._reader.size, dtype=torch.uint8)


def check_template(template: str, field: str) -> str:
    """Check that a prompt contains its placeholder once and no other, and return the prompt.

    Raises:
        ConfigError: It does not.
    """
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        fields = []
    if fields != [field]:
        raise ConfigError(f"prompt is {template!r}, but must contain {{{field}}} once and no other braces.")
    return template
