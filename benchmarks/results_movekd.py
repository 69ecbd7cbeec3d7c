"""MoVE-KD on Tabletop, measured: `make results-movekd` runs this and writes docs/results/movekd-tabletop.{md,json}.

Every student starts from the shipped CLIP and reads through the shipped language side. Main rows train 2000 steps,
ablations 500, all rows of a table alike. Every run is resumable and a finished one is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runs import Run, add_arguments, execute, slug

BASE = ("configs/movekd/tabletop-stage2.yaml", "configs/movekd/one-stage.yaml")
OVERLAYS = Path("configs/movekd/ablations")
OUT = Path("docs/results")
STEPS, ABLATION_STEPS = 2000, 500
TIME_RATIO = 1.6
"""Time of a step with heads and MoLE over one by text alone, by `python -m benchmarks.movekd_step`."""

RATE, RATE_WITHOUT_KD = "6e-3", "3e-3"
"""Of the student, with and without KD: each the best on validation scenes of seed 0 (benchmarks/tune_movekd.py)."""

TEXT_ONLY, KD_MOLE = "text only", "KD + MoLE (base)"
EQUAL_TIME = f"text only, equal time ({round(STEPS * TIME_RATIO)} steps)"


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Args:
        overlays: Files of configs/movekd/ablations, without .yaml, in order.
        settings: Further settings of the model, ``name=value``.
        steps: Optimiser steps; None for those of its table.
    """

    overlays: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    steps: int | None = None


MAIN = {
    TEXT_ONLY: Variant(("no-mole", "no-kd")),
    KD_MOLE: Variant(),
    "KD, no MoLE": Variant(("no-mole",)),
    EQUAL_TIME: Variant(("no-mole", "no-kd"), steps=round(STEPS * TIME_RATIO)),
    "MoLE, no KD": Variant(("no-kd",)),
    "KD + MoLE, published form, paper": Variant(("paper-form",)),
    "KD + MoLE, published form, released": Variant(("paper-form", "released-form")),
}
ABLATIONS = {
    TEXT_ONLY: Variant(("no-mole", "no-kd")),
    KD_MOLE: Variant(),
    "KD, no MoLE": Variant(("no-mole",)),
    "one LoRA of the same size": Variant(("one-lora",)),
    "router scaled": Variant(("mole-scaled",)),
    "router straight-through": Variant(("mole-straight-through",)),
    "dense routing": Variant(("mole-dense",)),
    "MoLE's init released": Variant(("mole-released-init",)),
    "direction to_student": Variant(("to-student",)),
    "direction fixed": Variant(("fixed",)),
    "CLIP at .8": Variant(("anchor-high",)),
    "CLIP no teacher": Variant(("no-anchor",)),
    "token weights by attention": Variant(("attention-tokens",)),
    "published form": Variant(("paper-form",)),
    "published form, uniform teachers": Variant(("paper-form", "uniform-teachers")),
    "published form, uniform tokens": Variant(("paper-form", "uniform-tokens")),
    "published form, both uniform": Variant(("paper-form", "uniform")),
    "semantic alone": Variant(("teacher-semantic",)),
    "depth alone": Variant(("teacher-depth",)),
    "normals alone": Variant(("teacher-normals",)),
    "edges alone": Variant(("teacher-edges",)),
    "segmentation alone": Variant(("teacher-segmentation",)),
    "no language model": Variant(("encoder-only",)),
}
"""Beside the base unless a row says otherwise."""


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/results-movekd"), help="folder of the runs")
    parser.add_argument("--only", default="", help="run only variants whose folder holds this")
    options = parser.parse_args()
    runs = runs_of(options.runs, options.seeds)
    execute([run for run in runs if options.only in str(run.folder)], jobs=options.jobs)


def runs_of(root: Path, seeds: Sequence[int]) -> list[Run]:
    """All runs, main rows first, seed by seed, so that a cut leaves whole comparisons."""
    tables = (("main", MAIN, STEPS), ("ablation", ABLATIONS, ABLATION_STEPS))
    return [
        run_of(root, table, name, variant, seed, variant.steps or steps)
        for table, variants, steps in tables
        for seed in seeds
        for name, variant in variants.items()
    ]


def run_of(root: Path, table: str, name: str, variant: Variant, seed: int, steps: int) -> Run:
    """One run of a table."""
    files = [*BASE, *(str(OVERLAYS / f"{overlay}.yaml") for overlay in variant.overlays)]
    rate = RATE_WITHOUT_KD if "no-kd" in variant.overlays else RATE
    settings = [f"clip_lr={rate}", f"mole_lr={rate}", "language_lr=1e-3", *variant.settings, "meteor=false"]
    if table == "ablation":
        settings.append("caption_images=0")
    arguments = (
        "fit", *(part for file in files for part in ("--config", file)),
        *(f"--model.init_args.{setting}" for setting in settings),
        "--trainer.max_steps", str(steps), "--trainer.val_check_interval", "500",
        "--seed_everything", str(seed), "--data.init_args.seed", "0",
    )  # fmt: skip
    return Run(root / table / slug(name) / f"seed{seed}", arguments, seed, f"{table}/{name}")


if __name__ == "__main__":
    main()
