"""Counting: exact over ranks, whatever rank saw which sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchmetrics.classification import MulticlassAccuracy

from tlx.base.metrics import top_ks
from tlx.ranks.collectives import World


class EvaluationMeter:
    """Loss, top-1, top-k and per-class accuracy of one evaluation.

    A rank without samples contributes zeros. `top_k` counts only where it is smaller than the number of classes. A
    sample whose logits have no softmax (NaN, infinity) is counted as wrong and in `nonfinite`: the greatest of NaNs
    would be class 0.
    """

    def __init__(self, classes: int, *, top_k: int, world: World) -> None:
        self.world = world
        # [summed loss, samples, samples without a softmax]; float64 so that the order of summation does not show
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.top = {k: self._accuracy(classes, average="micro", top_k=k) for k in top_ks(classes, top_k)}
        self.by_class = self._accuracy(classes, average="none", top_k=1)

    def update(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Counts a batch.

        Args:
            logits: float [N, classes].
            labels: int64 [N].
            loss: scalar, summed over the batch.
        """
        logits = logits.float()
        finite = logits.logsumexp(1).isfinite()
        counts = [loss.new_tensor(len(labels)).double(), finite.logical_not().sum().double()]
        self.sums += torch.stack([loss.double(), *counts])
        wrong = -torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)  # every other class is before it
        judged = torch.where(finite[:, None], logits, wrong)
        for accuracy in (*self.top.values(), self.by_class):
            accuracy.update(judged, labels)

    def result(self) -> dict[str, Any]:
        """Over all ranks: `loss`, `top1`, `top<k>`, `samples`, and `per_class` (None for a class without samples).

        `nonfinite` is there where it is not 0. Where no sample has a softmax, the accuracies are NaN and None.
        """
        loss, samples, nonfinite = self.world.sum(self.sums).tolist()
        states = [s for m in (*self.top.values(), self.by_class) for s in (m.tp, m.fp, m.tn, m.fn)]
        for state in states:
            self.world.sum(state)
        if not samples:
            return {"samples": 0}
        answered = nonfinite < samples
        present = (self.by_class.tp + self.by_class.fn) > 0 if answered else torch.zeros_like(self.by_class.tp)
        shares = zip(self._value(self.by_class).tolist(), present.tolist(), strict=True)
        return {
            "loss": loss / samples,
            **{f"top{k}": float(self._value(a)) if answered else math.nan for k, a in self.top.items()},
            "samples": int(samples),
            **({"nonfinite": int(nonfinite)} if nonfinite else {}),
            "per_class": [share if there else None for share, there in shares],
        }

    def _accuracy(self, classes: int, *, average: str, top_k: int) -> Any:
        # summed over ranks by us: one way of talking between ranks, on any backend
        metric = MulticlassAccuracy(classes, average=average, top_k=top_k, sync_on_compute=False, validate_args=False)  # type: ignore[arg-type]
        return metric.to(self.world.device)

    @staticmethod
    def _value(metric: Any) -> torch.Tensor:
        metric._update_count = max(metric._update_count, 1)  # a rank without samples has others' counts
        value: torch.Tensor = metric.compute()
        return value
