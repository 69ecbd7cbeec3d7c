"""Files of a run, written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visexpert.errors import DataError
from visexpert.io import reading
from visexpert.io.files import whole_file


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, so that readers never see half of it.

    Raises:
        DataError: The folder or file cannot be written (permissions, full disk).
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as :func:`write_text` does."""
    try:
        with whole_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise DataError(f"Cannot write {path} ({error.strerror}): free disk space, or use another folder.") from error


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file; one that a kill has cut is ended first.

    Raises:
        DataError: As :func:`write_text`; lines may be missing at the end.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            text = "".join(f"{line}\n" for line in lines).encode("utf-8")
            if size := file.tell():
                file.seek(size - 1)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)  # at the end, wherever was read
    except OSError as error:
        raise DataError(f"Cannot write {path} ({error.strerror}): free disk space, or use another folder.") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON that any reader accepts: numbers that are not finite become null.

    Raises:
        DataError: As :func:`write_text`.
    """
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_json_list(path: Path, items: Sequence[Any]) -> None:
    """Write a JSON list as :func:`write_json` does, one item per line."""
    lines = [json.dumps(_finite(item), allow_nan=False) for item in items]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: The file is missing or is not JSON.
    """
    try:
        return reading.read_json(path)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no {path}: the run that writes it has not finished, or is in another folder."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}): remove it and let the run write it again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: As :func:`read_json`, or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}, a JSON object is needed: remove it and let the run write it "
            "again."
        )
    return content


def set_aside(path: Path) -> Path | None:
    """Rename ``name.ext`` to the first free ``name.1.ext``, ``name.2.ext``, ...; return None if it does not exist."""
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    return kept


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
