"""Metrics of an evaluation: a number with a name and a direction, and which of two evaluations is better.

The direction belongs to the metric; nobody states it again. All that compares evaluations asks here: the best of a run
and of a phase, the checkpoints that stay, patience, plateaus, reports, trackers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

LOSS = "val/loss"
ACCURACY = "val/top1"

AVERAGED = "ema/"
"""In front of a metric of the moving average's weights."""

Weights = Literal["raw", "ema"]
WEIGHTS: tuple[Weights, ...] = ("raw", "ema")

_LOWER = re.compile(r"(.*[/_])?(loss|error|mae|mse|rmse|distance)")
_COUNTS = ("samples", "nonfinite")


class Score(NamedTuple):
    """What one evaluation is judged by.

    Attributes:
        value: of the metric; NaN where it is not finite.
        loss: ``val/loss``, for ties; None where it is not known.
    """

    value: float
    loss: float | None = None

    @classmethod
    def kept(cls, entry: Mapping[str, Any]) -> Score:
        """Of an entry that was kept: {value, loss}, of older checkpoints without `loss`."""
        return cls(float(entry["value"]), entry.get("loss"))


@dataclass(frozen=True)
class Metric:
    """A metric by its name without ``ema/``, such as ``val/top1``, and its direction."""

    name: str

    @classmethod
    def of(cls, name: str) -> Metric:
        """The metric that a name means, with or without ``ema/``."""
        return cls(name.removeprefix(AVERAGED))

    @property
    def higher_is_better(self) -> bool:
        """False for losses, errors and distances, by the last word of the name; True for accuracies and all else."""
        return not _LOWER.fullmatch(self.name)

    @property
    def judges(self) -> bool:
        """Whether it is a metric of an evaluation, and no count."""
        return self.name.startswith("val/") and self.name.rpartition("/")[2] not in _COUNTS

    @property
    def mode(self) -> Literal["min", "max"]:
        """The direction in the word that trackers use."""
        return "max" if self.higher_is_better else "min"

    def score(self, row: Mapping[str, Any], weights: Weights = "raw") -> Score | None:
        """What a row of metrics says of one kind of weights; None where it lacks the metric."""
        prefix = AVERAGED if weights == "ema" else ""
        value, loss = row.get(prefix + self.name), row.get(prefix + LOSS)
        if value is None:
            return None
        return Score(float(value), None if loss is None else float(loss))

    def improves(self, value: float, than: float, *, by: float = 0.0) -> bool:
        """Whether `value` is better than `than` by more than `by`. What is not finite never is, and any finite number
        is better than it."""
        if not (math.isfinite(value) and math.isfinite(than)):
            return math.isfinite(value)
        return value > than + by if self.higher_is_better else value < than - by

    def better(self, score: Score, than: Score | None) -> bool:
        """Whether an evaluation is better than an earlier one: by the metric, ties by the lower ``val/loss``. Where
        that is equal too, the earlier one stays. What is not finite is never better, not even than nothing."""
        if than is None:
            return math.isfinite(score.value)
        if score.value != than.value or score.loss is None or than.loss is None:
            return self.improves(score.value, than.value)
        return Metric(LOSS).improves(score.loss, than.loss)

    def best_of(self, row: Mapping[str, Any]) -> Score | None:
        """The better of the raw weights' evaluation and the moving average's; None where the row has neither."""
        raw, averaged = self.score(row), self.score(row, "ema")
        if raw is None or averaged is None:
            return averaged if raw is None else raw
        return averaged if self.better(averaged, raw) else raw


def metrics_of(row: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """What a row of metrics says of one kind of weights, by names without ``ema/``."""
    prefix = AVERAGED if weights == "ema" else ""
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(f"{prefix}val/")}


def top_ks(classes: int, top_k: int) -> list[int]:
    """The k of the top-k accuracies that are given; `top_k` counts where it is smaller than the number of classes."""
    return [1] + ([top_k] if 1 < top_k < classes else [])
