"""Compare many runs on one page: scores, tests, costs, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visexpert.errors import ConfigError
from visexpert.io.run_files import write_text
from visexpert.report.compare.comparison import Comparison
from visexpert.report.compare.document import markdown
from visexpert.report.compare.page import page
from visexpert.report.compare.record import RunRecord, find_runs, read_run
from visexpert.report.compare.scores import with_costs
from visexpert.report.compare.sections import document
from visexpert.report.compare.terms import mismatches, refuse_mixed
from visexpert.report.compare.variants import group_runs

__all__ = ["Choices", "Comparison", "compare_runs", "find_runs", "write_report"]


@dataclass(frozen=True)
class Choices:
    """How to compare.

    Args:
        named: Name of the variant by run folder; the other runs are grouped by folder or configuration.
        baseline: Variant that others are tested against; None chooses.
        scores: Keys of the first table; none chooses.
        primary: Score of the Pareto figure and the curves; None takes the first of the table.
        split: ``test`` or ``val``.
        allow_mixed: Show runs side by side that do not measure the same thing.
    """

    named: Mapping[Path, str] | None = None
    baseline: str | None = None
    scores: Sequence[str] = ()
    primary: str | None = None
    split: str = "test"
    allow_mixed: bool = False


def compare_runs(folders: Sequence[Path], choices: Choices, *, strays: Sequence[Path] = ()) -> Comparison:
    """Read and compare runs.

    Args:
        folders: Run folders.
        choices: How.
        strays: Given paths that hold no run; the report names them.

    Raises:
        ConfigError: No run is left to compare, runs that do not go together, or a choice that does not exist.
    """
    records = [read_run(folder, split=choices.split) for folder in folders]
    finished = [with_costs(record) for record in records if not record.problem]
    left_out = [record for record in records if record.problem]
    left_out += [RunRecord(path, problem="is not a run and holds none") for path in strays]
    if not finished:
        told = "; ".join(f"'{record.folder}' {record.problem}" for record in left_out[:3])
        raise ConfigError(f"None of {len(left_out)} folders is a finished run: {told or 'none was given'}.")
    variants = group_runs(finished, choices.named)
    mixed = mismatches(variants, split=choices.split)
    if not choices.allow_mixed:
        refuse_mixed(mixed)
    return Comparison.of(
        variants,
        baseline=choices.baseline,
        scores=choices.scores,
        primary=choices.primary,
        split=choices.split,
        left_out=left_out,
        mixed=mixed,
    )


def write_report(comparison: Comparison, out: Path) -> None:
    """Write ``report.html``, ``report.md``, ``results.csv`` and ``figures/``.

    Raises:
        DataError: The folder cannot be written.
    """
    report = document(comparison, out)
    write_text(out / "results.csv", comparison.csv())
    write_text(out / "report.md", markdown(report, base=out))
    write_text(out / "report.html", page(report))
