"""Measure a training step of each form of MoVE-KD, compared with plain fine-tuning on text.

    python -m benchmarks.movekd_step --forms no-mole recipe

Forms take turns in one process, in alternating order, so that a busy machine slows them all equally. Each round gives
the ratio of a form's time to that of the step on text; the table has the median and quartiles of these ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.ablations import base_of, overlays
from benchmarks.step_time import seconds_per_step
from visexpert.report import describe_machine
from visexpert.training import build_cli

FORMS = (
    "text-only",
    "no-kd",
    "no-mole",
    "geometry",
    "fixed-no-mole",
    "recipe",
    "base",
    "mole-dense",
    "paper-form",
    "encoder-only",
    "recipe-distil",
)
BESIDE = "text-only"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each form (default: 10)")
    parser.add_argument("--steps", type=int, default=8, help="steps per round (default: 8)")
    parser.add_argument("--forms", nargs="+", default=FORMS, help="ablations (default: the main rows)")
    options = parser.parse_args()
    forms = tuple(dict.fromkeys((BESIDE, *options.forms)))
    built = {name: _build(name) for name in forms}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in tqdm(range(options.rounds), desc="rounds"):
        for name in forms if number % 2 == 0 else forms[::-1]:
            seconds[name].append(seconds_per_step(*built[name], steps=options.steps, folder=Path("runs/movekd-step")))
    table = Table("form", "ms/step", "against text-only", "quartiles", title=describe_machine())
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds[BESIDE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = 1000 * statistics.median(values)
        table.add_row(name, f"{median:.0f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)


def _build(name: str) -> tuple[L.LightningModule, L.LightningDataModule]:
    files = [*base_of("movekd"), *overlays("movekd", name)]
    cli = build_cli([part for file in files for part in ("--config", str(file))], run=False)
    return cli.model, cli.datamodule


if __name__ == "__main__":
    main()
