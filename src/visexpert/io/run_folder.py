"""A run's folder: one writer at a time, an earlier run in it, and the version that wrote it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from visexpert import __version__
from visexpert.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@contextmanager
def hold(run: Path, phase: str | None = None) -> Iterator[None]:
    """Keep other processes out of a run's folder, or out of one phase's folder in it, by the file ``.lock``.

    The lock ends with the process, however that ends; the file stays. A file system that knows no locks gets none.

    Args:
        run: The run's folder; made where it is not there.
        phase: Name of the phase's folder; None for the run itself.

    Raises:
        ConfigError: Another process, or this one, works there already.
        DataError: The folder cannot be written.
    """
    folder, name = (run, ".lock") if phase is None else (run / phase, f".{phase}.lock")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / name)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another visexpert process is writing into '{folder}'; wait until it has ended, or name another folder."
        ) from error
    except NotImplementedError:
        log.warning("%s lies on a file system without locks: let one process at a time write there.", folder)
        yield
        return
    except OSError as error:
        raise DataError(f"Cannot write into {run} ({error.strerror}): name another folder.") from error
    try:
        yield
    finally:
        lock.release()


SIDECAR = "lmms.json"
"""File of a run's folder that says where the scores under ``lmms/`` come from."""

OWN = (
    "config*.yaml",
    "environment.json",
    "metrics*.csv",
    "metrics*.json",
    "figures",
    "checkpoints",
    "hpc_ckpt_*.ckpt",
    "predictions*.jsonl",
    "skipped*.jsonl",
    "not_finite*.jsonl",
    SIDECAR,
)
"""What a run writes, and what is stored of its scores."""

PHASE_FACTS = ("merge.json", "detachment.json")
"""A folder that holds one of these is that of a phase."""

PREVIOUS = "previous"


def holds_run(run: Path) -> bool:
    """Whether a folder holds weights or measurements of a run, finished or begun."""
    names = ("checkpoints/*.ckpt", "hpc_ckpt_*.ckpt", "metrics.csv", "metrics.json")
    return any(next(run.glob(name), None) is not None for name in names)


def set_run_aside(run: Path) -> Path:
    """Move all that a run wrote, phases included, to ``previous.1`` (or ``.2``, ...) in its folder; leave the rest.

    Returns:
        The new folder, a run of its own.

    Raises:
        ConfigError: Another process works on a phase of it.
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
            raise DataError(f"Cannot move the earlier run to {kept} ({error.strerror}): name another.") from error
    return kept


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
