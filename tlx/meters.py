"""Counting: exact over ranks, whatever rank saw which sample."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics.classification import MulticlassAccuracy

from tlx.world import World


class EvaluationMeter:
    """Loss, top-1, top-k and per-class accuracy of one evaluation.

    A rank without samples contributes zeros. `top_k` counts only where it is smaller than the number of classes.
    """

    def __init__(self, classes: int, *, top_k: int, world: World) -> None:
        self.world = world
        # [summed loss, samples]; float64 so that the order of summation does not show
        self.sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        self.top = {k: self._accuracy(classes, average="micro", top_k=k) for k in _ks(classes, top_k)}
        self.by_class = self._accuracy(classes, average="none", top_k=1)

    def update(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Counts a batch.

        Args:
            logits: float [N, classes].
            labels: int64 [N].
            loss: scalar, summed over the batch.
        """
        self.sums += torch.stack([loss.double(), loss.new_tensor(len(labels)).double()])
        for accuracy in (*self.top.values(), self.by_class):
            accuracy.update(logits.float(), labels)

    def result(self) -> dict[str, Any]:
        """Over all ranks: `loss`, `top1`, `top<k>`, `samples`, and `per_class` (None for a class without samples)."""
        loss, samples = self.world.sum(self.sums).tolist()
        states = [s for m in (*self.top.values(), self.by_class) for s in (m.tp, m.fp, m.tn, m.fn)]
        for state in states:
            self.world.sum(state)
        if not samples:
            return {"samples": 0}
        present = (self.by_class.tp + self.by_class.fn) > 0
        shares = zip(self._value(self.by_class).tolist(), present.tolist(), strict=True)
        return {
            "loss": loss / samples,
            **{f"top{k}": float(self._value(accuracy)) for k, accuracy in self.top.items()},
            "samples": int(samples),
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


def metric_names(classes: int, *, top_k: int) -> list[str]:
    """What an evaluation will give to choose the best by."""
    return ["val/loss", *(f"val/top{k}" for k in _ks(classes, top_k))]


def _ks(classes: int, top_k: int) -> list[int]:
    return [1] + ([top_k] if 1 < top_k < classes else [])
