"""Objectives: what is minimised. A part ``objective(counts, *, ...)`` gives an :class:`Objective`.

`counts` are the samples of a training epoch by class: after `data.sampling`, repeated ones counted again. Losses are
SUMS over samples: the loop divides by the loss normaliser (samples of the global batch, or their summed class weights),
which is known from the index, so that the mean is right however the batch is dealt.

**The loss of an evaluation** is softmax cross-entropy under every objective of ours: trainings by different ones can be
compared by it, as timm's `train.py` does, and it is the log loss of the probabilities that predictions show, a softmax.
After `bce` it tells about a use of the logits that they were not trained for: their order is right, their size need not
be, and the loss may rise while the accuracy does. Choose checkpoints by accuracy there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.errors import UserError

if TYPE_CHECKING:
    from tlx.tasks.constants import Constant

__all__ = ["bce", "cross_entropy", "focal", "logit_adjustment", "poly"]

Share = Annotated[Ratio, Field(ge=0, lt=1)]
Factor = Annotated[Ratio, Field(ge=0)]
ClassWeights = Literal["balanced"] | list[Factor] | None


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


Each = Callable[[Any, Any, Any, Any], Any]
"""(logits float32 [N, classes], labels [N], mix or None, class weights as a tensor or None) -> losses [N], times what
each sample weighs."""


@dataclass(frozen=True)
class Summed:
    """The sum of a loss over samples, auxiliary logits included; evaluated by plain cross-entropy."""

    class_weights: Sequence[float] | None
    aux_weight: float
    each: Each

    def loss(self, output: Any, labels: Any, mix: Any) -> Any:
        main, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss = self._sum(main, labels, mix)
        for logits in auxiliary:
            if logits is not None:
                loss = loss + self.aux_weight * self._sum(logits, labels, mix)
        return loss

    def losses(self, logits: Any, labels: Any, mix: Any = None) -> Any:
        """Of each sample, float32 [N], times what it weighs."""
        weights = self._weights.on(logits.device) if self._weights else None
        return self.each(logits.float(), labels, mix, weights)

    def evaluation_loss(self, logits: Any, labels: Any) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels, reduction="sum")

    def _sum(self, logits: Any, labels: Any, mix: Any) -> Any:
        return self.losses(logits, labels, mix).sum()

    @cached_property
    def _weights(self) -> Constant | None:
        return None if self.class_weights is None else _constant(self.class_weights)


def _in_shares(each: Callable[[Any, Any, Any], Any]) -> Each:
    """Of a mixed sample the loss by its own label and that by its partner's, in the shares of the mixture."""

    def mixed(logits: Any, labels: Any, mix: Any, weights: Any) -> Any:
        own = each(logits, labels, weights)
        return own if mix is None else mix.lam * own + (1 - mix.lam) * each(logits, mix.partner_labels, weights)

    return mixed


def cross_entropy(
    counts: Sequence[int],
    *,
    label_smoothing: Share = 0.0,
    class_weights: ClassWeights = None,
    aux_weight: Factor = 0.4,
) -> Summed:
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
    each = partial(_cross_entropy, label_smoothing=label_smoothing)
    return Summed(_class_weights(class_weights, counts), aux_weight, _in_shares(each))


def bce(
    counts: Sequence[int],
    *,
    label_smoothing: Share = 0.0,
    target_threshold: Share | None = None,
    sum_classes: bool = True,
    class_weights: ClassWeights = None,
    aux_weight: Factor = 0.4,
) -> Summed:
    """Binary cross-entropy of every class against the rest, for one label per image.

    That of timm's recipes ("ResNet strikes back", Wightman et al. 2021, arXiv:2110.00476) and of DeiT III (Touvron et
    al. 2022, arXiv:2204.07118). The target of a mixed sample is the mixture of both targets.

    Args:
        label_smoothing: as for `cross_entropy`: the label's target is 1 - s + s / classes, the others' s / classes.
        target_threshold: targets above it become 1, others 0, after mixing: a mixed sample shows each class whose share
            is large enough (0.2 in timm's recipes).
        sum_classes: a sample's loss is the sum over classes; false: their mean, timm's and DeiT III's default. With the
            sum a logit's gradient is as large as by `cross_entropy`, and so are useful rates of SGD; with the mean it
            is `classes` times smaller, which adamw makes up for, and clipping by a norm of 1 hardly ever acts.
        class_weights: as for `cross_entropy`, by a sample's label; a mixed sample weighs the mixture.
        aux_weight: of auxiliary logits.

    Raises:
        UserError: as for `cross_entropy`; or smoothing and threshold, which would undo it.
    """
    if label_smoothing and target_threshold is not None:
        raise UserError(
            "targets that a threshold makes 0 or 1 are not smooth",
            where="objective.label_smoothing",
            todo="leave out label_smoothing or target_threshold",
        )
    each = partial(_bce, label_smoothing=label_smoothing, threshold=target_threshold, mean=not sum_classes)
    return Summed(_class_weights(class_weights, counts), aux_weight, each)


def focal(
    counts: Sequence[int],
    *,
    gamma: Factor = 2.0,
    class_weights: ClassWeights = None,
    aux_weight: Factor = 0.4,
) -> Summed:
    """Focal loss, softmax form: (1 - p)^gamma times the cross-entropy, p the probability of the label.

    Lin et al. 2017 (arXiv:1708.02002). Samples that the network is sure of count less.

    Args:
        gamma: 0 gives the cross-entropy.
        class_weights: as for `cross_entropy`; the paper's alpha.
        aux_weight: of auxiliary logits.

    Raises:
        UserError: as for `cross_entropy`.
    """
    return Summed(_class_weights(class_weights, counts), aux_weight, _in_shares(partial(_focal, gamma=gamma)))


def poly(
    counts: Sequence[int],
    *,
    epsilon: Annotated[Ratio, Field(ge=-1)] = 1.0,
    label_smoothing: Share = 0.0,
    class_weights: ClassWeights = None,
    aux_weight: Factor = 0.4,
) -> Summed:
    """PolyLoss of one term (Poly-1): the cross-entropy, and epsilon * (1 - p), p the probability of the label.

    Leng et al. 2022 (arXiv:2204.12511).

    Args:
        epsilon: of -1 or more; the best one differs by data set.
        label_smoothing, class_weights, aux_weight: as for `cross_entropy`; p is that of the smooth target.

    Raises:
        UserError: as for `cross_entropy`.
    """
    each = partial(_poly, epsilon=epsilon, label_smoothing=label_smoothing)
    return Summed(_class_weights(class_weights, counts), aux_weight, _in_shares(each))


def logit_adjustment(
    counts: Sequence[int],
    *,
    tau: Annotated[Ratio, Field(gt=0)] = 1.0,
    label_smoothing: Share = 0.0,
    aux_weight: Factor = 0.4,
) -> Summed:
    """Softmax cross-entropy of logits + tau * log(prior), for classes of very different sizes.

    Menon et al. 2021 (arXiv:2007.07314): the logits themselves, by which evaluations and predictions go, come to be
    those for classes that are equally likely. The prior is a class's share of an epoch as it is trained on (where
    `data.sampling: balanced` makes them equal, this is `cross_entropy`). A class without a sample is taken to have one,
    since log(0) is no number.

    Args:
        tau: 1 is right for the balanced error; larger ones favour rare classes more.
        label_smoothing, aux_weight: as for `cross_entropy`.
    """
    seen = [max(1, count) for count in counts]
    shift = _constant([tau * math.log(count / sum(seen)) for count in seen])
    return Summed(None, aux_weight, _in_shares(partial(_adjusted, shift=shift, label_smoothing=label_smoothing)))


def _class_weights(given: ClassWeights, counts: Sequence[int]) -> list[float] | None:
    """
    Raises:
        UserError: see :func:`cross_entropy`.
    """
    where = "objective.class_weights"
    if given == "balanced":
        if min(counts) == 0:
            raise UserError("a class has no training sample, so it has no balanced weight", where=where)
        return [sum(counts) / (len(counts) * count) for count in counts]
    if given is None:
        return None
    weights = [float(weight) for weight in given]
    if len(weights) != len(counts):
        raise UserError(f"{len(weights)} class weights for {len(counts)} classes", where=where)
    if not (all(0 <= w < math.inf for w in weights) and any(weights)):
        raise UserError("class weights must be finite numbers of 0 or more, and not all 0", where=where)
    return weights


def _constant(values: Sequence[float]) -> Constant:
    import torch

    from tlx.tasks.constants import Constant

    return Constant(torch.tensor(values, dtype=torch.float32))


def _cross_entropy(logits: Any, labels: Any, weights: Any, *, label_smoothing: float) -> Any:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, weight=weights, reduction="none", label_smoothing=label_smoothing)


def _bce(
    logits: Any, labels: Any, mix: Any, weights: Any, *, label_smoothing: float, threshold: float | None, mean: bool
) -> Any:
    from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

    target = one_hot(labels, logits.shape[1]).to(logits.dtype)
    if mix is not None:
        partner = one_hot(mix.partner_labels, logits.shape[1]).to(logits.dtype)
        target = mix.lam[:, None] * target + (1 - mix.lam[:, None]) * partner
    if threshold is not None:
        target = (target > threshold).to(logits.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / logits.shape[1]
    losses = binary_cross_entropy_with_logits(logits, target, reduction="none")
    each = losses.mean(1) if mean else losses.sum(1)
    if weights is None:
        return each
    own = weights[labels]
    return each * (own if mix is None else mix.lam * own + (1 - mix.lam) * weights[mix.partner_labels])


def _focal(logits: Any, labels: Any, weights: Any, *, gamma: float) -> Any:
    import torch
    from torch.nn.functional import cross_entropy

    each = cross_entropy(logits, labels, reduction="none")
    others = -torch.expm1(-each)  # 1 - p
    # a power below 1 has an infinite slope at 0, and infinity times no loss would be NaN
    each = each * others.clamp(min=torch.finfo(others.dtype).tiny) ** gamma
    return each if weights is None else each * weights[labels]


def _poly(logits: Any, labels: Any, weights: Any, *, epsilon: float, label_smoothing: float) -> Any:
    others = 1 - logits.softmax(1)
    others = others if weights is None else others * weights
    own = others.gather(1, labels[:, None])[:, 0]
    smooth = (1 - label_smoothing) * own + label_smoothing * others.mean(1)
    return _cross_entropy(logits, labels, weights, label_smoothing=label_smoothing) + epsilon * smooth


def _adjusted(logits: Any, labels: Any, weights: Any, *, shift: Constant, label_smoothing: float) -> Any:
    shifted = logits + shift.on(logits.device)
    return _cross_entropy(shifted, labels, weights, label_smoothing=label_smoothing)
