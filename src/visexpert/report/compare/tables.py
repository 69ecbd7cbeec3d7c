"""The tables of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from visexpert.report.compare.comparison import Comparison
from visexpert.report.compare.document import ABSENT, NOT_RECORDED, Cell, Table, cells
from visexpert.report.compare.record import RunRecord, differences, shown
from visexpert.report.compare.scores import COSTS, MS, Score, unsteady
from visexpert.report.compare.statistics import PairedTest, Summary
from visexpert.report.compare.terms import Difference
from visexpert.report.compare.variants import Variant
from visexpert.timing import MARK

SIGNIFICANT = 0.05

_MILLIONS = 1e-6
_MOST_NAMES = 8


def score_table(comparison: Comparison, scores: Sequence[Score], *, caption: str = "") -> Table:
    """Means with sd and interval; the best of a column marked, differences beyond chance colored."""
    rows = []
    for number, variant in enumerate(comparison.variants, start=1):
        row = [Cell(str(number), number), Cell(variant.name), Cell(_seeds(variant), len(variant.runs))]
        row += [_score_cell(comparison, variant, score) for score in scores]
        rows.append(tuple(row))
    heading = ("#", "variant", "seeds", *(_titled(score) for score in scores))
    return Table(heading, tuple(rows), caption, strong=_base_row(comparison), text_columns=3)


def paired_table(comparison: Comparison) -> Table:
    """Differences to the baseline by seed, with interval and p before and after correction."""
    scores = [score for score in comparison.scores if score.better]
    rows = []
    for number, variant in enumerate(comparison.variants, start=1):
        if variant.name == comparison.baseline:
            continue
        row = [Cell(str(number), number), Cell(variant.name)]
        row += [_test_cell(comparison.tests.get((variant.name, score.key)), score) for score in scores]
        rows.append(tuple(row))
    caption = (
        f"Mean difference to '{comparison.baseline}' over the seeds that both have, with its 95 % interval; p of the "
        "paired t test → after Holm's correction over the variants of its column. Colored where the corrected p is "
        f"below {SIGNIFICANT}. Three seeds give a test little power: without color, a difference may "
        "still be there. Without p: one seed in common."
    )
    return Table(("#", "variant", *(_titled(score) for score in scores)), tuple(rows), caption, text_columns=2)


def cost_table(comparison: Comparison) -> Table:
    """Parameters, work and time of training and inference; columns without any value are left out."""
    columns = [score for score in COSTS if not _repeats(comparison, score)]
    rows = [
        (Cell(str(number), number), Cell(variant.name), *(_cost_cell(variant, score) for score in columns))
        for number, variant in enumerate(comparison.variants, start=1)
    ]
    heading = ("#", "variant", *(score.title for score in columns))
    return Table(heading, tuple(rows), strong=_base_row(comparison), text_columns=2)


def difference_table(found: Sequence[Difference]) -> Table:
    """Which variants have which value of what should be equal."""
    rows = []
    for one in found:
        holders = "; ".join(f"{value}: {_names(names)}" for value, names in one.holders.items())
        rows.append(cells(one.kind, one.key, holders))
    return Table(("what", "setting", "value: variants"), tuple(rows), text_columns=3)


def setting_table(comparison: Comparison) -> Table:
    """Settings in which variants differ, by variant."""
    apart = differences([variant.runs[0].settings for variant in comparison.variants])
    rows = [
        (
            Cell(variant.name),
            *(ABSENT if values[index] is None else Cell(shown(values[index])[:60]) for values in apart.values()),
        )
        for index, variant in enumerate(comparison.variants)
    ]
    return Table(("variant", *apart), tuple(rows), text_columns=1 + len(apart))


def run_table(comparison: Comparison) -> Table:
    """Every compared run: where it lies, and what it was made with."""
    rows = []
    for variant in comparison.variants:
        for run in variant.runs:
            commit = run.fact("git_commit")
            versions = run.fact("versions") or {}
            rows.append(
                cells(
                    variant.name,
                    "?" if run.seed is None else str(run.seed),
                    str(run.folder),
                    str(run.fact("time") or "–")[:16].replace("T", " "),
                    _short(commit),
                    str(versions.get("torch", "–")),
                    str(run.fact("machine", "cpu") or "–"),
                )
            )
    return Table(("variant", "seed", "folder", "scored (UTC)", "commit", "torch", "CPU"), tuple(rows), text_columns=7)


def left_out_table(runs: Sequence[RunRecord]) -> Table:
    """Runs that are not compared, and why."""
    rows = tuple(cells(str(run.folder), run.problem) for run in runs)
    return Table(("folder", "why it is left out"), rows, text_columns=2)


def number(value: float, score: Score) -> str:
    """Return a number as the report shows it."""
    return f"{value * score.scale:.{score.digits}f}"


def _score_cell(comparison: Comparison, variant: Variant, score: Score) -> Cell:
    summary = comparison.summary(variant, score.key)
    if summary is None:
        return Cell("–", detail="not finite" if _not_finite(variant, score) else "no such score", mark="absent")
    test = comparison.tests.get((variant.name, score.key))
    best = "best" if summary.mean == comparison.best(score) else ""
    mark = f"{best} {_verdict(test, score)}".strip()
    fewer = f" n={summary.n}" if summary.n < len(variant.runs) else ""
    return Cell(_mean_sd(summary, score), summary.mean, _interval(summary, score) + fewer, mark)


def _test_cell(test: PairedTest | None, score: Score) -> Cell:
    if test is None:
        return Cell("–", detail="no seed in common", mark="absent")
    text = f"{test.difference * score.scale:+.{score.digits}f}"
    if test.half_width is not None:
        text += f" ± {number(test.half_width, score)}"
    if test.p is None or test.p_holm is None:
        return Cell(text, test.difference, "" if test.n == 1 else "no spread: no test")
    return Cell(text, test.difference, f"p {_p(test.p)} → {_p(test.p_holm)}", _verdict(test, score))


def _verdict(test: PairedTest | None, score: Score) -> str:
    if test is None or test.p_holm is None or test.p_holm >= SIGNIFICANT:
        return ""
    return "better" if test.difference * score.better > 0 else "worse"


def _cost_cell(variant: Variant, score: Score) -> Cell:
    values = variant.values(score.key)
    if not values:
        return NOT_RECORDED
    mean = sum(values) / len(values)
    scaled = mean * _MILLIONS if "parameters" in score.key else mean
    if score.key == MS and unsteady(variant):
        return Cell(f"{MARK}{_compact(scaled)}", mean)
    return Cell(_compact(scaled), mean)


def _repeats(comparison: Comparison, score: Score) -> bool:
    """Return whether a cost "with its start" equals the one without it for every variant."""
    own = score.key.replace("cost/all_", "cost/")
    return own != score.key and all(variant.values(score.key) == variant.values(own) for variant in comparison.variants)


def _mean_sd(summary: Summary, score: Score) -> str:
    mean = number(summary.mean, score)
    return mean if summary.sd is None else f"{mean} ± {number(summary.sd, score)}"


def _interval(summary: Summary, score: Score) -> str:
    if summary.half_width is None:
        return ""
    low, high = summary.mean - summary.half_width, summary.mean + summary.half_width
    return f"[{number(low, score)}, {number(high, score)}]"


def _compact(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _titled(score: Score) -> str:
    way = {1: " ↑", -1: " ↓", 0: ""}[score.better]
    return f"{score.title}{', %' if score.percent else ''}{way}"


def _base_row(comparison: Comparison) -> int:
    return comparison.variants.index(comparison.base)


def _seeds(variant: Variant) -> str:
    return str(len(variant.runs))


def _not_finite(variant: Variant, score: Score) -> bool:
    return any(score.key in run.not_finite for run in variant.runs)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _short(commit: object) -> str:
    if not isinstance(commit, str):
        return "–"
    return commit[:8] + ("-dirty" if commit.endswith("-dirty") else "")
