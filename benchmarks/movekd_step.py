"""What a step of MoVE-KD costs by form, beside one of plain fine-tuning by text.

    python -m benchmarks.movekd_step

Forms take turns in one process, so that a busy machine slows all of them alike; the table gives medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ablations import BASES, CONFIGS, overlays
from benchmarks.step_time import seconds_per_step
from visexpert.training import build_cli

FORMS = ("text-only", "no-kd", "no-mole", "fixed-no-mole", "base", "mole-dense", "paper-form", "encoder-only")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each form (default: 5)")
    parser.add_argument("--steps", type=int, default=10, help="steps per round (default: 10)")
    options = parser.parse_args()
    built = {name: _build(name) for name in FORMS}
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(options.rounds):
        for name, (model, data) in built.items():
            seconds[name].append(seconds_per_step(model, data, steps=options.steps, folder=Path("runs/movekd-step")))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("form", "ms/step", "against text-only", title=f"{torch.get_num_threads()} thread(s)")
    for name, value in median.items():
        table.add_row(name, f"{1000 * value:.0f}", f"{value / median['text-only']:.2f}")
    Console().print(table)


def _build(name: str) -> tuple[L.LightningModule, L.LightningDataModule]:
    files = [*(CONFIGS / file for file in BASES["movekd"]), *overlays("movekd", name)]
    cli = build_cli([part for file in files for part in ("--config", str(file))], run=False)
    return cli.model, cli.datamodule


if __name__ == "__main__":
    main()
