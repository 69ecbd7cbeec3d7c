"""The helper that runs a function in two processes: they are joined, and a failure is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.methods.helpers import bare_trainer
from tests.two_processes import in_two_processes


def joined(rank: int, folder: Path) -> tuple[float, int, int]:
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    trainer = bare_trainer(folder, steps=1, devices=2, strategy="ddp")
    return float(total), trainer.world_size, trainer.global_rank


def one_fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("the second stumbles")
    time.sleep(600)


def test_processes_are_joined_and_lightning_finds_them(tmp_path: Path) -> None:
    assert in_two_processes(joined, tmp_path) == [(3.0, 2, 0), (3.0, 2, 1)]


def test_the_failure_of_one_is_told_at_once_though_the_other_waits() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: (.|\n)*the second stumbles"):
        in_two_processes(one_fails)
