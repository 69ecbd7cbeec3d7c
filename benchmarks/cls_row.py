"""Measure what the [CLS] row of attention costs beside the plain encoder: ``python -m benchmarks.cls_row --clock cpu``.

Both run a CLIP-L/336 with random weights, without gradients, in turns that alternate; the ratio is the median over
rounds of the time with the row divided by the time without, in the same round.
"""

from __future__ import annotations

import argparse
import datetime
import statistics

import torch

from benchmarks.stage1_step import CLIP_L, CLOCKS
from visexpert.report.machine import describe_machine
from visexpert.vision import ClipEncoder


@torch.no_grad()
def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds, at least 2 (default: 9)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default), or cpu for a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = ClipEncoder(config=dict(CLIP_L), layer=-2).eval()
    images = torch.rand(options.batch, 3, encoder.image_size, encoder.image_size)
    forms = {"encoder": encoder, "encoder and row": encoder.attend}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    clock = CLOCKS[options.clock]
    for turn in range(options.rounds + 1):
        for name in forms if turn % 2 else reversed(list(forms)):
            start = clock()
            forms[name](images)
            if turn:
                seconds[name].append(clock() - start)
    print(f"{describe_machine()}; {datetime.date.today()}, {options.rounds} rounds, {options.clock} time.\n")
    print("| form | s | ratio (quartiles) |")
    print("|---|---:|---:|")
    for name, own in seconds.items():
        low, middle, high = statistics.quantiles((a / b for a, b in zip(own, seconds["encoder"], strict=True)), n=4)
        print(f"| {name} | {statistics.median(own):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
