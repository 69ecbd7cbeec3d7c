"""Mean and interval over seeds, and paired tests by seed with Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from scipy import stats

LEVEL = 0.95
"""Confidence level of every interval."""


@dataclass(frozen=True)
class Summary:
    """A metric over seeds.

    Args:
        n: Seeds.
        mean: Mean.
        sd: Sample standard deviation; None for one seed.
        half_width: Half width of the 95 % t interval of the mean; None for one seed.
    """

    n: int
    mean: float
    sd: float | None = None
    half_width: float | None = None


@dataclass(frozen=True)
class PairedTest:
    """A variant against the baseline in one metric, over the seeds that both have.

    Args:
        n: Seeds in common.
        difference: Mean of variant minus baseline.
        half_width: Half width of its 95 % t interval; None for fewer than two seeds.
        p: Two-sided p of the paired t test; None for fewer than two seeds or differences without spread.
        p_holm: The same after Holm's correction over the family; None where ``p`` is.
    """

    n: int
    difference: float
    half_width: float | None = None
    p: float | None = None
    p_holm: float | None = None


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, sd and t interval; None without values."""
    if not values:
        return None
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Summary(1, mean)
    sd = statistics.stdev(values)
    return Summary(n, mean, sd, _half_width(sd, n))


def paired_test(variant: Mapping[int | None, float], baseline: Mapping[int | None, float]) -> PairedTest | None:
    """Compare by seed; None where no seed is in both. A run whose seed is unknown has no partner."""
    seeds = [seed for seed in variant if seed is not None and seed in baseline]
    if not seeds:
        return None
    differences = [variant[seed] - baseline[seed] for seed in seeds]
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return PairedTest(1, mean)
    sd = statistics.stdev(differences)
    half = _half_width(sd, n)
    if sd <= 1e-12 * max(1.0, abs(mean)):
        return PairedTest(n, mean, half)
    return PairedTest(n, mean, half, float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm (1979, Scand. J. Statist. 6:65-70), in the order given.

    The i-th smallest of m is multiplied by m - i + 1, never falls below the one before, and is at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def corrected(tests: Mapping[tuple[str, str], PairedTest]) -> dict[tuple[str, str], PairedTest]:
    """Tests by (variant, score) with Holm's correction over all variants within each score.

    Each score is a separate question; the correction is for the many variants tried on it.
    """
    adjusted: dict[tuple[str, str], float] = {}
    for score in dict.fromkeys(score for _, score in tests):
        family = {key: test.p for key, test in tests.items() if key[1] == score and test.p is not None}
        adjusted |= zip(family, holm(list(family.values())), strict=True)
    return {key: replace(test, p_holm=adjusted.get(key)) for key, test in tests.items()}


def _half_width(sd: float, n: int) -> float:
    return _quantile(n - 1) * sd / math.sqrt(n)


@lru_cache
def _quantile(freedom: int) -> float:
    """Of Student's t, two-sided at the level of the intervals."""
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
