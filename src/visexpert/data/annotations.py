"""Annotation files: JSON and JSON lines, read record by record so that one broken record costs one record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from visexpert import reading
from visexpert.data.faults import FaultLog
from visexpert.errors import DataError
from visexpert.types import Skipped

T = TypeVar("T")


class BrokenRecordError(Exception):
    """A record that cannot be used; the message says why."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return reading.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"The annotations {path} do not exist; correct the path, or fetch them.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"The annotations {path} cannot be read ({error}); fetch them again.") from error


def read_json_list(path: Path, *keys: str) -> list[Any]:
    """Read a JSON file and take the list that lies under ``keys``.

    Raises:
        DataError: It is missing, damaged, or has no such list.
    """
    value = read_json(path)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list):
        place = f"a list under {'.'.join(keys)}" if keys else "a list"
        raise DataError(f"The annotations {path} should hold {place}, but do not; is it the right file?")
    return value


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of one JSON value a line; a broken line becomes the error itself, for :func:`collect` to count.

    Raises:
        DataError: The file is missing or no text.
    """
    try:
        lines = reading.read_text(path).splitlines()
    except FileNotFoundError as error:
        raise DataError(f"The annotations {path} do not exist; correct the path, or fetch them.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"The annotations {path} cannot be read ({error}); fetch them again.") from error
    return [_value(line) for line in lines if line.strip()]


def collect(
    records: Iterable[Any], parse: Callable[[Any], T], *, path: Path, faults: FaultLog, numbered: str = "record"
) -> Iterator[T]:
    """Parse records one by one; what cannot be parsed goes to ``faults``.

    Args:
        records: Decoded JSON.
        parse: Turns one into what is wanted; raises :class:`BrokenRecordError`, KeyError, TypeError or ValueError.
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
        except (BrokenRecordError, LookupError, TypeError, ValueError, AttributeError) as error:
            key = f"{path.name}:{numbered} {number}"
            skipped.append(Skipped(key, f"{numbered.capitalize()} {number} of {path} is broken ({_told(error)})."))
            continue
        yield parsed
    faults.add(skipped)


def text_of(record: Any, key: str) -> str:
    """A text that must be there and not be empty.

    Raises:
        BrokenRecordError: It is not.
    """
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise BrokenRecordError(f"{key} is {value!r}, but must be text")
    return " ".join(value.split())


def image_path(folder: Path, name: Any) -> str:
    """The path of an image that an annotation names, inside its folder.

    Raises:
        BrokenRecordError: No name, or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BrokenRecordError(f"the image {name!r} is no name of a file inside {folder}")
    return str(folder / name)


def _value(line: str) -> Any:
    try:
        return reading.parse_json(line)
    except ValueError as error:
        return BrokenRecordError(f"no JSON: {error}")


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
