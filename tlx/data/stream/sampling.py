"""Which samples an epoch shows, and how often: against classes of very different sizes, and for few-shot subsets.

Exact counts per class and epoch instead of draws with replacement, so that an epoch has a known length and can be
resumed by arithmetic. Like the order, a function of (seed, epoch) alone, the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError, did_you_mean
from tlx.data.stream.episodes import EpisodeOrder, Episodes, by_class
from tlx.data.stream.order import Ids, derive, permutation

Method = Literal["all", "balanced", "sqrt", "repeat_factors"]

_NO_SHARDS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Sampling:
    """How often the samples of a class come in an epoch.

    N is the number of samples (after `limit`), n_c that of class c, K the number of classes that have any. A class
    comes m_c times: each of its samples floor(m_c / n_c) times, and m_c mod n_c of them, drawn anew in every epoch,
    once more.

    Attributes:
        method: "all": m_c = n_c, every sample once.
            "balanced": m_c = N / K, every class equally often.
            "sqrt": m_c in proportion to sqrt(n_c) and N in sum (Mahajan et al. 2018, arXiv:1805.00932).
            "repeat_factors": m_c = n_c * max(1, sqrt(threshold / (n_c / N))), so classes rarer than the threshold are
            repeated and no class is shown less (Gupta et al. 2019, arXiv:1908.03195, there with random rounding).
        threshold: of "repeat_factors", a share of the samples above 0, up to 1; None is 1 / K, so that a class below
            the mean size comes as often as the geometric mean of its size and the mean size.
        limit: at most so many samples per class, the same in every epoch, drawn by the seed; None is all of them.
        without: classes of which no sample is shown, by their place in the index.
        episodes: an epoch is so many of these, whatever the sizes of classes.

    Raises:
        UserError: an unknown method, values out of range, a threshold for another method.
    """

    method: Method = "all"
    threshold: float | None = None
    limit: int | None = None
    without: tuple[int, ...] = ()
    episodes: Episodes | None = None

    def __post_init__(self) -> None:
        methods = get_args(Method)
        if self.method not in methods:
            raise UserError(f"there is no sampling {self.method!r}{did_you_mean(str(self.method), methods)}")
        if self.threshold is not None and self.method != "repeat_factors":
            raise UserError(f"sampling {self.method!r} has no threshold", todo="leave it out, or use repeat_factors")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"a threshold of {self.threshold:g} is no share of the samples", todo="above 0, up to 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"a limit of {self.limit} samples per class leaves nothing", todo="1 or more, or null")

    @property
    def repeats(self) -> bool:
        """Whether a sample may come more than once in an epoch."""
        return self.method != "all" or self.episodes is not None


def targets(sampling: Sampling, counts: Ids) -> Ids:
    """How often each class comes in an epoch, int64 [classes], from how many samples it has, [classes].

    What every statistic of the training data is of. The same in every epoch, whichever samples are drawn, but for what
    `drop_last` drops: the last batch, of samples of all classes alike, so that proportions hold on average; and but for
    episodes, whose classes are drawn: on average. 0 for
    classes without samples. Where a sum is to be kept, the largest remainders are
    rounded up, those of lower classes first.
    """
    if sampling.episodes is not None:
        taken = sampling.episodes.taking(counts)
        return _apportioned((sampling.episodes.per_epoch or 0) * sampling.episodes.pictures, (taken > 0).astype(float))
    held = _held(counts, sampling)
    total, present = int(held.sum()), int(np.count_nonzero(held))
    if sampling.method == "all" or not total:
        return held
    if sampling.method == "balanced":
        return _apportioned(total, (held > 0).astype(np.float64))
    if sampling.method == "sqrt":
        return _apportioned(total, np.sqrt(held.astype(np.float64)))
    wanted = total * (sampling.threshold or 1 / present)
    repeated = np.floor(np.sqrt(held * wanted) + 0.5)  # n * sqrt(t / (n / N)) = sqrt(n * N * t)
    raised: Ids = np.maximum(held, repeated.astype(np.int64))
    return raised


def samples_per_epoch(sampling: Sampling, counts: Ids) -> int:
    """How many samples an epoch shows, repeated ones counted again; `counts` is samples per class, [classes]."""
    return int(targets(sampling, counts).sum())


def distinct(sampling: Sampling, counts: Ids) -> int:
    """How many different samples training shows, over all epochs; `counts` is samples per class, [classes]."""
    if sampling.episodes is not None:
        return int(sampling.episodes.taking(counts).sum())
    return int(_held(counts, sampling).sum())


def entries(sampling: Sampling, labels: NDArray[np.int32] | Ids, classes: int, seed: int, epoch: int) -> Ids | None:
    """The samples of an epoch in tar order, repeated ones next to each other.

    Args:
        labels: each sample's class, [samples].
        classes: how many classes there are.

    Returns:
        int64 [samples_per_epoch], ascending; None where every sample comes once.
    """
    if sampling == Sampling():
        return None  # without a look at the labels, which may be many
    if sampling.episodes is not None:
        order = EpisodeOrder(by_class(labels, sampling.episodes.left_out), sampling.episodes, seed, epoch, _NO_SHARDS)
        return np.sort(order.ids(0, len(order)))
    counts = np.bincount(labels, minlength=classes).astype(np.int64)
    held, wanted = _held(counts, sampling), targets(sampling, counts)
    if np.array_equal(wanted, counts):
        return None
    times = np.zeros(len(labels), np.int32)
    for label, own in _by_class(labels, counts):
        if not held[label]:
            continue
        if held[label] < len(own):
            own = own[permutation(derive(seed, "limit", label), len(own))[: held[label]]]
        whole, further = divmod(int(wanted[label]), len(own))
        times[own] = whole
        if further:
            times[own[permutation(derive(seed, "sampling", epoch, label), len(own))[:further]]] += 1
    return np.repeat(np.arange(len(labels)), times)


def _held(counts: Ids, sampling: Sampling) -> Ids:
    """Samples by class that training may show, int64 [classes]."""
    held: Ids = np.array(counts, dtype=np.int64)
    held[list(sampling.without)] = 0
    return held if sampling.limit is None else np.minimum(held, sampling.limit)


def _apportioned(total: int, weights: NDArray[np.float64]) -> Ids:
    """`total` in proportion to weights, in integers: floors, and the largest remainders up."""
    # fsum is exact, whereas numpy's sums depend on how wide the machine's vectors are
    quotas = total * weights / math.fsum(weights)
    wanted = np.floor(quotas).astype(np.int64)
    missing = total - int(wanted.sum())
    wanted[np.argsort(wanted - quotas, kind="stable")[:missing]] += 1
    return wanted


def _by_class(labels: NDArray[np.int32] | Ids, counts: Ids) -> Iterator[tuple[int, Ids]]:
    """(class, its samples ascending) for every class that has any."""
    # numpy sorts 16 bits by radix, ten times as fast
    order = np.argsort(labels.astype(np.uint16) if len(counts) <= 1 << 16 else labels, kind="stable")
    stops = np.cumsum(counts)
    for label in np.flatnonzero(counts):
        yield int(label), order[stops[label] - counts[label] : stops[label]]


def refuse_weightless(names: Sequence[str], counts: Sequence[int], weights: Sequence[float]) -> None:
    """
    Args:
        names: of the classes.
        counts: how often each comes in an epoch; `weights`: what it weighs in the loss.

    Raises:
        UserError: every class that an epoch shows weighs 0: there is nothing to learn from.
    """
    if any(count and weight for count, weight in zip(counts, weights, strict=True)):
        return
    shown = [name for name, count in zip(names, counts, strict=True) if count]
    raise UserError(
        f"every class that an epoch shows weighs 0: {', '.join(shown[:8])}{' ...' if len(shown) > 8 else ''}",
        where="objective.class_weights",
        todo="give one of them a weight above 0, or show others (data.train, data.sampling)",
    )
