"""Measure a merging step for each kind of loss, and compare the cost of the merged CLIP with that of the original.

    python -m benchmarks.merge_step runs/tove

Kinds take turns in one process, so that a busy machine slows them all equally; the table gives medians and ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.step_time import seconds_per_step
from visexpert.methods import MergeSettings, Merging, MergingOptimizer, ToVE
from visexpert.methods.cost import first_images, measure_cost
from visexpert.runs import load_run

TOKENS, TEXT, BOTH = MergeSettings(), MergeSettings(token_weight=0.0, lm_weight=1.0), MergeSettings(lm_weight=0.33)
FROZEN, TRAINED = MergingOptimizer(), MergingOptimizer(language_lr=1e-3)
KINDS = {
    "tokens": (TOKENS, FROZEN),
    "tokens, LoRA": (MergeSettings(adaptation="lora"), FROZEN),
    "text, decoder frozen": (TEXT, FROZEN),
    "text, decoder trained": (TEXT, TRAINED),
    "tokens + text, decoder frozen": (BOTH, FROZEN),
    "tokens + text, decoder trained": (BOTH, TRAINED),
}


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of ToVE with experts")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each kind (default: 7)")
    parser.add_argument("--steps", type=int, default=10, help="steps per round (default: 10)")
    options = parser.parse_args()
    saved = load_run(options.run)
    assert isinstance(saved.model, ToVE)
    students = {
        name: Merging(teacher=saved.model, merging=merging, optimizer=optimizer)
        for name, (merging, optimizer) in KINDS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in students}
    for _ in range(options.rounds):
        for name, student in students.items():
            seconds[name].append(
                seconds_per_step(student, saved.data, steps=options.steps, folder=Path("runs/merge-step"))
            )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("loss", "ms/step", "against tokens", title=f"{torch.get_num_threads()} thread(s)")
    for name, value in median.items():
        table.add_row(name, f"{1000 * value:.0f}", f"{value / median['tokens']:.2f}")
    Console().print(table)
    _costs(saved.model, students["tokens"], saved.data)


def _costs(teacher: ToVE, student: Merging, data: L.LightningDataModule) -> None:
    data.setup("fit")
    batch = first_images(next(iter(data.val_dataloader())), 32)
    original = ToVE(clip=teacher.clip, experts={}, language=teacher.language)
    original.projector = teacher.projector
    merged = student.merged()
    models = {"CLIP": original, "merged CLIP": merged, "ToVE": teacher}
    costs = {name: measure_cost(model.eval(), batch) for name, model in models.items()}
    same = {k: v.shape for k, v in merged.clip.state_dict().items()} == {
        k: v.shape for k, v in teacher.clip.state_dict().items()
    }
    table = Table("vision side", "GFLOP/image", "images/s", "parameters at inference")
    for name, cost in costs.items():
        row = (f"{cost['gflop_vision']:.4f}", f"{cost['images_per_s']:.0f}", f"{cost['parameters_inference']:.0f}")
        table.add_row(name, *row)
    Console().print(table)
    Console().print(f"State-dict keys and shapes of both CLIPs are {'the same' if same else 'NOT the same'}.")


if __name__ == "__main__":
    main()
