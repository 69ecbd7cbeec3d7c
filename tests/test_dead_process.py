"""One of two processes dies or hangs in a fit: the other ends within a minute, with a sentence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

ROOT = Path(__file__).parents[1]


class Ends(L.Callback):
    """Sends itself a signal on the second process, in the third step.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), self.signum)


def overlay(signum: int) -> dict[str, Any]:
    """Steps without end, and ten seconds to wait for the other process."""
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"timeout": "0:00:10", "process_group_backend": "gloo"},
    }
    callback = {"class_path": f"{__name__}.Ends", "init_args": {"signum": int(signum)}}
    return {"trainer": {"strategy": strategy, "devices": 2, "max_steps": 10_000, "callbacks": [callback]}}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the processes talk over lo")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_the_process_that_is_left_ends_with_a_sentence(tmp_path: Path, signum: signal.Signals) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(overlay(signum)), encoding="utf-8")
    command = [sys.executable, "-m", "visexpert.cli", "fit", "--config", "tove/smoke", "--config", str(config)]
    group = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as ends:
        processes = []
        for rank in range(2):
            environment = {**os.environ, **group, "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
            process = subprocess.Popen(
                [*command, "--run", str(tmp_path / "run")],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            ends.callback(process.wait)
            ends.callback(process.kill)
            processes.append(process)
        _, told = processes[0].communicate(timeout=300)
    assert processes[0].returncode == 2
    (line,) = (line for line in told.splitlines() if line.startswith("visexpert: "))
    assert "Another process of this run has died, hangs or cannot be reached" in line
    assert "--ckpt_path last" in line and "gloo" not in line
