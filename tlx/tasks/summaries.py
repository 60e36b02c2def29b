"""What targets of shards are like in an epoch as it is trained on: what a task is made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import LABEL, Target
from tlx.data.stream.order import Ids, share
from tlx.data.stream.sampling import Sampling, entries, targets
from tlx.tasks import TargetSummary

_PART = 1 << 20


def summaries(manifest: Manifest, sampling: Sampling, seed: int) -> dict[str, TargetSummary]:
    """Of every target, by name.

    Args:
        seed: of the draws of `sampling`: what is drawn anew in each epoch is that of the first one.
    """
    ids = entries(sampling, manifest.labels, len(manifest.classes), seed, 0) if len(manifest.targets) > 1 else None
    found = {}
    for name, target in manifest.targets.items():
        if name == LABEL:
            counts = targets(sampling, manifest.counts())
            found[name] = TargetSummary(target, tuple(counts.tolist()), int(counts.sum()))
        else:
            found[name] = _summary(target, manifest.values(name), ids)
    return found


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
        for part in _parts(values, ids):
            counts += np.bincount(part[part >= 0], minlength=len(counts))
        return TargetSummary(target, tuple(counts.tolist()), int(counts.sum()))
    if target.kind == "labels":
        yes, known = np.zeros((2, len(target.classes)), np.int64)
        for part in _parts(values, ids):
            yes += (part == 1).sum(0)
            known += (part >= 0).sum(0)
        return TargetSummary(target, tuple(yes.tolist()), tuple(known.tolist()))
    return _of_numbers(target, values, ids)


def _of_numbers(target: Target, values: NDArray[Any], ids: Ids | None) -> TargetSummary:
    """The mean first, then deviations from it: large numbers that differ little lose nothing."""
    known, total = np.zeros(target.width, np.int64), np.zeros(target.width)
    for part in _parts(values, ids):
        there = ~np.isnan(part)
        known += there.sum(0)
        total += np.where(there, part.astype(np.float64), 0.0).sum(0)
    mean = total / np.maximum(known, 1)
    squares = np.zeros(target.width)
    for part in _parts(values, ids):
        squares += np.nansum((part.astype(np.float64) - mean) ** 2, 0)
    std = np.sqrt(squares / np.maximum(known, 1))
    return TargetSummary(target, (), tuple(known.tolist()), tuple(mean.tolist()), tuple(std.tolist()))


def _parts(values: NDArray[Any], ids: Ids | None) -> Iterator[NDArray[Any]]:
    for start in range(0, len(values) if ids is None else len(ids), _PART):
        yield values[start : start + _PART] if ids is None else values[ids[start : start + _PART]]
