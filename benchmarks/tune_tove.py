"""Tune the rates and widths of configs/tove/tabletop/from-grounded.yaml: `python -m benchmarks.tune_tove`.

Settings are scored on the validation scenes; test scenes are not used. Prints a table; interrupted runs resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results_tove import BASE, GROUNDED_START
from benchmarks.runs import Run, add_arguments, execute
from visexpert.report import Column, ResultRow, describe_machine, markdown_table

SETTINGS: dict[str, dict[str, str]] = {
    "all: lr 2e-3, noise": {
        "optimizer.lr": "2e-3",
        "optimizer.gate_lr": "2e-3",
        "gate.noise": "fixed",
        "adapter_hidden": "64",
    },
    "all: lr 2e-3": {"optimizer.lr": "2e-3", "optimizer.gate_lr": "2e-3", "adapter_hidden": "64"},
    "all: lr 5e-3": {"optimizer.lr": "5e-3", "optimizer.gate_lr": "5e-3", "adapter_hidden": "64"},
    "all: lr 5e-3, wide": {"optimizer.lr": "5e-3", "optimizer.gate_lr": "5e-3", "adapter_hidden": "128"},
    "all: lr 1e-2": {"optimizer.lr": "1e-2", "optimizer.gate_lr": "1e-2", "adapter_hidden": "64"},
    "all: lr 1e-2, gate 1e-3": {"optimizer.lr": "1e-2", "optimizer.gate_lr": "1e-3", "adapter_hidden": "64"},
    "all: lr 2e-2, gate 2e-3": {"optimizer.lr": "2e-2", "optimizer.gate_lr": "2e-3", "adapter_hidden": "64"},
    "all: lr 1e-2, gate 2e-3, wide (chosen)": {
        "optimizer.lr": "1e-2",
        "optimizer.gate_lr": "2e-3",
        "adapter_hidden": "128",
    },
    "semantic: lr 5e-3": {"use": "[semantic]", "optimizer.lr": "5e-3", "adapter_hidden": "64"},
    "semantic: lr 1e-2": {"use": "[semantic]", "optimizer.lr": "1e-2", "adapter_hidden": "64"},
    "semantic: lr 1e-2, wide (chosen)": {"use": "[semantic]", "optimizer.lr": "1e-2", "adapter_hidden": "128"},
}
COLUMNS = [
    Column("val/nll/kind/dense", "dense NLL"),
    Column("val/vqa/accuracy", "VQA", digits=1, scale=100),
    Column("val/vqa/family/distance", "distance", digits=1, scale=100),
    Column("val/vqa/family/size", "size", digits=1, scale=100),
    Column("val/vqa/family/material", "material", digits=1, scale=100),
    Column("val/vsr/accuracy", "VSR", digits=1, scale=100),
    Column("val/pope/adversarial/accuracy", "POPE adv.", digits=1, scale=100),
]


def main() -> None:
    """Do the missing runs, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/tune-tove"), help="folder of the runs")
    options = parser.parse_args()
    runs = [
        Run(options.runs / f"{index}-seed{seed}", _arguments(settings, seed), seed, name)
        for index, (name, settings) in enumerate(SETTINGS.items())
        for seed in options.seeds
    ]
    execute(runs, jobs=options.jobs)
    rows = [ResultRow(run.variant, run.seed, 400, 0, 0.0, 0.0, run.metrics()) for run in runs if run.done]
    print(f"Machine: {describe_machine()}\n\n{markdown_table(rows, COLUMNS)}")


def _arguments(settings: dict[str, str], seed: int) -> tuple[str, ...]:
    overrides = [f"--model.init_args.{key}={value}" for key, value in settings.items()]
    start = ("--config", BASE, "--config", GROUNDED_START)
    return ("fit", *start, "--seed_everything", str(seed), "--test_after_fit", "false", *overrides)


if __name__ == "__main__":
    main()
