"""What may be chance: intervals of a share, and of differences between two networks over the same pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlx.runs.predictions import Part, Predictions

Z = 1.959964
"""Of 95 %."""

RESAMPLES = 10_000


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not of:
        return math.nan, math.nan
    share, spread = right / of, Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class Difference:
    """How much better the second of two networks is, and its 95 % interval.

    Attributes:
        unit: what is compared, in words.
        gained, lost: pictures that it alone has right, and the first alone; None where right is no yes or no.
    """

    value: float
    low: float
    high: float
    pictures: int
    unit: str
    gained: int | None = None
    lost: int | None = None

    @property
    def is_chance(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high


def difference(first: Predictions, second: Predictions, place: int = 0) -> Difference | None:
    """Of a part, over pictures that both have; None where they are not of the same pictures.

    Of a class or rank: the share of right ones, by resampling how many pictures the one or the other alone has right;
    of labels: the share of known labels told rightly, of numbers: the mean absolute error, by the normal approximation.
    """
    if first.digest != second.digest or len(first.parts) != len(second.parts):
        return None
    one, other = first.parts[place], second.parts[place]
    if one.about != other.about:
        return None
    _, of_first, of_second = np.intersect1d(first.ids, second.ids, assume_unique=True, return_indices=True)
    known = one.known[of_first]
    if not known.any():
        return None
    rows = of_first[known], of_second[known]
    if one.kind in ("class", "rank"):
        return _of_hits(one.right[rows[0]], other.right[rows[1]])
    before, after = goodness(one)[rows[0]], goodness(other)[rows[1]]
    each = after - before
    half = Z * float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    value = float(each.mean())
    unit = "known labels told rightly" if one.kind == "labels" else "lower mean absolute error"
    return Difference(value, value - half, value + half, len(each), unit)


def goodness(part: Part) -> NDArray[np.float64]:
    """[n], higher is better: whether a class or rank is right; the share of known labels told rightly; of numbers the
    mean absolute error, negative. NaN where nothing is known."""
    if part.kind in ("class", "rank"):
        return np.where(part.known, part.right, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        if part.kind == "labels":
            known = part.truth >= 0
            return np.asarray(((part.told == (part.truth == 1)) & known).sum(1) / known.sum(1))
        known = ~np.isnan(part.truth)
        errors = np.where(known, np.abs(part.told - part.truth), 0.0).astype(np.float64)
        return np.asarray(-errors.sum(1) / known.sum(1))


def _of_hits(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Difference:
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    unit = "accuracy"
    if not gained + lost:  # no picture differs: of so few, three could without being seen (rule of three)
        return Difference(0.0, -3 / n, 3 / n, n, unit, 0, 0)
    drawn = np.random.default_rng(0).multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    return Difference((gained - lost) / n, float(low), float(high), n, unit, gained, lost)
