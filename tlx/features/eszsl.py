"""A map from features to class vectors in closed form: ESZSL.

Romera-Paredes and Torr 2015, "An embarrassingly simple approach to zero-shot learning", ICML, equation 9: features X,
targets Y of 1 for the class and -1 for others, class vectors S,
``V = (X X' + gamma I)^-1 X Y S' (S S' + lambda I)^-1``; a class's score is ``x' V s``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(-3, 4))
"""Of both penalties, in units of the mean eigenvalue of what each is added to, so that no scale of features matters."""

_FOLDS = 5


@dataclass(frozen=True)
class Solved:
    """
    Attributes:
        weight: float32 [width, features], V'.
        gamma, lambda_: the penalties as they were tried, in units of the mean eigenvalue.
        accuracy: of classes held out, told among themselves, the mean over them; None where there were too few to
        choose.
    """

    weight: Tensor
    gamma: float
    lambda_: float
    accuracy: float | None


def solved_map(
    features: Tensor,
    labels: Tensor,
    vectors: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    beat: Callable[[], None] = lambda: None,
) -> Solved:
    """The map, with penalties chosen by holding out classes: each of them is once among those that nothing was fitted
    on, as unseen classes are. With fewer than four classes both are 1.

    Args:
        features: float [n, width of features].
        labels: int64 [n], places of `vectors`.
        vectors: float [classes, width], of classes that have features.
        beat: called for each fold.
    """
    features, vectors = features.double(), vectors.double()
    present = torch.unique(labels)
    folds = min(_FOLDS, len(present) // 2)
    pairs = list(itertools.product(strengths, strengths))
    best, score = (1.0, 1.0), None
    if folds >= 2 and len(pairs) > 1:
        scores = torch.zeros(len(pairs), dtype=torch.float64)
        for fold in range(folds):
            beat()
            held = present[fold::folds]
            scores += _held_out(features, labels, vectors, held.contiguous(), pairs) * len(held) / len(present)
        # of equals, the stronger penalties
        place = max(range(len(pairs)), key=lambda i: (round(float(scores[i]), 9), pairs[i][0] * pairs[i][1]))
        best, score = pairs[place], float(scores[place])
    fit = _Fit.of(features, labels, vectors, present)
    return Solved(fit.map(*best).T.float().contiguous(), *best, score)


def _held_out(
    features: Tensor, labels: Tensor, vectors: Tensor, held: Tensor, pairs: Sequence[tuple[float, float]]
) -> Tensor:
    """float64 [pairs]: the mean over held-out classes of the share of right rows, told among these."""
    out = torch.isin(labels, held)
    known = torch.unique(labels[~out])
    fit = _Fit.of(features[~out], labels[~out], vectors, known)
    own = torch.searchsorted(held, labels[out])
    counts = torch.bincount(own, minlength=len(held))
    found = []
    for gamma, lambda_ in pairs:
        told = (features[out] @ fit.map(gamma, lambda_) @ vectors[held].T).argmax(1)
        hits = torch.bincount(own, (told == own).double(), minlength=len(held))
        found.append((hits / counts).mean())
    return torch.stack(found)


@dataclass(frozen=True)
class _Fit:
    """Both symmetric matrices by their eigenvectors, so that another penalty costs two products.

    Attributes:
        inner: X Y S' between both bases of eigenvectors.
    """

    left: Tensor
    left_values: Tensor
    right: Tensor
    right_values: Tensor
    inner: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor, vectors: Tensor, classes: Tensor) -> _Fit:
        """Of rows whose classes are `classes`, ascending."""
        own = vectors[classes]
        sums = features.new_zeros(len(classes), features.shape[1])
        sums.index_add_(0, torch.searchsorted(classes, labels), features)
        targets = 2 * sums - features.sum(0)  # rows of (X Y)': 1 for the class, -1 for others
        left_values, left = torch.linalg.eigh(features.T @ features)
        right_values, right = torch.linalg.eigh(own.T @ own)
        return _Fit(left, left_values, right, right_values, left.T @ (targets.T @ own) @ right)

    def map(self, gamma: float, lambda_: float) -> Tensor:
        """V, [features, width]."""
        first = self.left_values.clamp(min=0) + gamma * self.left_values.clamp(min=0).mean()
        second = self.right_values.clamp(min=0) + lambda_ * self.right_values.clamp(min=0).mean()
        return self.left @ (self.inner / first[:, None] / second[None, :]) @ self.right.T
