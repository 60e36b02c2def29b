"""What targets of shards are like in an epoch as it is trained on: what a task is made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.data.shards.manifest import Manifest
from tlx.data.shards.target_arrays import parts
from tlx.data.shards.targets import LABEL, Target
from tlx.data.stream.order import Ids, share
from tlx.data.stream.sampling import Sampling, entries, targets
from tlx.tasks import TargetSummary


def summaries(manifest: Manifest, sampling: Sampling, seed: int) -> dict[str, TargetSummary]:
    """Of every target, by name; targets beside the class are read and counted when somebody asks.

    Args:
        seed: of the draws of `sampling`: what is drawn anew in each epoch is that of the first one.
    """

    def counted(target: Target) -> TargetSummary:
        ids = entries(sampling, manifest.labels, len(manifest.classes), seed, 0)
        return _summary(target, manifest.values(target.name), ids)

    found: dict[str, TargetSummary] = {}
    for name, target in manifest.targets.items():
        if name == LABEL:
            counts = targets(sampling, manifest.counts())
            found[name] = TargetSummary(target, tuple(counts.tolist()), int(counts.sum()))
        else:
            found[name] = _Counted(target, partial(counted, target))
    return found


class _Counted(TargetSummary):
    """Counted when a number is first asked for; its kind and its classes are known before."""

    _count: Callable[[], TargetSummary]

    def __init__(self, target: Target, count: Callable[[], TargetSummary]) -> None:
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "_count", cache(count))

    @property
    def counts(self) -> tuple[int, ...]:  # type: ignore[override]
        return self._count().counts

    @property
    def known(self) -> int | tuple[int, ...]:  # type: ignore[override]
        return self._count().known

    @property
    def mean(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._count().mean

    @property
    def std(self) -> tuple[float, ...]:  # type: ignore[override]
        return self._count().std


def expected_targets(
    counts: tuple[int, ...], names: tuple[str, ...], others: Iterable[Target] = (), samples: int = 0
) -> dict[str, TargetSummary]:
    """Of shards that are not built yet, as if no sample lacked a target: classes of one size, numbers that vary by 1.

    Args:
        counts, names: of classes; empty where there will be none.
    """
    own = {LABEL: TargetSummary(Target(LABEL, "class", names), counts, sum(counts))} if names else {}
    return own | {target.name: _expected(target, samples) for target in others}


def _expected(target: Target, samples: int) -> TargetSummary:
    if target.kind == "number":
        width = target.width
        return TargetSummary(target, (), (samples,) * width, (0.0,) * width, (1.0,) * width)
    classes = len(target.classes)
    if target.kind == "labels":
        return TargetSummary(target, (max(samples // 2, 1),) * classes, (samples,) * classes)
    return TargetSummary(target, tuple(len(share(samples, classes, c)) for c in range(classes)), samples)


def _summary(target: Target, values: NDArray[Any], ids: Ids | None) -> TargetSummary:
    if target.kind == "class":
        counts = np.zeros(len(target.classes), np.int64)
        for part in parts(values, ids):
            counts += np.bincount(part[part >= 0], minlength=len(counts))
        return TargetSummary(target, tuple(counts.tolist()), int(counts.sum()))
    if target.kind == "labels":
        yes, known = np.zeros((2, len(target.classes)), np.int64)
        for part in parts(values, ids):
            yes += (part == 1).sum(0)
            known += (part >= 0).sum(0)
        return TargetSummary(target, tuple(yes.tolist()), tuple(known.tolist()))
    return _of_numbers(target, values, ids)


def _of_numbers(target: Target, values: NDArray[Any], ids: Ids | None) -> TargetSummary:
    """The mean first, then deviations from it: large numbers that differ little lose nothing."""
    known, total = np.zeros(target.width, np.int64), np.zeros(target.width)
    for part in parts(values, ids):
        there = ~np.isnan(part)
        known += there.sum(0)
        total += np.where(there, part.astype(np.float64), 0.0).sum(0)
    mean = total / np.maximum(known, 1)
    squares = np.zeros(target.width)
    for part in parts(values, ids):
        squares += np.nansum((part.astype(np.float64) - mean) ** 2, 0)
    std = np.sqrt(squares / np.maximum(known, 1))
    return TargetSummary(target, (), tuple(known.tolist()), tuple(mean.tolist()), tuple(std.tolist()))
