"""A head that begins as the solution on stored features (:mod:`tlx.features.solve`, of class vectors
:mod:`tlx.features.eszsl`), or as their class means."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tlx.base.errors import UserError
from tlx.data.stream.batch_targets import values_of
from tlx.data.stream.order import derive, permuted
from tlx.features.eszsl import solved_map
from tlx.features.solve import solved_head
from tlx.features.stored import StoredFeatures
from tlx.models.head_modules import Prototypes, Semantic
from tlx.ranks.together import by_main
from tlx.tasks.classification import Classification
from tlx.tasks.semantic import Semantic as SemanticTask
from tlx.train.cached import PhaseInput
from tlx.train.run import Run

_MOST_BYTES = 2 << 30  # of the features that a head is solved on, in fp32: the solver holds a few times as much


def solve_head(run: Run, source: PhaseInput) -> None:
    """The head's weights become those that fit the features of training pictures best, on all ranks, in the moving
    average too.

    Raises:
        UserError: there are no features at its input, or it is no linear layer for one classification.
    """
    task, stream = run.task, run.stream
    head = _head_at(run, source)

    assert isinstance(task, Classification | SemanticTask)

    def solve() -> None:
        features, labels, pictures = _all_features(source, task.target.name, run.config.seed)
        began = time.monotonic()
        shown = len(set(pictures.tolist()))
        count = f"{len(features):,} views of {shown:,} pictures (there are {len(stream.manifest):,})"
        if isinstance(head, Prototypes):
            lacking = begin_with_means(head, features, labels)
            without = f"; without a picture: {', '.join(task.classes[c] for c in lacking)}" if lacking else ""
            run.journal.note(f"head: prototypes are class means of {count}{without}")
            return
        beat = lambda: run.world.watch.beat("batch")  # noqa: E731
        if isinstance(head, Semantic):
            said = begin_with_map(head, features, labels, beat)
            run.journal.note(f"head: ESZSL on {count}, {said}, {time.monotonic() - began:.1f} s")
            return
        weight, bias, penalty = solved_head(features, labels, len(task.classes), pictures, beat=beat)
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(bias)
        took = time.monotonic() - began
        run.journal.note(f"head: logistic regression on {count}, penalty {penalty:g}, {took:.1f} s")

    by_main(run.world, solve, faults=True)
    run.world.broadcast(list(head.parameters()))
    if run.ema is not None:
        run.ema.module.load_state_dict(run.net.state_dict())


def _head_at(run: Run, source: PhaseInput) -> nn.Linear | Prototypes | Semantic:
    """
    Raises:
        UserError: see :func:`solve_head`.
    """
    cut, task = source.cut, run.task
    means = run.config.begins_with_means
    at = None if cut is None or cut.side != "input" else run.net.get_submodule(cut.path)
    head = at
    own = Prototypes if means else Semantic
    if at is not None and not isinstance(at, nn.Linear):  # only dropout may come before it
        near = run.net if isinstance(at, nn.Dropout) else at
        head = next((one for one in near.modules() if isinstance(one, own)), None)
    if isinstance(head, Semantic) and isinstance(task, SemanticTask):
        return head
    if isinstance(head, nn.Linear | Prototypes) and isinstance(task, Classification) and len(task.heads) == 1:
        return head
    kind, where = ("prototypes begin as class means of", "head.name: prototype") if means else (
        "a head is solved from", "head.init: solved"
    )  # fmt: skip
    what = f"{kind} features at its input"
    if cut is not None:
        what = f"{what}, for one class" if means else "only a linear head of one class"
        what += f", and features are those of the {cut}"
    todo = "cache: {views: 4} (or exact, with transforms: []), head: linear, a first phase that trains the head"
    raise UserError(f"{what}; there is none here", where=where, todo=todo.replace("linear", run.config.head.name))


@torch.no_grad()
def begin_with_map(head: Semantic, features: Tensor, labels: Tensor, beat: Callable[[], None]) -> str:
    """The map becomes that of ESZSL, for the vectors as the head scores them. In words, how it was chosen.

    Args:
        features: float [n, width].
        labels: int64 [n], of classes that are trained on.
    """
    vectors = head.vectors.detach().cpu()
    solved = solved_map(features, labels, normalize(vectors, dim=1) if head.cosine else vectors, beat=beat)
    head.map.weight.copy_(solved.weight)
    if head.map.bias is not None:
        head.map.bias.zero_()
    chosen = f"gamma {solved.gamma:g}, lambda {solved.lambda_:g} (of mean eigenvalues)"
    if solved.accuracy is None:
        return f"{chosen}, too few classes to choose them"
    return f"{chosen}, chosen by {solved.accuracy:.1%} of classes held out in turn"


@torch.no_grad()
def begin_with_means(head: Prototypes, features: Tensor, labels: Tensor) -> list[int]:
    """Prototypes become the means of their classes; those of classes without a row stay.

    Args:
        features: float [n, width].
        labels: int64 [n].

    Returns:
        Classes without a row.
    """
    counts = torch.bincount(labels, minlength=len(head.weight))
    sums = torch.zeros(head.weight.shape, dtype=torch.float64).index_add_(0, labels, features.double())
    there = counts > 0
    means = (sums[there] / counts[there, None]).to(head.weight)
    head.weight[there.to(head.weight.device)] = means
    return (~there).nonzero()[:, 0].tolist()


def _all_features(source: PhaseInput, target: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 [n, width] of all views of pictures that have a class and can be read, as many as memory should hold,
    drawn by the seed; their classes, their places."""
    stored = source.stream.stored
    assert isinstance(stored, StoredFeatures)
    store, manifest = stored.store, stored.manifest
    layout = store.layout
    labels = torch.from_numpy(values_of(manifest, [target], np.arange(len(manifest)))[target].astype(np.int64))
    few = source.stream.loader.among
    if few is not None:
        labels[np.isin(np.arange(len(manifest)), few, invert=True)] = -1
    usable = (labels >= 0).nonzero()[:, 0].numpy()
    most = max(_MOST_BYTES // (4 * layout.views * int(np.prod(layout.shape))), 1)
    if len(usable) > most:
        drawn = permuted(derive(seed, "solved"), len(usable), np.arange(most))
        labels[np.setdiff1d(usable, usable[drawn])] = -1
    rows, classes, places = list[Tensor](), list[Tensor](), list[Tensor]()
    for view in range(layout.views):
        read = torch.tensor([(view, place) not in store.bad for place in range(len(manifest))])
        own = ((labels >= 0) & read).nonzero()[:, 0]
        rows.append(store.tensor(store.rows(view)[own.numpy()]).float())
        classes.append(labels[own])
        places.append(own)
    return torch.cat(rows), torch.cat(classes), torch.cat(places)
