"""`tlx probe CONFIG --lr ... --weight-decay ... --heads ...`: a grid of heads, all trained at once on the same
features, with logistic regression beside them; what is chosen, and what choosing is worth."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlx.base import plug
from tlx.base.errors import UserError
from tlx.data.stream.order import derive
from tlx.data.stream.stream import ShardStream
from tlx.features.knn import Table
from tlx.plan.config import Config
from tlx.plan.parts import Part, known_part
from tlx.probe.choice import RESAMPLES, Judged, means
from tlx.probe.features import Probed, probed
from tlx.probe.members import Member, Optimizer, Stack
from tlx.probe.regression import CS, folds, regressions
from tlx.tasks import Truth
from tlx.use.judged import Interval

_HELD_OUT = 5  # the part of the training pictures that judges where there are no others
_JUDGED_AT_ONCE = 1024


@dataclass(frozen=True)
class Wanted:
    """A grid.

    Attributes:
        heads, lrs, decays: by default those of the configuration.
        cs: of logistic regression.
        resamples: of pictures, for intervals.
    """

    heads: Sequence[Part] = ()
    lrs: Sequence[float] = ()
    decays: Sequence[float] = ()
    cs: Sequence[float] = CS
    resamples: int = RESAMPLES


@dataclass(frozen=True)
class Candidate:
    """What was trained or fitted, and how good it is on the pictures that judge.

    Attributes:
        member: of the grid; None of a logistic regression.
        loss: mean cross-entropy.
    """

    name: str
    member: Member | None
    accuracy: Interval
    loss: float

    def data(self) -> dict[str, Any]:
        own = self.member
        settings = (
            {} if own is None else {"head": own.head.model_dump(), "lr": own.lr, "weight_decay": own.weight_decay}
        )
        return {"name": self.name, **settings, "accuracy": self.accuracy.data(), "loss": self.loss}


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        candidates: the best first.
        chosen: accuracy of whichever member is best on one half of the pictures, on the other half.
        regression: the same of logistic regressions.
        judged_on: the pictures that judge, in words.
        shown: how training pictures were shown, in words.
        steps: of each member.
        seconds: of the grid, of the regressions.
    """

    candidates: Sequence[Candidate]
    chosen: Interval
    regression: Interval | None
    judged_on: str
    trained_on: str
    steps: int
    seconds: Mapping[str, float]

    @property
    def winner(self) -> Candidate:
        return next(one for one in self.candidates if one.member is not None)

    def data(self) -> dict[str, Any]:
        return {
            "judged_on": self.judged_on,
            "trained_on": self.trained_on,
            "steps": self.steps,
            "seconds": dict(self.seconds),
            "chosen_on_the_other_half": self.chosen.data(),
            "regression_chosen_on_the_other_half": None if self.regression is None else self.regression.data(),
            "candidates": [one.data() for one in self.candidates],
        }


def search(config: Config, wanted: Wanted) -> Found:
    """
    Raises:
        UserError: whatever keeps a training from beginning; heads that do not take pooled features; too few pictures.
    """
    members = members_of(config, wanted)
    optimizer = Optimizer.of(config.optimizer, config.no_decay, config.loop.clip)
    with probed(config, plain=False) as own:
        return _search(own, members, optimizer, wanted)


def members_of(config: Config, wanted: Wanted) -> list[Member]:
    """Every combination, in their order."""
    own = Part(name=config.head.name, args=config.head_args)
    heads = [_checked(head) for head in wanted.heads or (own,)]
    first = next((name for name in config.phase_names if name != "each"), "each")
    lr = config.settings(first).lr
    rates, decays = wanted.lrs or ([] if lr is None else [lr]), wanted.decays or [_decay(config.optimizer)]
    if not rates:
        raise UserError("the first phase has no learning rate", where="phases", todo="--lr 1e-4..1e-1:log/7")
    return [Member(*one) for one in product(heads, rates, decays)]


def _checked(head: Part) -> Part:
    made = known_part("head", head)
    function = plug.find("head", made.name)
    if getattr(function, "takes", "pooled") != "pooled":
        what = f"head {made.name} pools by itself, and a probe has pooled features"
        raise UserError(
            what, where="--heads", todo="linear, cosine, mlp, or one of your own that takes pooled features"
        )
    return made


def _decay(optimizer: Part) -> float:
    function = plug.find("optimizer", optimizer.name)
    given = plug.arguments(function, optimizer.args, label=f"optimizer {optimizer.name}")
    return float({**plug.defaults(function), **given}.get("weight_decay", 0.0))


def _search(own: Probed, members: Sequence[Member], optimizer: Optimizer, wanted: Wanted) -> Found:
    table, validation, left_out, judged_on = judges(own)
    stacks = stacks_of(own, members)
    began = time.monotonic()
    train(own, stacks, optimizer, left_out)
    judged = _judged(stacks, validation)
    trained = time.monotonic() - began
    of_regressions, names = None, [str(member) for stack in stacks for member in stack.members]
    if wanted.cs:
        fitted = list(regressions(table, len(own.classes), wanted.cs))
        of_regressions = Judged.of([one.logits(validation.rows) for one in fitted], validation.labels)
        names += [f"logistic regression C={one.c:.3g}" for one in fitted]
    both = judged if of_regressions is None else judged.beside(of_regressions)
    every: list[Member | None] = [member for stack in stacks for member in stack.members]
    every += [None] * (len(names) - len(every))
    losses = both.losses.double().mean(1).tolist()
    found = [Candidate(*one) for one in zip(names, every, both.accuracies(wanted.resamples), losses, strict=True)]
    seed = own.run.config.seed
    return Found(
        candidates=sorted(found, key=lambda one: (-one.accuracy.value, one.loss)),
        chosen=means(judged.crossed(seed)[None], wanted.resamples)[0],
        regression=None if of_regressions is None else means(of_regressions.crossed(seed)[None], wanted.resamples)[0],
        judged_on=judged_on,
        trained_on=f"{len(table.pictures.unique()):,} pictures, {own.shown}",  # type: ignore[no-untyped-call]
        steps=own.phase.stop - own.phase.start,
        seconds={"grid": trained, "regressions": time.monotonic() - began - trained},
    )


def judges(own: Probed) -> tuple[Table, Table, Tensor | None, str]:
    """What is trained on; what judges; the pictures that are left out of training for that; the same in words.

    Raises:
        UserError: there are too few.
    """
    table, validation = own.training_table(), own.validation_table()
    if validation is not None:
        if len(validation.labels) < 2:
            raise UserError("there are too few validation pictures to choose by", where="data.val")
        return table, validation, None, f"{len(validation.labels):,} pictures of data.val"
    out = folds(table, own.run.config.seed, _HELD_OUT) == 0
    if int(out.sum()) < 2:
        raise UserError(
            "there are too few pictures to hold a fifth of them out", where="data.train", todo="set data.val"
        )
    judging = table.of(out)
    if own.train.store.layout.views > 1:  # a picture once
        judging = judging.of(torch.from_numpy(np.unique(judging.pictures.numpy(), return_index=True)[1]))
    words = f"{len(judging.labels):,} training pictures, a fifth that was held out (there is no data.val)"
    return table.of(~out), judging, table.pictures[out].unique(), words  # type: ignore[no-untyped-call]


def stacks_of(own: Probed, members: Sequence[Member]) -> list[Stack]:
    """Members by their kind of head; each kind begins with weights of the seed, that of the configuration with those
    that a training begins with."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.head.model_dump_json(), []).append(member)
    width, count, seed = own.width, len(own.classes), own.run.config.seed

    def make(head: Part) -> nn.Module:
        torch.manual_seed(derive(seed, "probe") >> 1)
        function = plug.find("head", head.name)
        arguments = plug.arguments(function, head.args, label=f"head {head.name}")
        made: nn.Module = plug.call(f"head {head.name}", function, width, count, **arguments)
        if head == _checked(own.run.config.head):
            there = own.run.net.get_submodule(own.cut.path).state_dict()
            shapes = {name: value.shape for name, value in there.items()}
            if own.cut.side == "input" and shapes == {name: value.shape for name, value in made.state_dict().items()}:
                made.load_state_dict(there)
        return made.cpu()

    return [Stack(same, lambda head=same[0].head: make(head)) for same in found.values()]  # type: ignore[misc]


def train(own: Probed, stacks: Sequence[Stack], optimizer: Optimizer, left_out: Tensor | None) -> None:
    """Every member through the phase that trains the head: the same batches in the same order, with the same course of
    rates.

    Args:
        left_out: pictures that are not trained on.
    """
    updates, seed, phase = [optimizer.updater(stack) for stack in stacks], own.run.config.seed, own.phase
    for stack in stacks:
        stack.net.train()
    for step, (features, truth, total) in enumerate(_batches(own, left_out), start=1):
        factor = phase.rate(phase.layers.head, phase.start + step - 1) / phase.lr
        for stack, update in zip(stacks, updates, strict=True):
            torch.manual_seed(derive(seed, "dropout", step - 1, 0) >> 1)  # as in training
            logits = stack(features)
            loss = own.task.loss(logits.flatten(0, 1), _repeated(truth, len(stack.members)))
            (loss / total).backward()  # type: ignore[no-untyped-call]
            update(step, factor)


def _repeated(truth: Truth, members: int) -> Truth:
    return replace(truth, own={name: values.repeat(members) for name, values in truth.own.items()})


def _batches(own: Probed, left_out: Tensor | None) -> Iterator[tuple[Tensor, Truth, float]]:
    """Features of each step, their classes, the loss normaliser; steps without any are passed over."""
    phase, target = own.phase, own.task.target.name
    stream: ShardStream = own.run.stream.of(own.train)
    stream.micro_batch = None
    for batch in stream.batches(phase.start, phase.stop):
        truth, features, total = Truth.of(batch), batch.images.float(), batch.total
        if left_out is not None:
            kept = ~torch.isin(batch.ids, left_out)
            values = truth.own[target][kept]
            weights = own.task.weights({target: values.numpy()})
            total = float(len(values) if weights is None else weights.sum())
            features, truth = features[kept], replace(truth, own={target: values})
        if total:
            yield features, truth, total


@torch.no_grad()
def _judged(stacks: Sequence[Stack], validation: Table) -> Judged:
    found = list[Judged]()
    for block in torch.arange(len(validation.labels)).split(_JUDGED_AT_ONCE):  # type: ignore[no-untyped-call]
        rows, labels = validation.rows[block], validation.labels[block]
        logits = list[Tensor]()
        for stack in stacks:
            stack.net.eval()
            logits += list(stack(rows))
        found.append(Judged.of(logits, labels))
    hits, losses = torch.cat([one.hits for one in found], 1), torch.cat([one.losses for one in found], 1)
    return Judged(hits, losses, validation.labels)
