"""Measure ToVE on Tabletop: `make results-tove` writes docs/results/tove-tabletop.{md,json}.

Runs start from scratch or from the shipped language model; a table never mixes the two. Runs can be interrupted at any
time and resume; finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import COST, SCORES, Page, Table, row_of
from benchmarks.runs import DONE, Run, add_arguments, execute, slug
from visexpert.report import ResultRow

BASE = "configs/tove/tabletop.yaml"
OVERLAYS = Path("configs/tove/ablations")
GROUNDED_START = "configs/tove/tabletop/from-grounded.yaml"
ALL = "all five experts"

GROUNDED = {
    "text only": "text-only",
    "CLIP only": "clip-only",
    "CLIP + semantic": "semantic",
    "CLIP + depth": "depth",
    "CLIP + normals": "normals",
    "CLIP + edges": "edges",
    "CLIP + segmentation": "segmentation",
    "CLIP + semantic at 64 px": "semantic64",
    "semantic alone, no CLIP": "semantic-alone",
    "CLIP + semantic + depth": "semantic-depth",
    ALL: None,
    "all, no balance loss": "no-balance",
    "all, noisy gate": "noisy-gate",
    "all, uniform average": "uniform",
    "all, replacement": "replacement",
    "all, top-1 gate": "top1",
}
SCRATCH = {"CLIP only": "clip-only", "CLIP + semantic": "semantic", ALL: None}
CONTROL = "CLIP only under ToVE's decoder, continued"

DETACHED = ("all, lowest worth detached", "all, highest worth detached")
PAGE = Page(
    "tove-tabletop",
    [
        Table("From the shipped language model", [*GROUNDED, *DETACHED], [("", SCORES), ("Cost:", COST)], "grounded"),
        Table("From scratch", [*SCRATCH, CONTROL], [("", SCORES), ("Cost:", COST)], "scratch"),
    ],
    also=["test/vqa/family/material"],  # shown on the page about merging
)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/results-tove"), help="folder of the runs")
    parser.add_argument("--report_only", action="store_true", help="write the page from finished runs")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that the page has from an earlier machine")
    options = parser.parse_args()
    kept = [] if options.fresh else committed_rows(options.runs)
    known = {(row.variant, row.seed) for row in kept}
    stages: list[Callable[[], list[Run]]] = [
        lambda: grounded_runs(options.runs, options.seeds) + scratch_runs(options.runs, options.seeds),
        lambda: control_runs(options.runs, options.seeds) + detached_runs(options.runs, options.seeds),
    ]
    runs: list[Run] = []
    for stage in stages:
        wanted = [run for run in stage() if (run.variant, run.seed) not in known]
        if not options.report_only:
            execute(wanted, jobs=options.jobs)
        runs += [run for run in wanted if run.done]
    PAGE.write([row_of(run) for run in runs], known=kept)


def committed_rows(root: Path) -> list[ResultRow]:
    """Return the rows of the committed page whose runs are not on this machine; they are kept, not run again."""
    return [
        row
        for row in PAGE.committed()
        if not (
            root / row.variant.split("/")[0] / slug(row.variant.split("/", 1)[1]) / f"seed{row.seed}" / DONE
        ).is_file()
    ]


def grounded_runs(root: Path, seeds: Sequence[int]) -> list[Run]:
    """Return all variants from the language model, seed by seed, so that an interruption leaves whole comparisons."""
    start = ["--config", GROUNDED_START]
    return [
        _fit(root, "grounded", variant, overlay, seed, start) for seed in seeds for variant, overlay in GROUNDED.items()
    ]


def scratch_runs(root: Path, seeds: Sequence[int]) -> list[Run]:
    """Return the main rows from scratch."""
    return [_fit(root, "scratch", variant, overlay, seed, []) for seed in seeds for variant, overlay in SCRATCH.items()]


def control_runs(root: Path, seeds: Sequence[int]) -> list[Run]:
    """Return frozen CLIP trained further with the decoder that ToVE grounded: is the gap "when", not "whether"?"""
    runs = []
    for seed in seeds:
        teacher = root / "scratch" / slug(ALL) / f"seed{seed}" / "checkpoints" / "last.ckpt"
        if teacher.is_file():
            extra = [
                "--model.init_args.init_from",
                str(teacher),
                "--trainer.max_steps",
                "500",
                "--trainer.val_check_interval",
                "500",
            ]
            runs.append(_fit(root, "scratch", CONTROL, "clip-only", seed, extra))
    return runs


def detached_runs(root: Path, seeds: Sequence[int]) -> list[Run]:
    """Return the finished model without its least, and without its most valuable expert, not trained further.

    An expert's value is the rise of the validation loss without it. Only the two chosen models are scored on the test
    scenes.
    """
    runs = []
    for seed in seeds:
        trained = root / "grounded" / slug(ALL) / f"seed{seed}"
        if not (trained / "done").is_file():
            continue
        worth = _worth(trained)
        for which, name in (
            ("lowest", min(worth, key=worth.__getitem__)),
            ("highest", max(worth, key=worth.__getitem__)),
        ):
            variant = f"all, {which} worth detached"
            folder = root / "grounded" / slug(variant) / f"seed{seed}"
            arguments = ("test", *trained_arguments(trained), f"--model.init_args.detached=[{name}]")
            runs.append(Run(folder, arguments, seed, f"grounded/{variant}"))
    return runs


def _worth(trained: Path) -> dict[str, float]:
    """Return the rise of the validation loss per detached expert; it is kept in the run's folder."""
    path = trained / "worth.json"
    names = ("semantic", "depth", "normals", "edges", "segmentation")
    if not path.is_file():
        checks = [_validation(trained, name) for name in (None, *names)]
        execute(checks, jobs=2)
        losses = [check.metrics()["val/nll/nll"] for check in checks]
        path.write_text(json.dumps(dict(zip(names, (loss - losses[0] for loss in losses[1:]), strict=True)), indent=2))
    loaded: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _validation(trained: Path, name: str | None) -> Run:
    detached = [] if name is None else [f"--model.init_args.detached=[{name}]"]
    arguments = ("validate", *trained_arguments(trained), *detached)
    return Run(trained / "without" / (name or "nothing"), arguments, 0, f"without {name or 'nothing'}")


def trained_arguments(folder: Path) -> tuple[str, ...]:
    """Return the arguments that load a finished run."""
    return "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")


def _fit(root: Path, start: str, variant: str, overlay: str | None, seed: int, extra: Sequence[str]) -> Run:
    configs = ["--config", BASE]
    if extra[:1] == ["--config"]:
        configs, extra = [*configs, *extra[:2]], extra[2:]
    if overlay is not None:
        configs += ["--config", str(OVERLAYS / f"{overlay}.yaml")]
    arguments = (
        "fit",
        *configs,
        "--seed_everything",
        str(seed),
        "--data.init_args.seed",
        "0",
        "--model.init_args.evaluation.meteor=false",
        *extra,
    )
    return Run(root / start / slug(variant) / f"seed{seed}", arguments, seed, f"{start}/{variant}")


if __name__ == "__main__":
    main()
