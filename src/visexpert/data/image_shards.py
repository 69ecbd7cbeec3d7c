"""Images packed into WebDataset shards, with captions, questions or classes, or without."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visexpert.data.columns import check_val_share
from visexpert.data.division import Division
from visexpert.data.needs import Need
from visexpert.data.samples import BatchForm, subset
from visexpert.data.shard_loader import RecordReader, ShardLoader, ShardPlan
from visexpert.data.shards import (
    Record,
    ShardReader,
    check_shard,
    expand_shards,
    is_remote,
    iterate_shard,
    shard_counts,
    wrong_notes,
)
from visexpert.data.source import CAPTION_PROMPT, SourceData, no_fixed_images
from visexpert.errors import ConfigError, DataError
from visexpert.typed import typed
from visexpert.types import ImageSource, TextEncoder


@typed
class ImageShards(SourceData):
    """Images in WebDataset's tar shards, as img2dataset writes them: ``KEY.jpg``, ``KEY.txt`` or ``KEY.json``.

    With a ``tokenizer`` each record needs a caption: ``.txt``, or ``caption`` in ``.json``; or a question and its
    answer in ``.json``. Without one images are read without texts, whether they have some or not. Shards are read
    sequentially and never unpacked. Each epoch reads each record once, for any number of processes and workers, except
    for less than one leftover step. An interrupted run continues with the records that it would have read, also on
    other processes and workers: each then reads the stretches of the shards that its images lie in.
    ``train_fraction`` selects whole shards.

    Args:
        train: Names of the training shards, with braces, under ``root`` or as URLs (``https:``, ``pipe:aws s3 cp ...``,
            ``gs:``), joined by ``::``. A ``pipe:`` runs a command, which the user must allow: ``--allow_pipe true``, in
            Python ``visexpert.trust.grant``.
        val: The same for validation; null for none.
        test: The same for the test; null for none.
        val_share: Share of the training shards to hold out for validation, in (0, 1), drawn by ``seed``; null for none.
        class_member: Suffix of the file with the class of an image, for probes, such as ``cls``; null for none.
        question_key: Key in ``.json`` with a question, in data of questions instead of captions; null for captions.
        answer_key: Key with its answer, or a list of accepted answers.
        sizes: JSON file that maps shard names to numbers of records; null looks for ``sizes.json`` and img2dataset's
            ``_stats.json`` beside local shards, and counts records if there is neither. Remote shards need it.
        prompt: Prompt for a caption.
        shuffle_window: Records shuffled together in each worker, in addition to the order of shards; a worker holds
            this many encoded images in memory. A run that goes on keeps to the windows that it began with.
        root: Folder of local shards; ``num_val`` does not apply.
        kwargs: See :class:`~visexpert.data.source.SourceData`.
    """

    made_of = "your images"
    url = "whoever made the data"
    size = "a file of yours"

    def __init__(
        self,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        val_share: float | None = None,
        class_member: str | None = None,
        question_key: str | None = None,
        answer_key: str = "answer",
        sizes: str | None = None,
        prompt: str = CAPTION_PROMPT,
        shuffle_window: int = 2048,
        root: str = ".",
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        if shuffle_window < 1:
            raise ConfigError(
                f"shuffle_window is {shuffle_window}, but must be at least 1; 1 shuffles only the shards."
            )
        if self.settings.num_val is not None or self.settings.num_test is not None:
            raise ConfigError(
                f"{type(self).__name__} takes no num_val and num_test: leave them out and name fewer shards under val "
                "and test."
            )
        check_val_share(val_share, has_val=val is not None)
        self.val_share, self.class_member = val_share, class_member
        given = {"train": train, "val": val if val_share is None else train, "test": test}
        self.patterns = {part: pattern for part, pattern in given.items() if pattern is not None}
        self.parts = tuple(self.patterns)
        self.sizes = None if sizes is None else Path(sizes).expanduser()
        self.prompt = prompt
        self.questions = None if question_key is None else (question_key, answer_key)
        self.shuffle_window = shuffle_window
        self._counts: dict[str, tuple[int, ...]] = {}

    def shards(self, part: str) -> list[str]:
        """Return the paths or URLs of the shards in use."""
        names = expand_shards(self.patterns[part], self.root)
        names = self._divided(names, part)
        rows = subset(len(names), share=self.settings.share(part), most=None, seed=self.settings.seed)
        return [names[row] for row in rows]

    def _divided(self, names: list[str], part: str) -> list[str]:
        """Return the shards of a part, if validation is a share of the training shards."""
        if self.val_share is None or part == "test":
            return names
        held_out = set(subset(len(names), share=self.val_share, most=None, seed=self.settings.seed).tolist())
        if len(held_out) == len(names):
            raise ConfigError(
                f"{self.called}: val_share={self.val_share:g} of {len(names)} shards leaves none to train on; lower "
                "it, write more shards, or set val."
            )
        return [name for number, name in enumerate(names) if (number in held_out) == (part == "val")]

    def needs(self, part: str) -> list[Need]:
        """List the local shards; URLs are not checked."""
        local = [Path(shard) for shard in self.shards(part) if not is_remote(shard)]
        needs = [Need(path, f"A shard of {self.made_of}", self.url, self.size) for path in local]
        if self.sizes is not None:
            needs.append(Need(self.sizes, "The numbers of records", "the maker of your shards", "some kB"))
        return needs

    def check(self, parts: Sequence[str]) -> None:
        """Check that local shards exist and that none runs a command that is not allowed."""
        super().check(parts)
        for part in parts:
            for shard in self.shards(part):
                check_shard(shard)

    def prepare_data(self) -> None:
        """Count the records of uncounted shards (once per machine)."""
        super().prepare_data()
        for part in self.parts_of_stage(None):
            shard_counts(self.shards(part), sizes=self.sizes)

    def open(self, part: str) -> None:
        """Find out how many records the shards hold."""
        if part not in self._counts:
            self._counts[part] = shard_counts(self.shards(part), sizes=self.sizes)

    def records(self, part: str) -> int:
        """Return the number of records in use."""
        self.open(part)
        return sum(self._counts[part])

    def faults_found(self, part: str, *, shards: int | None, records: int) -> list[str]:
        """Check local shards with the code that training uses to read them.

        Args:
            part: The part.
            shards: Maximum number of shards to check, spread evenly; None for all.
            records: Number of records to decode at the beginning of each.

        Returns:
            One sentence per fault: wrong numbers of records, unusable records, damage.
        """
        local = [shard for shard in self.shards(part) if not is_remote(shard)]
        if shards is not None and len(local) > shards:
            local = [local[number * len(local) // shards] for number in range(shards)]
        reader = self._reader(packer=None, augment_seed=None)
        faults = []
        for shard in local:
            try:
                faults += wrong_notes([shard], sizes=self.sizes)
                bad = reader.faults(islice(iterate_shard(shard), records), shard=shard)
            except DataError as error:
                faults.append(str(error))
                continue
            if bad:
                faults.append(f"{len(bad)} of the first {records} records of {shard} cannot be used, such as: {bad[0]}")
        return faults

    def _reader(self, *, packer: TextEncoder | None, augment_seed: int | None) -> RecordReader:
        return RecordReader(
            reader=self.settings.reader(),
            packer=packer,
            prompt=self.prompt if self.settings.tokenizer is not None else None,
            augment_seed=augment_seed,
            class_member=self.class_member,
            questions=self.questions,
        )

    def loader(
        self, part: str, *, position: Callable[[], int] | None = None, plain: bool = False, most: int | None = None
    ) -> ShardLoader:
        """See :meth:`SourceData.loader`; ``most`` takes whole shards, as many as it needs."""
        self.open(part)
        settings, training, packer = self.settings, part == "train" and not plain, self.packer
        chosen = self._some(part, most)
        shards, all_counts = self.shards(part), self._counts[part]
        counts = tuple(all_counts[number] for number in chosen)
        starts = first_rows(all_counts)
        rank, world = self.process
        division = self.division() if training else Division(settings.eval_batch_size, world)
        return ShardLoader(
            shards=[shards[number] for number in chosen],
            first_rows=[starts[number] for number in chosen],
            plan=self._plan(counts, division, training=training),
            division=division,
            rank=rank,
            records=self._reader(packer=packer, augment_seed=settings.order_seed if training else None),
            form=BatchForm(
                split=self.split_of(part),
                source=self.label,
                image_size=settings.image_size,
                pad_id=0 if packer is None else packer.pad_id,
                with_items=not training,
            ),
            num_workers=settings.num_workers,
            worker_timeout=settings.worker_timeout,
            position=position,
            inspect=self.faults(part, total=sum(counts), shared=True).note,
        )

    def _plan(self, counts: tuple[int, ...], division: Division, *, training: bool) -> ShardPlan:
        """Return the plan of a new fit: a lane for each batch of a step, with memory for one window per worker."""
        settings, batches = self.settings, division.accumulate
        workers = max(1, settings.num_workers)
        return ShardPlan(
            counts=counts,
            batch_size=division.batch_size,
            shuffle=training,
            drop_last=training,
            seed=settings.order_seed,
            window=-(-self.shuffle_window // (division.batch_size * batches)),
            lanes=division.processes * batches,
            readers=workers // math.gcd(workers, batches),
        )

    def _some(self, part: str, most: int | None) -> list[int]:
        """Return the shards of a part that hold ``most`` records, drawn by the seed; all for None."""
        counts = self._counts[part]
        if most is None:
            return list(range(len(counts)))
        order = np.random.default_rng(self.settings.seed).permutation(len(counts))
        before = np.cumsum(np.asarray(counts)[order]) - np.asarray(counts)[order]
        return sorted(order[before < most].tolist())

    def image_sources(self) -> dict[str, ImageSource]:
        """Return the images of the opened parts, for the feature store, which reads them shard by shard."""
        reader = self._reader(packer=None, augment_seed=None)
        augments = self.settings.reader().augments
        return {
            self.split_of(part): StreamedImages(
                self.shards(part), counts, reader, source=self.called, changing=part == "train" and augments
            )
            for part, counts in self._counts.items()
        }


class StreamedImages:
    """The images of shards (:class:`~visexpert.types.ImageSource`), read in sequence.

    Rows are the records in the order of the shards. Reading on from where the last call stopped opens nothing anew;
    reading elsewhere opens a shard from its beginning.

    Args:
        shards: Paths or URLs.
        counts: Records of each.
        reader: Decodes images.
        source: Name of their source in messages.
        changing: Whether images are augmented, so that their tokens cannot be stored.
    """

    in_sequence = True

    def __init__(
        self, shards: Sequence[str], counts: Sequence[int], reader: RecordReader, *, source: str, changing: bool
    ) -> None:
        self._shards, self._counts, self._decoder = list(shards), list(counts), reader
        self._source, self._changing = source, changing
        self._starts = np.asarray(first_rows(counts))
        self._records = ShardReader(self._shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels: names of the shards, numbers of records, how images are resized, and sizes and
        modification times of local shards."""
        facts = [(shard, count, _stat(shard)) for shard, count in zip(self._shards, self._counts, strict=True)]
        told = json.dumps([facts, astuple(self._decoder.reader)])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return images (len(rows), 3, H, W), uint8; black ones for records that cannot be read, which batches skip.

        Raises:
            ConfigError: Images are augmented, so stored tokens would not match the training images.
        """
        if self._changing:
            raise no_fixed_images(self._source)
        wanted = np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        places = np.stack([shards, wanted - self._starts[shards]], axis=1)
        return torch.stack([self._image(record) for record in self._records.read(places)])

    def _image(self, record: Record | DataError) -> Tensor:
        try:
            if not isinstance(record, DataError):
                name = record["__key__"]
                return self._decoder.reader.read(self._decoder.image_of(record, name=name), name=name).image_CHW
        except DataError:  # batches skip and report it
            pass
        side = self._decoder.reader.size
        return torch.zeros(3, side, side, dtype=torch.uint8)


def first_rows(counts: Sequence[int]) -> list[int]:
    """Return the row of the first record of each shard.

    Args:
        counts: Records of each.
    """
    return [0, *np.cumsum(counts).tolist()][: len(counts)]


def _stat(shard: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(shard)
    except OSError:  # a URL
        return None
    return facts.st_size, facts.st_mtime_ns
