"""One class per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from tlx.base.metrics import top_ks
from tlx.data.shards.targets import Target
from tlx.data.stream.views import Views
from tlx.tasks import Ranks, Truth
from tlx.tasks.objectives import Objective
from tlx.tasks.told import About, Told, of_classes


class LabelMix(NamedTuple):
    """What an objective is told of mixed samples: int64 [m], and float32 [m], the share of the own label."""

    partner_labels: Tensor
    lam: Tensor


@dataclass(frozen=True)
class Classification:
    """See :func:`tlx.tasks.kinds.classification`.

    Attributes:
        partial: samples may lack the class.
        views: they draw it, and no index has it.
    """

    target: Target
    top_k: int
    objective: Objective
    partial: bool = False
    constants: tuple[str, ...] = ()
    metric: str = "top1"
    shown: str | None = "top1"
    parts: int = 1
    views: Views | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.target.classes

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.target.name: self.target} if self.views is None else {}

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": len(self.classes)}

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.classes

    @property
    def metrics(self) -> Mapping[str, bool]:
        return {"loss": False, **{f"top{k}": True for k in top_ks(len(self.classes), self.top_k)}}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {"per_class": self.classes}

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64] | None:
        by_class = self.objective.class_weights
        if by_class is None and not self.partial:
            return None
        labels = values[self.target.name]
        weights = np.ones(len(self.classes)) if by_class is None else np.asarray(by_class, dtype=np.float64)
        return np.where(labels >= 0, weights[labels], 0.0)[:, None]

    def loss(self, output: Any, truth: Truth) -> Tensor:
        if self.partial:
            main, *auxiliary = output if isinstance(output, tuple) else (output,)
            weight, total = getattr(self.objective, "aux_weight", 0.0), self._of_known(main, truth)
            for given in auxiliary:
                if given is not None:
                    total = total + weight * self._of_known(given, truth)
            return total
        mix = None
        if truth.partner is not None and truth.lam is not None:
            mix = LabelMix(truth.partner[self.target.name], truth.lam)
        loss: Tensor = self.objective.loss(output, truth.own[self.target.name], mix)
        return loss

    def _of_known(self, logits: Tensor, truth: Truth) -> Tensor:
        """The sum of losses of samples that have a class. A mixed sample that has one of two has the loss by that one
        alone, times its share."""
        own, mix = truth.own[self.target.name], None
        labels, share = own, (own >= 0).float()
        if truth.partner is not None and truth.lam is not None:
            partner, lam = truth.partner[self.target.name], truth.lam
            labels = torch.where(own >= 0, own, partner)
            mix = LabelMix(torch.where(partner >= 0, partner, own).clamp(min=0), lam)
            share = torch.where(own < 0, 1 - lam, torch.where(partner < 0, lam, 1.0))
        known = labels >= 0
        logits = torch.where(known[:, None], logits, 0.0)  # not 0 * infinity where nothing is known
        each: Tensor = self.objective.losses(logits, labels.clamp(min=0), mix)  # type: ignore[attr-defined]
        return torch.where(known, share * each, 0.0).sum()

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        labels = own[self.target.name]
        return torch.stack([(output.argmax(1) == labels).sum(), (labels >= 0).sum()])

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> ClassificationMeter:  # noqa: B008  # frozen
        return ClassificationMeter(
            len(self.classes),
            top_k=self.top_k,
            device=device,
            ranks=ranks,
            target=self.target.name,
            partial=self.partial,
            loss=self.objective.evaluation_loss,
        )

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`."""
        if self.views is not None:  # reports would show the pictures as they are, not as they were drawn
            return []
        about = About("class", self.classes, self.target.name)
        return [of_classes(about, output.float().softmax(1), output.argmax(1), own[self.target.name], samples)]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        shares, places = output.float().softmax(1).topk(min(self.top_k, len(self.classes)))
        return [
            {
                "label": self.classes[own[0]],
                "probability": of[0],
                "top": [{"label": self.classes[i], "probability": p} for i, p in zip(own, of, strict=True)],
            }
            for own, of in zip(places.tolist(), shares.tolist(), strict=True)
        ]


class ClassificationMeter:
    """Loss, top-1, top-k and per-class accuracy of one evaluation, exact over ranks.

    A rank without samples contributes zeros. `top_k` counts only where it is smaller than the number of classes. A
    sample whose logits have no softmax (NaN, infinity) is counted as wrong and in `nonfinite`: the greatest of NaNs
    would be class 0.

    Args:
        partial: samples may lack the class; they count for nothing but `samples`.
        loss: (logits, labels) -> the sum over samples.
    """

    def __init__(
        self,
        classes: int,
        *,
        top_k: int,
        device: torch.device,
        loss: Callable[[Tensor, Tensor], Tensor],
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
        target: str = "label",
        partial: bool = False,
    ) -> None:
        self.ranks, self.target, self.partial, self.loss = ranks, target, partial, loss
        # [summed loss, samples, samples without a softmax, samples with a class]; float64 so that the order of
        # summation does not show
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

        def accuracy(average: Any, k: int) -> Any:
            # summed over ranks by us: one way of talking between ranks, on any backend
            metric = MulticlassAccuracy(classes, average=average, top_k=k, sync_on_compute=False, validate_args=False)
            return metric.to(device)

        self.top = {k: accuracy("micro", k) for k in top_ks(classes, top_k)}
        self.by_class = accuracy("none", 1)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        """See :meth:`tlx.tasks.Meter.update`."""
        labels, logits, samples = own[self.target], output.float(), len(output)
        if self.partial:
            logits, labels = logits[labels >= 0], labels[labels >= 0]
        finite = logits.logsumexp(1).isfinite()
        loss = self.loss(logits, labels).double()
        counts = [finite.logical_not().sum().double(), loss.new_tensor(len(labels))]
        self.sums += torch.stack([loss, loss.new_tensor(samples), *counts])
        if not len(labels):  # torchmetrics takes no empty batch
            return
        wrong = -torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)  # every other class is before it
        judged = torch.where(finite[:, None], logits, wrong)
        for accuracy in (*self.top.values(), self.by_class):
            accuracy.update(judged, labels)

    def result(self) -> dict[str, Any]:
        """`loss`, `top1`, `top<k>`, `samples`, and `per_class` (None for a class without samples).

        `nonfinite` is there where it is not 0. Where no sample has a softmax, the accuracies are NaN and None.
        """
        loss, samples, nonfinite, labelled = self.ranks.sum(self.sums).tolist()
        states = [s for m in (*self.top.values(), self.by_class) for s in (m.tp, m.fp, m.tn, m.fn)]
        for state in states:
            self.ranks.sum(state)
        if not samples:
            return {"samples": 0}
        answered = nonfinite < labelled
        present = (self.by_class.tp + self.by_class.fn) > 0 if answered else torch.zeros_like(self.by_class.tp)
        shares = zip(_value(self.by_class).tolist(), present.tolist(), strict=True)
        return {
            "loss": loss / labelled if labelled else math.nan,
            **{f"top{k}": float(_value(a)) if answered else math.nan for k, a in self.top.items()},
            "samples": int(samples),
            **({"nonfinite": int(nonfinite)} if nonfinite else {}),
            "per_class": [share if there else None for share, there in shares],
        }


def _value(metric: Any) -> Tensor:
    metric._update_count = max(metric._update_count, 1)  # a rank without samples has others' counts
    value: Tensor = metric.compute()
    return value
