"""The tasks that a configuration can name. Nothing here imports torch before a task is made."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.errors import UserError
from tlx.tasks import TargetSummary, Task, TaskData  # annotations are read when arguments are checked
from tlx.tasks.choice import choose

__all__ = ["multilabel"]

AuxWeight = Annotated[Ratio, Field(ge=0)]
Focus = Annotated[Ratio, Field(ge=0)]


def multilabel(
    data: TaskData,
    *,
    target: str | None = None,
    loss: Literal["bce", "asymmetric", "focal"] = "bce",
    gamma_negative: Focus | None = None,
    gamma_positive: Focus | None = None,
    clip: Annotated[Ratio, Field(ge=0, lt=1)] | None = None,
    gamma: Focus | None = None,
    alpha: Annotated[Ratio, Field(gt=0, lt=1)] | None = None,
    positive_weights: Literal["balanced"] | list[Annotated[Ratio, Field(gt=0)]] | None = None,
    label_smoothing: Annotated[Ratio, Field(ge=0, lt=1)] = 0.0,
    aux_weight: AuxWeight = 0.4,
) -> Task:
    """Any number of labels for each image, each of which applies or not: one output for each.

    A sample's loss is the sum over the labels that are known of it, and it weighs 1, or 0 where none is. So each known
    decision counts the same, however many others are known, and the gradient of a logit is as large as by
    `cross_entropy` or the paper of `asymmetric`, which needs no other rates; torch's `BCEWithLogitsLoss`, a mean, is
    `labels` times smaller. Unknown labels teach nothing. Of a mixed sample both losses count, in their shares.

    Metrics: `map`, the mean over labels of the average precision; `f1_micro` and `f1_macro`, labels told by a
    probability above 1/2, all decisions together and the mean over labels; `tuned_f1_micro` and `tuned_f1_macro`, the
    same by thresholds of each label; `loss`, binary cross-entropy, whatever is minimised. Means are over labels that
    apply to a sample. By label: `per_class` (average precision), `f1_per_class`, and `thresholds`, those that make F1
    highest in this evaluation, by which predictions go. A threshold judged by the samples it was chosen on flatters:
    the tuned scores judge every other sample, by order of ids, by thresholds chosen on the rest, and the rest by
    theirs. The training curve shows `label_accuracy`, the share of known labels told rightly.

    Args:
        target: of kind labels; needed where there are several.
        loss: "bce", binary cross-entropy; "asymmetric" (Ridnik et al. 2021, arXiv:2009.14119), for many labels of which
            few apply; "focal" (Lin et al. 2017, arXiv:1708.02002).
        gamma_negative, gamma_positive, clip: of asymmetric: how much less sure decisions count, and the probability up
            to which a label that does not apply has no loss. 4, 1 and 0.05 are defaults, as in the authors' code (their
            MS-COCO has a gamma_positive of 0). The gradient is that of the paper's formula; the authors' code takes
            the factor (1 - p)^gamma as a constant.
        gamma: of focal, 2 by default.
        alpha: of focal, 0.25 by default, as in the paper: what labels that apply weigh; others weigh 1 - alpha.
        positive_weights: one per label, of the loss where it applies; "balanced": samples that it does not apply to /
            samples that it applies to, of an epoch as it is trained on; 1 for a label that lacks either.
        label_smoothing: targets are s / 2 and 1 - s / 2.
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the target cannot be chosen; an argument of another loss; not one positive weight for each label.
    """
    given = {"gamma_negative": gamma_negative, "gamma_positive": gamma_positive, "clip": clip}
    given |= {"gamma": gamma, "alpha": alpha}
    for owner, defaults in _FOCUS.items():
        for name in defaults:
            if given[name] is not None and owner != loss:
                raise UserError(f"is of loss {owner}; the loss is {loss}", where=f"task.{name}")
    summary = choose(data, "labels", target)
    weights = _positive_weights(summary, positive_weights)

    from tlx.tasks import multilabel as made

    focus = {name: default if given[name] is None else given[name] for name, default in _FOCUS.get(loss, {}).items()}
    losses = partial(getattr(made, loss), **focus)
    return made.MultiLabel(summary.target.name, summary.target.classes, losses, weights, label_smoothing, aux_weight)


_FOCUS = {
    "asymmetric": {"gamma_negative": 4.0, "gamma_positive": 1.0, "clip": 0.05},
    "focal": {"gamma": 2.0, "alpha": 0.25},
}
"""Arguments of losses, with their defaults."""


def _positive_weights(
    summary: TargetSummary, given: Literal["balanced"] | list[float] | None
) -> tuple[float, ...] | None:
    """
    Raises:
        UserError: not one for each label.
    """
    if given == "balanced":
        known = summary.known if isinstance(summary.known, tuple) else (summary.known,) * len(summary.counts)
        pairs = zip(summary.counts, known, strict=True)
        return tuple((total - count) / count if 0 < count < total else 1.0 for count, total in pairs)
    labels = len(summary.target.classes)
    if given is not None and len(given) != labels:
        raise UserError(f"{len(given)} positive weights for {labels} labels", where="task.positive_weights")
    return None if given is None else tuple(given)
