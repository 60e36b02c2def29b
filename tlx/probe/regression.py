"""Multinomial logistic regression on features, beside whatever is trained: by L-BFGS, over a range of C."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tlx.features.knn import Table
from tlx.features.solve import fitted

CS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Tried by default."""

FOLDS = 5
_EXACT = 1 << 25  # numbers, up to which they are float64
_LEAST = 1e-6  # deviation
_ITERATIONS = 1000


@dataclass(frozen=True)
class Scale:
    """Features less their mean, by their deviation over the training rows; constant ones become 0."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Scale:
        deviation = rows.std(0, unbiased=False)
        return cls(rows.mean(0), deviation.masked_fill(deviation < _LEAST, torch.inf))

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows.to(self.mean.dtype) - self.mean) / self.deviation


@dataclass(frozen=True)
class Regression:
    """What was fitted: logits are those of scaled features."""

    c: float
    scale: Scale
    weight: Tensor
    bias: Tensor

    def logits(self, rows: Tensor) -> Tensor:
        """float64 [n, classes]."""
        return (self.scale(rows) @ self.weight.T + self.bias).double()


def regressions(table: Table, classes: int, cs: Sequence[float]) -> Iterator[Regression]:
    """One for each C, from the smallest on; each begins where the one before has ended.

    C is scikit-learn's: the sum of losses over rows times C, and half the squared norm of the weights, biases left out.
    Features are scaled as its StandardScaler does.
    """
    rows = table.rows.double() if table.rows.numel() <= _EXACT else table.rows
    scale = Scale.of(rows)
    scaled, start = scale(rows), None
    for c in sorted(cs):
        weight, bias = fitted(scaled, table.labels, classes, 1 / (c * len(rows)), start=start, iterations=_ITERATIONS)
        start = (weight, bias)
        yield Regression(c, scale, weight, bias)


def folds(table: Table, seed: int, many: int = FOLDS) -> Tensor:
    """int64 [n]: of each row its fold. Views of a picture are in one; the pictures of each class are dealt in an order
    that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(len(table.labels), dtype=torch.int64)
    for label in table.labels.unique().tolist():  # type: ignore[no-untyped-call]
        own = table.labels == label
        places, which = table.pictures[own].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        dealt = torch.empty(len(places), dtype=torch.int64)
        # each class begins at another fold: else the first ones would hold all remainders
        dealt[torch.randperm(len(places), generator=generator)] = (torch.arange(len(places)) + label) % many
        found[own] = dealt[which]
    return found


def chosen_c(table: Table, classes: int, cs: Sequence[float], seed: int) -> float:
    """The C with the highest accuracy in cross-validation on these rows, of equal ones that with the lower loss."""
    if len(cs) == 1:
        return cs[0]
    fold, scores = folds(table, seed), dict.fromkeys(sorted(cs), (0.0, 0.0))
    for held_out in fold.unique().tolist():  # type: ignore[no-untyped-call]
        out, kept = table.of(fold == held_out), table.of(fold != held_out)
        if not len(kept.labels):
            return sorted(cs)[len(cs) // 2]
        for found in regressions(kept, classes, cs):
            logits = found.logits(out.rows)
            hits, loss = scores[found.c]
            hits += float((logits.argmax(1) == out.labels).sum())
            scores[found.c] = hits, loss - float(cross_entropy(logits, out.labels, reduction="sum"))
    return max(scores, key=lambda c: scores[c])


def fit(table: Table, classes: int, cs: Sequence[float], seed: int) -> Regression:
    """On all rows, with the C of :func:`chosen_c`."""
    return next(regressions(table, classes, [chosen_c(table, classes, cs, seed)]))
