"""Commands in processes of their own that kill themselves: at the n-th change of a file, counted, not timed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkProcess

from visexpert.cli import main

FORK = multiprocessing.get_context("fork")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def start(arguments: list[str], act: Callable[[], None] | None = None) -> ForkProcess:
    """Start a command in a forked process, which needs no imports; ``act`` is called in it before."""

    def run() -> None:
        if act is not None:
            act()
        main(arguments)

    process = FORK.Process(target=run)
    process.start()
    return process


def run(arguments: list[str], *, at: int | None = None, signum: signal.Signals = signal.SIGKILL) -> int | None:
    """Run a command that is sent a signal before it changes a file for the ``at``-th time.

    Returns:
        Number of changes; of a command that a signal ended, its exit code, or None where it was killed.
    """
    counted = FORK.Value("i", 0)

    def count(event: str, given: tuple[object, ...]) -> None:
        if event not in CHANGES and not (event == "open" and _writes(given[2])):
            return
        counted.value += 1
        if counted.value == at:
            os.kill(os.getpid(), signum)

    process = start(arguments, lambda: sys.addaudithook(count))
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return None
    if process.exitcode == 128 + signum:
        return process.exitcode
    assert process.exitcode == 0, (arguments, process.exitcode)
    return int(counted.value)


def _writes(flags: object) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
