"""Read text files from outside: regular files only, UTF-8 only, with a limit on nesting.

Readers raise only OSError or ValueError, which the caller turns into one sentence with the next step.
"""

from __future__ import annotations

import errno
import json
import stat
import zipfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from visexpert.errors import UserError, first_line

IMAGE_FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2",),
    "PPM": (".ppm", ".pgm"),
    "AVIF": (".avif",),
}
"""Image formats that are decoded, by Pillow's name, with the suffixes of their files; also listed in docs/faq.md.

Pillow supports some 40 more, but rarely used decoders are where faults hide, and one of them runs Ghostscript.
"""


def check_regular(path: str | Path) -> None:
    """Check that a path is a regular file, not a pipe, device, socket or folder, so that reading it ends.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: It is not a regular file.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def check_unpacked(path: Path) -> None:
    """Check that a zip holds its files as they are, as torch writes them: one that is packed may fill the memory.

    Anything but a zip is left to its reader.

    Raises:
        OSError: The file cannot be read.
        ValueError: The files take more bytes than the zip, or its list of them is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(str(error)) from None
    if size > path.stat().st_size:
        raise ValueError(f"it is a zip of {path.stat().st_size:,} bytes that unpacks to {size:,}")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: The text is not UTF-8.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from None


def parse_json(text: str | bytes) -> Any:
    """Decode JSON.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Decode a JSON file; errors as of :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path))


def read_object(path: Path, *, error: type[UserError], owner: str = "", step: str) -> dict[str, Any]:
    """Decode a JSON file that holds an object.

    Args:
        path: The file.
        error: Class of the error to raise.
        owner: Who asks, first in the message; empty for nobody.
        step: What the user can do, last in the message.

    Raises:
        UserError: The file cannot be read, or holds something else; the class is ``error``.
    """
    who = f"{owner}: " if owner else ""
    try:
        loaded = read_json(path)
    except (OSError, ValueError) as cause:
        raise error(f"{who}cannot read {path} ({cause}); {step}.") from cause
    if not isinstance(loaded, dict):
        raise error(f"{who}{path} holds a {type(loaded).__name__}, a JSON object is needed; {step}.")
    return loaded


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Encode as readable JSON: printable characters as they are, terminal control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(sign if sign.isprintable() or sign == "\n" else json.dumps(sign)[1:-1] for sign in text)


def read_yaml(path: Path) -> Any:
    """Decode a YAML file without building objects that it names.

    Raises:
        OSError: As :func:`read_text`.
        ValueError: The text is not YAML, has a duplicate key, is nested too deeply, or its aliases repeat it without
            end.
    """
    try:
        value = yaml.load(read_text(path), Loader=_OnceLoader)
        _expanded(value, {})
        return value
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem or first_line(error)}") from None
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, TypeError, AttributeError) as error:  # PyYAML's, for a value that belies its own tag
        raise ValueError(f"a value does not fit its tag: {first_line(error)}") from None


MOST_VALUES = 1_000_000
"""Most values of a YAML file, with those that aliases repeat."""


def _expanded(value: Any, known: dict[int, int | None]) -> int:
    """Return the number of values in a decoded YAML file when aliases are written out.

    Raises:
        ValueError: An alias stands inside of what it names, or there are too many values.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        if (count := known[id(value)]) is None:
            raise ValueError("an alias stands inside of what it names")
        return count
    known[id(value)] = None
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    found = 1 + sum(_expanded(part, known) for part in parts)
    if found > MOST_VALUES:
        raise ValueError(f"with its aliases written out it has more than {MOST_VALUES:,} values")
    known[id(value)] = found
    return found


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _OnceLoader(_SafeLoader):  # type: ignore[misc]
    """Refuses duplicate keys, of which YAML's own loaders silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' comes twice", key.start_mark
                    )
                seen.add(key.value)
        made: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return made
