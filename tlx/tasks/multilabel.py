"""Multi-label classification: any number of labels for each image. See :func:`tlx.tasks.kinds.multilabel`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from tlx.data.shards.targets import Target
from tlx.tasks import Ranks, Truth
from tlx.tasks.constants import Constant
from tlx.tasks.gathered import Gathered
from tlx.tasks.mixing import summed
from tlx.tasks.told import About, Told

Losses = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of logits, in their shape: the losses where the label applies, and those where it does not."""

HALF = 0.5
"""The threshold where none was chosen."""


def bce(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy."""
    return -logsigmoid(logits), -logsigmoid(-logits)


def focal(logits: Tensor, *, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Lin et al. 2017, arXiv:1708.02002."""
    applies, not_ = bce(logits)
    return (
        alpha * _power((-logits).sigmoid(), gamma) * applies,
        (1 - alpha) * _power(logits.sigmoid(), gamma) * not_,
    )


def asymmetric(logits: Tensor, *, gamma_negative: float, gamma_positive: float, clip: float) -> tuple[Tensor, Tensor]:
    """Ridnik et al. 2021, arXiv:2009.14119: labels that do not apply are judged by p - clip, and those below it have
    neither loss nor gradient."""
    applies, not_ = bce(logits)
    shifted = logits.sigmoid()
    if clip:
        shifted = (shifted - clip).clamp(min=0)
        not_ = -torch.log1p(-shifted)
    return _power((-logits).sigmoid(), gamma_positive) * applies, _power(shifted, gamma_negative) * not_


def _power(base: Tensor, exponent: float) -> Tensor:
    """A power below 1 has an infinite slope at 0, and infinity times no loss would be NaN."""
    return base.clamp(min=torch.finfo(base.dtype).tiny) ** exponent


@dataclass(frozen=True)
class MultiLabel:
    """One logit per label.

    Attributes:
        about: the target.
        losses: what is minimised.
        positive_weights: of the losses where a label applies, by label; None for 1.
        aux_weight: of auxiliary outputs.
    """

    about: Target
    losses: Losses
    positive_weights: tuple[float, ...] | None
    label_smoothing: float
    aux_weight: float
    metric: str = "map"
    shown: str | None = "label_accuracy"
    parts: int = 1
    constants: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return self.about.name

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.target: self.about}

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.about.classes

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": len(self.outputs)}

    @property
    def metrics(self) -> Mapping[str, bool]:
        scores = ("map", "f1_micro", "f1_macro", "tuned_f1_micro", "tuned_f1_macro")
        return {"loss": False, **dict.fromkeys(scores, True)}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return dict.fromkeys(("ap_per_class", "f1_per_class", "thresholds"), self.outputs)

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """1 for a sample with a label that is known to apply or not."""
        return np.asarray((values[self.target] >= 0).any(1, keepdims=True), np.float64)

    def loss(self, output: Any, truth: Truth) -> Tensor:
        return summed(self._each, output, truth, self.target, self.aux_weight)

    def _each(self, output: Tensor, values: Tensor) -> Tensor:
        """Losses of samples, float32 [m]: sums over known labels."""
        applies, not_ = self.losses(output.float())
        if self._positive is not None:
            applies = applies * self._positive.on(output.device)
        share = values.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        return torch.where(values >= 0, share * applies + (1 - share) * not_, 0.0).sum(1)

    @cached_property
    def _positive(self) -> Constant | None:
        return None if self.positive_weights is None else Constant(torch.tensor(self.positive_weights))

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The sum over samples of the share of known labels that are told right; not finite outputs are wrong."""
        values = own[self.target]
        right = (
            torch.where(values > 0, output > 0, output <= 0) & (values >= 0) & output.isfinite().all(1, keepdim=True)
        )
        known = (values >= 0).sum(1)
        return torch.stack([(right.sum(1) / known.clamp(min=1)).sum(), known.sign().sum()])

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> MultiLabelMeter:  # noqa: B008 - it is frozen
        return MultiLabelMeter(self.target, ranks)

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`."""
        about = About("labels", self.outputs, self.target)
        return [Told(about, {"truth": own[self.target].char(), "probabilities": output.float().sigmoid().half()})]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Labels whose probability is above their threshold: that of `kept`, else 1/2."""
        given = kept.get("thresholds") or [None] * len(self.outputs)
        thresholds = [HALF if threshold is None else threshold for threshold in given]
        return [
            {
                "labels": [n for n, p, t in zip(self.outputs, row, thresholds, strict=True) if p > t],
                "probabilities": dict(zip(self.outputs, row, strict=True)),
            }
            for row in output.detach().double().sigmoid().tolist()
        ]


class MultiLabelMeter:
    """Metrics of one evaluation; see :func:`tlx.tasks.kinds.multilabel`."""

    def __init__(self, target: str, ranks: Ranks) -> None:
        self._target = target
        self._gathered = Gathered(ranks)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        self._gathered.add(output, {self._target: own[self._target]}, ids)

    def result(self) -> dict[str, Any]:
        """See :class:`tlx.tasks.Meter`. A sample with an output that is not finite has every known label wrong, and
        comes last in its labels' ranking, or first where they do not apply."""
        scores = self._gathered.all()
        if not len(scores.ids):
            return {"samples": 0}
        values, finite = scores.own[self._target], scores.finite()
        informative = (values >= 0).any(1)
        if not bool((informative & finite).any()):  # an evaluation without any answer is no evaluation
            values = torch.full_like(values, -1)
        by_label = scores.output.T.contiguous(), values.T.contiguous()  # some times faster than column by column
        labels = [_Label.of(o, v, finite) for o, v in zip(*by_label, strict=True)]
        seen = [label for label in labels if label.precision is not None]
        nonfinite, samples = int((~finite).sum()), int((values >= 0).any(1).sum())
        return {
            "loss": math.nan if nonfinite or not samples else sum(label.loss for label in labels) / samples,
            "map": _mean([label.precision for label in seen]),
            "f1_micro": _f1(np.sum([label.plain for label in labels], 0)),
            "f1_macro": _mean([_f1(label.plain) for label in seen]),
            "tuned_f1_micro": _f1(np.sum([label.tuned for label in labels], 0)),
            "tuned_f1_macro": _mean([_f1(label.tuned) for label in seen]),
            "samples": len(scores.ids),
            **({"nonfinite": nonfinite} if nonfinite else {}),
            "ap_per_class": [label.precision for label in labels],
            "f1_per_class": [None if label.precision is None else _f1(label.plain) for label in labels],
            "thresholds": [label.threshold for label in labels],
        }


@dataclass(frozen=True)
class _Label:
    """What an evaluation's samples tell of a label, those where it is known whether it applies.

    Attributes:
        loss: the sum of binary cross-entropies.
        precision: average precision; None where it applies to no sample.
        plain, tuned: true positives, false positives and false negatives, at 1/2 and at cross-fitted thresholds.
        threshold: the best for F1; None where it applies to no sample that has an answer.
    """

    loss: float
    precision: float | None
    plain: NDArray[np.int64]
    tuned: NDArray[np.int64]
    threshold: float | None

    @classmethod
    def of(cls, output: Tensor, values: Tensor, finite: Tensor) -> _Label:
        """
        Args:
            output: of n samples by id; `values`: 1, 0 or -1; `finite`: whether the sample has an answer.
        """
        known = values >= 0
        logits, truth, answered = output[known].double(), values[known] > 0, finite[known].numpy()
        even = (np.arange(len(values)) % 2 == 0)[known.numpy()]
        loss = -float(logsigmoid(torch.where(truth, logits, -logits)).sum())
        p, y, ranked = logits.sigmoid().numpy(), truth.numpy(), logits.numpy()

        def counts(thresholds: float | NDArray[np.float64]) -> NDArray[np.int64]:
            told = np.where(answered, p > thresholds, ~y)
            return np.array([(told & y).sum(), (told & ~y).sum(), (~told & y).sum()])

        halves = [best_threshold(p[half & answered], y[half & answered]) for half in (even, ~even)]
        of_even, of_odd = (HALF if threshold is None else threshold for threshold in halves)
        return cls(
            loss,
            average_precision(np.where(answered, ranked, np.where(y, -np.inf, np.inf)), y),
            counts(HALF),
            counts(np.where(even, of_odd, of_even)),
            best_threshold(p[answered], y[answered]),
        )


def average_precision(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> float | None:
    """The sum over cuts of precision times the gain in recall, as scikit-learn's `average_precision_score`: equal
    scores make one cut. None where nothing is true."""
    if not truth.any():
        return None
    _, hits, told = _cuts(scores, truth)
    return float((np.diff(hits, prepend=0) * hits / told).sum() / truth.sum())


def best_threshold(p: NDArray[np.float64], truth: NDArray[np.bool_]) -> float | None:
    """Probabilities above it are told as true: half-way between two of the samples, where F1 is highest; of several
    such places the highest. None where nothing is true."""
    if not truth.any():
        return None
    values, hits, told = _cuts(p, truth)
    best = int((2 * hits / (told + truth.sum())).argmax())
    lower = values[best + 1] if best + 1 < len(values) else 0.0
    between = (values[best] + lower) / 2
    return float(between if between < values[best] else lower)


def _cuts(
    scores: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct scores from the highest down; for each, how many of those at or above it are true, and how many they
    are."""
    order = np.argsort(-scores)
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return ordered[ends], truth[order].cumsum()[ends], ends + 1


def _f1(counts: NDArray[np.int64]) -> float:
    """Of true positives, false positives and false negatives; NaN where there are none."""
    true, others = int(counts[0]), int(counts[1] + counts[2])
    return 2 * true / (2 * true + others) if true or others else math.nan


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean(np.array(values, np.float64))) if values else math.nan
