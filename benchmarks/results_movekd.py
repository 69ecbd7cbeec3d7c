"""MoVE-KD on Tabletop, measured: `make results-movekd` runs this and writes docs/results/movekd-tabletop.{md,json}.

Every student starts from the shipped CLIP and reads through the shipped language side. Main rows train 2000 steps,
ablations 500, all rows of a table alike. Every run is resumable and a finished one is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations import run_of
from benchmarks.runs import Run, add_arguments, execute, slug

OUT = Path("docs/results")
STEPS = 2000
TIME_RATIO = 1.6
"""Time of a step with heads and MoLE over one by text alone, by `python -m benchmarks.movekd_step`."""

TEXT_ONLY, KD_MOLE = "text only", "KD + MoLE (base)"
EQUAL_TIME = f"text only, equal time ({round(STEPS * TIME_RATIO)} steps)"


MAIN: dict[str, tuple[str, ...]] = {
    TEXT_ONLY: ("text-only",),
    KD_MOLE: ("base",),
    "KD, no MoLE": ("no-mole",),
    EQUAL_TIME: ("text-only", "--trainer.max_steps", str(round(STEPS * TIME_RATIO))),
    "KD + MoLE, published form": ("paper-form",),
}
"""Rows by ablation (configs/movekd/ablations), at SCALE=full, with further arguments."""

ABLATIONS = {
    TEXT_ONLY: "text-only",
    KD_MOLE: "base",
    "KD, no MoLE": "no-mole",
    "MoLE, no KD": "no-kd",
    "one LoRA of the same size": "one-lora",
    "router scaled": "mole-scaled",
    "router straight-through": "mole-straight-through",
    "dense routing": "mole-dense",
    "MoLE's init released": "mole-released-init",
    "direction to_student": "to-student",
    "direction fixed": "fixed",
    "CLIP at .8": "anchor-high",
    "CLIP no teacher": "no-anchor",
    "token weights by attention": "attention-tokens",
    "published form": "paper-form",
    "published form, released convention": "released-form",
    "published form, uniform teachers": "uniform-teachers",
    "published form, uniform tokens": "uniform-tokens",
    "published form, both uniform": "uniform",
    "semantic alone": "teacher-semantic",
    "depth alone": "teacher-depth",
    "normals alone": "teacher-normals",
    "edges alone": "teacher-edges",
    "segmentation alone": "teacher-segmentation",
    "no language model": "encoder-only",
}
"""Rows by ablation, at SCALE=default: the runs of `make ablations-movekd`."""


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", default="", help="run only variants whose folder holds this")
    options = parser.parse_args()
    runs = main_runs(options.seeds) + ablation_runs(options.seeds)
    execute([run for run in runs if options.only in str(run.folder)], jobs=options.jobs)


def main_runs(seeds: Sequence[int]) -> list[Run]:
    """The main rows, seed by seed, so that a cut leaves whole comparisons."""
    runs = []
    for seed in seeds:
        for title, (name, *extra) in MAIN.items():
            run = run_of("movekd", name, seed=seed, scale="full")
            folder = run.folder if not extra else run.folder.parents[1] / slug(title) / run.folder.name
            runs.append(Run(folder, (*run.arguments, *extra), seed, title))
    return runs


def ablation_runs(seeds: Sequence[int]) -> list[Run]:
    """The runs of `make ablations-movekd` that the page shows, row by row."""
    runs = []
    for title, name in ABLATIONS.items():
        for seed in seeds:
            run = run_of("movekd", name, seed=seed, scale="default")
            runs.append(Run(run.folder, run.arguments, run.seed, title))
    return runs


if __name__ == "__main__":
    main()
