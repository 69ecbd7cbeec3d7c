"""Shipped configurations, found by name: ``tove/tabletop`` is ``configs/tove/tabletop.yaml``, from any folder.

In a checkout they lie in ``configs/`` at its top, where they are read and edited; a wheel holds them in the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
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
    name, known = name_of(text), names()
    if name in known:
        return folder() / f"{name}{SUFFIX}"
    raise ConfigError(
        f"There is no configuration '{text}', neither a file nor a shipped one{_closest(name, known)}; correct it: "
        "`visexpert configs list` names those that are shipped."
    )


def find(text: str | Path) -> Path:
    """Return the file that ``--config`` means: one at the path, with or without ``.yaml``, else a shipped one.

    Args:
        text: A path or a name.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(text)
    given = next((each for each in (path, Path(f"{path}{SUFFIX}")) if each.is_file()), None)
    if given is not None:
        return given
    if path.exists() and name_of(text) not in names():
        return path  # a folder or a pipe: whoever reads it says so
    return shipped(text)


def in_arguments(arguments: Sequence[str]) -> list[str]:
    """Return arguments of the command line with the files that their ``--config`` means.

    Raises:
        ConfigError: A value of ``--config`` is neither a file nor the name of a shipped configuration.
    """
    return list(_resolved(arguments))


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
