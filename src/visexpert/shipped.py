"""Shipped configurations, found by name: ``tove/tabletop`` is ``configs/tove/tabletop.yaml``, from any folder.

In a checkout they lie in ``configs/`` at its top, where they are read and edited; a wheel holds them in the package.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from visexpert.errors import ConfigError

FOLDER = "configs"
SUFFIX = ".yaml"
OPTIONS = ("--config", "-c")
"""Options of the command line whose value is a configuration."""

CLOSEST = 3
"""How many names are offered in place of one that does not exist."""


def folder() -> Path:
    """Return the folder of the shipped configurations.

    Raises:
        ConfigError: The installation holds none.
    """
    package = Path(__file__).parent
    inside, beside = package / FOLDER, package.parents[1] / FOLDER
    if inside.is_dir():
        return inside
    if package.parent.name == "src" and beside.is_dir():  # a checkout, installed as editable or on the path
        return beside
    raise ConfigError(f"visexpert's own configurations are not in {inside}; install the package again.")


def names() -> list[str]:
    """Return the names of all shipped configurations, such as ``tove/tabletop``, in order."""
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob(f"*{SUFFIX}"))


def name_of(text: str | Path) -> str:
    """Return the name that a text means: ``tove/tabletop`` for ``configs/tove/tabletop.yaml``."""
    return Path(text).as_posix().removeprefix(f"{FOLDER}/").removesuffix(SUFFIX)


def shipped(text: str | Path) -> Path:
    """Return the file of a shipped configuration.

    Args:
        text: Its name, with or without ``.yaml``, or with ``configs/`` before it.

    Raises:
        ConfigError: There is none of that name; the closest are named.
    """
    name = name_of(text)
    if _is_shipped(name):
        return folder() / f"{name}{SUFFIX}"
    raise ConfigError(
        f"There is no configuration '{text}', neither a file nor a shipped one{_closest(name, names())}; correct it: "
        "`visexpert configs list` names those that are shipped."
    )


def find(text: str | Path) -> Path:
    """Return the file that ``--config`` means: one at the path, with or without ``.yaml``, else a shipped one.

    Args:
        text: A path or a name.

    Raises:
        ConfigError: There is neither, or the text is empty.
    """
    if not str(text):
        raise ConfigError("--config is empty; name a YAML file, or one of `visexpert configs list`.")
    path = Path(text)
    given = next((each for each in (path, Path(f"{path}{SUFFIX}")) if each.is_file()), None)
    if given is not None:
        return given
    if path.exists() and not _is_shipped(name_of(text)):
        return path  # a folder or a pipe: whoever reads it says so
    return shipped(text)


def shown(path: str | Path) -> str:
    """Return what to type for a file: its name where it is a shipped one, else its path."""
    root = folder()
    return Path(path).relative_to(root).with_suffix("").as_posix() if Path(path).is_relative_to(root) else str(path)


def header_of(path: Path) -> list[str]:
    """Return the comment lines at the head of a configuration, without their mark.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not UTF-8.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line[1:].strip() for line in lines[:end]]


def summary_of(path: Path) -> str:
    """Return the first sentence of a header, without its full stop; empty without a header."""
    lines = header_of(path)
    end = next((number for number, line in enumerate(lines) if not line), len(lines))
    sentence = re.match(r"(.*?)(?:[.:]$|\.\s(?=[A-Z])|$)", " ".join(lines[:end]))
    return sentence[1] if sentence else ""


def commands_of(path: Path) -> list[list[str]]:
    """Return the words of each command in a header.

    Raises:
        OSError, ValueError: See :func:`header_of`.
    """
    text = "\n".join(header_of(path)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("visexpert ")]


def configs_in(words: Sequence[str]) -> list[str]:
    """Return the configurations that a command names."""
    return [value for option, value in pairwise(words) if option in OPTIONS]


def layers_of(path: Path) -> list[list[str]]:
    """Return the configurations of each command in a header, as they are written there, in their order.

    A header that has no command, but says ``Over A, B.``, means those, then the file itself.

    Raises:
        OSError, ValueError: See :func:`header_of`.
    """
    commands = commands_of(path)
    layers = [configs_in(words) for words in commands]
    text = "\n".join(header_of(path)).replace("\\\n", " ")
    over = re.search(rf"^Over (.*?{re.escape(SUFFIX)}'?)\.$", text, flags=re.MULTILINE | re.DOTALL)
    if not commands and over:
        layers = [[*(word.strip(",") for word in shlex.split(over[1])), str(path)]]
    return [files for files in layers if files]


def companions(name: str) -> list[str]:
    """Return the names of the configurations that the commands in a header use, the file itself first.

    Args:
        name: Of a shipped configuration.
    """
    layers = layers_of(shipped(name))
    return list(dict.fromkeys([name, *(name_of(shown(each)) for files in layers for each in files)]))


def in_arguments(arguments: Sequence[str]) -> list[str]:
    """Return arguments of the command line with the files that their ``--config`` means.

    Raises:
        ConfigError: A value of ``--config`` is neither a file nor the name of a shipped configuration.
    """
    return list(_resolved(arguments))


def _is_shipped(name: str) -> bool:
    parts = Path(name).parts
    return ".." not in parts and not Path(name).is_absolute() and (folder() / f"{name}{SUFFIX}").is_file()


def _resolved(arguments: Sequence[str]) -> Iterator[str]:
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if before in OPTIONS:
            yield str(find(argument))
            before = ""
            continue
        yield f"{option}={find(value)}" if equals and option in OPTIONS else argument
        before = argument


def _closest(name: str, known: Sequence[str]) -> str:
    """Say which names are like one, in whole or in their last part; empty where none is."""
    last = {each.rpartition("/")[2]: each for each in reversed(known)}
    like = difflib.get_close_matches(name, known, CLOSEST)
    like += [last[each] for each in difflib.get_close_matches(name.rpartition("/")[2], last, CLOSEST)]
    offered = list(dict.fromkeys(like))[:CLOSEST]
    return f" (closest: {', '.join(offered)})" if offered else ""
