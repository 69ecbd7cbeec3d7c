"""Annotation files: JSON and JSON lines, read record by record so that one broken record costs one record."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from visexpert.data.faults import FaultLog
from visexpert.errors import DataError
from visexpert.io.reading import check_regular, parse_json
from visexpert.types import Skipped

T = TypeVar("T")


class BrokenRecordError(DataError):
    """An unusable record; the message states the reason."""


BROKEN = (BrokenRecordError, LookupError, TypeError, ValueError, AttributeError)
"""Exceptions that a broken record may raise."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise DataError(f"The annotations {path} cannot be read ({error}); fetch them again.") from error


def read_json_list(path: Path, *keys: str) -> list[Any]:
    """Read a JSON file and take the list that lies under ``keys``; JSON lines also count as a list.

    Raises:
        DataError: It is missing, damaged, or has no such list.
    """
    text = _text(path)
    lines = [] if keys else [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines[:2]):
        return [_value(line) for line in lines]
    value = read_json(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        place = f"a list under {'.'.join(keys)}" if keys else "a list"
        raise DataError(f"The annotations {path} should hold {place}, but do not; is it the right file?")
    return value


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of one JSON value a line; a broken line becomes the error itself, for :func:`collect` to count.

    A file that is one JSON list is read as that list.

    Raises:
        DataError: The file is missing or no text.
    """
    text = _text(path)
    if text.lstrip().startswith("["):
        return read_json_list(path)
    return [_value(line) for line in text.split("\n") if line.strip()]  # splitlines() also parts at U+2028 and U+0085


def collect(
    records: Iterable[Any], parse: Callable[[Any], T], *, path: Path, faults: FaultLog, numbered: str = "record"
) -> Iterator[T]:
    """Parse records one by one; what cannot be parsed goes to ``faults``.

    Args:
        records: Decoded JSON.
        parse: Turns one into what is wanted; raises :class:`BrokenRecordError`, KeyError, TypeError or ValueError. What
            a :class:`~visexpert.data.samples.Sample` says that it ``lost`` is counted as well.
        path: Their file, for messages.
        faults: Counts what is broken.
        numbered: What to call a record in messages.
    """
    skipped = []
    for number, record in enumerate(records):
        try:
            if isinstance(record, Exception):
                raise record
            parsed = parse(record)
        except BROKEN as error:
            key = f"{path.name}:{numbered} {number}"
            skipped.append(Skipped(key, f"{numbered.capitalize()} {number} of {path} is broken ({_told(error)})."))
            continue
        for reason in getattr(parsed, "lost", ()):
            key = f"{path.name}:{numbered} {number}: {reason}"
            skipped.append(
                Skipped(key, f"Of {numbered} {number} of {path} a part is left out ({reason}).", whole=False)
            )
        yield parsed
    faults.add(skipped)


class Once:
    """Refuses duplicates: official code keys results by id, so nothing is scored twice.

    Args:
        what: What is listed, for the message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: set[Any] = set()

    def check(self, name: Any) -> None:
        """Note a name.

        Raises:
            BrokenRecordError: It came before.
        """
        if name in self._seen:
            raise BrokenRecordError(f"{self._what} {name!r} is listed again")
        self._seen.add(name)


def each_usable(values: Iterable[Any], read: Callable[[Any], T], lost: list[str]) -> list[T]:
    """Read the parts of a record, such as an image's captions, so that a broken one costs no other.

    Args:
        values: Decoded JSON.
        read: Reads one part; raises as ``parse`` of :func:`collect`.
        lost: Is told why parts were left out.

    Raises:
        BrokenRecordError: There are parts, but none that can be used.
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


def text_of(record: Any, key: str) -> str:
    """Return a required text.

    Raises:
        BrokenRecordError: It is not.
    """
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecordError(f"{key} is {value!r:.80}, but must be text")
    return checked(" ".join(value.split()), name=key)


def checked(text: str, *, name: str) -> str:
    """Return a text if it is one: half a surrogate pair, or bytes that are no UTF-8, end tokenizers with an error.

    Args:
        text: The text.
        name: What to call it in messages.

    Raises:
        BrokenRecordError: It is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        sign = ord(error.object[error.start])
        what = f"byte {sign - 0xDC00:#04x} is no UTF-8" if 0xDC80 <= sign <= 0xDCFF else f"U+{sign:04X} stands alone"
        raise BrokenRecordError(f"{name} is no text: {what} at character {error.start}") from None
    return text


def image_path(folder: Path, name: Any) -> str:
    """Return the path of an image that an annotation names, inside its folder.

    Raises:
        BrokenRecordError: No name, or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BrokenRecordError(f"the image {name!r} is no name of a file inside {folder}")
    return str(folder / name)


def _text(path: Path) -> str:
    """Return a file's text; invalid UTF-8 becomes lone surrogates, which make the record around them unusable.

    Raises:
        DataError: It is missing, no regular file, or UTF-16.
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


def _value(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return BrokenRecordError(f"no JSON: {error}")


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
