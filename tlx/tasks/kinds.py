"""The tasks that a configuration can name. Nothing here imports torch before a task is made."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tlx.base.durations import Ratio
from tlx.base.errors import ConfigError, Problems, UserError, below, did_you_mean
from tlx.base.plug import Group
from tlx.data.shards.targets import LABEL
from tlx.data.stream.sampling import refuse_weightless
from tlx.tasks import TargetSummary, Task, TaskData, nested, views_of
from tlx.tasks.choice import choose, places_of
from tlx.tasks.few_shot import episodic

if TYPE_CHECKING:
    from tlx.data.stream.views import Views

__all__ = [
    "classification",
    "episodic",
    "hierarchical",
    "jigsaw",
    "multilabel",
    "multitask",
    "ordinal",
    "patches",
    "regression",
    "rotation",
    "semantic",
    "simclr",
    "vicreg",
]

AuxWeight = Annotated[Ratio, Field(ge=0)]
Focus = Annotated[Ratio, Field(ge=0)]
Share = Annotated[Ratio, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=1, le=65_536)]


def _ascending(area: tuple[float, float]) -> tuple[float, float]:
    if area[0] > area[1]:
        raise ValueError(f"the smallest share comes first: [{area[1]}, {area[0]}]")
    return area


Area = Annotated[
    tuple[Annotated[Ratio, Field(gt=0, le=1)], Annotated[Ratio, Field(gt=0, le=1)]], AfterValidator(_ascending)
]
Name = str | int | float
"""Of a class: YAML reads the name 3 as a number."""


def classification(
    data: TaskData,
    *,
    target: str | None = None,
    objective: Annotated[Any, Group("objective")] = None,
) -> Task:
    """One class per image.

    Args:
        target: of kind class; `label` if it is left out, or the only one of this kind.
        objective: what is minimised; left out, the configuration's `objective`.

    Raises:
        UserError: no such target, or one of a single class.
    """
    from tlx.tasks.classification import Classification

    own = choose(data, "class", target)
    if len(own.target.classes) < 2:
        what = f'target "{own.target.name}" has only one class: {", ".join(own.target.classes)}'
        raise UserError(what, where="task.target", todo="add a second one")
    counts = list(own.counts)
    made = data.objective(counts) if objective is None else nested.made("objective", objective, counts)
    partial = own.target.name != LABEL
    if partial and not callable(getattr(made, "losses", None)):
        raise UserError(
            f"samples may lack {own.target.name}, and the objective gives no losses of single samples",
            todo="a method `losses(logits, labels, mix)` -> [N]; or one of tlx's own objectives",
        )
    if made.class_weights is not None:
        refuse_weightless(own.target.classes, own.counts, made.class_weights)
    return Classification(own.target, data.top_k, made, partial)


classification.metric = "top1"  # type: ignore[attr-defined]


def rotation(data: TaskData) -> Task:
    """By how much a picture was turned: 0, 90, 180 or 270 degrees (Gidaris et al. 2018, arXiv:1803.07728).

    Nothing of the index is read: it may be of shards without labels. The paper shows each picture in all four
    rotations of a batch; here one is drawn for a sample in each epoch. `objective` is minimised; metrics are those of
    classification.
    """
    from tlx.tasks.pretext import Rotated

    return _drawn(data, Rotated())


def patches(
    data: TaskData,
    *,
    gap: Share = 0.5,
    area: Area = (0.5, 1.0),
) -> Task:
    """Where a patch of a picture lies beside the middle one: eight places (Doersch et al. 2015, arXiv:1505.05192).

    The network sees each of the two patches by itself, both of the input's size; the head takes the features of both,
    and needs a hidden layer to compare them (`head: mlp`). Nothing of the index is read. `transforms`, by default none,
    act on each patch by itself; colours that a lens shifts are best hidden (`grayscale`), as in the paper.

    Args:
        gap: between patches, on average, as a share of their size; about half in the paper.
        area: least and most of a picture's area that the nine patches are of.
    """
    from tlx.tasks.pretext import Grid, Neighbour

    return _drawn(data, Neighbour(Grid(3, gap, area)))


def jigsaw(
    data: TaskData,
    *,
    cells: Literal[2, 3] = 3,
    orders: Annotated[int, Field(ge=2, le=1000)] = 100,
    gap: Share = 0.17,
    area: Area = (0.5, 1.0),
) -> Task:
    """In which of some orders the patches of a picture are shown (Noroozi and Favaro 2016, arXiv:1603.09246).

    The network sees each patch by itself, of the input's size; the head takes the features of all, in the order shown.
    Nothing of the index is read. `transforms`, by default none, act on each patch by itself.

    Args:
        cells: patches in a row and in a column.
        orders: how many, chosen far from each other; at most as many as there are (24 of four patches).
        gap: between patches, on average, as a share of their size; 11 of 64 pixels in the paper.
        area: least and most of a picture's area that the patches are of.
    """
    from tlx.tasks.pretext import Grid, Shuffled, far_orders

    return _drawn(data, Shuffled(Grid(cells, gap, area), far_orders(cells**2, orders)))


def simclr(
    data: TaskData,
    *,
    width: Width = 128,
    temperature: Annotated[Ratio, Field(gt=0)] = 0.5,
) -> Task:
    """Two views of each picture, and which view of a batch belongs to which (Chen et al. 2020, arXiv:2002.05709).

    The head is the paper's projection, and falls away after the pretraining: `head: {name: mlp, hidden: [512]}`. The
    loss is NT-Xent over the whole global batch, of all ranks; the larger it is, the better. Nothing of the index is
    read. Metrics: `loss`, and `top1`, how often the nearest other view is of the same picture, within batches of an
    evaluation; `spread` and `rank` of the head's vectors, which are small where all are alike.

    Args:
        width: of the vectors that are compared.
        temperature: small ones make near views of other pictures count more.
    """
    from tlx.tasks.embedding import Embedding, contrasting

    return Embedding(width, contrasting(temperature), "each picture is told from all others of the batch")


def vicreg(
    data: TaskData,
    *,
    width: Width = 512,
    invariance: Focus = 25.0,
    variance: Focus = 25.0,
    covariance: Focus = 1.0,
) -> Task:
    """Two views of each picture, whose vectors are to be alike, each component of which is to vary over the batch, and
    no two to vary together (Bardes et al. 2022, arXiv:2105.04906).

    It tells no pictures from each other, and does with smaller batches than `simclr`. The head, the paper's expander,
    falls away: `head: {name: mlp, hidden: [512, 512], norm: true}`. Statistics are of the whole global batch, of all
    ranks. Nothing of the index is read. Metrics are those of `simclr`.

    Args:
        width: of the vectors that are compared.
        invariance, variance, covariance: weights of the three terms; 25, 25 and 1 in the paper. Without the second all
            pictures may get one vector.
    """
    from tlx.tasks.embedding import Embedding, regularising

    terms = regularising(invariance, variance, covariance)
    return Embedding(width, terms, "variances and covariances are of the whole batch")


for _views in (simclr, vicreg):
    _views.draws = True  # type: ignore[attr-defined, union-attr]
    _views.transforms = [  # type: ignore[attr-defined, union-attr]
        ("random_resized_crop", {}),
        ("horizontal_flip", {}),
        ("color_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}),
        ("grayscale", {"p": 0.2}),
    ]


for _pretext in (rotation, patches, jigsaw):
    _pretext.metric = "top1"  # type: ignore[attr-defined]
    _pretext.draws = True  # type: ignore[attr-defined]
patches.transforms = jigsaw.transforms = [("center_crop", {})]  # type: ignore[attr-defined]


def _drawn(data: TaskData, views: Views) -> Task:
    """Classification of what views draw.

    Raises:
        UserError: an objective that weighs classes, which are drawn alike.
    """
    from tlx.tasks.classification import Classification

    (target,) = views.targets.values()
    classes = len(target.classes)
    made = data.objective([max(1, data.samples // classes)] * classes)
    if made.class_weights is not None:
        raise UserError(
            "classes that are drawn come equally often", where="objective.class_weights", todo="leave it out"
        )
    return Classification(target, min(data.top_k, classes), made, views=views)


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
    apply to a sample. By label: `ap_per_class` (average precision), `f1_per_class`, and `thresholds`, those that make
    F1 highest in this evaluation, by which predictions go. A threshold judged by the samples it was chosen on flatters:
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
    losses = functools.partial(getattr(made, loss), **focus)
    return made.MultiLabel(summary.target, losses, weights, label_smoothing, aux_weight)


multilabel.metric = "map"  # type: ignore[attr-defined]


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
        "mse": functools.partial(functional.mse_loss, reduction="none"),
        "mae": functools.partial(functional.l1_loss, reduction="none"),
        "huber": functools.partial(functional.huber_loss, reduction="none", delta=1.0 if delta is None else delta),
        "smooth_l1": functools.partial(functional.smooth_l1_loss, reduction="none", beta=1.0 if beta is None else beta),
    }
    return Regression(summary.target, errors[loss], mean, std, aux_weight)


regression.metric = "mae"  # type: ignore[attr-defined]


def _scale(summary: TargetSummary, standardise: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What is subtracted from the values of each column, and what they are divided by.

    Raises:
        UserError: see :func:`regression`.
    """
    name, width = summary.target.name, summary.target.width
    known = summary.known if isinstance(summary.known, tuple) else (summary.known,) * width
    empty = [i for i in range(width) if not known[i]]
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
        order: names of all classes, the lowest first. It may be left out where all names are numbers, which are in the
            order of the index; other names are sorted as text there (high, low, medium).
        loss: "corn": output k learns whether the rank is above k from those samples alone whose rank is not below k
            (Shi, Cao & Raschka 2021, arXiv:2111.08851), so that probabilities fall from rank to rank. A sample's loss
            is the sum over the outputs it teaches, which is -log of the probability of its class, and weighs 1; the
            paper divides by the number of these terms in a batch, which depends on the classes in it.
            "thresholds": each output learns from all samples by itself (Niu et al. 2016); a sample's loss is the sum
            over outputs.
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the target cannot be chosen; fewer than two classes; an order that leaves out a class, or has others;
            no order, and names that are not numbers, or whose order in the index is not by value.
    """
    summary = choose(data, "class", target)
    classes = summary.target.classes
    named = _in_order(classes, None if order is None else tuple(map(str, order)))

    from tlx.tasks.ordinal import Ordinal

    ranks = tuple(named.index(name) for name in classes)
    return Ordinal(summary.target, named, ranks, loss == "corn", aux_weight)


ordinal.metric = "mae"  # type: ignore[attr-defined]


def _in_order(classes: tuple[str, ...], order: tuple[str, ...] | None) -> tuple[str, ...]:
    """All classes, the lowest first.

    Raises:
        UserError: see :func:`ordinal`.
    """
    if len(classes) < 2:
        raise UserError(f"classes with an order are two or more; the index has {len(classes)}", where="task.target")
    if order is None:
        values = _numbers(classes)
        if values is None:
            what = f"the order of these classes is not known: {', '.join(classes[:50])}"
            raise UserError(what, where="task.order", todo="name each of them once, the lowest first")
        if values != sorted(values):
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
        values = [float(name) for name in names]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


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

    return Hierarchical(summary.target, tree, alpha, aux_weight)


hierarchical.metric = "top1"  # type: ignore[attr-defined]


def semantic(
    data: TaskData,
    *,
    embeddings: str | None = None,
    unseen: list[Name] = [],  # noqa: B006  # read, and written down as it is
    names: dict[Name, str] = {},  # noqa: B006
    prompts: list[str] | None = None,
    width: Annotated[int, Field(ge=1)] | None = None,
    normalise: bool = True,
    loss: Literal["cross_entropy", "hinge"] = "cross_entropy",
    margin: Annotated[Ratio, Field(gt=0)] | None = None,
    calibration: Literal["validation"] | float | None = "validation",
    aux_weight: AuxWeight = 0.4,
) -> Task:
    """One class per image, by what is known of the classes: also classes without a training picture (zero-shot).

    The head `semantic` maps features to the space of the class vectors; an output is the similarity to a class's
    vector. Training shows no picture of an unseen class, and its loss is over the seen classes alone. All classes are
    in the index of the shards, whether training has pictures of them or not.

    Metrics, means over classes of the share of right pictures (Xian et al. 2018, arXiv:1707.00600): `seen` and
    `unseen`, pictures of such classes told among all classes; `harmonic`, the harmonic mean of both; `zsl`, pictures of
    unseen classes told among these alone; `calibrated_seen`, `calibrated_unseen` and `calibrated_harmonic`, with a
    constant taken from the scores of seen classes (calibrated stacking, Chao et al. 2016, arXiv:1605.04253); `ausuc`,
    the area under the curve of both over all constants (there, too); `top1`, the share of right pictures; `loss`,
    cross-entropy over all classes, whatever is minimised. By class: `per_class`, among all classes without a constant.
    Without unseen classes these are `seen`, `harmonic`, which is the same then, `top1` and `loss`.

    Args:
        embeddings: a file of vectors by class name (word vectors, attributes): .csv, .parquet, .npz, the text format of
            word2vec and GloVe; or ``text:MODEL``, what a text encoder says of prompts: the folder of a model of
            sentence-transformers or open_clip, the name of an installed package that holds one, or
            ``open_clip/NAME@FILE``. Left out, with `width`, the vectors are those of the weights (`head.keep`).
        unseen: classes of which no picture is trained on.
        names: of classes, as the file writes them or a prompt should: ``{"0004": lily of the valley}``.
        prompts: of ``text:``, with ``{}`` for the class; by default "a photo of a {}.". Of several a class has the
            mean of their unit vectors.
        width: how many numbers a class vector has, where `embeddings` is left out.
        normalise: vectors are scaled to length 1, as DeViSE has it.
        loss: "cross_entropy" over the seen classes; "hinge", the rank loss of DeViSE (Frome et al. 2013): the sum over
            other seen classes of max(0, margin - score + other score).
        margin: of hinge, 0.1 by default, in units of the head's scores (``similarity: dot``, whose scale is 1).
        calibration: the constant of calibrated stacking: "validation", the one with the highest harmonic mean in the
            evaluation that chose the weights, which test data and predictions then go by; that evaluation itself judges
            every other picture, by order of ids, by the constant of the rest, and the rest by theirs. A number; or null
            for none: predictions go by the scores as they are.
        aux_weight: of auxiliary outputs (0.4 for Inception, Szegedy et al. 2016).

    Raises:
        UserError: the index has no class; a class that is unseen or renamed and is none; fewer than two seen classes; a
            file or model that cannot be had or lacks a class; `prompts` without a text encoder; a margin of another
            loss.
    """
    if margin is not None and loss != "hinge":
        raise UserError(f"is of loss hinge; the loss is {loss}", where="task.margin")
    summary = choose(data, "class", LABEL if LABEL in data.targets else None)
    if summary.target.name != LABEL:  # what is shown is chosen by it
        raise UserError("this task is for the class of a picture, and the index has none", where="task")
    classes = summary.target.classes
    places = places_of(unseen, classes, where="task.unseen")
    if len(classes) - len(places) < 2:
        what = f"{len(classes) - len(places)} of {len(classes)} classes are seen: there is nothing to tell apart"
        raise UserError(what, where="task.unseen", todo="leave two classes or more to train on")
    renamed = {str(name): text for name, text in names.items()}
    places_of(renamed, classes, where="task.names")

    from tlx.tasks.semantic import Semantic, vectors_of

    said = {name: renamed.get(name, name) for name in classes}
    vectors = vectors_of(embeddings, said, prompts=prompts, width=width, normalise=normalise)
    described = {
        "embeddings": None,
        "width": vectors.width,
        "unseen": [classes[place] for place in places],
        "normalise": normalise,
        "loss": loss,
        **({"margin": margin} if margin is not None else {}),
        "calibration": calibration,
        "aux_weight": aux_weight,
    }
    return Semantic(
        summary.target,
        places,
        vectors,
        margin=(0.1 if margin is None else float(margin)) if loss == "hinge" else None,
        calibration=calibration if calibration == "validation" else float(calibration or 0.0),
        top_k=data.top_k,
        aux_weight=aux_weight,
        described=described,
    )


semantic.metric = "harmonic"  # type: ignore[attr-defined]
semantic.head = "semantic"  # type: ignore[attr-defined]
semantic.leaves_out = "unseen"  # type: ignore[attr-defined]


def multitask(
    data: TaskData,
    *,
    tasks: dict[str, Annotated[Any, Group("task")]],
    weighting: Literal["equal", "uncertainty"] | dict[str, Annotated[Ratio, Field(ge=0)]] = "equal",
    score: dict[str, float] | None = None,
) -> Task:
    """Several tasks: a head for each on a shared backbone, their losses summed. Samples may lack targets of some.

    Each task's loss is the mean over those samples of a global batch that have its target, so that a target which few
    samples have weighs as much as one that all have.

    Args:
        tasks: by name: a task each, ``{species: classification, colour: {name: classification, target: colour}}``.
        weighting: of losses: all 1 (`equal`); by hand, ``{species: 1, colour: 0.3}``; or `uncertainty`, a learned
            variance for each task (Kendall, Gal and Cipolla 2018, arXiv:1705.07115: exp(-s) loss + s), which is a
            parameter of the head.
        score: metrics as ``TASK/METRIC`` and their weights in the sum ``val/score``, which chooses the best checkpoint
            unless `evaluate.metric` names another; left out, the mean of every task's own, those of which lower is
            better with a minus. A task that weighs 0 counts neither here nor in `loss`.

    Raises:
        UserError: fewer than two tasks, names that no head can have, weights for others; a task with several heads,
            with several losses, with learned constants, or with a metric of its own that it does not give.
    """
    from torch.nn import Module

    from tlx.tasks.multitask import MultiTask

    if len(tasks) < 2:
        raise UserError(f"{len(tasks)} task{'s' * (len(tasks) != 1)}: several are two or more", where="task.tasks")
    odd = next((name for name in tasks if not name.isidentifier()), None)
    if odd is not None:
        raise UserError(f'the name "{odd}" is none for a head', where="task.tasks", todo="letters, digits and _")
    taken = next((name for name in tasks if name in ("constants", "names") or hasattr(Module(), name)), None)
    if taken is not None:
        what = f'the head of a task cannot have the name "{taken}": torch\'s modules have something of this name'
        raise UserError(what, where="task.tasks", todo=f"another name, such as {taken}_task")
    made = _each_made(data, tasks)
    shares = dict.fromkeys(made, 1.0)
    if isinstance(weighting, dict):
        strange = next((name for name in weighting if name not in made), None)
        if strange is not None:
            what = f'there is no task "{strange}"{did_you_mean(strange, made)}'
            raise UserError(what, where="task.weighting")
        shares |= {name: float(share) for name, share in weighting.items()}
        if not any(shares.values()):
            raise UserError("every task weighs 0: there is nothing to learn from", where="task.weighting")
    counted = {name: one for name, one in made.items() if shares[name]}
    task = MultiTask(made, shares, weighting == "uncertainty", score or _mean_of(counted))
    for metric in task.score:
        if metric not in task.metrics or metric == "score":
            near = did_you_mean(metric, [name for name in task.metrics if "/" in name])
            raise UserError(f'there is no metric "{metric}"{near}', where="task.score")
    return task


multitask.metric = "score"  # type: ignore[attr-defined]


def _each_made(data: TaskData, tasks: Mapping[str, Any]) -> dict[str, Task]:
    """
    Raises:
        UserError: what is wrong with any of them, by the keys under it.
    """
    made: dict[str, Task] = {}
    problems = Problems()
    for name, part in tasks.items():
        key = f"task.tasks.{name}"
        try:
            made[name] = nested.made("task", part, data)
        except ConfigError as error:
            problems.errors += below(error, key)
        except UserError as error:  # which knows itself as the only task
            own = (error.where or "task").partition(".")
            where = f"{key}.{own[2]}" if own[0] == "task" and own[2] else key
            what = error.what if own[0] == "task" else f"{error.where}: {error.what}"
            problems.add(UserError(what, where=where, todo=error.todo))
    for name, task in made.items():
        problems.of(functools.partial(_refuse_inside, task, where=f"task.tasks.{name}"))
    problems.refuse()
    return made


def _refuse_inside(task: Task, *, where: str) -> None:
    """
    Raises:
        UserError: it cannot be one of several.
    """
    if views_of(task) is not None:
        raise UserError("draws what a sample is shown as, which one of several tasks cannot", where=where)
    if task.parts > 1:
        raise UserError("a task of several tasks is made of single ones", where=where)
    if getattr(task, "vectors", None) is not None:
        raise UserError("a task of class vectors is none of several: they are the head", where=where)
    if getattr(task, "episodes", None) is not None:
        raise UserError("its batches are episodes, from which no other task can learn", where=where)
    if len(task.heads) > 1:
        raise UserError(
            f"has {len(task.heads)} heads ({', '.join(task.heads)}); one of several tasks has one", where=where
        )
    if task.constants:
        what = f"its loss learns constants ({', '.join(task.constants)}), which one of several tasks cannot have"
        raise UserError(what, where=where)
    if task.metric not in task.metrics:
        raise UserError(f'chooses by "{task.metric}", which is none of its metrics', where=where)


def _mean_of(tasks: Mapping[str, Task]) -> dict[str, float]:
    sign = {name: 1.0 if task.metrics[task.metric] else -1.0 for name, task in tasks.items()}
    return {f"{name}/{task.metric}": sign[name] / len(tasks) for name, task in tasks.items()}
