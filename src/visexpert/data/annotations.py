"""Annotation files: JSON and JSON lines, read record by record so that a broken record affects no other."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm.auto import tqdm

from visexpert.data.faults import FaultLog
from visexpert.errors import DataError
from visexpert.io.reading import check_regular, parse_json
from visexpert.types import Skipped

T = TypeVar("T")

_SPACE = " \t\n\r"
_CHUNK = 2**20


class BrokenRecordError(DataError):
    """An unusable record; the message states the reason."""


class StreamError(Exception):
    """A file cannot be read record by record; reading it whole works, or says what is wrong."""


BROKEN = (BrokenRecordError, LookupError, TypeError, ValueError, AttributeError)
"""Exceptions that a broken record may raise."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise DataError(f"The annotations {path} cannot be read ({error}); fetch them again.") from error


def slow(items: Sequence[T] | Iterable[T], *, doing: str, unit: str) -> Iterable[T]:
    """Return the items, with a progress bar from the tenth second on, on a terminal.

    Args:
        items: The items.
        doing: What is done, for the bar.
        unit: What an item is.
    """
    bar: Iterable[T] = tqdm(items, desc=doing, unit=unit, delay=10.0, disable=None)
    return bar


class Records(list[Any]):
    """The decoded records of a file, with their places in it.

    Args:
        values: The records.
        numbers: Position of each in the file, or name of each in its folder.
        form: Format of a place, such as ``images[{}]`` or ``Line {}``.
    """

    def __init__(
        self,
        values: Iterable[Any],
        *,
        numbers: Sequence[int] | Sequence[str] | None = None,
        form: str = "Record [{}]",
    ) -> None:
        super().__init__(values)
        self.numbers: Sequence[int] | Sequence[str] = range(len(self)) if numbers is None else numbers
        self.form = form

    def place(self, row: int) -> str:
        """Return the place of a record in its file, such as ``images[68]`` (from 0) or ``Line 3`` (from 1)."""
        return self.form.format(self.numbers[row])

    def only(self, rows: Iterable[int]) -> Records:
        """Return some of the records."""
        rows = list(rows)
        numbers: Any = [self.numbers[row] for row in rows]
        return Records([self[row] for row in rows], numbers=numbers, form=self.form)


def read_json_list(path: Path, *keys: str) -> Records:
    """Read a JSON file and return the list under ``keys``; JSON lines also count as a list.

    Raises:
        DataError: It is missing, damaged, or has no such list.
    """
    text = read_text(path)
    lines = [] if keys else [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines[:2]):
        return _lines(text)
    value = read_json(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        place = f"list under {'.'.join(keys)}" if keys else "list"
        raise DataError(f"The annotations {path} have no {place}; check that it is the right file.")
    return Records(value, form=".".join(keys) + "[{}]" if keys else "Record [{}]")


def read_json_lines(path: Path) -> Records:
    """Read a file with one JSON value per line; a broken line becomes an error, which :func:`collect` counts.

    A file that holds a single JSON list is read as that list.

    Raises:
        DataError: The file is missing or is not text.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return read_json_list(path)
    return _lines(text)


def stream_json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what :func:`read_json_list` returns, with places, holding one record at a time.

    Raises:
        OSError: The file cannot be read.
        StreamError: It is damaged or has another form.
    """
    check_regular(path)
    with path.open("rb") as binary:
        if binary.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise StreamError("UTF-16")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        sign = " "
        while sign and sign in _SPACE:
            sign = file.read(1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        if sign == "[":
            yield from ((f"Record [{number}]", record) for number, record in enumerate(_elements(file)))
        elif sign == "{":
            yield from _streamed_lines(file)
        else:
            raise StreamError("neither a list nor lines of objects")


def _streamed_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    whole = 0
    for number, line in enumerate(file, 1):
        line = line.removesuffix("\n")
        if not line.strip():
            continue
        if whole < 2 and not (line.lstrip().startswith("{") and line.rstrip().endswith("}")):
            raise StreamError("one object over several lines")
        whole += 1
        yield f"Line {number}", _value(line)
    if whole < 2:
        raise StreamError("one object")


def _elements(file: TextIO) -> Iterator[Any]:
    """Yield the elements of a JSON list from a text file, read in chunks.

    Raises:
        StreamError: It is not one list and nothing else.
    """
    decode, text, place, at_end = json.JSONDecoder().raw_decode, "", 0, False

    def more() -> None:
        nonlocal text, place, at_end
        read = file.read(_CHUNK)
        text, place, at_end = text[place:] + read, 0, not read

    def sign() -> str:
        """Return the next character that is not white space; empty at the end."""
        nonlocal place
        while True:
            while place < len(text) and text[place] in _SPACE:
                place += 1
            if place < len(text) or at_end:
                return text[place : place + 1]
            more()

    if sign() != "[":
        raise StreamError("not a list")
    place += 1
    closed = sign() == "]"
    while not closed:
        sign()
        try:
            value, end = decode(text, place)
        except (ValueError, RecursionError) as error:
            end = len(text)
            if at_end or isinstance(error, RecursionError):
                raise StreamError(str(error)) from error
        if end + 2 >= len(text) and not at_end:  # the rest of the value may follow, such as that of "3.5e+"
            more()
            continue
        place = end
        yield value
        closed = sign() == "]"
        if not closed and sign() != ",":
            raise StreamError("no comma between elements")
        place += not closed
    place += 1
    if sign():
        raise StreamError("more than one list")


def collect(records: Records, parse: Callable[[Any], T], *, path: Path, faults: FaultLog) -> Iterator[T]:
    """Parse records one by one; those that cannot be parsed go to ``faults``.

    Args:
        records: Decoded JSON, with its places.
        parse: Parses one record; raises :class:`BrokenRecordError`, KeyError, TypeError or ValueError. The ``lost``
            parts of a :class:`~visexpert.data.samples.Sample` are counted as well.
        path: Their file, for messages.
        faults: Counts broken records.
    """
    placed = (
        (records.place(row), record)
        for row, record in enumerate(slow(records, doing=f"reading {path.name}", unit="record"))
    )
    skipped: list[Skipped] = []
    for parsed, faulty in parse_each(placed, parse, path=path):
        skipped += faulty
        if parsed is not None:
            yield parsed
    faults.add(skipped)


def parse_each(
    records: Iterable[tuple[str, Any]], parse: Callable[[Any], T], *, path: Path
) -> Iterator[tuple[T | None, list[Skipped]]]:
    """Yield each record parsed, or None if it is broken, and its faults.

    Args:
        records: Places in the file, such as ``Record [3]``, and decoded JSON.
        parse: See :func:`collect`.
        path: Their file, for messages.
    """
    for place, record in records:
        where = f"{place} of {path}"
        try:
            if isinstance(record, Exception):
                raise record
            parsed = parse(an_object(record, name="it"))
        except BROKEN as error:
            yield None, [Skipped(f"{path.name}:{place}", f"{where} is broken ({_told(error)}).")]
            continue
        yield (
            parsed,
            [
                Skipped(
                    f"{path.name}:{place}: {reason}",
                    f"{where} is used, but a part of it is left out ({reason}).",
                    whole=False,
                )
                for reason in getattr(parsed, "lost", ())
            ],
        )


class Once:
    """Refuses duplicates: official code keys results by id, so nothing is scored twice.

    Args:
        what: What is listed, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: set[Any] = set()

    def check(self, name: Any) -> None:
        """Record a name.

        Raises:
            BrokenRecordError: It has been seen before.
        """
        if name in self._seen:
            raise BrokenRecordError(f"{self._what} {name!r} is listed twice")
        self._seen.add(name)


def each_usable(values: Iterable[Any], read: Callable[[Any], T], lost: list[str]) -> list[T]:
    """Read the parts of a record, such as an image's captions; a broken part does not affect the others.

    Args:
        values: Decoded JSON.
        read: Reads one part; raises the same errors as ``parse`` in :func:`collect`.
        lost: Receives the reasons for leaving parts out.

    Raises:
        BrokenRecordError: There are parts, but none is usable.
    """
    kept, reasons = [], []
    for value in values:
        try:
            kept.append(read(value))
        except BROKEN as error:
            reasons.append(_told(error))
    if reasons and not kept:
        raise BrokenRecordError(reasons[-1])
    lost += reasons
    return kept


def kind_of(value: Any) -> str:
    """Describe a JSON value in words: ``null``, ``the number 5``, ``a list``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the string {value!r:.60}"
    if isinstance(value, int | float):
        return f"the number {value!r:.60}"
    return "a list" if isinstance(value, list) else "an object"


def an_object(value: Any, *, name: str) -> dict[str, Any]:
    """Check that a JSON value is an object and return it.

    Raises:
        BrokenRecordError: It is not.
    """
    if not isinstance(value, dict):
        raise BrokenRecordError(f"{name} is {kind_of(value)}, but must be an object")
    return value


def value_of(record: Any, key: str, *, name: str = "it") -> Any:
    """Return the value under a record's key.

    Raises:
        BrokenRecordError: The record is not an object, or lacks the key.
    """
    if key not in an_object(record, name=name):
        raise BrokenRecordError(f"{name} has no {key!r}")
    return record[key]


def list_of(record: Any, key: str) -> list[Any]:
    """Return the list under a key.

    Raises:
        BrokenRecordError: There is none.
    """
    value = value_of(record, key)
    if not isinstance(value, list):
        raise BrokenRecordError(f"{key} is {kind_of(value)}, but must be a list")
    return value


def id_of(record: Any, key: str) -> int | float | str:
    """Return the number or text that identifies a record.

    Raises:
        BrokenRecordError: There is none.
    """
    value = value_of(record, key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BrokenRecordError(f"{key} is {kind_of(value)}, but must be a number or text")
    return value


def whole_of(record: Any, key: str) -> int:
    """Return the integer under a key, also if it is written as a string.

    Raises:
        BrokenRecordError: There is none.
    """
    value = value_of(record, key)
    try:
        if not isinstance(value, bool) and float(value) == int(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise BrokenRecordError(f"{key} is {kind_of(value)}, but must be a whole number")


def choice_of(record: Any, key: str, allowed: Sequence[str]) -> str:
    """Return the string under a key, which must be one of ``allowed``.

    Raises:
        BrokenRecordError: It is not one of them.
    """
    value = value_of(record, key)
    if value not in allowed:
        raise BrokenRecordError(f"{key} is {kind_of(value)}, but must be one of {', '.join(allowed)}")
    return str(value)


def text_of(record: Any, key: str) -> str:
    """Return the text under a key, with single spaces between words.

    Raises:
        BrokenRecordError: There is none, or it is blank.
    """
    value = value_of(record, key)
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecordError(f"{key} is {kind_of(value)}, but must be text")
    return checked(" ".join(value.split()), name=key)


def checked(text: str, *, name: str) -> str:
    """Check that a text is valid Unicode and return it: tokenizers fail on lone surrogates and on invalid UTF-8.

    Args:
        text: The text.
        name: Its name in messages.

    Raises:
        BrokenRecordError: It is not valid.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign = ord(error.object[error.start])
        what = f"byte {sign - 0xDC00:#04x} is not UTF-8" if 0xDC80 <= sign <= 0xDCFF else f"U+{sign:04X} stands alone"
        raise BrokenRecordError(f"{name} is not valid text: {what} at character {error.start}") from None
    return text


def image_path(folder: Path, name: Any, *, key: str) -> str:
    """Return the path of an image that an annotation names, which must lie inside its folder.

    Args:
        folder: The folder.
        name: The name.
        key: The record's key that holds it, for messages.

    Raises:
        BrokenRecordError: There is no name, or it leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        raise BrokenRecordError(f"{key} is {kind_of(name)}, but must be the name of a file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BrokenRecordError(f"{key} is {name!r}, but must be the name of a file inside {folder}")
    return str(folder / name)


def read_text(path: Path) -> str:
    """Return a file's text; invalid UTF-8 becomes lone surrogates, which make the record around them unusable.

    Raises:
        DataError: It is missing, UTF-16, or not a regular file.
    """
    try:
        check_regular(path)
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"The annotations {path} do not exist; correct the path, or fetch them.") from error
    except OSError as error:
        raise DataError(f"The annotations {path} cannot be read ({error}); fetch them again.") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"The annotations {path} are UTF-16; save them as UTF-8.")
    return content.decode("utf-8-sig", "surrogateescape")


def _lines(text: str) -> Records:
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    # splitlines() would also split at U+2028 and U+0085
    return Records([_value(line) for _, line in numbered], numbers=[number for number, _ in numbered], form="Line {}")


def _value(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return BrokenRecordError(f"not JSON: {error}")


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
