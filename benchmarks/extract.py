"""Measure how well two processes share the filling of a feature store: ``python -m benchmarks.extract``.

Every round fills an empty store once with one worker and once with two, in an order that alternates. Workers have one
thread each; the clock runs from the moment when all of them are ready to the moment when the last one has all tokens.
Efficiency is the time of one worker over twice that of two, round by round, with quartiles; its budget is 0.9 at the
median. Run it on an idle machine with at least two cores: a third process takes from two workers what it does not take
from one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from visexpert.experts import FeatureCache
from visexpert.names import EncoderName
from visexpert.report.machine import describe_machine

LEAST = 0.9
SIZE, PATCH, WIDTH, LAYERS = 224, 16, 384, 12
"""A ViT-S/16 at 224 px."""


class NoiseImages:
    """Images of noise, each from its own seed."""

    def __init__(self, rows: int) -> None:
        self.rows, self.fingerprint = rows, f"noise-{rows}"

    def __len__(self) -> int:
        return self.rows

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return images (len(rows), 3, SIZE, SIZE), uint8."""
        generators = [torch.Generator().manual_seed(row) for row in rows]
        drawn = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=each) for each in generators]
        return torch.stack(drawn)


def encoder() -> nn.Module:
    """Return a transformer of the size of ViT-S/16, random but the same in every process."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    patches = nn.Sequential(nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.Flatten(2))
    return nn.ModuleDict(
        {"patches": patches, "blocks": nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)}
    ).eval()


def fill(rank: int, world: int, folder: str, images: int, ready: Barrier, times: Any) -> None:
    """Fill a store as one of ``world`` workers, and report when all of it was there."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    parts, grid = encoder(), (SIZE // PATCH, SIZE // PATCH)
    assert isinstance(parts, nn.ModuleDict)

    def encode(images_BCHW: Tensor) -> Tensor:
        tokens: Tensor = parts["blocks"](parts["patches"](images_BCHW).transpose(1, 2))
        return tokens

    # Ten shards for each of two workers, so that what one has left at the end is little.
    shard_mb = grid[0] * grid[1] * WIDTH * 2 * max(1, images // 20) / 1e6
    cache = FeatureCache(folder, shard_mb=shard_mb, batch_size=16)
    ready.wait()
    started = time.perf_counter()
    cache.prepare(
        EncoderName("expert", "vit"),
        "train",
        NoiseImages(images),
        fingerprint="benchmark",
        encode=encode,
        grid_hw=grid,
        width=WIDTH,
        device=torch.device("cpu"),
    )
    times.put(time.perf_counter() - started)


def seconds(world: int, images: int) -> float:
    """Return the time in which ``world`` workers fill an empty store."""
    spawn = multiprocessing.get_context("spawn")
    ready, times = spawn.Barrier(world), spawn.Queue()
    with TemporaryDirectory(prefix="visexpert-") as folder:
        work = [
            spawn.Process(target=fill, args=(rank, world, str(Path(folder) / "store"), images, ready, times))
            for rank in range(world)
        ]
        for worker in work:
            worker.start()
        longest = max(times.get(timeout=3600) for _ in work)
        for worker in work:
            worker.join()
    return longest


def main() -> None:
    """Time all rounds and print a table; exit with 1 if the efficiency is below its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="fillings with one and with two (default: %(default)s)")
    parser.add_argument("--images", type=int, default=640, help="images of a filling (default: %(default)s)")
    options = parser.parse_args()
    print(f"{describe_machine()}; {options.rounds} rounds of {options.images} images; ", end="")
    print(f"load before {os.getloadavg()[0]:.1f}\n", flush=True)
    taken: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(options.rounds):
        for world in (1, 2) if turn % 2 == 0 else (2, 1):
            taken[world].append(seconds(world, options.images))
    print("| workers | median s | fastest s | images/s | efficiency |")
    print("|---:|---:|---:|---:|---:|")
    shares = [one / (2 * two) for one, two in zip(taken[1], taken[2], strict=True)]
    low, efficiency, high = statistics.quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
    for world, times in taken.items():
        median = statistics.median(times)
        share = "1" if world == 1 else f"{efficiency:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {world} | {median:.2f} | {min(times):.2f} | {options.images / median:.1f} | {share} |")
    sys.exit(efficiency < LEAST)


if __name__ == "__main__":
    main()
