"""WebDataset shards: their names, how many records each holds, and a sequential reader."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visexpert.data.packing import IntArray
from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import read_json
from visexpert.io.run_files import write_json
from visexpert.io.weights import cache_root
from visexpert.trust import require_pipe
from visexpert.types import Skipped

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

Record = dict[str, Any]
"""What a shard holds of one sample: ``__key__`` and the bytes of each file by suffix (``jpg``, ``txt``, ``json``)."""

MOST_BYTES = 2**29
"""Most bytes of a record, headers included: an image of 16 bits that is not compressed stays below."""
MOST_IN_HEADER = 2**20
"""Most bytes of a name, or of an extended header, in a tar."""
MOST_TIMES = 100
"""Most times its own size that a compressed shard may unpack to."""


class ShardReader:
    """Reads records sequentially, continuing where the last call stopped.

    Args:
        shards: Path or URL of each shard; anything that webdataset opens (``http:``, ``pipe:``, ``gs:``, ...).
        counts: Expected number of records in each; None if it is unknown.

    Attributes:
        surplus: Shards with more records than expected, which are never read; the caller reports and clears them.
    """

    def __init__(self, shards: Sequence[str], counts: Sequence[int] | None = None) -> None:
        self.shards, self.counts = shards, counts
        self.surplus: list[Skipped] = []
        self._open: tuple[int, int, Iterator[Record | DataError]] | None = None

    def read(self, records: IntArray) -> Iterator[Record | DataError]:
        """Yield each record, or the error that explains why it cannot be read.

        Args:
            records: int64 (n, 2), shard and place, in the order of the shards' files.
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
            return DataError(
                f"The shard {self.shards[shard]} ends before record {place}; correct its number of records."
            )
        except DataError as error:
            self._open = (shard, place + 1, iter(()))  # the rest of the shard is lost as well
            return error
        self._open = (shard, place + 1, records)
        if self.counts is not None and place + 1 == self.counts[shard]:
            self._check_end(shard, self.counts[shard], records)
        return record

    def _check_end(self, shard: int, count: int, records: Iterator[Record | DataError]) -> None:
        with contextlib.suppress(DataError):
            if next(records, None) is not None:
                said = (
                    f"The shard {self.shards[shard]} holds more than the {count} records that sizes.json or its "
                    "_stats.json states, and the rest is not read; correct that file, or delete it to count them again."
                )
                self.surplus.append(Skipped(f"{self.shards[shard]}: more records", said, whole=False))


def iterate_shard(url: str) -> Iterator[Record | DataError]:
    """Yield a shard's samples in order; an ambiguous one becomes an error.

    Raises:
        DataError: The shard cannot be opened, or the rest of it is damaged.
        ConfigError: See :func:`check_shard`.
    """
    _require_webdataset()
    check_shard(url)
    from webdataset.gopen import gopen

    try:
        # A local name never goes through webdataset, which also takes " pipe:" and "PIPE:" for commands.
        stream = gopen(url) if is_remote(url) else Path(url).open("rb")
    except Exception as error:  # curl, storage clients and pipes raise many kinds
        raise DataError(f"The shard {url} cannot be opened ({told(error)}); check path and access.") from error
    try:
        yield from _grouped(_files(stream), url)
    except Exception as error:
        raise DataError(f"The shard {url} is damaged ({told(error)}); fetch it again.") from error
    finally:
        with contextlib.suppress(Exception):  # a pipe that is closed early complains
            stream.close()


def split_member(name: str) -> tuple[str, str] | None:
    """Return a shard member's key and suffix by WebDataset's rule: the suffix follows the first dot.

    Args:
        name: Name in the tar.

    Returns:
        For example ``("0001/000012", "seg.png")``, with the suffix in lower case; None for members that belong to no
        sample, such as hidden files and ``__meta__.json``.
    """
    folder, _, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    if not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
        return None
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def _files(stream: Any) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each regular member of a tar, compressed or not."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
        for member in _regular(tar):
            file = tar.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def _regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar, whose headers are dropped once they are read.

    Raises:
        tarfile.ReadError: A size is one that no shard has. That of an extended header is known only here.
    """
    for member in tar:
        _check_size(member.size, MOST_BYTES)
        if member.isreg():
            yield member
        tar.members = []  # type: ignore[attr-defined]


class _Header(tarfile.TarInfo):
    """A header that is checked before anything is read by it.

    tarfile believes a size, even one below 0, and takes a damaged header for the end of the tar.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error
        _check_size(header.size, MOST_IN_HEADER if header.type in _ABOUT_ANOTHER else MOST_BYTES)
        return header


_ABOUT_ANOTHER = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of members that say something of the next one, and are read into memory at once."""


def _check_size(size: int, most: int) -> None:
    if not 0 <= size <= most:
        raise tarfile.ReadError(f"a header states {size:,} bytes, at most {most:,} are read")


def _grouped(files: Iterable[tuple[str, bytes]], url: str) -> Iterator[Record | DataError]:
    """Yield records of adjacent members with the same key."""
    members = ((*split, data) for name, data in files if (split := split_member(name)) is not None)
    for key, group in groupby(members, key=lambda member: member[0]):
        record: Record = {"__key__": key}
        twice, size = "", 0
        for _, suffix, data in group:
            size += tarfile.BLOCKSIZE + len(data)
            twice = suffix if suffix in record else twice
            if size <= MOST_BYTES:
                record[suffix] = data
            else:
                record.clear()
        if size > MOST_BYTES:
            yield DataError(f"The record {url}/{key} has more than {MOST_BYTES:,} bytes in the shard; leave it out.")
        elif twice:
            yield DataError(f"The record {url}/{key} has several members {key}.{twice}; write each once.")
        else:
            yield record


def expand_shards(pattern: str, root: Path) -> list[str]:
    """Expand braces; names without a scheme are relative to ``root``.

    Args:
        pattern: For example ``{00000..00331}.tar`` or ``https://host/cc3m-train-{0000..0575}.tar``; several are joined
            by ``::``.
        root: Folder of local shards.

    Raises:
        ConfigError: The braces are not valid.
    """
    _require_webdataset()
    from braceexpand import braceexpand

    try:
        names = [name for part in pattern.split("::") for name in braceexpand(part)]
    except ValueError as error:
        raise ConfigError(f"The shards {pattern!r} cannot be expanded: {error}.") from error
    return [name if is_remote(name) else str(root / name) for name in names]


def check_shard(name: str) -> None:
    """Check that a shard runs no command, unless the user allows it, and is not a URL that could become one.

    Raises:
        ConfigError: It does, or is one.
    """
    scheme = name.partition(":")[0].lower() if is_remote(name) else ""
    if scheme == "pipe":
        require_pipe(name)
    if scheme and scheme != "pipe" and re.search(r"[\s'\"`\\\x00-\x1f]", name):
        raise ConfigError(
            f"The shard {name!r} is a URL with a space, quote, backslash or control character; percent-encode it "
            "(%20, %27)."
        )


def is_remote(name: str) -> bool:
    """Return whether a shard is a URL."""
    return re.match(r"^[a-z][a-z0-9+.-]*:", name, flags=re.IGNORECASE) is not None


def _require_webdataset() -> None:
    if find_spec("webdataset") is None:
        raise ConfigError("Reading shards needs webdataset; install it with pip install webdataset.")


def told(error: Exception) -> str:
    """Return the type and first line of an error; tarfile adds a line for each compression that it tried."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160].rstrip(':')}" if text else type(error).__name__


def shard_counts(shards: Sequence[str], *, sizes: Path | None) -> tuple[int, ...]:
    """Return the number of records in each shard.

    Looked up in this order: ``sizes`` or a ``sizes.json`` beside the shard (webdataset's convention, name to number);
    the ``_stats.json`` that img2dataset writes beside it (``successes``); the shard's headers, whose count is cached.
    Shards at a URL are not read for this.

    Args:
        shards: Paths or URLs.
        sizes: JSON file of numbers by name; None looks for one beside each shard.

    Raises:
        ConfigError: No file states the number of a remote shard.
        DataError: A shard is damaged or empty.
    """
    known: dict[Path, dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        counts = tuple(pool.map(lambda shard: _count(shard, sizes, known), shards))
    if not sum(counts):
        raise DataError(f"The shards from {shards[0]} on hold no records; check the pattern.")
    return counts


def _count(shard: str, sizes: Path | None, known: dict[Path, dict[str, Any]]) -> int:
    noted = _note_of(shard, sizes, known)
    if noted is not None:
        return noted[0]
    if is_remote(shard):
        raise ConfigError(
            f"The number of records in {shard} is unknown, so it cannot be divided among processes; set sizes to a "
            'JSON file of names and numbers ({"00000.tar": 9812, ...}).'
        )
    return _counted(Path(shard))


def wrong_notes(shards: Sequence[str], *, sizes: Path | None) -> list[str]:
    """Return one sentence for each local shard whose number of records a file states wrongly.

    Raises:
        DataError: A shard is damaged.
    """
    known: dict[Path, dict[str, Any]] = {}
    wrong = []
    for shard in shards:
        noted = None if is_remote(shard) else _note_of(shard, sizes, known)
        if noted is not None and noted[0] != (held := _counted(Path(shard))):
            wrong.append(
                f"{noted[1]} states {noted[0]} records for {shard}, which holds {held}; correct that file, or delete "
                "it to count them again"
            )
    return wrong


def _note_of(shard: str, sizes: Path | None, known: dict[Path, dict[str, Any]]) -> tuple[int, Path] | None:
    """Return the number that a file states, and the file."""
    path = Path(shard)
    listed = sizes if sizes is not None else path.with_name("sizes.json")
    number = _noted(listed, known).get(shard.rsplit("/", 1)[-1])
    if number is None and not is_remote(shard):
        listed = path.with_name(f"{path.name.split('.')[0]}_stats.json")
        number = _noted(listed, known).get("successes")
    return None if number is None else (int(number), listed)


def _noted(path: Path, known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    if path not in known:
        try:
            content = read_json(path)
        except (OSError, ValueError):
            content = {}
        known[path] = content if isinstance(content, dict) else {}
    return known[path]


def _counted(path: Path) -> int:
    """Count the samples from the headers alone; the count is cached by size and modification time."""
    try:
        facts = path.stat()
        content = os.fsencode(path.resolve()) + f"\0{facts.st_size}\0{facts.st_mtime_ns}".encode()
        note = cache_root() / "shards" / f"{hashlib.sha256(content).hexdigest()[:24]}.json"
        if note.is_file():
            return int(read_json(note))
        number = _groups(path)
    except Exception as error:  # decompressors raise many kinds
        raise DataError(f"The shard {path} cannot be counted ({told(error)}); fetch it again.") from error
    try:
        write_json(note, number)
    except DataError as error:
        log.warning("%s The records are counted again next time; VISEXPERT_CACHE names the folder.", error)
    return number


def _groups(path: Path) -> int:
    number, previous = 0, ""
    most = MOST_TIMES * path.stat().st_size
    with tarfile.open(path, "r:*", tarinfo=_Header) as tar:
        for member in _regular(tar):
            if tar.offset > most:  # where the next header is
                raise tarfile.ReadError(f"it unpacks to more than {MOST_TIMES} times its size")
            named = split_member(member.name)
            if named is None:
                continue
            number += named[0] != previous
            previous = named[0]
    return number
