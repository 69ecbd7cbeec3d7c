"""Intervals, paired tests and Holm's correction, against scipy and by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from visexpert.report.compare.statistics import PairedTest, corrected, holm, paired_test, summarize


def test_the_interval_is_that_of_student() -> None:
    values = [0.71, 0.74, 0.69, 0.73]
    summary = summarize(values)
    assert summary is not None and summary.half_width is not None and summary.n == 4
    low, high = stats.t.interval(0.95, 3, loc=summary.mean, scale=stats.sem(values))
    assert (summary.mean - summary.half_width, summary.mean + summary.half_width) == pytest.approx((low, high))


def test_three_seeds_by_hand() -> None:
    """1, 2, 3: mean 2, sd 1, and t of two degrees of freedom is 4.303."""
    summary = summarize([1.0, 2.0, 3.0])
    assert summary is not None and summary.mean == 2 and summary.sd == 1
    assert summary.half_width == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


def test_one_value_has_no_interval_and_none_no_summary() -> None:
    summary = summarize([0.5])
    assert summary is not None and (summary.n, summary.sd, summary.half_width) == (1, None, None)
    assert summarize([]) is None


def test_the_paired_test_is_scipys_over_the_seeds_in_common() -> None:
    variant: dict[int | None, float] = {0: 0.80, 1: 0.82, 2: 0.79, 3: 0.85, None: 0.1}
    baseline: dict[int | None, float] = {3: 0.80, 2: 0.78, 0: 0.77, 5: 0.1, None: 0.9}
    test = paired_test(variant, baseline)
    assert test is not None and test.n == 3
    expected = stats.ttest_rel([0.80, 0.79, 0.85], [0.77, 0.78, 0.80])
    assert test.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert test.half_width is not None
    assert (test.difference - test.half_width, test.difference + test.half_width) == pytest.approx((low, high))


def test_where_nothing_can_be_tested_there_is_no_p() -> None:
    assert paired_test({0: 1.0}, {1: 1.0}) is None
    assert paired_test({0: 1.0}, {0: 0.5}) == PairedTest(1, 0.5)
    same = paired_test({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5})
    assert same is not None and same.p is None and same.half_width == 0


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04 times 4 3 2 1 gives .02 .03 .06 .04, and the last may not fall below .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_score_is_a_family_of_its_own() -> None:
    tests = {
        ("a", "vqa"): PairedTest(3, 0.1, 0.1, 0.01),
        ("b", "vqa"): PairedTest(3, 0.1, 0.1, 0.03),
        ("a", "nll"): PairedTest(3, 0.1, 0.1, 0.04),
        ("b", "nll"): PairedTest(1, 0.1),
    }
    found = {key: test.p_holm for key, test in corrected(tests).items()}
    assert found == {("a", "vqa"): 0.02, ("b", "vqa"): 0.03, ("a", "nll"): 0.04, ("b", "nll"): None}
