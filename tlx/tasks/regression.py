"""Regression: numbers for each image. See :func:`tlx.tasks.kinds.regression`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.data.shards.targets import Target
from tlx.tasks import Ranks, Truth
from tlx.tasks.constants import Constant
from tlx.tasks.gathered import Gathered
from tlx.tasks.told import About, Told

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Regression:
    """The network learns (value - mean) / std; predictions and metrics are in the target's own units.

    Attributes:
        about: the target.
        error: of standardised predictions [m, width] and values, elementwise.
        mean, std: by column.
        aux_weight: of auxiliary outputs.
    """

    about: Target
    error: Callable[[Tensor, Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
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
        return {"": len(self.mean)}

    @property
    def outputs(self) -> tuple[str, ...]:
        width = len(self.mean)
        return (self.target,) if width == 1 else tuple(f"{self.target}_{i}" for i in range(width))

    @property
    def metrics(self) -> Mapping[str, bool]:
        return {"loss": False, "mae": False, "rmse": False, "r2": True}

    @property
    def scale(self) -> Mapping[str, Any]:
        """Mean and standard deviation, rounded by more than two machines' sums may differ."""
        if not any(self.mean) and set(self.std) == {1.0}:
            return {}
        return {name: [float(f"{v:.9g}") for v in values] for name, values in (("mean", self.mean), ("std", self.std))}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {"mae_by_column": self.outputs, "r2_by_column": self.outputs} if len(self.mean) > 1 else {}

    def weights(self, values: Mapping[str, NDArray[Any]]) -> Array:
        """1 for a sample that has a value in any column."""
        known = ~np.isnan(values[self.target].reshape(-1, len(self.mean)))
        return np.asarray(known.any(1, keepdims=True), np.float64)

    def loss(self, output: Any, truth: Truth) -> Tensor:
        main, *auxiliary = output if isinstance(output, tuple) else (output,)
        goal, shares = self._goal(truth)
        loss = self._summed(main, goal, shares)
        for given in auxiliary:
            if given is not None:
                loss = loss + self.aux_weight * self._summed(given, goal, shares)
        return loss

    def _summed(self, output: Tensor, goal: Tensor, shares: Tensor) -> Tensor:
        judged = torch.where(shares > 0, output.float(), goal)  # not 0 * infinity where nothing is known
        errors: Tensor = self.error(judged, goal)
        return (shares * errors).sum()

    def _goal(self, truth: Truth) -> tuple[Tensor, Tensor]:
        """What to predict, standardised [m, width], and what the error of each value weighs in the sum.

        Mixed pictures have mixed values. Where only one of the two has a value, that is to be predicted, and weighs as
        much as it has a share in the picture. A sample's weights add up to those of the two samples, which is 1 where
        both have a value in any column, and which is what the index says.
        """
        own, known = self._standardised(truth.own[self.target])
        if truth.partner is None or truth.lam is None:
            return own, known / known.sum(1, keepdim=True).clamp(min=1)
        other, also = self._standardised(truth.partner[self.target])
        lam = truth.lam[:, None]
        goal = torch.where(known & also, lam * own + (1 - lam) * other, torch.where(known, own, other))
        by_column = lam * known + (1 - lam) * also
        by_sample = lam * known.any(1, keepdim=True) + (1 - lam) * also.any(1, keepdim=True)
        total = by_column.sum(1, keepdim=True)
        return goal, torch.where(total > 0, by_sample * by_column / total, 0.0)

    def _standardised(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised values, float32 [m, width], 0 where missing; and where they are known."""
        mean, std = self._scale.on(values.device).unbind()
        # float64: years and the like lie close together, far from 0
        standard = ((values.double() - mean) / std).float()
        known = ~values.isnan()
        return torch.where(known, standard, 0.0), known

    @cached_property
    def _scale(self) -> Constant:
        return Constant(torch.tensor([self.mean, self.std], dtype=torch.float64))

    def predicted(self, output: Tensor) -> Tensor:
        """In the target's own units, float64 [m, width]."""
        mean, std = self._scale.on(output.device).unbind()
        return output.detach().double() * std + mean

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The sum over samples of the mean absolute error over known columns."""
        values = own[self.target].double()
        known = ~values.isnan()
        errors = torch.where(known, (self.predicted(output) - values).abs(), 0.0)
        means = errors.sum(1) / known.sum(1).clamp(min=1)
        return torch.stack([means.sum(), known.any(1).sum()])

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> RegressionMeter:  # noqa: B008 - it is frozen
        return RegressionMeter(self, ranks)

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`."""
        about = About("number", self.outputs, self.target)
        truth = own[self.target].reshape(-1, len(self.mean)).float()
        return [Told(about, {"truth": truth, "told": self.predicted(output).float()})]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(zip(self.outputs, values, strict=True)) for values in self.predicted(output).tolist()]


class RegressionMeter:
    """Errors of one evaluation; see :func:`tlx.tasks.kinds.regression` for the metrics."""

    def __init__(self, task: Regression, ranks: Ranks) -> None:
        self._task = task
        self._gathered = Gathered(ranks)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        self._gathered.add(output, {self._task.target: own[self._task.target]}, ids)

    def result(self) -> dict[str, Any]:
        """See :class:`tlx.tasks.Meter`. A sample with an output that is not finite has no error that could count: the
        metrics of its columns are NaN."""
        scores = self._gathered.all()
        if not len(scores.ids):
            return {"samples": 0}
        nonfinite = int((~scores.finite()).sum())
        output = torch.where(scores.output.isfinite(), scores.output, torch.nan)
        values = scores.own[self._task.target].double().numpy()
        predicted = self._task.predicted(output).numpy()
        columns = [_Column.of(p, v) for p, v in zip(predicted.T, values.T, strict=True)]
        return {
            "loss": self._loss(predicted, values),
            "mae": _mean([c.mae for c in columns if c.mae is not None]),
            "rmse": _mean([c.rmse for c in columns if c.rmse is not None]),
            "r2": _mean([c.r2 for c in columns if c.r2 is not None]),
            "samples": len(scores.ids),
            **({"nonfinite": nonfinite} if nonfinite else {}),
            **{name: [getattr(c, name.partition("_")[0]) for c in columns] for name in self._task.lists},
        }

    def _loss(self, predicted: Array, values: Array) -> float:
        known = ~np.isnan(values)
        squares = np.where(known, ((predicted - values) / np.array(self._task.std)) ** 2, 0.0)
        counts = known.sum(1)
        return _mean(squares[counts > 0].sum(1) / counts[counts > 0])


@dataclass(frozen=True)
class _Column:
    """Metrics of a column, over samples that have a value in it; None where there are too few."""

    mae: float | None = None
    rmse: float | None = None
    r2: float | None = None

    @classmethod
    def of(cls, predicted: Array, values: Array) -> _Column:
        known = ~np.isnan(values)
        values, errors = values[known], (predicted - values)[known]
        if not len(values):
            return cls()
        mae, rmse = float(np.abs(errors).mean()), float(np.sqrt((errors**2).mean()))
        return cls(mae, rmse, _r2(errors, values) if len(values) > 1 else None)


def _r2(errors: Array, values: Array) -> float:
    """The share of the variance that is explained; of values that are all the same, as scikit-learn has it, 1 if they
    are predicted exactly, else 0."""
    left, total = float((errors**2).sum()), float(((values - values.mean()) ** 2).sum())
    if np.isnan(left):
        return np.nan
    return 1 - left / total if total else float(left == 0)


def _mean(values: Sequence[float] | Array) -> float:
    return float(np.mean(values)) if len(values) else np.nan
