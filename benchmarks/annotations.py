"""Time and memory of opening a million LLaVA records: without an index, while it is made, and from it.

    python -m benchmarks.annotations

Each opening runs in a process of its own, whose memory is the unique set size (USS) over that before the opening; the
peak is the resident set's. The records are generated: two or three turns of some 90 words each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from pathlib import Path

from visexpert.data import LLaVAInstruct, index

OPENINGS = ("into memory", "first (makes the index)", "second", "third")


def write_records(path: Path, number: int) -> None:
    """Write a JSON list of conversations, of which every eighth has no image."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for row in range(number):
            turns = [
                {"from": ("human", "gpt")[turn % 2], "value": " ".join(rng.choices(words, k=rng.randint(8, 40)))}
                for turn in range(2 * rng.randint(2, 3))
            ]
            record = {"id": f"{row:09d}", "conversations": turns}
            if row % 8:
                record["image"] = f"coco/train2017/{row:012d}.jpg"
            file.write(("[" if row == 0 else ",\n") + json.dumps(record))
        file.write("]")


def unique_set_size() -> int:
    """Return the bytes of memory that this process shares with no other (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def opened(root: Path, least: int) -> tuple[float, float, float]:
    """Open the records and their order; return seconds, MB over the base, and MB at the peak."""
    index.INDEX_FROM = least
    base, start = unique_set_size(), time.perf_counter()
    data = LLaVAInstruct(root=str(root), annotations="chat.json", num_workers=0, resize="pad")
    data.open("train")
    order = data.order("train")
    assert order is not None
    rows = order(0)
    seconds = time.perf_counter() - start
    assert all(data.table("train")[int(row)].items for row in rows[:1000])
    used = unique_set_size() - base
    return seconds, used / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print one line per opening."""
    parser = argparse.ArgumentParser(description="Time and memory of opening many records.")
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N", help="records (default: 1000000)")
    records: int = parser.parse_args().records
    with tempfile.TemporaryDirectory(prefix="visexpert-annotations-") as folder:
        os.environ["VISEXPERT_CACHE"] = str(Path(folder, "cache"))
        path = Path(folder, "chat.json")
        write_records(path, records)
        print(f"{records:,} records, {path.stat().st_size / 1e6:,.0f} MB")
        context = multiprocessing.get_context("spawn")
        for number, opening in enumerate(OPENINGS):
            with context.Pool(1) as pool:
                seconds, used, peak = pool.apply(opened, (Path(folder), 0 if number else 2**62))
            print(f"{opening:<24} {seconds:6.1f} s {used:8,.0f} MB over the base, peak {peak:8,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
