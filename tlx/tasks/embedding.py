"""Vectors of several views of a picture, which are to be alike, and unlike those of other pictures."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tlx.data.shards.targets import Target
from tlx.data.stream.views import Shown
from tlx.tasks import Ranks, Truth
from tlx.tasks.gathered import Gathered
from tlx.tasks.spread import MOST, effective_rank, spread

Compare = Callable[[Tensor, Tensor, int], Tensor]
"""(vectors of the rank's own samples, float32 [m, views, width]; of all samples, [n, views, width]; where among these
its own begin) -> the sum over its own of a loss whose mean over all n is minimised."""


@dataclass(frozen=True)
class Augmented:
    """Views that training's transforms make, each drawn by itself."""

    count: int = 2
    joined: bool = False
    evaluated_plainly: bool = False

    @property
    def targets(self) -> Mapping[str, Target]:
        return {}

    def draw(self, rng: random.Random) -> Mapping[str, int]:
        return {}

    def pictures(self, image: Tensor, shown: Shown, drawn: Mapping[str, int]) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield shown.view(image)


@dataclass(frozen=True)
class Embedding:
    """See :func:`tlx.tasks.kinds.simclr`.

    Attributes:
        width: of a vector.
        whole: why a batch cannot be taken in parts.
    """

    width: int
    compare: Compare
    whole: str
    views: Augmented = Augmented()  # frozen
    constants: tuple[str, ...] = ()
    metric: str = "loss"
    shown: str | None = None
    parts: int = 1

    @property
    def targets(self) -> Mapping[str, Target]:
        return {}

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": self.width}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"z{n}" for n in range(self.width))

    @property
    def metrics(self) -> Mapping[str, bool]:
        return {"loss": False, "top1": True, "spread": True, "rank": True}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {}

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64] | None:
        return None

    def loss(self, output: Any, truth: Truth) -> Tensor:
        output = output[0] if isinstance(output, tuple) else output
        own = self._vectors(output[:0] if truth.idle else output)
        everybody, first = truth.ranks.joined(own)
        return self.compare(own, everybody, first)

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return output.new_zeros(2)

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> EmbeddingMeter:  # noqa: B008  # frozen
        return EmbeddingMeter(self, ranks, device)

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(zip(self.outputs, row, strict=True)) for row in output.tolist()]

    def _vectors(self, output: Tensor) -> Tensor:
        return output.float().reshape(len(output), self.views.count, self.width)


class EmbeddingMeter:
    """The loss within each batch of an evaluation, which is cut by place in the index, and what vectors are like."""

    def __init__(self, task: Embedding, ranks: Ranks, device: torch.device) -> None:
        self._task, self._ranks, self._gathered = task, ranks, Gathered(ranks)
        # [summed loss, samples in it, views whose nearest is their own, views, samples, those that are not finite]
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        """See :meth:`tlx.tasks.Meter.update`."""
        finite = output.isfinite().all(1)
        vectors = self._task._vectors(output[finite])
        counts = output.new_tensor([len(output), len(output) - len(vectors)], dtype=torch.float64)
        if len(vectors) > 1:  # one has nothing to be compared with
            loss, right = self._task.compare(vectors, vectors, 0).double(), nearest_is_own(vectors)
            judged = loss.new_tensor([len(vectors), len(right)])
            self._sums[:4] += torch.stack([loss, judged[0], right.sum().double(), judged[1]])
        self._sums[4:] += counts
        self._gathered.add(output[finite], {}, ids[finite.to(ids.device)])

    def result(self) -> dict[str, Any]:
        """`loss`; `top1`, of how many views the nearest other view in the batch is of the same sample; `spread` and
        `rank` of vectors, see :mod:`tlx.tasks.spread`."""
        loss, judged, right, views, samples, nonfinite = self._ranks.sum(self._sums).tolist()
        if not samples:
            return {"samples": 0}
        output = self._gathered.all().output[:MOST]
        vectors = self._task._vectors(output).flatten(0, 1) if len(output) else output
        return {
            "loss": loss / judged if judged and not nonfinite else torch.nan,
            "top1": right / views if views else torch.nan,
            "spread": spread(vectors) if len(vectors) else torch.nan,
            "rank": effective_rank(vectors) if len(vectors) else torch.nan,
            "samples": int(samples),
            **({"nonfinite": int(nonfinite)} if nonfinite else {}),
        }


def nearest_is_own(vectors: Tensor) -> Tensor:
    """bool [2 m], of [m, 2, width]: whether the view with the smallest angle is of the same sample."""
    unit = functional.normalize(vectors.flatten(0, 1), dim=1)
    places = torch.arange(len(unit), device=unit.device)
    found: Tensor = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(1) == places ^ 1
    return found


def contrast(own: Tensor, everybody: Tensor, first: int, *, temperature: float) -> Tensor:
    """NT-Xent: of each view, the cross-entropy of telling its sample's other view from all other views of the batch, by
    cosines over the temperature; the mean of both views."""
    anchors = functional.normalize(own.flatten(0, 1), dim=1)
    keys = functional.normalize(everybody.flatten(0, 1), dim=1)
    places = 2 * first + torch.arange(len(anchors), device=own.device)
    logits = (anchors @ keys.T / temperature).scatter(1, places[:, None], -torch.inf)
    return functional.cross_entropy(logits, places ^ 1, reduction="sum") / 2


def regularise(
    own: Tensor, everybody: Tensor, first: int, *, invariance: float, variance: float, covariance: float
) -> Tensor:
    """VICReg's three terms over the whole batch, for as many samples as are own."""
    alike = functional.mse_loss(everybody[:, 0], everybody[:, 1])
    views = everybody.unbind(1)
    spread_out = sum(functional.relu(1 - (view.var(0) + 1e-4).sqrt()).mean() for view in views) / 2
    return len(own) * (invariance * alike + variance * spread_out + covariance * sum(map(_correlated, views)))


def _correlated(view: Tensor) -> Tensor:
    """The sum of squared covariances of different components, over the width."""
    centred = view - view.mean(0)
    square = (centred.T @ centred / (len(view) - 1)).square()
    return (square.sum() - square.diagonal().sum()) / view.shape[1]


def contrasting(temperature: float) -> Compare:
    return functools.partial(contrast, temperature=temperature)


def regularising(invariance: float, variance: float, covariance: float) -> Compare:
    return functools.partial(regularise, invariance=invariance, variance=variance, covariance=covariance)
