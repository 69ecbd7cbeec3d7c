"""One writer at a time in a run's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

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
