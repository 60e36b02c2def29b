"""The tasks that a configuration can name. Nothing here imports torch before a task is made."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from tlx.base.durations import Ratio
from tlx.base.errors import UserError
from tlx.tasks import TargetSummary, Task, TaskData
from tlx.tasks.choice import choose

__all__ = ["hierarchical", "ordinal", "regression"]

AuxWeight = Annotated[Ratio, Field(ge=0)]
Name = str | int | float
"""Of a class: YAML reads the name 3 as a number."""


def regression(
    data: TaskData,
    *,
    target: str | None = None,
    loss: Literal["mse", "mae", "huber", "smooth_l1"] = "mse",
    delta: Annotated[Ratio, Field(gt=0)] | None = None,
    beta: Annotated[Ratio, Field(gt=0)] | None = None,
    standardise: bool = True,
    aux_weight: AuxWeight = 0.4,
) -> Task:
    """Numbers for each image: one output for each column of the target.

    A sample's loss is the mean over the columns that it has a value in. It weighs 1, however many those are, and 0
    without any. Mixup and cutmix mix the values, as the pictures (Yao et al. 2022, arXiv:2210.05775), and not the
    losses.

    Metrics, in the target's own units: `mae`, `rmse` and `r2` are means over columns of each column's (`r2` as
    scikit-learn's `r2_score`), with several columns also `mae_by_column` and `r2_by_column`; `loss` is the mean squared
    error of standardised values, whatever is minimised. The training curve shows `mae`.

    Args:
        target: of kind number; needed where there are several.
        loss: what is minimised, of standardised values; mse is the square, without a half.
        delta: of huber, 1 by default: where it goes from quadratic to linear.
        beta: of smooth_l1, 1 by default, the same; smooth_l1 is huber / beta.
        standardise: learn (value - mean) / std, by column, of the values of a training epoch. Without, targets of a
            large scale need other learning rates.
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the target cannot be chosen; a column without values, or where all are the same; `delta` or `beta`
            of another loss.
    """
    for name, value, owner in (("delta", delta, "huber"), ("beta", beta, "smooth_l1")):
        if value is not None and loss != owner:
            raise UserError(f"is of loss {owner}; the loss is {loss}", where=f"task.{name}")
    summary = choose(data, "number", target)
    mean, std = _scale(summary, standardise)

    from torch.nn import functional

    from tlx.tasks.regression import Regression

    errors = {
        "mse": partial(functional.mse_loss, reduction="none"),
        "mae": partial(functional.l1_loss, reduction="none"),
        "huber": partial(functional.huber_loss, reduction="none", delta=1.0 if delta is None else delta),
        "smooth_l1": partial(functional.smooth_l1_loss, reduction="none", beta=1.0 if beta is None else beta),
    }
    return Regression(summary.target.name, errors[loss], mean, std, aux_weight)


def _scale(summary: TargetSummary, standardise: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What is subtracted from the values of each column, and what they are divided by.

    Raises:
        UserError: see :func:`regression`.
    """
    name, width = summary.target.name, summary.target.width
    empty = [i for i in range(width) if not math.isfinite(summary.mean[i])] if summary.known else list(range(width))
    if empty:
        which = "has no value" if len(empty) == width else f"has no value in columns {empty}"
        what = f'target "{name}" {which} in any training sample'
        raise UserError(what, where="task.target", todo="look at the source of the target, or build it without these")
    if not standardise:
        return (0.0,) * width, (1.0,) * width
    if same := [i for i in range(width) if not 0 < summary.std[i] < math.inf]:
        which = "" if width == 1 else f" in columns {same}"
        what = f'target "{name}" is the same in all training samples{which}: there is nothing to tell apart'
        raise UserError(what, where="task.target", todo="build it without these, or set task.standardise=false")
    return summary.mean, summary.std


def ordinal(
    data: TaskData,
    *,
    target: str | None = None,
    order: list[Name] | None = None,
    loss: Literal["corn", "thresholds"] = "corn",
    aux_weight: AuxWeight = 0.4,
) -> Task:
    """Classes that have an order, such as grades: K - 1 outputs for K classes, each whether the rank is above one.

    Metrics: `mae`, the mean distance between the predicted and the true rank; `top1`, the share of right classes;
    `kappa`, Cohen's with quadratic weights; `loss`, as it is minimised; `per_class`, the share of right ones by class.
    The training curve shows `mae`. `order` and the names of outputs ("above low") tell which order it is.

    Args:
        target: of kind class; `label` if it is left out, or the only one of this kind.
        order: names of all classes, the lowest first. Without, the order is that of the index, where names are sorted
            as text (high, low, medium) and whole numbers by value.
        loss: "corn": output k learns whether the rank is above k from those samples alone whose rank is not below k
            (Shi, Cao & Raschka 2021, arXiv:2111.08851), so that probabilities fall from rank to rank. A sample's loss
            is the sum over the outputs it teaches, which is -log of the probability of its class, and weighs 1; the
            paper divides by the number of these terms in a batch, which depends on the classes in it.
            "thresholds": each output learns from all samples by itself (Niu et al. 2016); a sample's loss is the sum
            over outputs.
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the target cannot be chosen; fewer than two classes; an order that leaves out a class, or has others;
            numbers whose order in the index is not by value, and no order.
    """
    summary = choose(data, "class", target)
    classes = summary.target.classes
    named = _in_order(classes, None if order is None else tuple(map(str, order)))

    from tlx.tasks.ordinal import Ordinal

    ranks = tuple(named.index(name) for name in classes)
    return Ordinal(summary.target.name, named, ranks, loss == "corn", aux_weight)


def _in_order(classes: tuple[str, ...], order: tuple[str, ...] | None) -> tuple[str, ...]:
    """All classes, the lowest first.

    Raises:
        UserError: see :func:`ordinal`.
    """
    if len(classes) < 2:
        raise UserError(f"classes with an order are two or more; the index has {len(classes)}", where="task.target")
    if order is None:
        values = _numbers(classes)
        if values is not None and values != sorted(values):
            what = f"classes are numbers, and their order in the index is another: {', '.join(classes[:8])}"
            by_value = [name for _, name in sorted(zip(values, classes, strict=True))]
            raise UserError(what, where="task", todo=f"say the order in task.order: [{', '.join(by_value)}]")
        return classes
    missing, unknown = [c for c in classes if c not in order], [c for c in order if c not in classes]
    if missing or unknown or len(order) != len(classes):
        odd = [f"without {', '.join(missing)}"] if missing else []
        odd += [f"with {', '.join(unknown)}, which are no classes"] if unknown else []
        what = " and ".join(odd) or "names a class twice"
        raise UserError(what, where="task.order", todo=f"name each of these once, the lowest first: {list(classes)}")
    return order


def _numbers(names: tuple[str, ...]) -> list[float] | None:
    """Their values, where all names are numbers."""
    try:
        return [float(name) for name in names]
    except ValueError:
        return None


def hierarchical(
    data: TaskData,
    *,
    target: str | None = None,
    separator: Annotated[str, Field(min_length=1)] = "/",
    levels: dict[Name, str] | None = None,
    alpha: Annotated[Ratio, Field(ge=0)] = 0.1,
    aux_weight: AuxWeight = 0.4,
) -> Task:
    """Classes that form a tree: names are paths such as ``animal/dog/poodle``, of any depth.

    One softmax over the leaves, the classes that are above no other; a node has the probability of the leaves below it.
    The loss is the hierarchical cross-entropy of Bertinetto et al. 2020 (arXiv:1912.09393): the sum, over the nodes on
    the way to the sample's class, of -log of the node's probability given the node above, times
    exp(-alpha * steps below the first level). The paper calls the node's distance from the root its height, and its
    code divides by the sum of weights; here the first level weighs 1. A sample whose class is no leaf
    (``animal/dog``) learns the levels that it knows.

    Metrics: `top1`, the share of right leaves among samples whose class is a leaf; `level1_top1`, `level2_top1` ...,
    the share of right nodes among samples that have a node at this depth, predicted as the likeliest of this depth;
    `distance`, the mean height (steps down to the farthest leaf) of the lowest common ancestor of the predicted leaf
    and the sample's class, 0 for a leaf below the class; `loss`, -log of the probability of the sample's class,
    whatever alpha is; `per_class`, `top1` by leaf. The training curve shows the share of predicted leaves that are the
    class or below it.

    Args:
        target: of kind class; `label` if it is left out, or the only one of this kind.
        separator: between the parts of a name.
        levels: what is above each class, where names are not paths: ``{poodle: animal/dog, chair: furniture}``, with ""
            for a class on the first level.
        alpha: 0 for plain cross-entropy of leaves; the higher, the more the upper levels count (0.1 to 0.6 in the
            paper).
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the target cannot be chosen; classes make no tree.
    """
    from tlx.tasks.tree import tree_of

    summary = choose(data, "class", target)
    above = None if levels is None else {str(name): path for name, path in levels.items()}
    tree = tree_of(summary.target.classes, separator, above)

    from tlx.tasks.hierarchical import Hierarchical

    return Hierarchical(summary.target.name, tree, alpha, aux_weight)
