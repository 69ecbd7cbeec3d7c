"""Run a function in some processes that are joined by gloo, as `torchrun --nproc-per-node N` would on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch.distributed as dist

P = ParamSpec("P")
Result = TypeVar("Result")

LIMIT_S = 300.0
"""What takes longer hangs: one process waits for what another never sends."""

_processes = multiprocessing.get_context("forkserver")
# Imported once, in a process of its own that nothing was trained in: autograd survives no fork of one that trained.
_processes.set_forkserver_preload(["tests.preload"])


def in_two_processes(
    work: Callable[Concatenate[int, P], Result], *arguments: P.args, **named: P.kwargs
) -> list[Result]:
    """What ``work(rank, ...)`` returns on rank 0 and on rank 1; see :func:`in_processes`."""
    return in_processes(2, work, *arguments, **named)


def in_processes(
    count: int, work: Callable[Concatenate[int, P], Result], *arguments: P.args, **named: P.kwargs
) -> list[Result]:
    """What ``work(rank, ...)`` returns on each rank.

    A ``Trainer(accelerator="cpu", devices=count, strategy="ddp")`` in it finds the processes and joins them; any
    number of them may run one after another. The first call costs the imports, later ones a second.

    Args:
        count: Number of processes.
        work: A function of a module, since processes are given its name.
        arguments: What it gets beside its rank; must pickle.
        named: Likewise.

    Raises:
        AssertionError: A process failed, hangs or died; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_processes.Pipe(duplex=False) for _ in range(count)]
        task = (count, Path(folder) / "rendezvous", dict(os.environ), work, arguments, named)
        started = [
            _processes.Process(target=_child, args=(sender, rank, *task)) for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(started, pipes, strict=True):
            process.start()
            sender.close()
        try:
            return _results([receiver for receiver, _ in pipes])
        finally:
            for process in started:
                process.kill()
                process.join()


def _results(receivers: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout=LIMIT_S)
        assert ready, f"the processes gave nothing for {LIMIT_S:.0f} s"
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                result, error = pickle.loads(receiver.recv_bytes())
            except EOFError:
                result, error = None, "it died"
            assert error is None, f"rank {rank}: {error}"
            results[rank] = result
    return [results[rank] for rank in range(len(receivers))]


def _child(
    sender: Connection,
    rank: int,
    count: int,
    rendezvous: Path,
    environment: dict[str, str],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    """One of them; Lightning takes LOCAL_RANK for the sign that it need not start others."""
    os.environ.update(environment)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(count), OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
        result = work(rank, *arguments, **named)
        dist.barrier()
        _send(sender, result, None)
    except BaseException:
        _send(sender, None, traceback.format_exc())


def _send(sender: Connection, result: Any, error: str | None) -> None:
    sender.send_bytes(pickle.dumps((result, error)))  # a pipe's own way with tensors needs their sender alive
