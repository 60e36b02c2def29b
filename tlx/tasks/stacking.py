"""Seen and unseen classes told among all of them, and the constant between both: calibrated stacking.

Chao et al. 2016, "An Empirical Study and Analysis of Generalized Zero-Shot Learning for Object Recognition in the
Wild", arXiv:1605.04253: a constant is taken from the scores of seen classes, which a network that has never been shown
others prefers. A picture is told as a seen class where the highest score of these is ahead of the highest of unseen
ones by the constant or more: all that follows is about this lead, [n].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def harmonic_mean(seen: float, unseen: float) -> float:
    """0 where both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0 if seen + unseen == 0 else math.nan


@dataclass(frozen=True)
class Stacking:
    """Of n pictures, in the order of their ids.

    Attributes:
        classes: how many there are; `unseen`: which of them, bool [classes].
        labels: int64 [n].
        lead: float64 [n], of seen scores over unseen ones; infinite where there are no unseen classes.
        right: bool [n], the highest score of the classes of its kind, seen or unseen, is that of its class.
    """

    classes: int
    unseen: Array
    labels: Array
    lead: Array
    right: Array

    @staticmethod
    def of(scores: Tensor, labels: Tensor, unseen: Sequence[int], answered: Tensor | None) -> Stacking:
        """
        Args:
            scores: float64 [n, classes].
            answered: bool [n]: the others are wrong; None where no picture has an answer, so that nothing is known.
        """
        classes = scores.shape[1]
        is_unseen = torch.zeros(classes, dtype=torch.bool)
        is_unseen[list(unseen)] = True
        if answered is None:
            scores, labels, answered = scores[:0], labels[:0], torch.zeros(0, dtype=torch.bool)
        scores = torch.where(answered[:, None], scores, 0.0)
        of_seen = torch.where(is_unseen, -math.inf, scores)
        of_unseen = torch.where(is_unseen, scores, -math.inf)
        lead = (of_seen.amax(1) - of_unseen.amax(1)) if len(scores) else scores.new_zeros(0)
        own = torch.where(is_unseen[labels][:, None], of_unseen, of_seen)
        right = (own.argmax(1) == labels) & answered if len(scores) else answered
        return Stacking(classes, is_unseen.numpy(), labels.numpy(), lead.numpy(), right.numpy())

    def told(self, constant: float | Array) -> Array:
        """bool [n]: right among all classes.

        Args:
            constant: one, or one for each picture.
        """
        as_seen = self.lead >= constant
        hits: Array = self.right & (as_seen != self._is_unseen)
        return hits

    def share(self, constant: float | Array) -> float:
        return float(self.told(constant).mean()) if len(self.labels) else math.nan

    def by_class(self, constant: float | Array) -> list[float | None]:
        """The share of right pictures of each class; None for one without pictures."""
        return self._by_class(self.told(constant))

    def accuracies(self, constant: float | Array) -> tuple[float, float]:
        """Of seen and of unseen classes: means over those that have pictures, NaN where none has."""
        return self._means(self.told(constant))

    def zsl(self) -> float:
        """Of unseen classes, told among these alone."""
        return self._means(self.right)[1]

    def best(self) -> float:
        """The constant with the highest harmonic mean, half-way between two pictures; of several the one nearest to 0,
        and 0 where one kind of class has no picture."""
        if not self._is_unseen.any() or self._is_unseen.all():
            return 0.0
        constants, seen, unseen = self._curve()
        with np.errstate(invalid="ignore"):
            means = np.nan_to_num(2 * seen * unseen / (seen + unseen))
        highest = constants[means >= means.max() - 1e-12]
        return float(highest[np.abs(highest).argmin()])

    def cross_fitted(self) -> Array:
        """float64 [n]: for every other picture the best constant of the rest, for the rest that of these: a constant
        that is judged by the pictures that it was chosen on flatters."""
        even = np.arange(len(self.labels)) % 2 == 0
        return np.where(even, self._some(~even).best(), self._some(even).best())

    def area(self) -> float:
        """Under the curve of both accuracies over all constants (AUSUC), 0 to 1; NaN where one kind has no picture."""
        if not self._is_unseen.any() or self._is_unseen.all():
            return math.nan
        _, seen, unseen = self._curve()
        return float(((seen[1:] + seen[:-1]) / 2 * np.diff(unseen)).sum())

    @property
    def _is_unseen(self) -> Array:
        of: Array = self.unseen[self.labels]
        return of

    def _some(self, which: Array) -> Stacking:
        return Stacking(self.classes, self.unseen, self.labels[which], self.lead[which], self.right[which])

    def _curve(self) -> tuple[Array, Array, Array]:
        """Constants from below all leads to above all of them; the accuracies of seen classes, which fall, and of
        unseen ones, which rise."""
        leads, place = np.unique(self.lead, return_inverse=True)
        counts = np.bincount(self.labels, minlength=self.classes)
        groups = np.array([np.count_nonzero(counts[~self.unseen]), np.count_nonzero(counts[self.unseen])])
        share = self.right / (counts * groups[self.unseen.astype(int)])[self.labels]
        lost, won = (
            np.bincount(place, np.where(own, share, 0.0), minlength=len(leads))
            for own in (~self._is_unseen, self._is_unseen)
        )
        seen = lost.sum() - np.concatenate([[0.0], np.cumsum(lost)])
        unseen = np.concatenate([[0.0], np.cumsum(won)])
        constants = np.concatenate([[leads[0] - 1], (leads[1:] + leads[:-1]) / 2, [leads[-1] + 1]])
        return constants, seen, unseen

    def _by_class(self, hits: Array) -> list[float | None]:
        counts = np.bincount(self.labels, minlength=self.classes)
        right = np.bincount(self.labels, hits, minlength=self.classes)
        return [float(r / n) if n else None for r, n in zip(right, counts, strict=True)]

    def _means(self, hits: Array) -> tuple[float, float]:
        each = np.array([math.nan if of is None else of for of in self._by_class(hits)])
        kinds = (each[~self.unseen], each[self.unseen])
        seen, unseen = (float(of[~np.isnan(of)].mean()) if (~np.isnan(of)).any() else math.nan for of in kinds)
        return seen, unseen
