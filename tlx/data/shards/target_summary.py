"""How often the values of targets come in an index: counts, pairs of labels, means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import LABEL, Kind, Target

_PART = 1 << 18  # rows that are looked at together
_PAIRED = 512  # labels, the most frequent ones, whose pairs are counted
_PAIRS = 10


@dataclass(frozen=True)
class Column:
    """One number of a target, over the samples that have it."""

    least: float
    mean: float
    most: float
    std: float


@dataclass(frozen=True)
class Pair:
    """Two labels: how many samples both apply to, and the share of those that the rarer one applies to."""

    labels: tuple[str, str]
    samples: int
    share: float


@dataclass(frozen=True)
class TargetSummary:
    """A target of an index.

    Attributes:
        missing: samples that lack it; of labels those of which nothing is known.
        counts: class -> samples, label -> samples that it applies to; in the order of `classes`.
        known: label -> samples of which it is known whether it applies.
        cardinality: how many labels apply to a sample of which any is known, on average.
        pairs: labels that come together most often.
        columns: of numbers; none where every sample lacks them.
    """

    name: str
    kind: Kind
    samples: int
    missing: int
    counts: dict[str, int]
    known: dict[str, int]
    cardinality: float | None = None
    pairs: tuple[Pair, ...] = ()
    columns: tuple[Column, ...] = ()


def summarise_targets(manifest: Manifest) -> tuple[TargetSummary, ...]:
    """Of each target beside the class."""
    return tuple(_summary(target, manifest.values(name)) for name, target in manifest.targets.items() if name != LABEL)


def _summary(target: Target, values: NDArray[Any]) -> TargetSummary:
    if target.kind == "class":
        return _of_class(target, values)
    return _of_labels(target, values) if target.kind == "labels" else _of_number(target, values)


def _of_class(target: Target, values: NDArray[np.int32]) -> TargetSummary:
    counts = np.zeros(len(target.classes) + 1, np.int64)
    for start in range(0, len(values), _PART):
        counts += np.bincount(values[start : start + _PART].astype(np.int64) + 1, minlength=len(counts))
    named = dict(zip(target.classes, counts[1:].tolist(), strict=True))
    return TargetSummary(target.name, target.kind, len(values), int(counts[0]), named, {})


def _of_labels(target: Target, values: NDArray[np.int8]) -> TargetSummary:
    yes, known = np.zeros(len(target.classes), np.int64), np.zeros(len(target.classes), np.int64)
    missing = 0
    for start in range(0, len(values), _PART):
        part = values[start : start + _PART]
        yes += (part == 1).sum(0)
        known += (part >= 0).sum(0)
        missing += int((part < 0).all(1).sum())
    told = len(values) - missing
    return TargetSummary(
        target.name,
        target.kind,
        len(values),
        missing,
        dict(zip(target.classes, yes.tolist(), strict=True)),
        dict(zip(target.classes, known.tolist(), strict=True)),
        cardinality=int(yes.sum()) / told if told else None,
        pairs=_pairs(target, values, yes),
    )


def _pairs(target: Target, values: NDArray[np.int8], yes: NDArray[np.int64]) -> tuple[Pair, ...]:
    chosen = np.sort(np.argsort(-yes, kind="stable")[:_PAIRED])
    together = np.zeros((len(chosen), len(chosen)), np.int64)
    for start in range(0, len(values), _PART):
        applies = (values[start : start + _PART, chosen] == 1).astype(np.float32)  # exact up to 2^24 rows
        together += (applies.T @ applies).astype(np.int64)
    one, other = np.triu_indices(len(chosen), 1)
    counts = together[one, other]
    found = []
    for i in np.argsort(-counts, kind="stable")[:_PAIRS]:
        if counts[i]:
            a, b = int(chosen[one[i]]), int(chosen[other[i]])
            share = int(counts[i]) / int(min(yes[a], yes[b]))
            found.append(Pair((target.classes[a], target.classes[b]), int(counts[i]), share))
    return tuple(found)


def _of_number(target: Target, values: NDArray[np.float32]) -> TargetSummary:
    has = np.concatenate([_has(values[s : s + _PART]) for s in range(0, len(values), _PART)] or [np.zeros(0, bool)])
    columns = []
    for column in range(target.width if has.any() else 0):
        own = values[:, column][has].astype(np.float64)
        # fsum is exact, so that the same numbers come out on every machine
        mean = math.fsum(own) / len(own)
        std = math.sqrt(math.fsum((own - mean) ** 2) / len(own))
        columns.append(Column(float(own.min()), mean, float(own.max()), std))
    missing = len(values) - int(has.sum())
    return TargetSummary(target.name, target.kind, len(values), missing, {}, {}, columns=tuple(columns))


def _has(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.logical_not(np.isnan(values).any(axis=1))
    return found
