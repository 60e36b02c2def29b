"""What predictions say by class: counts, confusions, how sure the network is and how right. Arrays, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlx.runs.predictions import Part

BINS = 15
"""Of the calibration error, as in :data:`tlx.use.judged.BINS`."""

Matrix = NDArray[np.int64]


@dataclass(frozen=True)
class ClassRow:
    """A class, rank or label among the pictures.

    Attributes:
        support: pictures that it is the truth of; `told`: that it was told of.
        precision, recall, f1: NaN where nothing tells: of recall and F1 without support, of precision where it was
            never told.
    """

    name: str
    support: int
    told: int
    precision: float
    recall: float
    f1: float


def by_class(part: Part) -> list[ClassRow]:
    """Of a class, rank or labels, in the order of names."""
    if part.kind == "labels":
        known, yes = part.truth >= 0, part.truth == 1
        told = part.told & known
        counts = np.stack([yes.sum(0), told.sum(0), (told & yes).sum(0)])
    else:
        matrix = confusion(part)
        answered = part.told[part.known]
        of_told = np.bincount(answered[answered >= 0], minlength=len(part.names))
        support = np.bincount(part.truth[part.known], minlength=len(part.names))
        counts = np.stack([support, of_told, matrix.diagonal()])
    return [_row(name, *map(int, of)) for name, of in zip(part.names, counts.T, strict=True)]


def _row(name: str, support: int, told: int, right: int) -> ClassRow:
    nan = float("nan")
    f1 = 2 * right / (support + told) if support else nan
    return ClassRow(name, support, told, right / told if told else nan, right / support if support else nan, f1)


def confusion(part: Part) -> Matrix:
    """[classes, classes] of a class or rank: of the truth (row), told as (column); those without an answer are left
    out."""
    classes, counted = len(part.names), part.known & (part.told >= 0)
    flat = part.truth[counted].astype(np.int64) * classes + part.told[counted]
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class Confusion:
    """Of one class told as another; `of`: pictures of the class."""

    truth: str
    told: str
    pictures: int
    of: int


def largest_confusions(part: Part, most: int) -> list[Confusion]:
    """The most frequent first."""
    matrix = confusion(part)
    support = np.bincount(part.truth[part.known], minlength=len(part.names))
    np.fill_diagonal(matrix, 0)
    rows, columns = matrix.nonzero()
    order = np.lexsort((columns, rows, -matrix[rows, columns]))[:most]
    return [
        Confusion(part.names[i], part.names[j], int(matrix[i, j]), int(support[i]))
        for i, j in zip(rows[order], columns[order], strict=True)
    ]


def most_confused(matrix: Matrix, most: int) -> NDArray[np.int64]:
    """Classes that take part in the most frequent confusions, in their order: at most so many."""
    both = matrix + matrix.T
    rows, columns = np.triu(both, 1).nonzero()
    order = np.lexsort((columns, rows, -both[rows, columns]))
    pairs = np.stack([rows[order], columns[order]], 1).ravel()
    seen = list(dict.fromkeys(pairs.tolist()))[:most]
    return np.array(sorted(seen) or range(min(most, len(matrix))), np.int64)


def similar_order(matrix: Matrix) -> list[int]:
    """Classes so that those that are confused stand together: chains are joined at their ends, the most confused pair
    first (as single linkage clusters); the rest in their order."""
    classes = len(matrix)
    both = matrix + matrix.T
    rows, columns = np.triu(both, 1).nonzero()
    order = np.lexsort((columns, rows, -both[rows, columns]))
    chain_of: dict[int, list[int]] = {i: [i] for i in range(classes)}
    for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        one, other = chain_of[i], chain_of[j]
        if one is other:
            continue
        joined = (one if one[-1] == i else one[::-1]) + (other if other[0] == j else other[::-1])
        for place in joined:
            chain_of[place] = joined
    chains = {id(chain): chain for chain in chain_of.values()}
    return [place for chain in sorted(chains.values(), key=lambda c: (-len(c), min(c))) for place in chain]


@dataclass(frozen=True)
class Reliability:
    """How sure against how right, in `BINS` bins of equal width.

    Attributes:
        count: decisions in each bin; `confidence`, `accuracy`: their means, NaN where there are none.
        ece: the expected calibration error (Guo et al. 2017): the mean distance of the two over decisions.
    """

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    ece: float

    @property
    def gap(self) -> float:
        """Mean confidence less accuracy: above 0 the network is surer than it is right."""
        there = self.count > 0
        shares = self.count[there] / self.count.sum()
        return float((shares * (self.confidence[there] - self.accuracy[there])).sum())


def reliability(part: Part) -> Reliability | None:
    """Of a class or rank: of what was told; of labels: of each known decision, for the probability that the label
    applies. None without any."""
    if part.kind == "labels":
        known = part.truth >= 0
        sure, right = part.probabilities[known].astype(np.float64), part.truth[known] == 1
    else:
        counted = part.known & (part.told >= 0)
        sure, right = part.confidence[counted].astype(np.float64), part.right[counted]
    if not len(sure) or np.isnan(sure).any():
        return None
    bins = np.clip((sure * BINS).astype(np.int64), 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, sure, BINS) / count
        accuracy = np.bincount(bins, right.astype(np.float64), BINS) / count
    ece = float(np.nansum(np.abs(confidence - accuracy) * count) / len(sure))
    return Reliability(count, confidence, accuracy, ece)


def never_told(rows: Sequence[ClassRow]) -> list[str]:
    """Classes that are among the pictures and were told of none."""
    return [row.name for row in rows if row.support and not row.told]


@dataclass(frozen=True)
class ColumnRow:
    """A column of numbers: errors are told less true, in its own units; NaN without a known value."""

    name: str
    known: int
    mae: float
    rmse: float
    bias: float
    worst: float


def by_column(part: Part) -> list[ColumnRow]:
    rows = []
    for i, name in enumerate(part.names):
        known = ~np.isnan(part.truth[:, i])
        errors = (part.told[known, i] - part.truth[known, i]).astype(np.float64)
        if not len(errors):
            rows.append(ColumnRow(name, 0, *[float("nan")] * 4))
            continue
        size = np.abs(errors)
        rmse = float(np.sqrt((errors**2).mean()))
        rows.append(ColumnRow(name, len(errors), float(size.mean()), rmse, float(errors.mean()), float(size.max())))
    return rows
