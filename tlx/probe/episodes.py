"""`tlx probe CONFIG --shots 1,5,10`: few pictures of each class, over many drawn episodes.

An episode is `ways` classes, with `shots` pictures of each to learn from and `queries` others to judge, as Vinyals et
al. 2016, Snell et al. 2017 and Chen et al. 2019 have it. Episodes of one number are the same for every count of shots,
but for the pictures that are added. Three classifiers, on frozen features:

- prototypes: the nearest class mean by Euclidean distance (Snell et al. 2017, without their training);
- cosine: vectors whose cosine with the features, times 10, is a logit; they begin as the means of normalised features
  and train for 100 steps on all pictures of the episode at once (Chen et al. 2019, Baseline++, which draws batches);
- logistic regression on normalised features, C = 1 (Tian et al. 2020, "Rethinking Few-Shot Image Classification").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tlx.base.errors import UserError
from tlx.data.stream.episodes import by_class, draw, too_few
from tlx.plan.config import Config
from tlx.probe.features import probed

_SCALE, _STEPS, _RATE, _MOMENTUM, _DECAY = 10.0, 100, 0.01, 0.9, 0.001
_C, _ITERATIONS = 1.0, 200
_AT_ONCE = 1 << 24  # numbers of a block of episodes


@dataclass(frozen=True)
class Wanted:
    """Episodes; of each class `queries` pictures judge."""

    shots: Sequence[int]
    ways: int = 5
    episodes: int = 600
    queries: int = 15


@dataclass(frozen=True)
class Accuracy:
    """Over episodes.

    Attributes:
        mean: of their accuracies.
        half: of the 95 % interval of the mean, 1.96 standard errors, as the literature reports it.
    """

    mean: float
    half: float

    @classmethod
    def of(cls, each: Tensor) -> Accuracy:
        """Of accuracies [episodes]."""
        half = 1.96 * float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return cls(float(each.mean()), half)


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        accuracies: by shots and classifier.
        pictures: that were drawn from, of so many classes.
    """

    wanted: Wanted
    accuracies: Mapping[int, Mapping[str, Accuracy]]
    pictures: int
    classes: int
    seed: int

    def data(self) -> dict[str, Any]:
        return {
            "ways": self.wanted.ways,
            "episodes": self.wanted.episodes,
            "queries": self.wanted.queries,
            "seed": self.seed,
            "pictures": self.pictures,
            "classes": self.classes,
            "chance": 1 / self.wanted.ways,
            "shots": {
                str(shots): {name: {"mean": one.mean, "half": one.half} for name, one in of.items()}
                for shots, of in self.accuracies.items()
            },
        }


def search(config: Config, wanted: Wanted) -> Found:
    """
    Raises:
        UserError: whatever keeps a training from beginning; fewer classes than ways; classes of too few pictures.
    """
    with probed(config, plain=True) as own:
        table = own.training_table()
        places = drawn(table.labels, own.classes, wanted, config.seed)
    found = {shots: judged(table.rows, places, shots, wanted) for shots in wanted.shots}
    return Found(wanted, found, len(table.labels), len(table.labels.unique()), config.seed)  # type: ignore[no-untyped-call]


def drawn(labels: Tensor, names: Sequence[str], wanted: Wanted, seed: int) -> Tensor:
    """int64 [episodes, ways, queries + most shots]: rows of the table; the first ones of each class are queries.

    Raises:
        UserError: fewer classes than ways; classes of too few pictures.
    """
    each = wanted.queries + max(wanted.shots)
    own = by_class(labels.numpy())
    if len(own) < wanted.ways or wanted.ways < 2:
        what = f"{wanted.ways} ways, and {len(own)} classes have pictures"
        raise UserError(what, where="--ways", todo=f"2 to {len(own)}")
    listed = too_few([names[label] for label in own], [len(rows) for rows in own.values()], each)
    if listed is not None:
        most = min(map(len, own.values())) - wanted.queries
        todo = f"--shots of at most {most}, or fewer --queries" if most > 0 else "fewer --queries, or more pictures"
        what = f"{max(wanted.shots)} shots and {wanted.queries} queries take {each} pictures of a class: {listed}"
        raise UserError(what, where="--shots", todo=todo)
    found = [draw(own, wanted.ways, each, seed=seed, number=n)[1] for n in range(wanted.episodes)]
    return torch.from_numpy(np.stack(found))


def judged(rows: Tensor, places: Tensor, shots: int, wanted: Wanted) -> dict[str, Accuracy]:
    """Accuracies of each classifier with so many shots."""
    each = wanted.ways * (wanted.queries + shots) * rows.shape[1]
    found: dict[str, list[Tensor]] = {name: [] for name in CLASSIFIERS}
    labels = torch.arange(wanted.ways).repeat_interleave(wanted.queries)
    for block in places.split(max(_AT_ONCE // each, 1)):  # type: ignore[no-untyped-call]
        support = rows[block[:, :, wanted.queries : wanted.queries + shots]]
        queries = rows[block[:, :, : wanted.queries].flatten(1)]
        for name, classify in CLASSIFIERS.items():
            found[name].append((classify(support, queries).argmax(2) == labels).double().mean(1))
    return {name: Accuracy.of(torch.cat(accuracies)) for name, accuracies in found.items()}


def prototypes(support: Tensor, queries: Tensor) -> Tensor:
    """Logits [episodes, queries, ways] of features [episodes, ways, shots, width] and [episodes, queries, width]."""
    return -torch.cdist(queries, support.mean(2)).square()


def cosine(support: Tensor, queries: Tensor) -> Tensor:
    """See :func:`prototypes`."""
    episodes, ways, shots, _ = support.shape
    rows = normalize(support, dim=3)
    weight, rows = normalize(rows.mean(2), dim=2).requires_grad_(), rows.flatten(1, 2)
    labels = torch.arange(ways).repeat_interleave(shots).repeat(episodes)
    # a sum over episodes: each has the gradient that it would have alone
    optimizer = torch.optim.SGD([weight], lr=_RATE, momentum=_MOMENTUM, dampening=_MOMENTUM, weight_decay=_DECAY)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        logits = _SCALE * rows @ normalize(weight, dim=2).transpose(1, 2)
        (cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / (ways * shots)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return normalize(queries, dim=2) @ normalize(weight.detach(), dim=2).transpose(1, 2)


def regression(support: Tensor, queries: Tensor) -> Tensor:
    """See :func:`prototypes`. All episodes are one convex problem; weights are sums of the pictures' features, which
    leaves as many numbers as there are pictures."""
    episodes, ways, shots, _ = support.shape
    rows = normalize(support, dim=3).flatten(1, 2).double()
    basis, within = torch.linalg.qr(rows.transpose(1, 2))
    within = within.transpose(1, 2)  # [episodes, pictures, coordinates]
    weight = within.new_zeros(episodes, within.shape[2], ways, requires_grad=True)
    bias = within.new_zeros(episodes, 1, ways, requires_grad=True)
    labels = torch.arange(ways).repeat_interleave(shots).repeat(episodes)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = (within @ weight + bias).flatten(0, 1)
        value: Tensor = _C * cross_entropy(logits, labels, reduction="sum") + weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found: Tensor = (normalize(queries, dim=2).double() @ basis) @ weight.detach() + bias.detach()
    return found


CLASSIFIERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "prototypes": prototypes,
    "cosine": cosine,
    "logistic regression": regression,
}


def text(found: Found) -> str:
    """A table for people."""
    from tlx.base.terminal import drawn as shown
    from tlx.base.terminal import tables, width

    wanted = found.wanted
    columns = {
        f"{shots}-shot": [f"{100 * one.mean:.1f} ± {100 * one.half:.1f}" for one in of.values()]
        for shots, of in found.accuracies.items()
    }
    title = f"{wanted.ways}-way accuracy, %: {wanted.episodes} episodes, {wanted.queries} queries a class"
    lines = [
        shown(*tables(title, {"classifier": list(CLASSIFIERS)}, columns, width(), more=title)),
        f"of {found.pictures:,} training pictures of {found.classes} classes, shown plainly; seed {found.seed}; "
        f"chance is {100 / wanted.ways:.1f} %",
        "95 % intervals of the mean over episodes, which share pictures: of other pictures they say less.",
    ]
    return "\n".join(lines)
