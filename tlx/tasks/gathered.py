"""What an evaluation gave for each sample, put together over ranks in one order: for metrics that are no sums."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tlx.tasks import Ranks


class Scores(NamedTuple):
    """Of n samples, by ascending id, on the CPU. Without samples `output` is [0, 0] and `own` is empty.

    Attributes:
        output: float32 [n, outputs].
        own: targets by name, see :class:`tlx.tasks.Truth`.
        ids: int64 [n].
    """

    output: Tensor
    own: Mapping[str, Tensor]
    ids: Tensor

    def finite(self) -> Tensor:
        """bool [n]: none of the sample's outputs is NaN or infinite."""
        return self.output.isfinite().all(1)


class Gathered:
    """Outputs, targets and ids of an evaluation's samples.

    A rank keeps its own samples in its host's memory, 4 bytes per output, and each rank has everybody's in the end: so
    all compute the same numbers, which do not depend on how many ranks there are.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._batches: list[Scores] = []

    def add(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        """Takes a batch, as :meth:`tlx.tasks.Meter.update` gets it."""
        if len(ids):
            on_cpu = {name: values.detach().cpu() for name, values in own.items()}
            self._batches.append(Scores(output.detach().float().cpu(), on_cpu, ids.detach().cpu()))

    def all(self) -> Scores:
        """The samples of all ranks; every rank calls it, one without samples too."""
        batches = [batch for given in self._ranks.gather(_joined(self._batches)) for batch in given]
        if not batches:
            return Scores(torch.zeros(0, 0), {}, torch.zeros(0, dtype=torch.int64))
        [(output, own, ids)] = _joined(batches)
        order = ids.argsort(stable=True)
        return Scores(output[order], {name: values[order] for name, values in own.items()}, ids[order])


def mean(each: Tensor, known: Tensor) -> float:
    """The mean of `each` [n] in float64 where `known`, bool [n]; NaN where nothing is."""
    return float(each[known].double().mean()) if bool(known.any()) else math.nan


def _joined(batches: list[Scores]) -> list[Scores]:
    """All in one; nothing for none."""
    if not batches:
        return []
    own = {name: torch.cat([batch.own[name] for batch in batches]) for name in batches[0].own}
    return [Scores(torch.cat([b.output for b in batches]), own, torch.cat([b.ids for b in batches]))]
