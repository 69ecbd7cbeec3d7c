"""The samples of a large annotation file on disk: parsed once, then shared by all processes and runs.

The index is a folder in the cache: one file with the samples back to back, arrays with their ends, numbers of words and
images, and the list of faults. Plain NumPy files need no further package, and samples are read by position, so that an
open index takes about 13 bytes of memory per record, whatever the length of the texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from visexpert.data.annotations import StreamError, parse_each, slow, stream_json_list
from visexpert.data.faults import FaultLog
from visexpert.data.packing import BoolArray, IntArray
from visexpert.data.samples import Sample, file_facts, from_line, to_line, words_of
from visexpert.io.files import remove, take_place
from visexpert.io.reading import read_json
from visexpert.io.weights import cache_root
from visexpert.types import Skipped
from visexpert.version import __version__

try:
    import fcntl
except ImportError:  # Windows: annotations are read into memory
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

INDEX_FROM = 32 * 2**20
"""Size in bytes from which an annotation file is indexed; smaller ones are read faster than they are looked up."""

FOLDER = "annotations"

_told: set[str] = set()


class AnnotationIndex:
    """The samples of a whole annotation file, one row per record; a broken record has no bytes.

    Args:
        folder: Folder of a complete index.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        arrays = [np.load(self.folder / f"{name}.npy", allow_pickle=False) for name in ("ends", "words", "images")]
        self.ends, self.words, self.images = arrays
        card = read_json(self.folder / "card.json")
        self.faults = [(int(row), Skipped(key, reason, whole=whole)) for row, key, reason, whole in card["faults"]]
        self._file = os.open(self.folder / "records", os.O_RDONLY)  # kept open: the folder may be cleaned in mid-run
        weakref.finalize(self, os.close, self._file)
        size = int(self.ends[-1]) if len(self.ends) else 0
        if len({len(array) for array in arrays}) > 1 or os.fstat(self._file).st_size != size:
            raise ValueError(f"{self.folder} is damaged")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = state["folder"]
        self._open()

    def __len__(self) -> int:
        return len(self.ends)

    def usable(self, start: int, stop: int) -> IntArray:
        """Return the rows from ``start`` to ``stop`` whose records are not broken, int64."""
        starts = np.concatenate([[0], self.ends[:-1]])
        rows: IntArray = np.flatnonzero((self.ends > starts)[start:stop]).astype(np.int64) + start
        return rows

    def tell(self, faults: FaultLog, start: int, stop: int) -> None:
        """Report the faults found in the records from ``start`` to ``stop``, as reading them does.

        Raises:
            DataError: More records are broken than allowed.
        """
        faults.add([fault for row, fault in self.faults if start <= row < stop])

    def sample(self, row: int) -> Sample:
        """Return the sample of a row."""
        start = int(self.ends[row - 1]) if row else 0
        return from_line(os.pread(self._file, int(self.ends[row]) - start, start))


class IndexRows:
    """Some rows of an index (:class:`~visexpert.data.samples.Rows`).

    Args:
        index: The index.
        rows: int64, its rows in use.
    """

    def __init__(self, index: AnnotationIndex, rows: IntArray) -> None:
        self.index, self.rows = index, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return self.index.sample(int(self.rows[row]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def only(self, rows: IntArray) -> IndexRows:
        """Return some of these rows."""
        return IndexRows(self.index, self.rows[rows])

    def key(self, row: int) -> str:
        """Return the name of a sample in messages."""
        return self[row].key

    def identity(self) -> Iterator[str]:
        """Yield name, size and modification time of each image file."""
        return (f"{sample.image}\0{file_facts(sample.image)}" for sample in self)

    def lengths(self) -> tuple[IntArray, BoolArray]:
        """Return the number of words of each row, int64, and whether it has an image."""
        return self.index.words[self.rows], self.index.images[self.rows]


def indexed(path: Path, parse: Callable[[Any], Sample], settings: Mapping[str, Any]) -> AnnotationIndex | None:
    """Return the index of a JSON list or JSON lines, made on first use by one process while others wait.

    Args:
        path: The annotation file.
        parse: Parses a record; see :func:`~visexpert.data.annotations.collect`.
        settings: Everything else that its result depends on.

    Returns:
        The index; None if the file is small, cannot be streamed, or the cache cannot be written: then it is to be read
        into memory.
    """
    try:
        if fcntl is None or path.stat().st_size < INDEX_FROM:
            return None
    except OSError:  # reading it says what is wrong
        return None
    folder = _folder_of(path, parse, settings)
    try:
        return _opened(folder) or _made(folder, path, parse)
    except StreamError:
        return None
    except OSError as error:
        if str(folder.parent) not in _told:
            _told.add(str(folder.parent))
            log.warning(
                "The index of %s cannot be kept in %s (%s), so each process reads all annotations into memory; let "
                "VISEXPERT_CACHE name a folder that can be written.",
                path,
                folder.parent,
                error.strerror or error,
            )
        return None


def _folder_of(path: Path, parse: Callable[[Any], Sample], settings: Mapping[str, Any]) -> Path:
    """Return the folder of an index: name and place of the file, its size and time, settings and code."""
    modules = sorted({parse.__module__, parse_each.__module__, Sample.__module__, __name__})
    code = [Path(str(sys.modules[name].__file__)).read_text(encoding="utf-8") for name in modules]
    reading = [__version__, json.dumps(settings, sort_keys=True), *code]
    facts = (f"{path}\0{path.resolve()}", file_facts(str(path)), "\0".join(reading))
    digests = "-".join(hashlib.sha256(fact.encode("utf-8", "surrogateescape")).hexdigest()[:12] for fact in facts)
    return cache_root() / FOLDER / f"{path.stem[:60]}-{digests}"


def _opened(folder: Path) -> AnnotationIndex | None:
    try:
        return AnnotationIndex(folder)
    except (OSError, ValueError, LookupError, TypeError):  # none yet, or a damaged one, which is made again
        return None


def _made(folder: Path, path: Path, parse: Callable[[Any], Sample]) -> AnnotationIndex:
    """Make an index unless another process has just made it.

    Raises:
        OSError: The cache cannot be written.
        StreamError: The file cannot be read record by record, or changed meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock")):
        if (found := _opened(folder)) is not None:
            return found
        part = folder.with_name(f".{folder.name}.part")  # of a killed process, if it is there: we hold the lock
        remove(part)
        try:
            part.mkdir()
            before = file_facts(str(path))
            _write(part, path, parse)
            if file_facts(str(path)) != before:
                raise StreamError(f"{path} changed while it was read")
            take_place(part, folder)
        finally:
            remove(part)
        start, _, _ = folder.name.rsplit("-", 2)
        current = folder.name.rsplit("-", 1)[0]
        for other in folder.parent.glob(f"{start}-*"):  # of the file as it was
            if other.name.rsplit("-", 1)[0] != current:
                remove(other)
    return AnnotationIndex(folder)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, path: Path, parse: Callable[[Any], Sample]) -> None:
    """Parse a file into a folder, one record at a time."""
    ends, words, images, faults, end = [], [], [], [], 0
    records = slow(stream_json_list(path), doing=f"indexing {path.name}", unit="record")
    with (folder / "records").open("wb") as file:
        for row, (sample, skipped) in enumerate(parse_each(records, parse, path=path)):
            if sample is not None:
                end += file.write(to_line(sample))
            ends.append(end)
            words.append(0 if sample is None else words_of(sample))
            images.append(sample is not None and bool(sample.image))
            faults += [(row, fault.key, fault.reason, fault.whole) for fault in skipped]
    for name, values, dtype in (("ends", ends, np.int64), ("words", words, np.int64), ("images", images, np.bool_)):
        np.save(folder / f"{name}.npy", np.array(values, dtype=dtype))
    (folder / "card.json").write_text(json.dumps({"source": str(path), "faults": faults}), encoding="utf-8")
