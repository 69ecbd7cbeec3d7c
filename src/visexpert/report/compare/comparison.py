"""What is compared: variants, scores, baseline, summaries and tests, computed once for tables, figures and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from visexpert.errors import ConfigError
from visexpert.report.compare.record import RunRecord
from visexpert.report.compare.scores import Score, choose_primary, choose_scores, score_of
from visexpert.report.compare.statistics import PairedTest, Summary, corrected, paired_test, summarize
from visexpert.report.compare.terms import Difference
from visexpert.report.compare.variants import Variant

BASELINES = ("clip-only", "clip only", "clip", "baseline", "base")
"""Names that are taken for the baseline where none is chosen; else the first variant is."""


@dataclass(frozen=True)
class Comparison:
    """Finished runs by variant, and how to compare them.

    Args:
        variants: In the order of the report.
        baseline: Name of the one that others are tested against.
        scores: Scores of the first table.
        primary: The score of the Pareto figure and the learning curves.
        split: ``test`` or ``val``.
        left_out: Runs that are not compared, each with its problem.
        mixed: Differences that would have been refused.
    """

    variants: tuple[Variant, ...]
    baseline: str
    scores: tuple[Score, ...]
    primary: Score
    split: str
    left_out: tuple[RunRecord, ...] = ()
    mixed: tuple[Difference, ...] = ()

    @classmethod
    def of(
        cls,
        variants: Sequence[Variant],
        *,
        baseline: str | None = None,
        scores: Sequence[str] = (),
        primary: str | None = None,
        split: str = "test",
        left_out: Sequence[RunRecord] = (),
        mixed: Sequence[Difference] = (),
    ) -> Comparison:
        """Choose what is not given.

        Raises:
            ConfigError: A baseline or a score that is not there.
        """
        known = list(dict.fromkeys(key for variant in variants for run in variant.runs for key in run.metrics))
        keys = choose_scores(known, scores, split=split)
        chosen = [_score(variants, key) for key in keys]
        main = choose_primary(keys, primary, known, split=split)
        return cls(
            tuple(variants),
            choose_baseline([variant.name for variant in variants], baseline),
            tuple(chosen),
            _score(variants, main),
            split,
            tuple(left_out),
            tuple(mixed),
        )

    @cached_property
    def base(self) -> Variant:
        """The baseline."""
        return next(variant for variant in self.variants if variant.name == self.baseline)

    @cached_property
    def all_scores(self) -> tuple[Score, ...]:
        """Every score of the split that any run has, by key."""
        keys = {key for variant in self.variants for run in variant.runs for key in run.metrics}
        return tuple(_score(self.variants, key) for key in sorted(keys) if key.startswith(f"{self.split}/"))

    @cached_property
    def tests(self) -> Mapping[tuple[str, str], PairedTest]:
        """Paired tests by (variant, key) for the scores of the first table, corrected over all of them."""
        found = {
            (variant.name, score.key): paired_test(variant.by_seed(score.key), self.base.by_seed(score.key))
            for variant in self.variants
            for score in self.scores
            if variant.name != self.baseline and score.better
        }
        return corrected({key: test for key, test in found.items() if test is not None})

    @cached_property
    def _summaries(self) -> Mapping[str, Mapping[str, Summary]]:
        """By variant and key."""
        found: dict[str, dict[str, Summary]] = {}
        for variant in self.variants:
            keys = dict.fromkeys(key for run in variant.runs for key in run.metrics)
            every = {key: summarize(variant.values(key)) for key in keys}
            found[variant.name] = {key: summary for key, summary in every.items() if summary is not None}
        return found

    def summary(self, variant: Variant, key: str) -> Summary | None:
        """Return a metric of a variant over its seeds; None where no run has it."""
        return self._summaries[variant.name].get(key)

    def best(self, score: Score) -> float | None:
        """The best mean of all variants; None where neither direction is better, no variant has it or all are equal."""
        means = [summaries[score.key].mean for summaries in self._summaries.values() if score.key in summaries]
        if not score.better or not means or (len(means) > 1 and len(set(means)) == 1):
            return None
        return max(means) if score.better > 0 else min(means)

    def missing(self) -> dict[str, list[str]]:
        """Scores of the first table that a run lacks, with the runs; not finite ones say so."""
        found: dict[str, list[str]] = {}
        for score in self.scores:
            for variant in self.variants:
                for run in variant.runs:
                    if score.key not in run.metrics:
                        why = " (not finite)" if score.key in run.not_finite else ""
                        found.setdefault(score.key, []).append(f"{variant.name}, seed {run.seed}{why}")
        return found

    def csv(self) -> str:
        """Return every metric of every variant, one a line: scores, costs, tests against the baseline."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_COLUMNS)
        keys = sorted({key for variant in self.variants for run in variant.runs for key in run.metrics})
        for variant in self.variants:
            for key in keys:
                if key.startswith((f"{self.split}/", "cost/")) and (summary := self.summary(variant, key)) is not None:
                    writer.writerow(self._line(variant, key, summary))
        return out.getvalue()

    def _line(self, variant: Variant, key: str, summary: Summary) -> list[object]:
        half, test = summary.half_width, self.tests.get((variant.name, key))
        low, high = (None, None) if half is None else (summary.mean - half, summary.mean + half)
        seeds = " ".join(f"{seed}:{value:.9g}" for seed, value in variant.by_seed(key).items())
        tested = [None] * 4 if test is None else [test.difference, test.half_width, test.p, test.p_holm]
        numbers = [summary.mean, summary.sd, low, high, *tested]
        told = ["" if number is None else f"{number:.9g}" for number in numbers]
        return [variant.name, key, summary.n, *told[:4], seeds, self.baseline, *told[4:]]


_COLUMNS = [
    "variant",
    "metric",
    "n",
    "mean",
    "sd",
    "ci95_low",
    "ci95_high",
    "by_seed",
    "baseline",
    "difference",
    "difference_ci95_half_width",
    "p_paired_t",
    "p_holm",
]


def choose_baseline(names: Sequence[str], wanted: str | None) -> str:
    """The wanted variant, else one whose name says so, else the first.

    Raises:
        ConfigError: No variant has the wanted name.
    """
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"baseline is '{wanted}', which is not a variant here; they are {', '.join(names)}.")
        return wanted
    return next((name for word in BASELINES for name in names if name.rpartition("/")[2].lower() == word), names[0])


def _score(variants: Sequence[Variant], key: str) -> Score:
    return score_of(key, [value for variant in variants for value in variant.values(key)])
