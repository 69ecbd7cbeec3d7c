"""Which version of visexpert wrote a run, and what is said of a run that this version cannot read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from visexpert import __version__
from visexpert.errors import ConfigError

UNSTAMPED = "0.1"
"""The version whose runs do not say which one wrote them."""

STAMP = "# visexpert=="
MADE_BESIDE = ("checkpoints", "environment.json", "metrics.json", "merge.json", "detachment.json")


def stamped(config: str) -> str:
    """Return the text of a run's configuration with this version on its first line."""
    return f"{STAMP}{__version__}\n{config}"


def is_of_run(config: Path) -> bool:
    """Tell whether a configuration lies in a run's folder, which may be anyone's."""
    return config.is_file() and any((config.parent / name).exists() for name in MADE_BESIDE)


def version_of(config: Path) -> str | None:
    """Return the version of visexpert that wrote a configuration, or None for a file that no run wrote.

    Args:
        config: A YAML file. Runs of version 0.1 have Lightning's version on the first line; their merged, detached and
            imported ones have none, but name their folder.
    """
    text = config.read_text(encoding="utf-8", errors="replace")
    first = text.partition("\n")[0].strip()
    if first.startswith(STAMP):
        return first.removeprefix(STAMP)
    written = first.startswith("# lightning.pytorch==")
    written |= is_of_run(config) and re.search(r"^run: ", text, flags=re.MULTILINE) is not None
    return UNSTAMPED if written else None


def blamed_on_version(error: ConfigError, configs: Iterable[Path]) -> ConfigError:
    """Return the error, or one that names the version where another one wrote a configuration.

    Args:
        error: Why the configurations cannot be read.
        configs: Their files, which are there.
    """
    for config in configs:
        theirs = version_of(config)
        if theirs is None or _series(theirs) == _series(__version__):
            continue
        age = "an earlier" if _series(theirs) < _series(__version__) else "a later"
        cause = str(error).removeprefix(f"{config}: ").partition("; ")[0].rstrip(".")
        return ConfigError(
            f"{config} was written by {age} version of visexpert ({theirs}), whose runs this one ({__version__}) does "
            f"not read ({cause}); train anew, or use visexpert {theirs}."
        )
    return error


def _series(version: str) -> tuple[int, ...]:
    """Major and minor number: within them runs stay readable."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
