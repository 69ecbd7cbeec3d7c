"""WebDataset shards: the plan of which process reads which records, and a sequential reader."""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from visexpert.data.packing import IntArray
from visexpert.errors import ConfigError, DataError
from visexpert.trust import pipe_allowed
from visexpert.types import Skipped

Record = dict[str, Any]
"""What a shard holds of one sample: ``__key__`` and the bytes of each file by suffix (``jpg``, ``txt``, ``json``)."""


@dataclass(frozen=True)
class ShardPlan:
    """Divides the records of all shards among processes and workers: each record goes to exactly one per epoch.

    An epoch puts the shards in a random order and their records, end to end, on a line. Each process gets an equal
    stretch of it, cut into equally many batches; each of its workers gets a part of that stretch, so that it reads
    from one shard on to the next. Within stretches of ``window`` batches the records are shuffled.

    Args:
        counts: Records of each shard.
        batch_size: Records per batch.
        shuffle: New order each epoch; else as the shards lie.
        drop_last: Give all processes batches of ``batch_size`` alone, dropping the remainder (a different one each
            epoch).
        seed: Seed of the order.
        window: Batches whose records are shuffled among one another; a worker holds so many encoded in memory.
        rank: This process.
        world_size: Number of processes.
        workers: Workers of each process.
    """

    counts: tuple[int, ...]
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    window: int
    rank: int = 0
    world_size: int = 1
    workers: int = 1

    @property
    def num_batches(self) -> int:
        """Batches of this process in an epoch; the same for each process."""
        step = self.batch_size * self.world_size
        total = sum(self.counts)
        return total // step if self.drop_last and total >= step else -(-total // step)

    def windows(self, epoch: int, worker: int, *, skip: int = 0) -> Iterator[tuple[IntArray, list[IntArray]]]:
        """Yield what a worker reads in an epoch, window by window.

        Args:
            epoch: Epoch, from 0.
            worker: The worker, from 0.
            skip: Number of its batches that are done.

        Yields:
            The window's records, int64 (n, 2) of shard and place in it, in the order in which they lie; and for each
            batch that is not done the places in the window that make it up.
        """
        line = self._line(epoch)
        ends = self._batch_ends(len(line))
        first = self._first_batch(worker)
        last = self._first_batch(worker + 1)
        for number, start in enumerate(range(first, last, self.window)):
            stop = min(start + self.window, last)
            if stop <= first + skip:
                continue
            begin = int(ends[start])
            order = np.arange(int(ends[stop]) - begin)
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, self.rank, worker, number]).permutation(order)
            batches = [order[ends[b] - begin : ends[b + 1] - begin] for b in range(start, stop)]
            yield line[begin : int(ends[stop])], batches[max(0, first + skip - start) :]

    def _line(self, epoch: int) -> IntArray:
        """Return all records of an epoch end to end, int64 (n, 2), as far as they are this process's."""
        shards = np.arange(len(self.counts))
        if self.shuffle:
            shards = np.random.default_rng([self.seed, epoch]).permutation(shards)
        counts = np.asarray(self.counts, dtype=np.int64)[shards]
        total = int(counts.sum())
        size = self.num_batches * self.batch_size
        exact = self.drop_last and size * self.world_size <= total
        bounds = [size * rank if exact else total * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        position = np.arange(*bounds)
        starts = np.cumsum(counts) - counts
        index = np.searchsorted(starts, position, side="right") - 1
        return np.stack([shards[index], position - starts[index]], axis=1)

    def _batch_ends(self, size: int) -> IntArray:
        """Return where in this process's stretch its batches begin, and where the last one ends."""
        return np.arange(self.num_batches + 1) * size // max(self.num_batches, 1)

    def _first_batch(self, worker: int) -> int:
        """Return where a worker's batches begin, if workers give batches in turn and each reads one stretch."""
        full, over = divmod(self.num_batches, self.workers)
        return worker * full + min(worker, over)


class ShardReader:
    """Reads records that lie one behind the other, going on where it was.

    Args:
        shards: Path or URL of each shard; whatever webdataset opens (``http:``, ``pipe:``, ``gs:``, ...).
        counts: How many records each is said to hold; None where nobody says.

    Attributes:
        surplus: Shards that hold more than that, which would never be read; whoever asks takes them out.
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int] | None = None) -> None:
        self.shards, self.counts = shards, counts
        self.surplus: list[Skipped] = []
        self._open: tuple[int, int, Iterator[Record | DataError]] | None = None

    def read(self, records: IntArray) -> Iterator[Record | DataError]:
        """Give each record, or the sentence that says why it cannot be read.

        Args:
            records: int64 (n, 2), shard and place, as they lie in the shards.
        """
        for shard, place in records.tolist():
            yield self._read(shard, place)

    def _read(self, shard: int, place: int) -> Record | DataError:
        try:
            if self._open is None or self._open[0] != shard or self._open[1] > place:
                self._open = (shard, 0, iterate_shard(self.shards[shard]))
            _, at, records = self._open
            record = next(record for skipped, record in enumerate(records, at) if skipped == place)
        except StopIteration:
            self._open = (shard, place + 1, iter(()))
            return DataError(f"The shard {self.shards[shard]} ends before record {place}; write its counts anew.")
        except DataError as error:
            self._open = (shard, place + 1, iter(()))  # what follows in the shard is lost as well
            return error
        self._open = (shard, place + 1, records)
        if self.counts is not None and place + 1 == self.counts[shard]:
            self._look_behind(shard, self.counts[shard], records)
        return record

    def _look_behind(self, shard: int, count: int, records: Iterator[Record | DataError]) -> None:
        with contextlib.suppress(DataError):
            if next(records, None) is not None:
                said = (
                    f"The shard {self.shards[shard]} holds more than the {count} records that sizes.json or its "
                    "_stats.json says, which are not read; correct that file, or delete it to have them counted."
                )
                self.surplus.append(Skipped(f"{self.shards[shard]}: more records", said, whole=False))


def iterate_shard(url: str) -> Iterator[Record | DataError]:
    """Give a shard's samples in order; one that cannot be told from others as the sentence that says why.

    Raises:
        DataError: It cannot be opened, or is damaged from here on.
        ConfigError: See :func:`check_shard`.
    """
    _require_webdataset()
    check_shard(url)
    from webdataset.gopen import gopen

    try:
        # A local name never goes through webdataset, which takes " pipe:" and "PIPE:" for commands, too.
        stream = gopen(url) if is_remote(url) else Path(url).open("rb")
    except Exception as error:  # curl, storage clients and pipes fail in their own ways
        raise DataError(f"The shard {url} cannot be opened ({told(error)}); check path and access.") from error
    try:
        yield from _grouped(_files(stream), url)
    except Exception as error:
        raise DataError(f"The shard {url} is damaged ({told(error)}); fetch it again.") from error
    finally:
        with contextlib.suppress(Exception):  # a pipe that is left before its end complains
            stream.close()


def split_member(name: str) -> tuple[str, str] | None:
    """Return the key and suffix of a member of a shard, by WebDataset's rule: what follows the first dot is the suffix.

    Args:
        name: Name in the tar.

    Returns:
        Such as ``("0001/000012", "seg.png")``, the suffix in lower case; None for members that are of no sample, such
        as hidden files and ``__meta__.json``.
    """
    folder, _, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
        return None
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _files(stream: Any) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular member of a tar, compressed or not, as it is read."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            if file is not None:
                yield member.name, file.read()
            tar.members = []  # type: ignore[attr-defined]  # headers of what was read


def _grouped(files: Iterable[tuple[str, bytes]], url: str) -> Iterator[Record | DataError]:
    """Yield records of adjacent members with the same key."""
    members = ((*split, data) for name, data in files if (split := split_member(name)) is not None)
    for key, group in groupby(members, key=lambda member: member[0]):
        record: Record = {"__key__": key}
        twice = ""
        for _, suffix, data in group:
            twice = suffix if suffix in record else twice
            record[suffix] = data
        if twice:
            yield DataError(f"The record {url}/{key} has several members {key}.{twice}; write each once.")
        else:
            yield record


def expand_shards(pattern: str, root: Path) -> list[str]:
    """Expand braces; names without a scheme lie under ``root``.

    Args:
        pattern: Such as ``{00000..00331}.tar`` or ``https://host/cc3m-train-{0000..0575}.tar``; several are joined
            by ``::``.
        root: Folder of local shards.

    Raises:
        ConfigError: The braces make no names.
    """
    _require_webdataset()
    from braceexpand import braceexpand

    try:
        names = [name for part in pattern.split("::") for name in braceexpand(part)]
    except ValueError as error:
        raise ConfigError(f"The shards {pattern!r} cannot be expanded: {error}.") from error
    return [name if is_remote(name) else str(root / name) for name in names]


def check_shard(name: str) -> None:
    """Check that a shard is not a command, unless the command line allows it, nor a URL that could become one.

    Raises:
        ConfigError: It is.
    """
    scheme = name.partition(":")[0].lower() if is_remote(name) else ""
    if scheme == "pipe" and not pipe_allowed():
        raise ConfigError(
            f"The shard {name!r} would run a command; if you know whose it is, add  --allow_pipe true  to the command "
            "line (no configuration can)."
        )
    if scheme and scheme != "pipe" and re.search(r"[\s'\"`\\\x00-\x1f]", name):
        raise ConfigError(
            f"The shard {name!r} is a URL with a space, quote, backslash or control character; write it in percent "
            "form (%20, %27)."
        )


def is_remote(name: str) -> bool:
    """Return whether a shard is remote."""
    return re.match(r"^[a-z][a-z0-9+.-]*:", name, flags=re.IGNORECASE) is not None


def _require_webdataset() -> None:
    if find_spec("webdataset") is None:
        raise ConfigError("Shards are read by webdataset; install it with  pip install webdataset.")


def told(error: Exception) -> str:
    """Return the first line of an error with its kind: tarfile adds one for each way in which it tried to read."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160].rstrip(':')}" if text else type(error).__name__
