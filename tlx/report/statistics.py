"""Means and differences of runs with 95 % intervals. Each says by what method, and `SOURCES` whose that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000

T = "t-interval"
PAIRED = "paired t-interval over seeds"
WELCH = "Welch's t-interval over seeds"
PICTURES = "adjusted Wald interval over pictures"
RESAMPLED = "paired bootstrap over pictures"

SOURCES: Mapping[str, str] = {
    T: "Student 1908, The Probable Error of a Mean, Biometrika 6",
    PAIRED: "Student 1908, of the differences between runs of the same seed",
    WELCH: "Welch 1947, Biometrika 34: two means of seeds that are not the same, of unequal variance",
    PICTURES: "Bonett and Price 2012, J. Educ. Behav. Stat. 37: two shares of the same pictures, as McNemar's test",
    RESAMPLED: f"Efron and Tibshirani 1993, chapter 13: percentiles of {RESAMPLES:,} resamples of the pictures",
    "Holm": "Holm 1979, Scand. J. Stat. 6: p-values of several comparisons, so that any wrong claim has 5 %",
}


@dataclass(frozen=True)
class Estimate:
    """A mean, or the difference of two, in the unit of the metric.

    Attributes:
        n: of values, or of pairs; of pictures.
        deviation: standard deviation of the values or differences; None of one.
        low, high: the 95 % interval; None where there is none: of one value, or of values that are all the same.
        p: of a difference, that of no difference by the same method; None where there is no interval.
    """

    value: float
    n: int
    method: str
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def data(self) -> dict[str, Any]:
        return dict(vars(self))


def mean(values: Sequence[float], method: str = T) -> Estimate:
    """The mean of values, at least one, with Student's t-interval."""
    n, middle = len(values), float(np.mean(values))
    deviation = float(np.std(values, ddof=1)) if n > 1 else None
    if deviation is None or deviation <= 1e-12 * max(1.0, abs(middle)):
        return Estimate(middle, n, method, deviation)
    return _by_t(middle, deviation / math.sqrt(n), n - 1, n, method, deviation)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of first - second, values of the same seeds, at least one."""
    return mean([a - b for a, b in zip(first, second, strict=True)], PAIRED)


def welch(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """mean(first) - mean(second), at least two values each, of any seeds."""
    value, n = float(np.mean(first) - np.mean(second)), len(first) + len(second)
    parts = [float(np.var(own, ddof=1)) / len(own) for own in (first, second)]
    total = sum(parts)
    if total <= 1e-24:
        return Estimate(value, n, WELCH)
    freedom = total**2 / sum(part**2 / (len(own) - 1) for part, own in zip(parts, (first, second), strict=True))
    return _by_t(value, math.sqrt(total), freedom, n, WELCH)


def over_pictures(first: NDArray[Any], second: NDArray[Any]) -> Estimate:
    """mean(first) - mean(second) over the same pictures: what other pictures of the same kind would change, the runs
    being as they are. Of one run against one, Bonett and Price's interval; else the pictures are resampled.

    Args:
        first, second: [n] float, n > 0: the share of the runs of a group that were right; of one run 0 or 1.
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if set(np.unique(first)) | set(np.unique(second)) <= {0.0, 1.0}:
        return _of_two_shares(differences)
    # pictures of the same difference are alike: a resample is how many it has of each kind
    kinds, counts = np.unique(differences.round(9), return_counts=True)
    n = len(differences)
    if len(kinds) == 1:
        return Estimate(float(kinds[0]), n, RESAMPLED, 0.0)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, size=RESAMPLES) @ kinds / n
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tails = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    value, deviation = float(differences.mean()), float(differences.std())
    p = min(1.0, 2 * (tails + 1) / (RESAMPLES + 1))
    return Estimate(value, n, RESAMPLED, deviation, float(low), float(high), p)


def holm(ps: Sequence[float], comparisons: int | None = None) -> list[float]:
    """p-values adjusted for as many comparisons as they are, or more: those below 0.05 hold together."""
    m = max(len(ps), comparisons or 0)
    adjusted, least = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = adjusted[i] = max(least, min(1.0, (m - rank) * ps[i]))
    return adjusted


def _by_t(value: float, error: float, freedom: float, n: int, method: str, deviation: float | None = None) -> Estimate:
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(value) / error))
    return Estimate(value, n, method, deviation, value - half, value + half, p)


def _of_two_shares(differences: NDArray[np.float64]) -> Estimate:
    from scipy.special import ndtr, ndtri

    n = len(differences)
    more, less = ((int((sign * differences > 0).sum()) + 1) / (n + 2) for sign in (1, -1))
    middle, error = more - less, math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    half = float(ndtri((1 + LEVEL) / 2)) * error
    value, deviation = float(differences.mean()), float(differences.std())
    p = 2 * float(ndtr(-abs(middle) / error))
    return Estimate(value, n, PICTURES, deviation, max(-1.0, middle - half), min(1.0, middle + half), p)
