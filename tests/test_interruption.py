"""Signals: deferred during a step, at once elsewhere, the second one final, and none of a child's business."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from visexpert import interruption
from visexpert.interruption import Interrupted, check, defer, received, stoppable


def test_a_signal_waits_while_a_step_is_under_way() -> None:
    with pytest.raises(Interrupted, match="SIGTERM; again") as stopped, stoppable(go_on="again"):
        defer(True)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher: the same one
        assert received() == signal.SIGTERM
        check()
    assert stopped.value.exit_code == 143
    assert received() is None


def test_elsewhere_it_acts_at_once_and_a_silent_exit_is_named() -> None:
    with pytest.raises(Interrupted) as stopped, stoppable(go_on=""):
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130
    with pytest.raises(Interrupted), stoppable(go_on=""):
        defer(True)
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit  # Lightning's answer
    with pytest.raises(SystemExit), stoppable(go_on=""):
        raise SystemExit


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process(signum: int) -> None:
    code = (
        "import os, time\nfrom visexpert import interruption as i\ni.SAME_SIGNAL_S = 0\nwith i.stoppable(go_on=''):\n"
        f"    i.defer(True)\n    os.kill(os.getpid(), {int(signum)})\n    time.sleep(0.01)\n"
        f"    print('first', flush=True)\n    os.kill(os.getpid(), {int(signum)})\n    print('second', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signum, "first\n")


def test_a_forked_child_leaves_ctrl_c_to_its_parent_and_dies_of_sigterm() -> None:
    with stoppable(go_on=""):
        child = os.fork()
        if child == 0:  # as a data worker
            time.sleep(60)
            os._exit(7)
        os.kill(child, signal.SIGINT)
        time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert interruption.received() is None
