"""A run's folder: one writer at a time, an earlier run in it, and the version that wrote it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from visexpert.errors import ConfigError, DataError
from visexpert.version import __version__

log = logging.getLogger(__name__)


@contextmanager
def hold(run: Path, phase: str | None = None) -> Iterator[None]:
    """Lock a run's folder, or the folder of a phase in it, against other processes by the file ``.lock``.

    The lock ends with the process, however that ends; the file stays. Without support of the file system there is no
    lock.

    Args:
        run: The run's folder; created if missing.
        phase: Name of the phase's folder; None for the run itself.

    Raises:
        ConfigError: Another process, or this one, already uses it.
        DataError: The folder cannot be written.
    """
    folder, name = (run, ".lock") if phase is None else (run / phase, f".{phase}.lock")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / name)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another visexpert process is writing into '{folder}'; wait until it has ended, or use another folder."
        ) from error
    except NotImplementedError:
        log.warning("%s is on a file system without locks: run only one process at a time there.", folder)
        yield
        return
    except OSError as error:
        raise DataError(f"Cannot write into {run} ({error.strerror}): use another folder.") from error
    try:
        yield
    finally:
        lock.release()


SIDECAR = "lmms.json"
"""File in a run's folder with the origin of the scores under ``lmms/``."""

OWN = (
    "config*.yaml",
    "environment.json",
    "metrics*.csv",
    "metrics*.json",
    "figures",
    "checkpoints",
    "hpc_ckpt_*.ckpt",
    "predictions*.jsonl",
    ".predictions.jsonl.part*",
    "skipped*.jsonl",
    "not_finite*.jsonl",
    SIDECAR,
)
"""Files and folders that a run writes, including its scores."""

PHASE_FACTS = ("merge.json", "detachment.json")
"""Files that mark the folder of a phase."""

PREVIOUS = "previous"


def holds_run(run: Path) -> bool:
    """Return whether a folder holds weights or metrics of a run, finished or not."""
    names = ("checkpoints/*.ckpt", "hpc_ckpt_*.ckpt", "metrics.csv", "metrics.json")
    return any(next(run.glob(name), None) is not None for name in names)


def set_run_aside(run: Path) -> Path:
    """Move everything that a run wrote, phases included, to ``previous.1`` (or ``.2``, ...) in its folder.

    Returns:
        The new folder, which is a run by itself.

    Raises:
        ConfigError: Another process is working on a phase of the run.
        DataError: The folder cannot be written.
    """
    number = 1
    while (kept := run / f"{PREVIOUS}.{number}").exists():
        number += 1
    found = {path for name in OWN for path in run.glob(name)}
    phases = {path.parent for name in PHASE_FACTS for path in run.glob(f"*/{name}")}
    with ExitStack() as held:
        for phase in phases:
            held.enter_context(hold(run, phase.name))
        try:
            kept.mkdir()
            for path in sorted(found | phases):
                path.rename(kept / path.name)
        except OSError as error:
            raise DataError(f"Cannot move the earlier run to {kept} ({error.strerror}): use another folder.") from error
    return kept


UNSTAMPED = "0.1"
"""The version whose runs carry no stamp."""

STAMP = "# visexpert=="
MADE_BESIDE = ("checkpoints", "environment.json", "metrics.json", "merge.json", "detachment.json")


def stamped(config: str) -> str:
    """Return a run's configuration with this version on its first line."""
    return f"{STAMP}{__version__}\n{config}"


def is_of_run(config: Path) -> bool:
    """Return whether a configuration is in a run's folder, which may come from anyone."""
    return config.is_file() and any((config.parent / name).exists() for name in MADE_BESIDE)


def version_of(config: Path) -> str | None:
    """Return the version of visexpert that wrote a configuration; None if no run wrote it.

    Args:
        config: A YAML file. In runs of version 0.1 the first line has Lightning's version; merged, detached and
            imported runs have none, but name their folder.
    """
    text = config.read_text(encoding="utf-8", errors="replace")
    first = text.partition("\n")[0].strip()
    if first.startswith(STAMP):
        return first.removeprefix(STAMP)
    written = first.startswith("# lightning.pytorch==")
    written |= is_of_run(config) and re.search(r"^run: ", text, flags=re.MULTILINE) is not None
    return UNSTAMPED if written else None


def blamed_on_version(error: ConfigError, configs: Iterable[Path]) -> ConfigError:
    """Return the error, or one that names the version if another version wrote a configuration.

    Args:
        error: Why the configurations cannot be read.
        configs: The configuration files, which exist.
    """
    for config in configs:
        theirs = version_of(config)
        if theirs is None or _series(theirs) == _series(__version__):
            continue
        age = "an earlier" if _series(theirs) < _series(__version__) else "a later"
        cause = str(error).removeprefix(f"{config}: ").partition("; ")[0].rstrip(".")
        return ConfigError(
            f"{config} was written by {age} version of visexpert ({theirs}), which this one ({__version__}) cannot "
            f"read ({cause}); train again, or use visexpert {theirs}."
        )
    return error


def _series(version: str) -> tuple[int, ...]:
    """Return major and minor number; runs stay readable within a series."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
