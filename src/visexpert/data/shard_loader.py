"""Load batches from shards: a plan of which process reads which records, and a loader that resumes in mid-epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from visexpert.data.annotations import BROKEN, checked
from visexpert.data.columns import question_item
from visexpert.data.division import Division
from visexpert.data.images import ImageReader
from visexpert.data.loader import warn_of_other_order
from visexpert.data.packing import IntArray
from visexpert.data.samples import BatchForm, Loaded, encode_items, prompts_of
from visexpert.data.shards import Record, ShardReader
from visexpert.data.workers import load
from visexpert.errors import ConfigError, DataError, first_line
from visexpert.io.reading import IMAGE_FORMATS, parse_json
from visexpert.types import Batch, Skipped, TextEncoder, TextItem

_IMAGES = tuple(suffix[1:] for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)


@dataclass(frozen=True)
class ShardPlan:
    """Divides the records of all shards into lanes, and each lane among readers: each record is in one, every epoch.

    Each epoch puts the shards in a random order and lines up their records. Every lane is an equal stretch of that
    line, divided into the same number of batches, one for each optimizer step; each of its readers, which take turns,
    gets a part of the stretch, so that it reads shard after shard. Records are shuffled within stretches of ``window``
    batches. None of this names a process: a fit begins with a lane for each batch of a step and a reader for each
    worker, and keeps them if it goes on with other processes and workers.

    Args:
        counts: Number of records in each shard.
        batch_size: Records of a lane per step.
        shuffle: Use a new order each epoch; otherwise the order of the shards.
        drop_last: Drop the remainder (a different one each epoch), so that all batches have ``batch_size`` records.
        seed: Seed of the order.
        window: Number of batches whose records are shuffled together; a reader holds that many undecoded in memory.
        lanes: Number of lanes.
        readers: Readers of each lane.
    """

    counts: tuple[int, ...]
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    window: int
    lanes: int = 1
    readers: int = 1

    @property
    def step_size(self) -> int:
        """Records per step."""
        return self.batch_size * self.lanes

    @property
    def num_steps(self) -> int:
        """Number of steps per epoch."""
        step, total = self.step_size, sum(self.counts)
        return total // step if self.drop_last and total >= step else -(-total // step)

    def windows(
        self, epoch: int, lane: int, reader: int, *, skip: int = 0
    ) -> Iterator[tuple[IntArray, list[IntArray]]]:
        """Yield the records that a reader reads in an epoch, window by window.

        Args:
            epoch: Epoch, from 0.
            lane: Its lane, from 0.
            reader: The reader, from 0.
            skip: Number of its batches that are done.

        Yields:
            The window's records in reading order, int64 (n, 2) of shard and place in it; and the positions in the
            window of each batch that is not done.
        """
        line = self._line(epoch, lane)
        ends = self._batch_ends(len(line))
        first = self._first_batch(reader)
        last = self._first_batch(reader + 1)
        for number, start in enumerate(range(first, last, self.window)):
            stop = min(start + self.window, last)
            if stop <= first + skip:
                continue
            begin = int(ends[start])
            order = np.arange(int(ends[stop]) - begin)
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, lane, reader, number]).permutation(order)
            batches = [order[ends[b] - begin : ends[b + 1] - begin] for b in range(start, stop)]
            yield line[begin : int(ends[stop])], batches[max(0, first + skip - start) :]

    def _line(self, epoch: int, lane: int) -> IntArray:
        """Return a lane's records of an epoch in order, int64 (n, 2) of shard and place."""
        shards = np.arange(len(self.counts))
        if self.shuffle:
            shards = np.random.default_rng([self.seed, epoch]).permutation(shards)
        counts = np.asarray(self.counts, dtype=np.int64)[shards]
        total = int(counts.sum())
        size = self.num_steps * self.batch_size
        exact = self.drop_last and size * self.lanes <= total
        bounds = [size * end if exact else total * end // self.lanes for end in (lane, lane + 1)]
        position = np.arange(*bounds)
        starts = np.cumsum(counts) - counts
        index = np.searchsorted(starts, position, side="right") - 1
        return np.stack([shards[index], position - starts[index]], axis=1)

    def _batch_ends(self, size: int) -> IntArray:
        """Return the start of each batch in a lane's stretch, and the end of the last one."""
        return np.arange(self.num_steps + 1) * size // max(self.num_steps, 1)

    def _first_batch(self, reader: int) -> int:
        """Return a reader's first batch, given that readers take turns and each reads one stretch."""
        full, over = divmod(self.num_steps, self.readers)
        return reader * full + min(reader, over)


@dataclass(frozen=True, kw_only=True)
class RecordReader:
    """Turns a record of a shard into a row of a batch.

    Args:
        reader: Decodes images.
        packer: Tokenizes captions; None for batches without text.
        prompt: Prompt for a caption; None reads no texts.
        augment_seed: Seed of the augmentation; None for no augmentation.
        class_member: Suffix of the file with the class; None reads no classes.
        questions: Keys in ``.json`` of a question and its answer, which stand in place of a caption; None for captions.
    """

    reader: ImageReader
    packer: TextEncoder | None
    prompt: str | None
    augment_seed: int | None
    class_member: str | None = None
    questions: tuple[str, str] | None = None

    def load(self, record: Record, *, row: int, epoch: int, name: str) -> Loaded:
        """Decode one record.

        Raises:
            DataError: The image, text or class is missing or broken.
        """
        image = self.image_of(record, name=name)
        items = () if self.prompt is None else (self._item(record, name, self.prompt),)
        label = "" if self.class_member is None else _class(record, name, self.class_member)
        rng = None if self.augment_seed is None else np.random.default_rng([self.augment_seed, epoch, row])
        picture = self.reader.read(image, name=name, rng=rng)
        encoded = encode_items(items, self.packer, has_image=True)
        prompts = prompts_of(items, self.packer, has_image=True)
        return Loaded(row, picture, items, encoded, prompts, name, label)

    def image_of(self, record: Record, *, name: str) -> bytes:
        """Return the encoded image of a record.

        Raises:
            DataError: It is missing, or several members may be it.
        """
        image: bytes = record[_one_of(record, _IMAGES, what="image", name=name)]
        return image

    def _item(self, record: Record, name: str, prompt: str) -> TextItem:
        if self.questions is None:
            return _caption_item(record, name, prompt)
        suffix = _one_of(record, ("json",), what="question", name=name)
        try:
            return question_item(parse_json(bytes(record[suffix]).decode("utf-8-sig")), *self.questions)
        except BROKEN as error:
            raise DataError(
                f"The record {name} has no readable question in its .{suffix} ({first_line(error)}); mend it, or set "
                "question_key and answer_key to its keys."
            ) from error

    def faults(self, records: Iterable[Record | DataError], *, shard: str) -> list[str]:
        """Return the reasons why records of a shard cannot be used."""
        reasons = []
        for record in records:
            try:
                if isinstance(record, DataError):
                    raise record
                self.load(record, row=0, epoch=0, name=f"{shard}/{record['__key__']}")
            except DataError as error:
                reasons.append(str(error))
        return reasons


class ShardLoader:
    """Iterates over the batches of this process, epoch after epoch; see :class:`~visexpert.data.loader.BatchLoader`.

    Besides the seed, the order of images depends only on the numbers of processes and workers that the fit began with,
    which its state keeps: where it goes on with others, each process reads the lanes that its images lie in, some of
    which it may share with another. An iteration that starts in mid-epoch opens the shard that is due and skips the
    records already read. Empty training batches (the rest of a damaged shard) are skipped and replaced by the next
    epoch's, so every process yields the same number.

    Args:
        shards: Paths or URLs.
        first_rows: Row of the first record of each shard in the split.
        plan: Assignment of records to readers.
        division: Division of a step; its size is that of the plan.
        rank: This process.
        records: Decodes records.
        form: Settings common to all batches.
        num_workers: Worker processes; 0 reads in this one.
        worker_timeout: Seconds to wait for a batch of the workers; 0 for no end.
        position: Returns how many batches of the endless sequence are done; None restarts each time.
        inspect: Called with each batch before it is yielded, to record missing samples.
    """

    def __init__(
        self,
        *,
        shards: Sequence[str],
        first_rows: Sequence[int],
        plan: ShardPlan,
        division: Division,
        rank: int,
        records: RecordReader,
        form: BatchForm,
        num_workers: int,
        worker_timeout: float = 0,
        position: Callable[[], int] | None,
        inspect: Callable[[Batch], None],
    ) -> None:
        self.shards, self.plan, self.records, self.form = shards, plan, records, form
        self.division, self.rank = division, rank
        self.first_rows = first_rows
        self.num_workers, self.worker_timeout = num_workers, worker_timeout
        self.position, self.inspect = position, inspect
        self._empty: set[int] = set()

    def __len__(self) -> int:
        return self.plan.num_steps * self.division.accumulate

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing is read before the first batch is due (see BatchLoader).
        if not self.plan.shuffle:
            yield from self._shown(0, 0, len(self))
            return
        place, given = self._place(0 if self.position is None else self.position()), 0
        while given < len(self):
            epoch, skip = divmod(place, len(self))
            stop = min(len(self), skip + len(self) - given)
            before = given
            for batch in self._shown(epoch, skip, stop):
                given += 1
                yield batch
            if given == before and stop - skip == len(self):
                raise DataError(f"None of the records from {self.shards[0]} on can be read; see skipped.jsonl.")
            place += stop - skip

    @property
    def has_whole_steps(self) -> bool:
        """Whether an epoch is whole optimizer steps."""
        return sum(self.plan.counts) >= self.plan.step_size

    def state_dict(self) -> dict[str, Any]:
        """Return which batches of the sequence were empty, and the settings that determine their order."""
        lanes = {name: getattr(self.plan, name) for name in ("batch_size", "window", "lanes", "readers")}
        return {
            "empty": sorted(self._empty),
            "order": self._order(),
            "lanes": lanes,
            "division": asdict(self.division),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep to the lanes of the interrupted run and to what was empty; warn if other records are in them.

        Raises:
            ConfigError: Batches were empty, and the number of processes is another.
        """
        if warn_of_other_order(state["order"], self._order()) or "lanes" not in state:
            return
        old = Division(**state["division"])
        if state["empty"] and old != self.division:
            raise ConfigError(
                f"The interrupted fit left out batches, since shards are damaged, so that only {old} can go on with "
                "the same images; use as many."
            )
        self.plan, self._empty = replace(self.plan, **state["lanes"]), set(state["empty"])

    def _place(self, done: int) -> int:
        """Return the index of the next batch in the endless sequence, after ``done`` non-empty ones."""
        for empty in sorted(self._empty):
            done += empty <= done
        return done

    def _shown(self, epoch: int, skip: int, stop: int) -> Iterator[Batch]:
        """Yield the non-empty batches of an epoch after passing each to ``inspect``."""
        for number, batch in enumerate(self._batches(epoch, skip, stop), skip):
            self.inspect(batch)
            if len(batch):
                yield batch
            else:
                self._empty.add(epoch * len(self) + number)

    def _batches(self, epoch: int, skip: int, stop: int) -> Iterator[Batch]:
        stream = ShardStream(self, epoch, skip, stop)
        if not self.num_workers:
            yield from stream.worker(0)
            return
        yield from load(stream, num_workers=self.num_workers, timeout=self.worker_timeout)

    def _order(self) -> dict[str, Any]:
        counts = self.plan.counts
        order = {"records": sum(counts), "shards": len(counts), "seed": self.plan.seed}
        return order | {"step_size": self.plan.step_size}


Lying: TypeAlias = tuple[int, int, Record | DataError]
"""Shard, place in it, and the record that lies there or why it cannot be read."""


class Piece(NamedTuple):
    """What a batch holds of a lane.

    Args:
        step: Optimizer step of the epoch.
        lane: The lane.
        first: First of the lane's records in that step.
        last: The one after the last.
    """

    step: int
    lane: int
    first: int
    last: int


class ShardStream(IterableDataset[Batch]):
    """Batches ``skip`` to ``stop`` of an epoch, divided among the workers.

    Args:
        loader: Loader with all other settings.
        epoch: Epoch, from 0.
        skip: Batches of this process that are done.
        stop: Batch before which to stop.
    """

    def __init__(self, loader: ShardLoader, epoch: int, skip: int, stop: int) -> None:
        self.shards, self.first_rows, self.plan = list(loader.shards), list(loader.first_rows), loader.plan
        self.division, self.rank, self.workers = loader.division, loader.rank, max(1, loader.num_workers)
        self.records, self.form = loader.records, loader.form
        self.epoch, self.skip, self.stop = epoch, skip, stop

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        return self.worker(0 if info is None else info.id)

    def worker(self, worker: int) -> Iterator[Batch]:
        """Yield the batches of one worker, the first of which is due first: every ``workers``-th from ``skip`` on."""
        pieces = {number: self._pieces(number) for number in range(self.skip + worker, self.stop, self.workers)}
        wanted: dict[tuple[int, int], list[Piece]] = {}
        for piece in chain.from_iterable(pieces.values()):
            wanted.setdefault((piece.lane, piece.step % self.plan.readers), []).append(piece)
        streams = {(lane, reader): self._read(lane, reader, own) for (lane, reader), own in wanted.items()}
        for own in pieces.values():
            found = [next(streams[piece.lane, piece.step % self.plan.readers]) for piece in own]
            batch = self._batch(list(chain.from_iterable(lying for lying, _ in found)))
            yield replace(batch, skipped=(*batch.skipped, *chain.from_iterable(surplus for _, surplus in found)))

    def _pieces(self, number: int) -> list[Piece]:
        """Return what a batch of this process holds of each lane."""
        size, division = self.plan.batch_size, self.division
        step, part = divmod(number, division.accumulate)
        first = (self.rank * division.accumulate + part) * division.batch_size
        last = first + division.batch_size
        return [
            Piece(step, lane, max(first - lane * size, 0), min(last - lane * size, size))
            for lane in range(first // size, -(-last // size))
        ]

    def _read(self, lane: int, reader: int, pieces: list[Piece]) -> Iterator[tuple[list[Lying], list[Skipped]]]:
        """Yield the records of each piece, and the shards that turned out to hold more than expected."""
        shards, readers, left = ShardReader(self.shards, self.plan.counts), self.plan.readers, deque(pieces)
        done = pieces[0].step // readers
        for lying, batches in self.plan.windows(self.epoch, lane, reader, skip=done):
            due = []
            while left and left[0].step // readers < done + len(batches):
                piece = left.popleft()
                due.append(batches[piece.step // readers - done][piece.first : piece.last].tolist())
            done += len(batches)
            wanted = set(chain.from_iterable(due))
            read = enumerate(shards.read(lying)) if wanted else ()
            kept = {place: record for place, record in read if place in wanted}
            for places in due:
                yield [(*lying[place].tolist(), kept.pop(place)) for place in places], list(shards.surplus)
                shards.surplus.clear()
            if not left:
                return

    def _batch(self, records: list[Lying]) -> Batch:
        loaded, skipped = [], []
        for shard, number, record in records:
            key = f"{self.shards[shard]}:{number}"
            try:
                if isinstance(record, DataError):
                    raise record
                name = f"{self.shards[shard]}/{record['__key__']}"
                row = self.first_rows[shard] + number
                loaded.append(self.records.load(record, row=row, epoch=self.epoch, name=name))
            except DataError as error:
                skipped.append(Skipped(key, str(error)))
        return self.form.batch(loaded, skipped)


def _caption_item(record: Record, name: str, prompt: str) -> TextItem:
    caption = _caption(record, name)
    if not caption:
        raise DataError(f"The record {name} has an empty caption; leave it out of the shard.")
    return TextItem("caption", prompt, caption, generate=True)


def _class(record: Record, name: str, suffix: str) -> str:
    """Return the class of an image: the text of the member with this suffix."""
    content = record[_one_of(record, (suffix,), what="class", name=name)]
    try:
        label = bytes(content).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"The record {name} has no readable class in its .{suffix} ({error}).") from error
    if not label:
        raise DataError(f"The record {name} has an empty class; leave it out of the shard.")
    return label


def _caption(record: Record, name: str) -> str:
    """Return the text of a record's ``.txt``, or ``caption`` of its ``.json``."""
    suffix = _one_of(record, ("txt", "json"), what="caption", name=name)
    try:
        content = bytes(record[suffix]).decode("utf-8-sig")
        value = content if suffix.endswith("txt") else parse_json(content)["caption"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"The record {name} has no readable caption in its .{suffix} ({error}).") from error
    if not isinstance(value, str):
        raise DataError(f"The caption of the record {name} is {value!r:.60}, but must be text.")
    return checked(" ".join(value.split()), name=f"The caption of the record {name}")


def _one_of(record: Record, suffixes: Sequence[str], *, what: str, name: str) -> str:
    """Return the suffix of the wanted member: an exact match, or the only one with that ending (keys with dots)."""
    if exact := next((suffix for suffix in suffixes if suffix in record), None):
        return exact
    found = [suffix for suffix in record if suffix.rpartition(".")[2] in suffixes]
    if len(found) == 1:
        return found[0]
    has = ", ".join(f".{suffix}" for suffix in record if suffix != "__key__")
    if found:
        raise DataError(
            f"The record {name} has several members that may be its {what} ({has}): in WebDataset a suffix starts at "
            "the first dot of a name; write keys without dots."
        )
    raise DataError(
        f"The record {name} has no {what} (.{', .'.join(suffixes)}), only {has}; the members of a record must be "
        "adjacent in the shard (`tar --sort=name`)."
    )
