"""Objectives: what is minimised. A part ``objective(counts, *, ...)`` gives an :class:`Objective`.

`counts` are the samples of a training epoch by class: after `data.sampling`, repeated ones counted again. Losses are
SUMS over samples: the loop divides by the loss normaliser (samples of the global batch, or their summed class weights),
which is known from the index, so that the mean is right however the batch is dealt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.errors import UserError

__all__ = ["cross_entropy"]


class Objective(Protocol):
    """What the loop asks of an objective."""

    class_weights: Sequence[float] | None
    """Weight of a sample by its class, for the sum that divides the loss; None: every sample weighs 1."""

    def loss(self, output: Any, labels: Any, mix: Any) -> Any:
        """The training loss of a micro-batch: a scalar tensor, the sum over samples.

        Args:
            output: of the network in training mode: logits [N, classes], or a tuple of them and auxiliary logits, None
                for those of a frozen classifier.
            labels: int64 [N].
            mix: None, or an object with `partner_labels` int64 [N] and `lam` float32 [N], the share of the own label.
        """
        ...

    def evaluation_loss(self, logits: Any, labels: Any) -> Any:
        """The sum of the plain loss over samples, comparable between trainings: a scalar tensor."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy; see :func:`cross_entropy`."""

    class_weights: Sequence[float] | None
    label_smoothing: float
    aux_weight: float
    _weights: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def loss(self, output: Any, labels: Any, mix: Any) -> Any:
        main, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss = self._mixed(main, labels, mix)
        for logits in auxiliary:
            if logits is not None:
                loss = loss + self.aux_weight * self._mixed(logits, labels, mix)
        return loss

    def evaluation_loss(self, logits: Any, labels: Any) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels, reduction="sum")

    def _mixed(self, logits: Any, labels: Any, mix: Any) -> Any:
        if mix is None:
            return self._each(logits, labels).sum()
        own, other = self._each(logits, labels), self._each(logits, mix.partner_labels)
        return (mix.lam * own + (1 - mix.lam) * other).sum()

    def _each(self, logits: Any, labels: Any) -> Any:
        from torch.nn.functional import cross_entropy

        weight = self._on(logits.device) if self.class_weights is not None else None
        return cross_entropy(
            logits.float(), labels, weight=weight, reduction="none", label_smoothing=self.label_smoothing
        )

    def _on(self, device: Any) -> Any:
        """The class weights on a device, copied there once."""
        import torch

        if device not in self._weights:
            self._weights[device] = torch.tensor(self.class_weights, dtype=torch.float32, device=device)
        return self._weights[device]


def cross_entropy(
    counts: Sequence[int],
    *,
    label_smoothing: Annotated[Ratio, Field(ge=0, lt=1)] = 0.0,
    class_weights: Literal["balanced"] | list[Annotated[Ratio, Field(ge=0)]] | None = None,
    aux_weight: Annotated[Ratio, Field(ge=0)] = 0.4,
) -> CrossEntropy:
    """Softmax cross-entropy for one label per image.

    Args:
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016).
        class_weights: one per class, 0 to leave a class out of the loss (a step that shows only such classes has a
            gradient of zero); or "balanced": samples / (classes * samples of the class), as scikit-learn does, of an
            epoch as it is trained on (`data.sampling: balanced` leaves nothing to weigh).
        aux_weight: of auxiliary logits (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: as many weights as classes are needed; "balanced" needs a sample of each class.
    """
    weights = list(class_weights) if isinstance(class_weights, list) else None
    if weights is not None and len(weights) != len(counts):
        raise UserError(f"{len(weights)} class weights for {len(counts)} classes", where="objective.class_weights")
    if weights is not None and not (all(0 <= w < math.inf for w in weights) and any(weights)):
        raise UserError(
            "class weights must be finite numbers of 0 or more, and not all 0", where="objective.class_weights"
        )
    if class_weights == "balanced":
        if min(counts) == 0:
            raise UserError(
                "a class has no training sample, so it has no balanced weight", where="objective.class_weights"
            )
        weights = [sum(counts) / (len(counts) * count) for count in counts]
    return CrossEntropy(weights, float(label_smoothing), float(aux_weight))
