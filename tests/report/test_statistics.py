"""Intervals and p-values of runs' differences are scipy's, and hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tlx.report import statistics
from tlx.report.statistics import PICTURES, RESAMPLED


def test_a_mean_and_paired_differences_are_students() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(0.8, 0.02, 5), random.normal(0.77, 0.03, 5)
    found = statistics.mean(list(a))
    theirs = stats.t.interval(0.95, 4, loc=a.mean(), scale=stats.sem(a))
    assert (found.low, found.high, found.deviation) == pytest.approx((*theirs, a.std(ddof=1)))
    found, theirs = statistics.paired(list(a), list(b)), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, theirs.pvalue))
    assert found.value == pytest.approx(a.mean() - b.mean())


def test_other_seeds_are_compared_as_welch_does() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(0.8, 0.01, 4), random.normal(0.77, 0.05, 7)
    found, theirs = statistics.welch(list(a), list(b)), stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, theirs.pvalue))


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5]])
def test_one_value_or_the_same_ones_have_no_interval(values: list[float]) -> None:
    found = statistics.mean(values)
    assert (found.value, found.low, found.high, found.p) == (0.5, None, None, None)


def test_resampling_differences_by_their_kinds_is_resampling_pictures() -> None:
    random = np.random.default_rng(2)
    a, b = random.integers(0, 4, 300) / 3, random.integers(0, 3, 300) / 3
    found = statistics.over_pictures(a, b)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, n_resamples=5000, method="percentile",
        vectorized=True, rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert found.method == RESAMPLED
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_intervals_over_pictures_hold_the_truth_as_often_as_they_say() -> None:
    """Of pictures drawn anew again and again; of few pictures and few differences too."""
    random = np.random.default_rng(4)

    def covered(of: int, runs: int, times: int) -> float:
        hits = 0
        for _ in range(times):
            ease = random.random(of) ** 0.3  # a picture is hard for both
            a, b = ((random.random((runs, of)) < ease * share).mean(0) for share in (0.95, 0.85))
            found = statistics.over_pictures(a, b)
            assert found.method == (PICTURES if runs == 1 else RESAMPLED)
            hits += found.low <= 0.1 / 1.3 <= found.high  # the mean of x ** 0.3 is 1 / 1.3
        return hits / times

    assert covered(40, 1, 500) == pytest.approx(0.95, abs=0.025)
    assert covered(200, 3, 150) == pytest.approx(0.95, abs=0.04)


def test_two_runs_that_tell_the_same_of_all_pictures_may_yet_differ_elsewhere() -> None:
    found = statistics.over_pictures(np.ones(50), np.ones(50))
    assert found.low < 0 == found.value < found.high
    assert found.p == 1.0


def test_holm() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.01, 0.04], comparisons=6) == pytest.approx([0.06, 0.2])
    assert statistics.holm([]) == []
