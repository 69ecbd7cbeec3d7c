"""Measure MoVE-KD on Tabletop: `make results-movekd` writes docs/results/movekd-tabletop.{md,json}.

Every student starts from the shipped CLIP and is read by the shipped language model. Main rows train for 2000 steps,
ablations for 400. Interrupted runs resume, and finished ones are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tqdm.auto import tqdm

from benchmarks.ablations import run_of
from benchmarks.results import SCORES, Page, Table, row_of
from benchmarks.runs import Run, add_arguments, execute, slug
from benchmarks.student_probes import TEACHERS, ensure
from visexpert.report import Column, ResultRow

STEPS = 2000
SAME_TIME, LONG, LONGER = 2260, 2540, 3200
"""Steps on text alone in the time of STEPS of: direction fixed without MoLE (a step takes 1.13 times as long); heads
without MoLE (1.27 when the row was set, later 1.18); the base (1.57, later 1.64). From
`python -m benchmarks.movekd_step`."""

FIRST_STAGE = 600
"""Those of STEPS in which CLIP's own weights and the language model are frozen."""

TEXT_ONLY, KD_MOLE = "text only", "KD + MoLE (base)"
RECIPE = "recipe: depth and normals, fixed, CLIP at .1, no MoLE"
NO_LANGUAGE = "KD + MoLE, no language model"
TWO_STAGES = "KD + MoLE, two stages"


def _steps(steps: int) -> tuple[str, ...]:
    return "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)


MAIN: dict[str, tuple[str, ...]] = {
    TEXT_ONLY: ("text-only",),
    KD_MOLE: ("base",),
    "KD, no MoLE": ("no-mole",),
    "KD, no MoLE, direction fixed": ("fixed-no-mole",),
    "KD, no MoLE, CLIP at .1": ("anchor-low",),
    "KD, no MoLE, direction fixed, CLIP at .1": ("fixed-anchor-low",),
    "KD of depth and normals, no MoLE": ("geometry",),
    RECIPE: ("recipe",),
    "recipe with MoLE": ("recipe-mole",),
    "recipe with heads": ("recipe-heads",),
    "recipe, token weights by attention": ("recipe-attention-tokens",),
    f"text only, {SAME_TIME} steps": ("text-only", *_steps(SAME_TIME)),
    f"text only, {LONG} steps": ("text-only", *_steps(LONG)),
    f"text only, {LONGER} steps": ("text-only", "--trainer.max_steps", str(LONGER)),
    "KD + MoLE, published form": ("paper-form",),
    NO_LANGUAGE: ("encoder-only",),
    "recipe, no language model": ("recipe-distil",),
}
"""Rows at SCALE=full: ablation (configs/movekd/ablations) and further arguments, by title."""

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
    "semantic, depth, normals": "three-teachers",
    "weight of distillation .1": "kd-weight-01",
    "weight of distillation 2": "kd-weight-20",
    "recipe": "recipe",
    "recipe, token weights by attention": "recipe-attention-tokens",
    "recipe, both by attention": "recipe-attention",
    "fewer blocks, text only": "shallow-text-only",
    "fewer blocks, KD, no MoLE": "shallow",
}
"""Rows at SCALE=default: ablation by title; the runs of `make ablations-movekd`."""

FRACTIONS = (0.05, 0.1, 0.25)
SCARCE_STEPS = 600
LONG_SCARCE = 3020
"""Steps on text alone in the time of STEPS of distillation alone (1.21 each) and SCARCE_STEPS on text."""

FIRST = "distilled first"
"""Rows that distill the encoder alone on the images of all scenes, then train on the texts of a few."""

COLUMNS = [
    *SCORES[:9],
    Column("student/probe/object_depth", "object depth", digits=1, scale=100, better="max"),
    Column("student/probe/depth", "depth", digits=1, scale=100, better="max"),
    Column("student/probe/normals", "normals", digits=1, scale=100, better="max"),
    Column("student/probe/shape", "shape", digits=1, scale=100, better="max"),
    Column("student/raw/object_depth", "object depth, raw", digits=1, scale=100, better="max"),
    Column("student/variance", "variance across images", digits=2),
]
TEACHER_COLUMNS = [Column(f"student/teacher/{name}", name, digits=1, scale=100, better="max") for name in TEACHERS]
COST = [
    Column("steps", digits=0),
    Column("parameters", "trained params (k)", digits=0, scale=1e-3),
    Column("cost/parameters_inference", "params at inference (k)", digits=0, scale=1e-3),
    Column("gflop", "vision GFLOP/image", digits=4),
    Column("images_per_s", "images/s (vision)", digits=0),
    Column("train/images_per_s", "images/s (training)", digits=0),
]


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", default="", help="only do runs whose folder has this in its path")
    parser.add_argument("--report_only", action="store_true", help="write the page from finished runs")
    options = parser.parse_args()
    tables = {
        "main": main_runs(options.seeds),
        "stages": [run for seed in options.seeds for run in two_stages(seed)],
        "scarce": scarce_runs(options.seeds),
        "ablation": ablation_runs(options.seeds),
    }
    if not options.report_only:
        for runs in tables.values():
            execute([run for run in runs if options.only in str(run.folder)], jobs=options.jobs)
    tables["main"] += [run for run in tables.pop("stages") if run.variant == TWO_STAGES]
    report({name: [run for run in runs if run.done] for name, runs in tables.items()})


def main_runs(seeds: Sequence[int]) -> list[Run]:
    """Return the main rows, seed by seed, so that an interruption leaves whole comparisons."""
    runs = []
    for seed in seeds:
        for title, (name, *extra) in MAIN.items():
            run = run_of("movekd", name, seed=seed, scale="full")
            folder = run.folder if not extra else run.folder.parents[1] / slug(title) / run.folder.name
            runs.append(Run(folder, (*run.arguments, *extra), seed, title))
    return runs


def ablation_runs(seeds: Sequence[int]) -> list[Run]:
    """Return the runs of `make ablations-movekd` that the page shows, row by row."""
    runs = []
    for title, name in ABLATIONS.items():
        for seed in seeds:
            run = run_of("movekd", name, seed=seed, scale="default")
            runs.append(Run(run.folder, run.arguments, run.seed, title))
    return runs


def two_stages(seed: int) -> list[Run]:
    """Return the base in the paper's two stages, STEPS in all: MoLE, heads, projector; then all but the teachers."""
    run = run_of("movekd", "base", seed=seed, scale="full")
    first, second = (run.folder.parents[1] / slug(f"{TWO_STAGES}{part}") / run.folder.name for part in (" first", ""))
    rest = (
        "--model.init_args.optimizer.clip_lr",
        "0",
        "--model.init_args.optimizer.language_lr",
        "0",
        *_steps(FIRST_STAGE),
    )
    start = ("--model.init_args.init_from", str(first / "checkpoints" / "last.ckpt"), *_steps(STEPS - FIRST_STAGE))
    return [
        Run(first, (*run.arguments, *rest), seed, f"{TWO_STAGES}, the first"),
        Run(second, (*run.arguments, *start, "--model.init_args.init_complete", "true"), seed, TWO_STAGES),
    ]


def scarce_runs(seeds: Sequence[int]) -> list[Run]:
    """Return the runs on few texts, from CLIP and from an encoder that was distilled on the images of all scenes."""
    runs = []
    for fraction in FRACTIONS:
        extra = ("--data.init_args.train_fraction", str(fraction), *_steps(SCARCE_STEPS))
        for seed in seeds:
            starts = [_start("encoder-only", seed), _start("recipe-distil", seed)]
            rows: list[tuple[str, str, tuple[str, ...]]] = [
                (TEXT_ONLY, "text-only", ()),
                (FIRST, "no-kd", starts[0]),
                (f"{FIRST} by the recipe", "text-only", starts[1]),
                (f"{TEXT_ONLY}, {LONG_SCARCE} steps", "text-only", _steps(LONG_SCARCE)),
            ]
            for title, name, more in rows:
                run = run_of("movekd", name, seed=seed, scale="full")
                title = f"{100 * fraction:.0f} % of the scenes, {title}"
                folder = run.folder.parents[1] / slug(title) / run.folder.name
                runs.append(Run(folder, (*run.arguments, *extra, *more), seed, title))
    return runs


def _start(name: str, seed: int) -> tuple[str, ...]:
    first = run_of("movekd", name, seed=seed, scale="full").folder
    return "--model.init_args.init_from", str(first / "checkpoints" / "last.ckpt")


def row_with_probes(run: Run) -> ResultRow:
    """Return a finished run as a row, with the probes of the student's own tokens and the training throughput."""
    row = row_of(run)
    probes = {f"student/{name}": value for name, value in ensure(run.folder).items()}
    key = "train/images_per_s"  # missing if a run was interrupted between its last step and its scores
    speed = {name: value for name, value in run.metrics().items() if name == key}
    return replace(row, scores={**row.scores, **probes, **speed})


def report(tables: Mapping[str, Sequence[Run]]) -> None:
    """Write the page and its rows."""
    todo = [(name, run) for name, runs in tables.items() for run in runs]
    rows = []
    for name, run in tqdm(todo, desc="probes", unit="run"):
        rows.append(replace(row_with_probes(run), variant=f"{name}/{run.variant}"))
    page().write(rows)


def page() -> Page:
    """Return the page: main rows, little text, ablations."""
    teachers = "R² of a ridge probe from the student's tokens to each teacher's:"
    parts = [("", COLUMNS), (teachers, TEACHER_COLUMNS), ("Cost:", COST)]
    scarce = [run.variant for run in scarce_runs([0])]
    little = f"Little text: {SCARCE_STEPS} steps on a part of the scenes"
    return Page(
        "movekd-tabletop",
        [
            Table(f"Main rows, {STEPS} steps", [*MAIN, TWO_STAGES], parts, "main"),
            Table(little, scarce, parts, "scarce"),
            Table("Ablations, 400 steps", list(ABLATIONS), parts, "ablation"),
        ],
    )


if __name__ == "__main__":
    main()
