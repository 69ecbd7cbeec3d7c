"""Measure detaching and merging on Tabletop: `make results-merge` writes docs/results/merge.{md,json}.

The base is ToVE with all five experts from `make results-tove` (400 steps from the shipped language model), one run per
seed. From it come the detached models, the merged CLIPs, and controls with the same number of further steps. Runs can
be interrupted at any time and resume; finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import results_tove
from benchmarks.results import SCORES, Page, Table, row_of
from benchmarks.results_tove import ALL, BASE, OVERLAYS, grounded_runs, trained_arguments
from benchmarks.runs import Run, add_arguments, execute, slug
from visexpert.report import Column, ResultRow

STEPS = 2500
LR = "5e-3"
"""Rate of CLIP and projector, for tokens and for text; chosen on validation scenes of seed 0 from 2e-3 to 8e-3."""

EQUAL_TIME, EQUAL_TIME_ALONG = 1970, 1690
"""Steps on text that take as long as STEPS on tokens: see benchmarks/merge_step.py."""

SEMANTIC = "CLIP + semantic"
TEXT = ["--merging.token_weight", "0", "--merging.lm_weight", "1"]
ALONG = ["--optimizer.language_lr", "1e-3"]
MERGED = {
    "merged: tokens, full": [],
    f"text only, ToVE's decoder frozen, equal time ({EQUAL_TIME} steps)": [*TEXT, "--steps", str(EQUAL_TIME)],
    "text only, ToVE's decoder trained along": [*TEXT, *ALONG],
    f"text only, ToVE's decoder trained along, equal time ({EQUAL_TIME_ALONG} steps)": [
        *TEXT,
        *ALONG,
        "--steps",
        str(EQUAL_TIME_ALONG),
    ],
    "merged: tokens, LoRA": ["--merging.adaptation", "lora"],
    "merged: tokens + text, ToVE's decoder trained along": ["--merging.lm_weight", "0.33", *ALONG],
}
"""Options of `visexpert merge` from the base run; a later option replaces an earlier one."""

CONTINUED = {
    "ToVE, trained on": None,
    "CLIP + semantic, trained on": "semantic",
    "CLIP only, trained on": "clip-only",
}
FRESH = "text only, CLIP and a fresh decoder"
BUDGETS: dict[str, tuple[str, ...]] = {
    "within 4x of CLIP's GFLOP": ("4.0", "--retune_steps", "0"),
    "within 6x of CLIP's GFLOP": ("6.0", "--retune_steps", "0"),
    "within 4x of CLIP's GFLOP, re-tuned (200 steps)": ("4.0", "--retune_steps", "200"),
    "within 6x of CLIP's GFLOP, re-tuned (200 steps)": ("6.0", "--retune_steps", "200"),
}
ORDERS = {"lowest worth first": (1, 2, 3, 4), "highest worth first": (1, 2)}
"""How many experts are detached, in the order of leave-one-out; the first of each is in tove-tabletop.json."""

COLUMNS = [
    *SCORES[:2],
    Column("kept", "gain kept, %", digits=0),
    *SCORES[2:4],
    Column("test/vqa/family/material", "material", digits=1, scale=100, better="max"),
    *SCORES[4:],
]
COST = [
    Column("steps", "steps in all", digits=0),
    Column("gflop", "vision GFLOP/image", digits=4),
    Column("ms", "ms/image (vision)", digits=2),
    Column("cost/parameters_inference", "params at inference (k)", digits=0, scale=1e-3),
    Column("cost/train_seconds", "seconds of the last phase", digits=0),
]


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--base", type=Path, default=Path("runs/results-tove"), help="folder of ToVE's runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/results-merge"), help="folder of the other runs")
    parser.add_argument("--report_only", action="store_true", help="write the page from finished runs")
    parser.add_argument("--only", default="", help="only run variants whose name has this")
    options = parser.parse_args()
    if not options.report_only:
        execute(base_runs(options.base, options.seeds), jobs=options.jobs)
    by_seed = [runs_of(options.base, options.runs, seed) for seed in options.seeds]
    runs = [run for alike in zip(*by_seed, strict=True) for run in alike]  # leaves whole comparisons if interrupted
    if not options.report_only:
        execute([run for run in runs if options.only in run.variant], jobs=options.jobs)
    ordered = [run for seed in options.seeds for run in ordered_runs(options.base, options.runs, seed)]
    if not options.report_only:
        execute([run for run in ordered if options.only in run.variant], jobs=options.jobs)
    report([run for run in [*runs, *ordered] if run.done])


def base_runs(base: Path, seeds: Sequence[int]) -> list[Run]:
    """Return the runs of ToVE from which everything else starts."""
    return [run for run in grounded_runs(base, seeds) if run.variant == f"grounded/{ALL}"]


def runs_of(base: Path, runs: Path, seed: int) -> list[Run]:
    """Return all runs of one seed, the main rows first."""
    (trained,) = base_runs(base, [seed])
    merges = [_merge(trained.folder, seed, variant, extra) for variant, extra in MERGED.items()]
    tove, semantic, clip = (
        _continued(runs, trained.folder, base, seed, variant, overlay) for variant, overlay in CONTINUED.items()
    )
    detached = [_detach(trained.folder, seed, variant, budget) for variant, budget in BUDGETS.items()]
    return [*merges[:4], *detached, merges[4], tove, merges[5], semantic, _fresh(runs, seed), clip]


def ordered_runs(base: Path, runs: Path, seed: int) -> list[Run]:
    """Return the base run with experts detached in the order of their value, which the search for a budget measured."""
    (trained,) = base_runs(base, [seed])
    found = trained.folder / slug(f"detached: {next(iter(BUDGETS))}") / "detachment.json"
    if not found.is_file():
        return []
    worths = {worth["expert"]: worth["loss"] for worth in json.loads(found.read_text(encoding="utf-8"))["worths"]}
    made = []
    for order, numbers in ORDERS.items():
        names = sorted(worths, key=worths.__getitem__, reverse=order.startswith("highest"))
        for number in numbers[1:]:
            variant = f"detached: {order}, {len(names) - number} left"
            arguments = (
                "test",
                *trained_arguments(trained.folder),
                f"--model.init_args.detached=[{','.join(names[:number])}]",
            )
            made.append(Run(runs / slug(variant) / f"seed{seed}", arguments, seed, variant))
    return made


def _merge(trained: Path, seed: int, variant: str, extra: Sequence[str]) -> Run:
    arguments = [
        "merge",
        str(trained),
        "--steps",
        str(STEPS),
        "--optimizer.lr",
        LR,
        "--eval_every",
        "500",
        *extra,
        "--name",
        slug(variant),
    ]
    return Run(trained / slug(variant), tuple(arguments), seed, variant)


def _detach(trained: Path, seed: int, variant: str, budget: Sequence[str]) -> Run:
    variant = f"detached: {variant}"
    extra = ("--latency_budget", *budget, "--budget_measure", "gflop", "--images", "250")
    return Run(trained / slug(variant), ("detach", str(trained), *extra, "--name", slug(variant)), seed, variant)


def _continued(runs: Path, trained: Path, base: Path, seed: int, variant: str, overlay: str | None) -> Run:
    """Return a run of the same number of further steps, from the last weights of a model of the same kind."""
    names = {None: ALL, "semantic": SEMANTIC, "clip-only": "CLIP only"}
    start = base / "grounded" / slug(names[overlay]) / f"seed{seed}" / "checkpoints" / "last.ckpt"
    extra = ["--config", str(OVERLAYS / f"{overlay}.yaml")] if overlay else []
    extra += ["--model.init_args.init_from", str(start), "--model.init_args.optimizer.lr", "2e-3"]
    return _fit(runs, seed, variant, [*extra, *_steps(STEPS)])


def _fresh(runs: Path, seed: int) -> Run:
    """Return the run of CLIP, projector and a random decoder on text alone, for as many steps as the others in all."""
    extra = ["--config", str(OVERLAYS / "clip-only.yaml"), "--model.init_args.optimizer.clip_lr", LR]
    return _fit(runs, seed, FRESH, [*extra, *_steps(STEPS + 400)])


def _steps(steps: int) -> list[str]:
    return ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", "500"]


def _fit(runs: Path, seed: int, variant: str, extra: Sequence[str]) -> Run:
    arguments = (
        "fit",
        "--config",
        BASE,
        *extra,
        "--seed_everything",
        str(seed),
        "--data.init_args.seed",
        "0",
        "--model.init_args.evaluation.meteor=false",
    )
    return Run(runs / slug(variant) / f"seed{seed}", arguments, seed, variant)


def report(runs: Sequence[Run]) -> None:
    """Write the page and its rows."""
    if not runs:
        page().write(_references(), measured=False)
        return
    page().write([*_references(), *map(row_of, runs)])


REFERENCES = {
    "CLIP only": "CLIP only",
    SEMANTIC: "CLIP + semantic (best single expert)",
    ALL: "ToVE, all five experts",
    "all, lowest worth detached": "detached: lowest worth first, 4 left",
    "all, highest worth detached": "detached: highest worth first, 4 left",
}
"""Rows that are already in docs/results/tove-tabletop.json, with their names here."""


def order() -> list[str]:
    """Return the variants in the order of the page."""
    names = [REFERENCES[name] for name in ("CLIP only", SEMANTIC, ALL)]
    names += [*CONTINUED, *MERGED, FRESH]
    names += [f"detached: {order}, {5 - number} left" for order, numbers in ORDERS.items() for number in numbers]
    return [*names, *(f"detached: {name}" for name in BUDGETS)]


def page() -> Page:
    """Return the page: scores, then costs, of the same rows."""
    tables = [Table("Scores", order(), [("", COLUMNS)]), Table("Cost", order(), [("", COST)])]
    return Page("merge", tables, derive=with_gain, derived=["kept", "ms"])


def _references() -> list[ResultRow]:
    wanted = {f"grounded/{name}": title for name, title in REFERENCES.items()}
    rows = results_tove.PAGE.committed()
    return [replace(row, variant=wanted[row.variant]) for row in rows if row.variant in wanted]


def with_gain(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Add the share of ToVE's VQA gain over CLIP only (same seed, same start) that a row keeps, in percent, and ms."""
    key = "test/vqa/accuracy"
    low = {row.seed: row.scores[key] for row in rows if row.variant == "CLIP only"}
    high = {row.seed: row.scores[key] for row in rows if row.variant == REFERENCES[ALL]}
    made = []
    for row in rows:
        scores = {**row.scores, "ms": 1000.0 / row.images_per_s}
        if row.seed in low and row.seed in high:
            scores["kept"] = 100 * (row.scores[key] - low[row.seed]) / (high[row.seed] - low[row.seed])
        made.append(replace(row, scores=scores))
    return made


if __name__ == "__main__":
    main()
