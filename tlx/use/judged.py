"""How good a classification is: every number with an interval by resampling pictures.

Points are functions of torchmetrics, but for areas under curves and the Brier score, of which it makes arrays that are
too large and too slow where there are many classes. Intervals need points a thousand times: there the same formulas are
applied to how often each picture was drawn, for many resamples at once (:class:`Resamples`). Tests compare all of them
with scikit-learn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag
from torchmetrics.functional import classification as of

from tlx.base.metrics import top_ks

BINS = 15
"""Of the calibration error, as Guo et al. 2017 have it."""

LOWER = ("loss", "ece", "brier")
"""Of what :meth:`Classified.scalars` gives, those that are better where they are lower."""

SEED = 0
_AT_ONCE = 1 << 22  # numbers of a block of resamples
_RANKING = 2e10  # resamples x pictures x classes, for areas under curves; beyond it fewer resamples are drawn


@dataclass(frozen=True)
class Interval:
    """A metric, and the middle 95 % of its values over so many resamples; NaN without any."""

    value: float
    low: float = math.nan
    high: float = math.nan
    resamples: int = 0

    def data(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "resamples": self.resamples}


@dataclass(frozen=True)
class Classified:
    """Logits and classes of n pictures.

    Attributes:
        logits: float64 [n, classes].
        labels: int64 [n].
        top_k: of `top<k>`.
        temperature: that logits are divided by for ``loss_scaled``, ``ece_scaled`` and ``brier_scaled``; None leaves
            them out.
    """

    logits: Tensor
    labels: Tensor
    top_k: int
    temperature: float | None = None

    @property
    def classes(self) -> int:
        return self.logits.shape[1]

    @property
    def told(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def counts(self) -> Tensor:
        return torch.bincount(self.labels, minlength=self.classes)

    def scales(self) -> dict[str, Tensor]:
        """Logits by the ending of metrics' names: as they are, and scaled."""
        found = {"": self.logits}
        if self.temperature is not None:
            found["_scaled"] = self.logits / self.temperature
        return found

    def scalars(self) -> dict[str, float]:
        """By name. Averages over classes are over those that are among the pictures; of precision and F1 also over
        those that are told of one, as scikit-learn has it."""
        n, labels, told = self.classes, self.labels, self.told
        p = self.logits.softmax(1)
        each = self.by_class()
        there = self.counts > 0
        found = {f"top{k}": _top(p, labels, k) for k in top_ks(n, self.top_k)}
        for name, metric in (("precision", of.multiclass_precision), ("f1", of.multiclass_f1_score)):
            found[name] = float(metric(told, labels, n, average="macro"))
        found["balanced_accuracy"] = _mean(each["recall"][there])
        found["auroc"] = _mean(each["auroc"][there])
        found["average_precision"] = _mean(each["average_precision"][there])
        for ending, logits in self.scales().items():
            shares = logits.softmax(1)
            found[f"loss{ending}"] = float(cross_entropy(logits, labels))
            found[f"ece{ending}"] = float(of.multiclass_calibration_error(shares, labels, n, n_bins=BINS, norm="l1"))
            found[f"brier{ending}"] = float(_brier(shares, labels).mean())
        return found

    def by_class(self) -> dict[str, Tensor]:
        """[classes] of each; NaN where no picture is of the class."""
        return dict(self._each)

    @cached_property
    def rankings(self) -> dict[int, _Ranking]:
        """Of each class that has pictures."""
        p, labels = self.logits.softmax(1), self.labels
        return {c: _Ranking.of(p[:, c], labels == c) for c in self.counts.nonzero()[:, 0].tolist()}

    @cached_property
    def _each(self) -> dict[str, Tensor]:
        n, labels, told, there = self.classes, self.labels, self.told, self.counts > 0
        once = torch.ones(len(labels), 1, dtype=_exact(len(labels)))
        areas = torch.full((2, n), torch.nan, dtype=torch.float64)
        for c, ranking in self.rankings.items():
            areas[:, c] = torch.cat(ranking.areas(once, once.sum(0).double()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without pictures, which are left out below
            found = {
                "precision": of.multiclass_precision(told, labels, n, average="none"),
                "recall": of.multiclass_recall(told, labels, n, average="none"),
                "f1": of.multiclass_f1_score(told, labels, n, average="none"),
            }
        found |= dict(zip(("auroc", "average_precision"), areas, strict=True))
        return {name: torch.where(there, values.double(), torch.nan) for name, values in found.items()}

    def confusion(self) -> Tensor:
        """int64 [classes, classes]: of a class (row), told as another."""
        matrix: Tensor = of.multiclass_confusion_matrix(self.told, self.labels, self.classes)
        return matrix

    def intervals(self, resamples: int, between: Callable[[], None] = lambda: None) -> dict[str, Interval]:
        """`between` is called now and then: with many pictures and classes it takes minutes."""
        points = self.scalars()
        if not resamples:
            return {name: Interval(value) for name, value in points.items()}
        values = Resamples(self, resamples).scalars(between)
        return {name: with_interval(value, values[name]) for name, value in points.items()}


def _brier(shares: Tensor, labels: Tensor) -> Tensor:
    """[n], the sum over classes of (share - truth)², without an array of the truth."""
    return shares.square().sum(1) - 2 * shares.gather(1, labels[:, None])[:, 0] + 1


def with_interval(value: float, resampled: Tensor) -> Interval:
    """The middle 95 % of what resamples gave; those without a value left out."""
    if not len(resampled) or bool(resampled.isnan().all()):
        return Interval(value)
    low, high = torch.nanquantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(value, low, high, len(resampled))


def drawn(pictures: int, resamples: int) -> Iterator[Tensor]:
    """Which pictures each resample has, int64 [some, pictures], with replacement: the same for the same numbers."""
    generator = torch.Generator().manual_seed(SEED)
    block = max(1, _AT_ONCE // pictures)
    for start in range(0, resamples, block):
        yield torch.randint(pictures, (min(block, resamples - start), pictures), generator=generator)


class Resamples:
    """The metrics of a classification for many resamples of its pictures at once.

    Args:
        resamples: how many.
    """

    def __init__(self, judged: Classified, resamples: int) -> None:
        self.judged, self.resamples = judged, resamples
        labels, n = judged.labels, judged.classes
        p = judged.logits.softmax(1)
        self.hit = judged.told == labels
        among = {k: (p.topk(k).indices == labels[:, None]).any(1) for k in top_ks(n, judged.top_k)}
        self.means = {f"top{k}": hits.double() for k, hits in among.items()}
        self.means["top1"] = self.hit.double()
        self.bins: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        bounds = torch.linspace(0, 1, BINS + 1, dtype=p.dtype)
        for ending, logits in judged.scales().items():
            shares = logits.softmax(1)
            self.means[f"loss{ending}"] = cross_entropy(logits, labels, reduction="none")
            self.means[f"brier{ending}"] = _brier(shares, labels)
            sure, told = shares.max(1)
            self.bins[f"ece{ending}"] = torch.bucketize(sure, bounds, right=True) - 1, sure, (told == labels).double()
        self.most_ranked = min(resamples, max(50, int(_RANKING / (len(labels) * n))))

    def scalars(self, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """[resamples] of each; fewer of areas under curves where these would take very long."""
        found: dict[str, list[Tensor]] = {}
        done = 0
        for block in drawn(len(self.judged.labels), self.resamples):
            between()
            weights = torch.zeros(block.shape, dtype=torch.float64)
            weights.scatter_add_(1, block, torch.ones_like(weights))
            values = self._of(weights) | self._areas(weights[: max(self.most_ranked - done, 0)])
            done += len(block)
            for name, of_block in values.items():
                found.setdefault(name, []).append(of_block)
        return {name: torch.cat(blocks) for name, blocks in found.items()}

    def _of(self, weights: Tensor) -> dict[str, Tensor]:
        """
        Args:
            weights: float64 [some, pictures], how often each was drawn.
        """
        count, labels, told = weights.shape[1], self.judged.labels, self.judged.told
        stacked = torch.stack(list(self.means.values()), 1)
        found = dict(zip(self.means, (weights @ stacked / count).T, strict=True))
        right = self._summed(weights * self.hit, labels)
        true, said = self._summed(weights, labels), self._summed(weights, told)
        seen = (true + said) > 0
        found["precision"] = _over(right / said.clamp(min=1), seen)
        found["f1"] = _over(2 * right / (true + said).clamp(min=1), seen)
        found["balanced_accuracy"] = _over(right / true.clamp(min=1), true > 0)
        for name, (bins, sure, hit) in self.bins.items():
            gaps = torch.zeros(len(weights), BINS + 1, dtype=weights.dtype).index_add_(1, bins, weights * (sure - hit))
            found[name] = gaps.abs().sum(1) / count
        return found

    def _summed(self, values: Tensor, classes: Tensor) -> Tensor:
        return torch.zeros(len(values), self.judged.classes, dtype=values.dtype).index_add_(1, classes, values)

    def _areas(self, weights: Tensor) -> dict[str, Tensor]:
        by_picture = weights.T.to(_exact(weights.shape[1])).contiguous()
        drawn = weights.sum(1)
        areas = [ranking.areas(by_picture, drawn) for ranking in self.judged.rankings.values()]
        names = ("auroc", "average_precision")
        stacked = [torch.stack(values, 1) for values in zip(*areas, strict=True)]
        return {name: values.nanmean(1) for name, values in zip(names, stacked, strict=True)}


@dataclass(frozen=True)
class _Ranking:
    """Pictures by falling score for a class, in groups of equal scores. Only groups that have some of the class count:
    nothing changes elsewhere.

    Attributes:
        order: int32, to the end of the last such group.
        bounds: int32 [2 groups + 1]: 0, and where in the order each group begins and ends.
        own: int64 [of the class], those of the class.
        group: int64 [of the class], their groups.
    """

    order: Tensor
    bounds: Tensor
    own: Tensor
    group: Tensor

    @classmethod
    def of(cls, scores: Tensor, truth: Tensor) -> _Ranking:
        falling = -scores
        order = torch.from_numpy(np.argsort(falling.numpy()))  # several times as fast as torch's
        own = truth.nonzero()[:, 0]
        groups, group = falling[own].unique(return_inverse=True)  # type: ignore[no-untyped-call]  # sorted
        ends = (torch.searchsorted(falling[order], groups, right=right) for right in (False, True))
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.stack(list(ends), 1).flatten()])
        return cls(order[: bounds[-1]].int(), bounds.int(), own, group)

    def areas(self, weights: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Area under the ROC curve, and average precision, [some] each; NaN where a resample lacks the class, or all
        else.

        Args:
            weights: float32 or float64 [pictures, some], how often each was drawn; whole numbers, so that sums are
                exact.
            drawn: float64 [some], the sum of weights.
        """
        between = embedding_bag(self.order, weights, self.bounds, mode="sum", include_last_offset=True)  # sums of rows
        counted = between.double().cumsum(0)
        before, told = counted[0::2], counted[1::2]
        gained = torch.zeros(len(told), weights.shape[1], dtype=torch.float64)
        gained.index_add_(0, self.group, weights[self.own].double())
        hits = gained.cumsum(0)
        positive = hits[-1]
        negative = drawn - positive
        above = before - (hits - gained)  # others before the group; those in it count half
        beside = told - before - gained
        auroc = (gained * (negative - above - beside / 2)).sum(0) / (positive * negative)
        precision = (gained * hits / told.clamp(min=1)).sum(0) / positive
        return auroc.masked_fill((positive == 0) | (negative == 0), torch.nan), precision


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The one that minimises the loss of logits divided by it (Guo et al. 2017), between 1/50 and 50."""
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log], max_iter=100, line_search_fn="strong_wolfe")
    most = math.log(50)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(logits.double() / log.clamp(-most, most).exp(), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return float(log.detach().clamp(-most, most).exp())


def _exact(pictures: int) -> torch.dtype:
    """In which sums of counts of so many pictures are exact."""
    return torch.float32 if pictures < 1 << 24 else torch.float64


def _top(p: Tensor, labels: Tensor, k: int) -> float:
    return float(of.multiclass_accuracy(p, labels, p.shape[1], average="micro", top_k=k))


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if len(values) else math.nan


def _over(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over classes, of those that count in each resample."""
    return (values * counted).sum(1) / counted.sum(1)


def largest_confusions(confusion: Tensor, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Of one class told as another, the most frequent first; none that did not happen."""
    counts = confusion.clone()
    counts.fill_diagonal_(0)
    found = [(int(counts[i, j]), i, j) for i, j in counts.nonzero().tolist()]
    return [
        {"true": names[i], "told": names[j], "pictures": count, "of": int(confusion[i].sum())}
        for count, i, j in sorted(found, key=lambda one: (-one[0], one[1], one[2]))
    ]
