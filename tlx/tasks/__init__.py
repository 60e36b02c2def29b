"""Tasks: what a sample's targets are, which outputs of the network they need, the loss, the metrics, what a prediction
looks like.

A part of the group ``task`` is a function ``(data, *, ...) -> Task``: `data` says what the index holds, the rest are
the user's arguments (:mod:`tlx.tasks.kinds`; an entry point of the group ``tlx.task``; ``package.module:function``).
Nothing here imports torch: a plan knows outputs and metrics without it.

**Sums.** Losses are sums over the samples of a micro-batch, and samples weigh what `weights` says, from the index
alone: the loop divides by the sum of weights over the global batch. So the mean is right however the batch is dealt,
with class weights, and where samples lack a target (they weigh 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from tlx.data.shards.targets import Target

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from tlx.data.stream.stream import Batch
    from tlx.data.stream.views import Views
    from tlx.models import Outputs
    from tlx.tasks.objectives import Objective

__all__ = ["Meter", "Ranks", "TargetSummary", "Task", "TaskData", "Truth", "all_targets", "scale_of", "views_of"]


@dataclass(frozen=True)
class TargetSummary:
    """A target, and how often its values come in an epoch as it is trained on.

    Attributes:
        counts: samples by class, or that a label applies to; empty for numbers.
        known: samples that have the target; of kind `labels` by label: those where it is known whether it applies; of
            numbers by column.
        mean, std: of numbers, by column.
    """

    target: Target
    counts: tuple[int, ...] = ()
    known: int | tuple[int, ...] = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def samples(self) -> int:
        """At least so many have a value; 0 where none has."""
        return max(self.known, default=0) if isinstance(self.known, tuple) else self.known


@dataclass(frozen=True)
class TaskData:
    """What a task is made with.

    Attributes:
        targets: of the index, by name.
        samples: of an epoch.
        top_k: `evaluate.top_k`.
        objective: makes the configuration's `objective` from counts by class; what classification minimises.
    """

    targets: Mapping[str, TargetSummary]
    samples: int
    top_k: int
    objective: Callable[[Sequence[int]], Objective]


@dataclass(frozen=True)
class Ranks:
    """How ranks put together what they measured; alone by default.

    Attributes:
        sum: sums a tensor over all ranks, in place, and returns it.
        gather: what each rank gives, in the order of ranks, on every rank.
        joined: the rows of all ranks, [n, ...], on every rank, with gradients, and where its own begin; each rank calls
            it, one without rows too.
    """

    sum: Callable[[Any], Any] = lambda tensor: tensor
    gather: Callable[[Any], list[Any]] = lambda given: [given]
    joined: Callable[[Any], tuple[Any, int]] = lambda rows: (rows, 0)


@dataclass(frozen=True)
class Truth:
    """Targets of a micro-batch of m samples.

    Attributes:
        own: by name, on the network's device: int64 [m] of a class, int8 [m, classes] of labels, float32 [m, width] of
            numbers; missing ones as in the index (-1, NaN).
        partner: those of the samples that are mixed in; None without mixing.
        lam: float32 [m], the share of the own ones.
        scales: float32 [parts], of a task of several parts: samples of the global batch by what they weigh for each
            part; 0 where none of them has its target.
        idle: the rank has no sample, and what it computes is of a stand-in: no rows of it go to others.
        ranks: how a loss that compares samples gets those of other ranks.
    """

    own: Mapping[str, Tensor]
    partner: Mapping[str, Tensor] | None = None
    lam: Tensor | None = None
    scales: Tensor | None = None
    idle: bool = False
    ranks: Ranks = Ranks()  # frozen

    @staticmethod
    def of(batch: Batch, ranks: Ranks = Ranks()) -> Truth:
        """Of the stream's."""
        if batch.mix is None:
            return Truth(batch.targets, scales=batch.scales, idle=batch.idle, ranks=ranks)
        mix = batch.mix
        return Truth(batch.targets, mix.partner_targets, mix.lam, batch.scales, batch.idle, ranks)


class Meter(Protocol):
    """The metrics of one evaluation, exact over ranks: the same numbers on any number of them."""

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        """Counts a batch.

        Args:
            output: of the network in evaluation mode, [N, outputs].
            own: targets by name, see :class:`Truth`.
            ids: int64 [N], of the samples in the index: gathered scores are put in their order.
        """
        ...

    def result(self) -> dict[str, Any]:
        """Over all ranks: `loss` (the mean over samples that have the target), every one of the task's metrics (NaN
        where no sample tells), `samples`, and `nonfinite`, samples with outputs that are not finite, where there are
        any; values by class as lists (`per_class`), None for a class that no sample tells about. Without samples
        ``{"samples": 0}``."""
        ...


class Task(Protocol):
    """What a network is trained for.

    Attributes:
        targets: those that it reads of the index, by name.
        heads: outputs by head; a single head's name is "".
        outputs: names of all outputs, in order.
        constants: names of numbers that the loss learns, parameters of the head: they are further columns of the
            outputs, the same in every row.
        metrics: of an evaluation, by name without ``val/``: whether higher is better. `loss` is one of them.
        metric: the one that chooses the best checkpoint where the configuration does not say. The function that makes
            the task says the same as its attribute, ``FUNCTION.metric``; without one that is `loss`. It must be known
            before there is data, and without torch.
        shown: the name, without ``train/``, of what `hits` counts on the training curve; None for nothing.
        parts: how many losses, each with a normaliser of its own; more than one for several tasks at once.
        lists: names of the values of each list in an evaluation's result: ``{"per_class": classes}``.

    One with many metrics may have a `headline`: those, without ``val/``, that lines for people have room for. One whose
    outputs mean something else after other training samples, such as numbers in standard deviations, has a `scale`,
    plain data that says so: a checkpoint goes on, and a head is kept, with the same one alone. One that minimises what
    `TaskData.objective` makes has that as `objective`, so that a fault of it is told with its name. One of which the
    run keeps what was told of each validation picture has ``told(output, own, samples)`` -> list of
    :class:`tlx.tasks.told.Told`: of a batch, where the whole evaluation has so many samples; tlx's own have it, where
    pictures have answers of their own. One that cannot judge by any samples has ``refuse_held_out(summary, where)``,
    which raises a UserError about those of data.val or data.test. One whose batches are episodes has these as
    `episodes`, :class:`tlx.data.stream.episodes.Episodes`, and so has its function: (arguments, names of classes) ->
    Episodes. How evaluations judge may be said as ``judged_by``, a clause of the plan's first line. One that says
    itself how sure its metrics are has a true ``own_interval``: no pictures are resampled for them.
    One that draws what a sample is shown as has that as `views` (:class:`tlx.data.stream.views.Views`); its function
    then has the attribute ``draws = True``, and perhaps `transforms`, those of a configuration that says none. One
    whose loss compares the samples of a batch has `whole`, the reason why a batch cannot be taken in parts.
    """

    @property
    def targets(self) -> Mapping[str, Target]: ...
    @property
    def heads(self) -> Mapping[str, int]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def constants(self) -> tuple[str, ...]: ...
    @property
    def metrics(self) -> Mapping[str, bool]: ...
    @property
    def metric(self) -> str: ...
    @property
    def shown(self) -> str | None: ...
    @property
    def parts(self) -> int: ...
    @property
    def lists(self) -> Mapping[str, Sequence[str]]: ...

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64] | None:
        """What samples weigh in the loss, from the index's values of n samples, by target.

        Returns:
            float64 [n, parts]; 0 for a sample without the target. None: every sample weighs 1.
        """
        ...

    def loss(self, output: Any, truth: Truth) -> Tensor:
        """The training loss of a micro-batch: a scalar, the sum over samples, each times its weight.

        Args:
            output: of the network in training mode: [m, outputs], or a tuple of that and auxiliary outputs of the same
                shape, None for those of a frozen classifier.
        """
        ...

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """What the training curve shows: [2], the sum over samples that have the target, and how many these are."""
        ...

    def meter(self, device: torch.device, ranks: Ranks = ...) -> Meter:
        """For one evaluation."""
        ...

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Predictions, one row per sample: plain data under the names of columns.

        Args:
            kept: the result of the evaluation that chose the weights: thresholds and the like.
        """
        ...


def views_of(task: Task) -> Views | None:
    """What a sample is shown as; None: as one picture, with the targets of the index."""
    views: Views | None = getattr(task, "views", None)
    return views


def all_targets(task: Task) -> Mapping[str, Target]:
    """Those that it reads of the index, and those that are drawn."""
    views = views_of(task)
    return {**task.targets, **(views.targets if views is not None else {})}


def columns_of(task: Task) -> int:
    """Of the network's output in training, constants included: where views are answered each by itself, those of all
    views stand beside each other."""
    views = views_of(task)
    of_all = views.count if views is not None and not views.joined else 1
    return len(task.outputs) * of_all + len(task.constants)


def outputs_of(task: Task) -> Outputs:
    """What a task needs of the network."""
    from tlx.models import Outputs

    needed = Outputs(task.heads, len(task.constants), vectors=getattr(task, "vectors", None))
    views = views_of(task)
    return needed if views is None else replace(needed, views=views.count, joined=views.joined)


def scale_of(task: Task) -> dict[str, Any]:
    """What a task's outputs mean, as far as that depends on the training samples; empty where it does not."""
    return dict(getattr(task, "scale", {}))
