"""A run of the command line that is stopped in two processes and goes on in one."""

from __future__ import annotations

import os
import signal
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.two_processes import in_processes
from visexpert.cli import main
from visexpert.methods import ToVE

STEPS, EPOCH = 8, 4
"""Steps of the run and of an epoch: 36 scenes in steps of eight, of which four are left out."""

SIZES = ("--data.init_args.batch_size=4", "--data.init_args.global_batch_size=8", "--data.init_args.num_train=36")

Shown = list[tuple[int, list[int]]]
"""Step and rows of each batch of a process."""


def fit(rank: int, run: Path, processes: int, *options: str, stop: int | None = None) -> Shown:
    """What this process is shown; with ``stop``, the first one gets SIGTERM in that step."""
    shown: Shown = []
    step = ToVE.training_step

    def watched(self: ToVE, batch: Any, batch_idx: int) -> Any:
        shown.append((self.trainer.global_step, batch.index_B.tolist()))
        if self.trainer.global_step == stop and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    trainer: tuple[str, ...] = (
        f"--trainer.max_steps={STEPS}",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={processes}",
    )
    trainer += ("--trainer.val_check_interval=1.0", f"--trainer.strategy={'ddp' if processes > 1 else 'auto'}")
    with patch.object(ToVE, "training_step", watched):
        try:
            main(
                [
                    "fit",
                    "--config",
                    "tove/smoke",
                    "--run",
                    str(run),
                    "--test_after_fit=false",
                    *SIZES,
                    *trainer,
                    *options,
                ]
            )
        except SystemExit as end:
            assert stop is not None and end.code == 143
    return shown


@pytest.mark.long
def test_a_run_goes_on_in_one_process_with_the_images_that_two_had_left(tmp_path: Path) -> None:
    stopped = in_processes(2, fit, tmp_path, 2, stop=2)
    rest = fit(0, tmp_path, 1, "--ckpt_path=last")
    assert [number for number, _ in rest] == [number for number in range(3, STEPS) for _ in range(2)]
    rows: dict[int, list[int]] = {}
    for number, batch in chain(*stopped, rest):
        rows.setdefault(number, []).extend(batch)
    assert sorted(rows) == list(range(STEPS)) and all(len(step) == 8 for step in rows.values())
    for first in range(0, STEPS, EPOCH):
        epoch = [row for number in range(first, first + EPOCH) for row in rows[number]]
        assert len(set(epoch)) == len(epoch) == 32
