"""Signals that end a run: SIGTERM and Ctrl-C stop it between two steps, its work saved, and are named by the exit code.

The handlers set a flag while a training step is under way (:func:`defer`), which a callback answers at the end of the
step; at any other time they raise :class:`Interrupted` at once. A second signal ends the process there and then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME_SIGNAL_S = 0.5
"""A signal that comes again so soon is the same one: launchers pass on what the whole process group was sent."""


class Interrupted(BaseException):
    """A signal has ended the run; no error, so that nothing but the command line answers it.

    Args:
        signum: The signal.
        sentence: What a user should know: what is saved and how to go on.
    """

    def __init__(self, signum: int, sentence: str = "") -> None:
        self.signum = signum
        super().__init__(sentence or f"Stopped by {self.name}{hint()}.")

    @property
    def name(self) -> str:
        """Name of the signal, such as ``SIGTERM``."""
        return signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int:
        """What shells report for a process that this signal has ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


@dataclass
class _State:
    """Of this process.

    Args:
        go_on: How to continue what was stopped, as the end of a sentence.
        process: The process whose handlers these are; its forked children inherit them.
        received: The first signal.
        at: When the last one came, in seconds.
        deferred: Whether a step is under way.
    """

    go_on: str = ""
    process: int = field(default_factory=os.getpid)
    received: int | None = None
    at: float = 0.0
    deferred: bool = False


_state: _State | None = None


@contextmanager
def stoppable(*, go_on: str) -> Iterator[None]:
    """Handle the signals in here; in other threads than the main one, and inside another of its kind, change nothing.

    Args:
        go_on: How a user continues what was stopped, as the end of a sentence.

    Raises:
        Interrupted: A signal came and no step is under way.
    """
    global _state
    if _state is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _state = _State(go_on)
    try:
        for signum in SIGNALS:
            signal.signal(signum, _handle)
        yield
    except SystemExit as ended:  # Lightning's own answer to a signal, which has exit code 0
        if _state.received is None:
            raise
        raise Interrupted(_state.received) from ended
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _state = None


def received() -> int | None:
    """The signal that asks this process to stop, or None."""
    return None if _state is None else _state.received


def hint() -> str:
    """How to continue, to be put behind what was stopped; empty where nothing is known."""
    return "" if _state is None or not _state.go_on else f"; {_state.go_on}"


def check() -> None:
    """Stop here if a signal asked for it; from here on, signals act at once.

    Raises:
        Interrupted: A signal was received.
    """
    defer(False)
    signum = received()
    if signum is not None:
        raise Interrupted(signum)


def reclaim() -> None:
    """Take the signals back, inside :func:`stoppable`, from handlers that were put around ours.

    Lightning's own for SIGTERM broadcasts from within the handler, at whatever point each process is: those that are in
    another collective, or got no signal, then wait for each other without end.
    """
    if _state is not None and threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, _handle)


def defer(deferred: bool) -> None:
    """Say whether work is under way that stops by itself at the next good moment once a signal is :func:`received`."""
    if _state is not None:
        _state.deferred = deferred


def _handle(signum: int, frame: FrameType | None) -> None:
    state = _state
    if state is None or os.getpid() != state.process:
        _answer_in_child(signum)
        return
    now = time.monotonic()
    if state.received is None:
        state.received, state.at = signum, now
        if not state.deferred:
            raise Interrupted(signum)
    elif now - state.at > SAME_SIGNAL_S:
        _end(signum)


def _answer_in_child(signum: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the parent; die of SIGTERM, which the parent sends."""
    if signum == signal.SIGTERM:
        _end(signum)


def _end(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
