"""Compare both methods and their hybrids: `make results-comparison` writes docs/results/comparison.{md,json}.

The matrix is `make ablations SCALE=default` (400 steps of 12 images from the shipped language model), and the two
targets share their runs. Finished runs are not repeated, and interrupted ones resume. The report of `visexpert compare`
on the matrix (paired tests, costs, Pareto front, skills) stays with the runs; docs/results/comparison/ gets the figures
of the page.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.ablations import run_of
from benchmarks.results import COST, OUT, SCORES, Page, Table, row_of
from benchmarks.runs import DONE, Run, add_arguments, execute, slug
from visexpert.report import ResultRow
from visexpert.report.compare import Choices, compare_runs, write_report
from visexpert.report.palette import canvas, colors, save, styled

SCALE = "default"
BASELINE = "CLIP only"
TWICE = ("--trainer.max_steps", "800", "--trainer.val_check_interval", "800")
"""For rows compared with hybrids, which continue from 400 steps of ToVE."""


@dataclass(frozen=True)
class Entry:
    """A row of the matrix.

    Args:
        method: Method of the ablation.
        name: Name of the ablation.
        phase: Folder in the run that holds what is scored; empty for the run itself.
        extra: Further arguments of the fit.
    """

    method: str
    name: str
    phase: str = ""
    extra: tuple[str, ...] = ()


MATRIX: Mapping[str, Entry] = {
    BASELINE: Entry("tove", "clip-only"),
    "CLIP + best single expert": Entry("tove", "semantic"),
    "best single expert without CLIP": Entry("tove", "semantic-alone"),
    "average of experts": Entry("tove", "uniform"),
    "ToVE": Entry("tove", "base"),
    "ToVE detached to 3": Entry("tove", "detach", phase="detached"),
    "ToVE merged": Entry("tove", "merge", phase="merged"),
    "ToVE merged into MoLE": Entry("hybrid", "merge-into-mole", phase="merged"),
    "fine-tuned CLIP": Entry("movekd", "text-only"),
    "fine-tuned CLIP at ToVE's rates": Entry("tove", "clip-trained"),
    "KD": Entry("movekd", "no-mole"),
    "KD + MoLE": Entry("movekd", "base"),
    "KD in the published form": Entry("movekd", "paper-form"),
    "KD by the recipe": Entry("movekd", "recipe"),
    "fine-tuned CLIP for 800 steps": Entry("movekd", "text-only", extra=TWICE),
    "KD + MoLE from ToVE merged": Entry("hybrid", "from-merged"),
    "KD + MoLE weighed by the gate": Entry("hybrid", "gate-weighted"),
}

SHARES = (10, 25, 50, 100)
WITH, WITHOUT = "ToVE", BASELINE

SHARE_SCORES = [column for column in SCORES if column.key in ("test/nll/kind/dense", "test/vqa/accuracy")]


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", default="", help="only do runs whose folder has this in its path")
    parser.add_argument("--report_only", action="store_true", help="write the page from what is finished")
    options = parser.parse_args()
    if not options.report_only:
        for fits in stages(options.seeds):
            execute([run for run in fits if options.only in str(run.folder)], jobs=options.jobs)
    report(done(matrix_runs(options.seeds)), done(share_runs(options.seeds)))


def fit_of(entry: Entry, seed: int) -> Run:
    """Return the fit of a row."""
    run = run_of(entry.method, entry.name, seed=seed, scale=SCALE)
    steps = "" if not entry.extra else f"-{entry.extra[1]}-steps"
    folder = run.folder.parents[1] / slug(f"{entry.name}{steps}") / run.folder.name
    return replace(run, folder=folder, arguments=(*run.arguments, *entry.extra))


def stages(seeds: Sequence[int]) -> list[list[Run]]:
    """Return the fits in stages: hybrids come last, because they continue from runs of ToVE."""
    hybrids = [entry for entry in MATRIX.values() if entry.method == "hybrid"]
    first = [entry for entry in MATRIX.values() if entry.method != "hybrid"] + [Entry("tove", "merge")]
    fits = [[fit_of(entry, seed) for seed in seeds for entry in part] for part in (first, hybrids)]
    return [*fits, share_runs(seeds)]


def matrix_runs(seeds: Sequence[int]) -> list[Run]:
    """Return the runs that the rows score: a fit, or what a callback made from it."""
    runs = []
    for title, entry in MATRIX.items():
        for seed in seeds:
            fit = fit_of(entry, seed)
            runs.append(replace(fit, folder=fit.folder / entry.phase, variant=title))
    return runs


def share_runs(seeds: Sequence[int]) -> list[Run]:
    """Return the runs of ToVE and of CLIP alone on part of the training scenes."""
    names = {WITH: ("base", "scenes-{}"), WITHOUT: ("clip-only", "clip-only-scenes-{}")}
    runs = []
    for share in SHARES:
        for title, (whole, part) in names.items():
            name = whole if share == 100 else part.format(share)
            fits = [run_of("tove", name, seed=seed, scale=SCALE) for seed in seeds]
            runs += [replace(fit, variant=f"{share} %, {title}") for fit in fits]
    return runs


def done(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that have been scored; what a callback made has its scores once the fit around it has."""
    return [run for run in runs if any((folder / DONE).is_file() for folder in (run.folder, run.folder.parent))]


def report(matrix: Sequence[Run], shares: Sequence[Run]) -> None:
    """Write the page, its rows and its figures; rows from an earlier machine stay unless a run replaces them."""
    runs = [replace(run, variant=f"matrix/{run.variant}") for run in matrix]
    runs += [replace(run, variant=f"shares/{run.variant}") for run in shares]
    PAGE.write([row_of(run) for run in runs])
    if shares:
        share_figure(PAGE.tables[1].rows(PAGE.committed()), FIGURES / "shares.png")
    if matrix:
        named = {run.folder: run.variant for run in matrix}
        folder = matrix[0].folder.parents[2] / "comparison"
        write_report(compare_runs(list(named), Choices(named, baseline=BASELINE)), folder)
        FIGURES.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "figures" / "pareto_gflop.png", FIGURES)
        print(f"wrote {folder / 'report.html'}")


FIGURES = OUT / "comparison" / "figures"
COMPARED = """\
The target also writes `runs/ablations/default/comparison/report.html`: paired tests with Holm's correction, intervals,
training GFLOP, differences in settings between rows, all scores, gate maps, and attention and captions side by side.

![Score against cost at inference](comparison/figures/pareto_gflop.png)
"""
PARTS = [("", SCORES), ("Cost:", COST)]
PAGE = Page(
    "comparison",
    [
        Table("The matrix", list(MATRIX), PARTS, "matrix", after=COMPARED),
        Table(
            "Part of the training scenes",
            [f"{share} %, {title}" for title in (WITH, WITHOUT) for share in SHARES],
            PARTS,
            "shares",
            after="![Scores against the share of training scenes](comparison/figures/shares.png)\n",
        ),
    ],
)


def share_figure(rows: Sequence[ResultRow], out: Path) -> Path:
    """Draw scores with and without experts against the share of the scenes; bars are one standard deviation."""
    figure = canvas(4.4 * len(SHARE_SCORES), 3.6)
    for place, column in enumerate(SHARE_SCORES, start=1):
        scale, label = column.scale, f"{column.title}, %" if column.scale == 100 else column.title
        axes = figure.add_subplot(1, len(SHARE_SCORES), place)
        styled(axes, title=column.title, xlabel="share of the training scenes, %", ylabel=f"{label} (± one sd)")
        for title, color in zip((WITH, WITHOUT), colors(2), strict=True):
            points = {share: _values(rows, f"{share} %, {title}", column.key) for share in SHARES}
            shown = [share for share, values in points.items() if values]
            means = [scale * statistics.fmean(points[share]) for share in shown]
            spreads = [scale * statistics.stdev(points[share]) if len(points[share]) > 1 else 0.0 for share in shown]
            axes.errorbar(shown, means, yerr=spreads, color=color, marker="o", markersize=4, capsize=3, label=title)
        axes.legend(frameon=False, fontsize=8)
    return save(figure, out)


def _values(rows: Sequence[ResultRow], variant: str, key: str) -> list[float]:
    return [row.scores[key] for row in rows if row.variant == variant and key in row.scores]


if __name__ == "__main__":
    main()
