"""Run many commands in parallel, each resumable, in processes that share the import of torch."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tqdm.auto import tqdm

PRELOAD = ["visexpert.training", "visexpert.methods", "visexpert.data", "visexpert.experts", "visexpert.language"]


@dataclass(frozen=True)
class Run:
    """One `visexpert` command that ends with ``metrics.json`` in its folder.

    Args:
        folder: Folder of the run.
        arguments: Arguments of the command, without ``--run`` and ``--ckpt_path``.
        seed: Seed of the run.
        variant: Name in the table.
    """

    folder: Path
    arguments: tuple[str, ...]
    seed: int
    variant: str

    @property
    def done(self) -> bool:
        """Whether the run was scored."""
        return (self.folder / DONE).is_file()

    def metrics(self) -> dict[str, float]:
        """Return its final metrics."""
        loaded: dict[str, float] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return loaded


LIGHTNING = ("fit", "validate", "test")
"""Commands that take their folder with ``--run``."""

DONE = "done"
"""File that marks a finished run."""


def execute(runs: Sequence[Run], *, jobs: int) -> list[Run]:
    """Do the unfinished runs, ``jobs`` at a time; a failed run does not stop the others.

    Returns:
        Failed runs; their output is in ``log.txt`` of their folders.
    """
    todo = [run for run in runs if not run.done]
    os.environ["OMP_NUM_THREADS"] = "1"  # two one-thread processes beat one with two threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished, {len(todo)} to do, {jobs} at a time.", flush=True)

    def one(run: Run) -> Run | None:
        process = context.Process(target=_execute, args=(run,))
        process.start()
        process.join()
        return None if process.exitcode == 0 else run

    with ThreadPoolExecutor(jobs) as pool:
        failed = [run for run in tqdm(pool.map(one, todo), total=len(todo), unit="run") if run is not None]
    for run in failed:
        print(f"failed: {run.variant} seed {run.seed}, see {run.folder / 'log.txt'}", file=sys.stderr)
    return failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every results page has."""
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel (default: 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")


def slug(variant: str) -> str:
    """Return the name of a variant's folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in variant.lower()).replace("--", "-")


def run_here(run: Run) -> int:
    """Do one run in a child process, with its output in ``log.txt``; return the exit code as a shell does.

    SIGTERM and Ctrl-C are passed on to the child, which saves its work before it ends.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    process = multiprocessing.get_context("spawn").Process(target=_execute, args=(run,))

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if process.pid is not None:
            os.kill(process.pid, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in STOPS}
    try:
        process.start()
        process.join()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code


STOPS = (signal.SIGINT, signal.SIGTERM)
STOPPED = tuple(128 + signum for signum in STOPS)
"""Exit codes of a run that a signal stopped; it has not failed."""


def _execute(run: Run) -> None:
    """Redirect the output, do the run and mark it as done, in the child process."""
    import torch

    from visexpert.cli import main

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        started = time.time()
        last = run.folder / "checkpoints" / "last.ckpt"
        begin = ["--ckpt_path", str(last)] if last.is_file() else ["--overwrite"]  # it has no checkpoint yet
        resume = begin if run.arguments[0] == "fit" else []
        command, *others = run.arguments
        if command in LIGHTNING:
            # Behind the configurations: their own `run` would win over one before them.
            others = [*others, "--run", str(run.folder), *resume] if command == "fit" else [str(run.folder), *others]
        main([command, *others])
        (run.folder / DONE).write_text(f"{time.time() - started:.0f} s\n", encoding="utf-8")
