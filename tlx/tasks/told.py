"""What is kept of what a network told of a picture, compact: a few bytes for each output, for reports and trackers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["class", "rank", "labels", "number"]

WHOLE = 1 << 22
"""Probabilities of all classes are kept of up to so many pictures x classes (8 MiB); of more the highest."""

TOP = 5


@dataclass(frozen=True)
class About:
    """What was told.

    Attributes:
        kind: class, one of `names`; rank, one of `names`, the lowest first; labels, each of `names` applies or not;
            number, one for each of `names`.
        names: of classes, leaves of a tree, ranks from the lowest, labels, columns.
        target: of the index.
        task: its name among several; "" of a single one.
    """

    kind: Kind
    names: tuple[str, ...]
    target: str
    task: str = ""

    def of(self, task: str) -> About:
        return replace(self, task=task)


class Told(NamedTuple):
    """Of m pictures.

    Attributes:
        arrays: by name, each with m rows; see :class:`tlx.runs.predictions.Part`.
    """

    about: About
    arrays: Mapping[str, Any]


def of_classes(about: About, probabilities: Tensor, told: Tensor, truth: Tensor, samples: int) -> Told:
    """
    Args:
        probabilities: [m, classes]; `told`, `truth`: positions, [m], where `truth` is -1 without one.
        samples: of the whole evaluation.
    """
    finite = probabilities.isfinite().all(1)
    found = {"truth": truth.int(), "told": told.where(finite, -1).int()}
    if samples * len(about.names) <= WHOLE:
        return Told(about, {**found, "probabilities": probabilities.half()})
    top = probabilities.topk(min(TOP, probabilities.shape[1]))
    own = probabilities.gather(1, truth.long().clamp(min=0)[:, None])[:, 0]
    own = own.where(truth >= 0, float("nan"))
    return Told(about, {**found, "top": top.indices.int(), "shares": top.values.half(), "own": own.half()})
