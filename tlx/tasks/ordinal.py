"""Ordinal regression: classes that have an order. See :func:`tlx.tasks.kinds.ordinal`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tlx.data.shards.targets import Target
from tlx.tasks import Ranks, Truth
from tlx.tasks.constants import Constant
from tlx.tasks.gathered import Gathered, mean
from tlx.tasks.mixing import summed
from tlx.tasks.told import About, Told, of_classes


@dataclass(frozen=True)
class Ordinal:
    """K classes by rank, from 0. Output k of K - 1 is the logit of "the rank is above k".

    Attributes:
        about: the target.
        order: names of classes, the lowest first.
        rank_of: rank by the class's position in the index.
        conditional: output k is conditional on "the rank is not below k", as in CORN.
        aux_weight: of auxiliary outputs.
    """

    about: Target
    order: tuple[str, ...]
    rank_of: tuple[int, ...]
    conditional: bool
    aux_weight: float
    metric: str = "mae"
    shown: str | None = "mae"
    parts: int = 1
    constants: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return self.about.name

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.target: self.about}

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": len(self.order) - 1}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"above {name}" for name in self.order[:-1])

    @property
    def metrics(self) -> Mapping[str, bool]:
        return {"loss": False, "mae": False, "top1": True, "kappa": True}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {"per_class": self.order}

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """1 for a sample that has a class."""
        return (values[self.target] >= 0).astype(np.float64)[:, None]

    def loss(self, output: Any, truth: Truth) -> Tensor:
        return summed(self.each, output, truth, self.target, self.aux_weight)

    def each(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample, float32 [m]; 0 without a class."""
        ranks = self.ranks(target)[:, None]
        steps = torch.arange(output.shape[1], device=output.device)
        asked = ranks >= (steps if self.conditional else 0)
        logits = torch.where(asked, output.float(), 0.0)
        losses = binary_cross_entropy_with_logits(logits, (ranks > steps).float(), reduction="none")
        return torch.where(asked, losses, 0.0).sum(1)

    def ranks(self, target: Tensor) -> Tensor:
        """Ranks [m] of classes; -1 without one."""
        return self._ranks.on(target.device)[target.long()]

    @cached_property
    def _ranks(self) -> Constant:
        return Constant(torch.tensor([*self.rank_of, -1]))  # position -1 is the last one

    def above(self, output: Tensor) -> Tensor:
        """Probabilities that the rank is above 0, 1 ..., float64 [m, K - 1]; none is greater than the one before it."""
        each = output.detach().double().sigmoid()
        # independent thresholds may contradict each other; sorted, they still say the same rank
        return each.cumprod(1) if self.conditional else each.sort(1, descending=True).values

    def predicted(self, output: Tensor) -> Tensor:
        """Ranks [m]: how many thresholds are more likely passed than not."""
        return (self.above(output) > 0.5).sum(1)

    def judged(self, output: Tensor, ranks: Tensor) -> Tensor:
        """Predicted ranks [m]; outputs that are not finite predict what is farthest from the truth."""
        top = len(self.order) - 1
        farthest = torch.where(2 * ranks < top, top, 0)
        return torch.where(output.isfinite().all(1), self.predicted(output), farthest)

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The sum of absolute errors of the rank."""
        ranks = self.ranks(own[self.target])
        errors = torch.where(ranks >= 0, (self.judged(output, ranks) - ranks).abs(), 0)
        return torch.stack([errors.sum(), (ranks >= 0).sum()])

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> OrdinalMeter:  # noqa: B008 - it is frozen
        return OrdinalMeter(self, ranks)

    def by_rank(self, output: Tensor) -> Tensor:
        """Probabilities of ranks, float64 [m, K]."""
        above = torch.nn.functional.pad(self.above(output), (1, 0), value=1.0)
        return above - torch.nn.functional.pad(above[:, 1:], (0, 1))

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`."""
        about, truth = About("rank", self.order, self.target), self.ranks(own[self.target])
        return [of_classes(about, self.by_rank(output), self.predicted(output), truth, samples)]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        by_rank, ranks = self.by_rank(output), self.predicted(output)
        likely = by_rank.gather(1, ranks[:, None])[:, 0]
        return [
            {"label": self.order[rank], "rank": rank, "probability": probability}
            for rank, probability in zip(ranks.tolist(), likely.tolist(), strict=True)
        ]


class OrdinalMeter:
    """Metrics of one evaluation from its confusion matrix; see :func:`tlx.tasks.kinds.ordinal`."""

    def __init__(self, task: Ordinal, ranks: Ranks) -> None:
        self._task = task
        self._gathered = Gathered(ranks)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        self._gathered.add(output, {self._task.target: own[self._task.target]}, ids)

    def result(self) -> dict[str, Any]:
        """See :class:`tlx.tasks.Meter`. Outputs that are not finite count as the rank farthest from the truth."""
        scores = self._gathered.all()
        if not len(scores.ids):
            return {"samples": 0}
        finite, target = scores.finite(), scores.own[self._task.target]
        ranks = self._task.ranks(target)
        known = (ranks >= 0) & finite.any()  # an evaluation without any answer is no evaluation
        loss = torch.where(finite, self._task.each(scores.output, target), math.nan)
        nonfinite = int((~finite).sum())
        return {
            "loss": mean(loss, known),
            **self._of(ranks[known], self._task.judged(scores.output, ranks)[known]),
            "samples": len(ranks),
            **({"nonfinite": nonfinite} if nonfinite else {}),
        }

    def _of(self, truth: Tensor, predicted: Tensor) -> dict[str, Any]:
        classes = len(self._task.order)
        counts = torch.bincount(truth * classes + predicted, minlength=classes**2)
        confusion = counts.reshape(classes, classes).double().numpy()
        apart = np.abs(np.subtract.outer(np.arange(classes), np.arange(classes)))
        total = len(truth)
        return {
            "mae": float((confusion * apart).sum()) / total if total else math.nan,
            "top1": float(confusion.trace()) / total if total else math.nan,
            "kappa": _kappa(confusion, apart**2),
            "per_class": [float(row[i] / row.sum()) if row.any() else None for i, row in enumerate(confusion)],
        }


def _kappa(confusion: NDArray[np.float64], costs: NDArray[np.int64]) -> float:
    """Cohen's weighted kappa: 1 - cost / the cost that is expected of predictions independent of the truth. NaN where
    none is expected: all samples are, and are said to be, of one class."""
    expected = np.outer(confusion.sum(1), confusion.sum(0)) * costs
    if not expected.any():
        return math.nan
    return 1 - float((confusion * costs).sum()) * float(confusion.sum()) / float(expected.sum())
