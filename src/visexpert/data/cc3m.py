"""CC3M, or any captioned images packed into WebDataset shards by img2dataset."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from visexpert.data.needs import Need
from visexpert.data.samples import BatchForm, subset
from visexpert.data.shard_loader import RecordReader, ShardLoader, ShardPlan
from visexpert.data.shards import (
    check_shard,
    expand_shards,
    is_remote,
    iterate_shard,
    shard_counts,
    wrong_notes,
)
from visexpert.data.source import CAPTION_PROMPT, SourceData
from visexpert.errors import ConfigError, DataError
from visexpert.types import ImageSource

_URL = (
    "https://github.com/rom1504/img2dataset/blob/main/dataset_examples/cc3m.md, or ready-made by  "
    "hf download --repo-type dataset pixparse/cc3m-wds"
)


class CC3M(SourceData):
    """Conceptual Captions (3.3 M images) in tar shards of ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``.

    Shards are read sequentially and never unpacked. Each epoch reads each record once, for any number of
    processes and workers, except for less than one leftover batch per process. An interrupted run continues with the
    records that it would have read. ``train_fraction`` selects whole shards.

    Args:
        train: Names of the training shards, with braces, under ``root`` or as URLs (``https:``, ``pipe:aws s3 cp ...``,
            ``gs:``), joined by ``::``. A ``pipe:`` runs a command, so it is read only with ``--allow_pipe true``.
        val: The same for validation; null for none.
        sizes: JSON file that maps shard names to numbers of records; null looks for ``sizes.json`` and img2dataset's
            ``_stats.json`` beside local shards, and counts records if there is neither. Remote shards need it.
        prompt: Prompt for a caption.
        shuffle_window: Records shuffled together in each worker, in addition to the order of shards; a worker holds
            this many encoded images in memory.
        root: Folder of local shards; ``num_val`` does not apply.
        kwargs: See :class:`~visexpert.data.source.SourceData`.
    """

    def __init__(
        self,
        *,
        train: str = "{00000..00331}.tar",
        val: str | None = None,
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
            raise ConfigError("CC3M takes no num_val and num_test: leave them out and name fewer shards under val.")
        self.parts = ("train",) if val is None else ("train", "val")
        self.patterns = {"train": train} | ({} if val is None else {"val": val})
        self.sizes = None if sizes is None else Path(sizes).expanduser()
        self.prompt = prompt
        self.shuffle_window = shuffle_window
        self._counts: dict[str, tuple[int, ...]] = {}

    def shards(self, part: str) -> list[str]:
        """Return the paths or URLs of the shards in use."""
        names = expand_shards(self.patterns[part], self.root)
        rows = subset(len(names), share=self.settings.share(part), most=None, seed=self.settings.seed)
        return [names[row] for row in rows]

    def needs(self, part: str) -> list[Need]:
        """List the local shards; URLs are not checked."""
        local = [Path(shard) for shard in self.shards(part) if not is_remote(shard)]
        needs = [Need(path, "A shard of CC3M", _URL, "3.3 M images, tens of GB at 256 px") for path in local]
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
        reader = RecordReader(reader=self.settings.reader(), packer=None, prompt=self.prompt, augment_seed=None)
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

    def loader(self, part: str, *, position: Callable[[], int] | None = None) -> ShardLoader:
        """See :meth:`SourceData.loader`."""
        self.open(part)
        settings, training, packer = self.settings, part == "train", self.packer
        counts = self._counts[part]
        rank, world = self.process
        batch_size = settings.batch_size if training else settings.eval_batch_size
        return ShardLoader(
            shards=self.shards(part),
            plan=ShardPlan(
                counts=counts,
                batch_size=batch_size,
                shuffle=training,
                drop_last=training,
                seed=settings.order_seed,
                window=-(-self.shuffle_window // batch_size),
                rank=rank,
                world_size=world,
                workers=max(1, settings.num_workers),
            ),
            records=RecordReader(
                reader=settings.reader(),
                packer=packer,
                prompt=self.prompt,
                augment_seed=settings.order_seed if training else None,
            ),
            form=BatchForm(
                split=self.split_of(part),
                source=self.label,
                image_size=settings.image_size,
                pad_id=0 if packer is None else packer.pad_id,
                with_items=not training,
            ),
            num_workers=settings.num_workers,
            position=position,
            inspect=self.faults(part, total=sum(counts), shared=True).note,
        )

    def image_sources(self) -> dict[str, ImageSource]:
        """Return the opened parts; streams have a fingerprint, but cannot be read by row."""
        return {
            self.split_of(part): StreamedImages(self.shards(part), counts, source=self.called)
            for part, counts in self._counts.items()
        }


class StreamedImages:
    """Images read as a stream (:class:`~visexpert.types.ImageSource`).

    Args:
        shards: Paths or URLs.
        counts: Records of each.
        source: Name of their source in messages.
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int], *, source: str) -> None:
        self._shards, self._counts, self._source = list(shards), list(counts), source

    @property
    def fingerprint(self) -> str:
        """Identity of the shards: names, numbers of records and, for local ones, sizes and modification times."""
        facts = [(shard, count, _stat(shard)) for shard, count in zip(self._shards, self._counts, strict=True)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Refuse to read by row.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{self._source} reads its images as a stream, so their tokens cannot be stored; set store.folder to null."
        )


def _stat(shard: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(shard)
    except OSError:  # a URL
        return None
    return facts.st_size, facts.st_mtime_ns
