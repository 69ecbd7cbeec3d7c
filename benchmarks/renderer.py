"""Measure how many scenes per second the renderer of Tabletop produces.

Each process samples and renders its own scenes with one thread, as the render cache does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

import torch

from visexpert.report.machine import describe_machine
from visexpert.tabletop.render import render
from visexpert.tabletop.scenes import sample_scenes
from visexpert.tabletop.world import TabletopWorld

_CHUNK = 64


def main() -> None:
    """Print scenes per second for each image size and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--num_scenes", type=int, default=1024, help="scenes per measurement, over all processes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 64], help="image sizes, pixels")
    parser.add_argument("--num_processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    args = parser.parse_args()
    print(describe_machine())
    for size in args.sizes:
        for num_processes in args.num_processes:
            rate, cpu_rate = measure(args.num_scenes, size, num_processes)
            print(f"{size} px, {num_processes} process(es): {rate:.0f} scenes/s, {cpu_rate:.0f} per CPU second")


def measure(num_scenes: int, size: int, num_processes: int) -> tuple[float, float]:
    """Return scenes per second of wall time and per second of CPU time.

    Wall time runs from when all processes are ready until the last is done. The CPU rate is that of one process on an
    otherwise idle machine.
    """
    context = multiprocessing.get_context("spawn")
    barrier, cpu_seconds = context.Barrier(num_processes + 1), context.SimpleQueue()
    share = num_scenes // num_processes
    workers = [
        context.Process(target=_work, args=(barrier, cpu_seconds, share, size, rank * share))
        for rank in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    cpu = sum(cpu_seconds.get() for _ in workers)
    for worker in workers:
        worker.join()
    return share * num_processes / seconds, share * num_processes / cpu


def _work(barrier: Barrier, cpu_seconds: SimpleQueue[float], num: int, size: int, first: int) -> None:
    torch.set_num_threads(1)
    world = TabletopWorld(image_size=size)
    render(sample_scenes(_CHUNK, seed=1, world=world), size=size)  # warm up
    barrier.wait()
    start = time.process_time()
    for chunk in range(first, first + num, _CHUNK):
        scenes = sample_scenes(min(_CHUNK, first + num - chunk), seed=0, first=chunk, world=world)
        render(scenes, size=size)
    cpu_seconds.put(time.process_time() - start)
    barrier.wait()


if __name__ == "__main__":
    main()
