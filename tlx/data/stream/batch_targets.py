"""Targets of the samples of a batch, and what a global batch's samples weigh in the loss: from the index alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import UserError
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import LABEL
from tlx.data.stream.mix import Draws, weight_sums
from tlx.data.stream.order import Ids

Values: TypeAlias = Mapping[str, NDArray[Any]]
Weigh: TypeAlias = Callable[[Values], "NDArray[np.float64] | None"]
"""From the values of the n samples of a global batch, by target, what they weigh: [n, parts], or None for 1 each."""


def values_of(manifest: Manifest, names: Iterable[str], ids: Ids) -> dict[str, NDArray[Any]]:
    """Values of samples by target: int64 [m] of a class, int8 [m, classes] of labels, float32 [m, width] of numbers."""
    found: dict[str, NDArray[Any]] = {}
    for name in names:
        values = manifest.values(name)[ids]
        found[name] = values.astype(np.int64) if values.dtype == np.int32 else values
    return found


def as_tensors(values: Values) -> dict[str, Tensor]:
    """The same memory as tensors."""
    return {name: torch.from_numpy(array) for name, array in values.items()}


def refuse_unknown(manifest: Manifest, names: Iterable[str]) -> None:
    """
    Raises:
        UserError: the index lacks a target. The class may be asked for where there is none: it is missing then.
    """
    for name in names:
        manifest.values(name)


def by_class(class_weights: Sequence[float], values: Values) -> NDArray[np.float64]:
    """Each sample weighs what its class weighs."""
    weights: NDArray[np.float64] = np.asarray(class_weights, dtype=np.float64)[values[LABEL]][:, None]
    return weights


def normalisers(weights: NDArray[np.float64] | None, draws: Draws | None, count: int) -> tuple[float, Tensor | None]:
    """What losses over a global batch are divided by.

    Args:
        weights: what its samples weigh for each part of the loss, [count, parts]; None for 1 each.

    Returns:
        (total, None) of one part, the sum of weights; of several (count, scales): float32 [parts], count by each sum, 0
        where that is 0.

    Raises:
        UserError: there is not one row of weights per sample.
    """
    if weights is None:
        return float(count), None
    if weights.ndim != 2 or len(weights) != count or not weights.shape[1]:
        raise UserError(f"weights have the shape {list(weights.shape)}; expected [{count}, parts]")
    sums = weight_sums(weights, draws)
    if len(sums) == 1:
        return float(sums[0]), None
    scales = np.divide(count, sums, out=np.zeros_like(sums), where=sums != 0)
    return float(count), torch.from_numpy(scales.astype(np.float32))
