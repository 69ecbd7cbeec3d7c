"""The report of a comparison: which tables and figures, in what order, and the words between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from visexpert.report.compare import figures
from visexpert.report.compare.comparison import Comparison
from visexpert.report.compare.document import Cell, Document, Picture, Section, Table
from visexpert.report.compare.record import RunRecord
from visexpert.report.compare.scores import skill_groups, unsteady
from visexpert.report.compare.tables import (
    cost_table,
    difference_table,
    left_out_table,
    paired_table,
    run_table,
    score_table,
    setting_table,
)
from visexpert.report.compare.terms import unequal_terms, uneven_variants
from visexpert.report.world import known_images
from visexpert.timing import TOLD

STRIPS = {
    "gate_maps": "Gate maps: how much each token listens to each expert",
    "cls_attention": "[CLS] attention",
    "captions": "Captions",
    "gate_by_region": "Mean gate by region",
}
"""Figures of runs that are shown side by side."""

RUNS_PAGE = 60
"""Most lines that a section may have on the page without being folded."""


def document(comparison: Comparison, out: Path) -> Document:
    """Compute every table and draw every figure.

    Args:
        comparison: What to report.
        out: Folder of the report; figures go to ``figures/`` in it.
    """
    drawn = out / "figures"
    parts = [
        *_warnings(comparison),
        *_results(comparison),
        *_figures(comparison, drawn),
        *_skills(comparison, drawn),
        *_side_by_side(comparison),
        *_appendix(comparison),
    ]
    count = sum(len(variant.runs) for variant in comparison.variants)
    title = f"{len(comparison.variants)} variants, {count} runs"
    return Document(f"Comparison: {title}", tuple(_summary(comparison)), tuple(parts))


def _summary(comparison: Comparison) -> Iterator[str]:
    seeds = Counter(len(variant.runs) for variant in comparison.variants)
    spread = ", ".join(f"{count} of {n} {'seed' if n == 1 else 'seeds'}" for n, count in sorted(seeds.items()))
    yield (
        f"Scores on the {comparison.split} split; baseline: '{comparison.baseline}'. Variants: {spread}. Numbers are "
        "mean ± sample standard deviation over seeds, with the 95 % t interval of the mean in brackets."
    )
    yield from _known(comparison)
    if comparison.left_out:
        yield f"{len(comparison.left_out)} given folder(s) are not compared; they are named below."
    if min(seeds) < 2:
        which = "Every variant has one seed" if max(seeds) < 2 else "Some variants have one seed"
        yield f"{which}: without a second one there is no interval and no test, and small differences mean nothing."


def _known(comparison: Comparison) -> Iterator[str]:
    """Which images the models know; variant by variant where they were trained on unlike data."""
    sets = {variant.name: variant.runs[0].trained_on for variant in comparison.variants}
    if len(set(sets.values())) == 1:
        known = known_images(next(iter(sets.values())))
        if known:
            yield f"All models know only the images of their training data: {known}."
        return
    told = "; ".join(f"'{name}': {known_images(names) or 'not recorded'}" for name, names in sets.items())
    yield f"Each model knows only the images of its training data. {told}."


def _warnings(comparison: Comparison) -> Iterator[Section]:
    if comparison.mixed:
        told = "Shown side by side because allow_mixed was given. Scores below do not measure the same thing."
        yield Section("These runs are not comparable", (told,), (difference_table(comparison.mixed),), warning=True)
    if comparison.left_out:
        yield Section("Runs left out", tables=(left_out_table(comparison.left_out),), warning=True)
    missing = comparison.missing()
    if missing:
        rows = tuple((Cell(key), Cell("; ".join(runs))) for key, runs in missing.items())
        yield Section("Scores that runs lack", tables=(Table(("score", "runs"), rows, text_columns=2),), warning=True)
    uneven = uneven_variants(comparison.variants)
    if uneven:
        told = (
            "These were grouped by folder or by name, but differ in more than their seed. That is expected where a run "
            "chooses the setting itself, such as the expert to detach."
        )
        yield Section("Seeds with different settings", (told,), (difference_table(uneven),), warning=True)
    unequal = unequal_terms(comparison.variants)
    if unequal:
        told = (
            "The variants were not trained on equal terms. Some of these differences may be the question of the "
            "comparison; keep the others in mind when reading the scores. Images of a run's start are included."
        )
        yield Section("Unequal terms", (told,), (difference_table(unequal),), warning=True)


def _results(comparison: Comparison) -> Iterator[Section]:
    told = (
        f"Bold: the best mean of a column. Color on the page: better or worse than '{comparison.baseline}' beyond "
        "chance, by the tests below."
    )
    yield Section("Scores", (told,), tables=(score_table(comparison, comparison.scores),))
    if len(comparison.variants) > 1:
        yield Section(f"Against '{comparison.baseline}'", tables=(paired_table(comparison),))
    told = (
        "Training GFLOP: forward and backward passes of all steps, as run (tokens from the feature store are free) and "
        "as if every encoder had run at each step. Times depend on the machine and on its other "
        "load. Images seen are steps times batch where a run has not counted them. With its start: the cost of "
        "the run that this one started from is added."
    )
    if any(unsteady(variant) for variant in comparison.variants):
        told += f" {TOLD}."
    yield Section("Costs", (told,), (cost_table(comparison),))


def _figures(comparison: Comparison, folder: Path) -> Iterator[Section]:
    made = [
        (measure, figures.pareto(comparison, folder / f"pareto_{measure}.png", measure=measure))
        for measure in figures.COST_AXES
    ]
    pictures = tuple(
        Picture(path, f"{comparison.primary.title} against {figures.COST_AXES[measure][1]}")
        for measure, path in made
        if path
    )
    if pictures:
        told = (
            "Numbers are those of the tables. Blue: no other variant is both cheaper and better. Hollow: measured "
            "unsteadily, so left out of that comparison."
        )
        yield Section("Score against cost at inference", (told,), pictures=pictures)
    paths, told = figures.curves(comparison, folder)
    yield Section("Learning curves", (told,), pictures=tuple(Picture(path, "Learning curves") for path in paths))


def _skills(comparison: Comparison, folder: Path) -> Iterator[Section]:
    by_key = {score.key: score for score in comparison.all_scores}
    pictures, tables = [], []
    for task, keys in skill_groups(list(by_key), split=comparison.split).items():
        scores = [by_key[key] for key in keys]
        path = figures.skills(comparison, scores, task, folder / f"skills_{task}.png")
        pictures.append(Picture(path, f"{task} by skill"))
        tables.append(score_table(comparison, scores, caption=task))
    if pictures:
        yield Section("Skills", pictures=tuple(pictures))
        yield Section("Skills in numbers", tables=tuple(tables), folded=True)


def _side_by_side(comparison: Comparison) -> Iterator[Section]:
    shown = _representatives(comparison)
    strips = []
    for name, title in STRIPS.items():
        pictures = [
            Picture(path, _label(variant, run), is_plot=name == "gate_by_region")
            for variant, run in shown
            if (path := run.figure(name)) is not None
        ]
        if pictures:
            strips.append((title, tuple(pictures)))
    if strips:
        mixed = any(one.kind == "data" for one in comparison.mixed)
        told = (
            "Runs of different data: the images are not the same."
            if mixed
            else "The first images of the same split in every run, one run of each variant. Variants without such a "
            "figure are left out."
        )
        yield Section("Side by side", (told,), strips=tuple(strips), folded=len(shown) > RUNS_PAGE)


def _appendix(comparison: Comparison) -> Iterator[Section]:
    if len(comparison.variants) > 1:
        told = "A dash: the variant has no such setting. Seeds, places and logging are left out."
        yield Section("How the variants differ", (told,), (setting_table(comparison),), folded=True)
    yield Section("All scores", tables=(score_table(comparison, comparison.all_scores),), folded=True)
    yield Section("Runs", tables=(run_table(comparison),), folded=True)


def _representatives(comparison: Comparison) -> list[tuple[str, RunRecord]]:
    """One run of each variant: of the seed that most variants have, else its first."""
    counts = Counter(run.seed for variant in comparison.variants for run in variant.runs)
    common = max(counts, key=lambda seed: (counts[seed], -(seed or 0)))
    return [
        (variant.name, next((run for run in variant.runs if run.seed == common), variant.runs[0]))
        for variant in comparison.variants
    ]


def _label(variant: str, run: RunRecord) -> str:
    return f"{variant} (seed {run.seed})" if run.seed is not None else variant
