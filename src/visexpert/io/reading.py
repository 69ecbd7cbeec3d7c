"""How text files from outside are read: regular files alone, UTF-8 alone, nested no deeper than anyone writes.

Every reader raises OSError or ValueError and nothing else, so that a caller says in one sentence what is to be done.
"""

from __future__ import annotations

import errno
import json
import stat
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
"""The formats that are decoded, by Pillow's name, with the suffixes of their files; README lists them, too.

Pillow knows some 40 more. Decoders that hardly anyone uses are where faults hide, and one of them runs Ghostscript.
"""


def check_regular(path: str | Path) -> None:
    """Check that reading a path will end: that it is no pipe, device, socket or folder.

    Raises:
        FileNotFoundError: There is none.
        OSError: It is no regular file.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is not UTF-8.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from None


def parse_json(text: str | bytes) -> Any:
    """Decode JSON.

    Raises:
        ValueError: It is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Decode a JSON file; raises as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path))


def read_object(path: Path, *, error: type[UserError], owner: str = "", step: str) -> dict[str, Any]:
    """Decode a JSON file that holds an object.

    Args:
        path: The file.
        error: Class of the error to raise.
        owner: Who asks, first in the message; empty for nobody.
        step: What the user can do, last in the message.

    Raises:
        UserError: It cannot be read, or it holds something else; of the class ``error``.
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
    """Encode as JSON that people can read: letters as they are, and escaped what a terminal could act on."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(sign if sign.isprintable() or sign == "\n" else json.dumps(sign)[1:-1] for sign in text)


def read_yaml(path: Path) -> Any:
    """Decode a YAML file without building anything that it names.

    Raises:
        OSError: See :func:`read_text`.
        ValueError: It is no YAML, names a key twice, or is nested too deeply.
    """
    try:
        return yaml.load(read_text(path), Loader=_OnceLoader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}{error.problem or first_line(error)}") from None
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _OnceLoader(_SafeLoader):  # type: ignore[misc]
    """Refuses a key that comes twice, where YAML's own loaders silently take the last."""

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
