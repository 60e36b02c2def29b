"""Exact evaluation over ranks; which evaluation is the best, and when a phase ends for want of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tlx.base.errors import UserError
from tlx.base.metrics import AVERAGED, WEIGHTS, Metric, Score, Weights, metrics_of
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import Batch
from tlx.data.stream.transfer import on_device
from tlx.plan.loop_config import Evaluate
from tlx.plan.plan import Phase
from tlx.ranks.collectives import World
from tlx.runs.progress import Progress
from tlx.tasks import Ranks, Task
from tlx.tasks.spread import collapse
from tlx.train.answers import Answers
from tlx.train.feature_probe import FeatureProbe
from tlx.train.step import share_unreadable

Warn = Callable[[str], None]
"""Hears what is odd about an evaluation, in words that follow "WARNING: at step N"."""


@dataclass(frozen=True)
class Validation:
    """The validation shards, and what a network is measured with.

    Attributes:
        batches: starts a pass over this rank's share: uint8 images, unreadable samples left out and reported; takes
            `stored` and `numbers` of :func:`tlx.data.stream.stream.evaluation_batches`.
        batch: pictures that go through the network at once; of fewer the rest are zeros.
        probe: what else is measured, of what the head is given.
        where: the shards, for messages.
    """

    batches: Callable[..., Iterable[Batch]]
    manifest: Manifest
    batch: int
    where: str
    task: Task
    normalise: Callable[[torch.Tensor, int | None], torch.Tensor]
    world: World
    probe: FeatureProbe | None = None


def evaluate_weights(
    nets: Mapping[Weights, nn.Module],
    validation: Validation,
    unreadable: dict[str, str],
    quota: Callable[[], int],
    warn: Warn,
) -> tuple[dict[str, Any], dict[Weights, Answers]]:
    """Metrics of the raw weights and, where there is one, of the moving average: ``val/loss``, ``ema/val/top1`` ...;
    and what each told of this rank's pictures.

    Args:
        unreadable: samples of the run so far, place -> reason; those that are found here are added.
        quota: how many are allowed.
    """
    answers = {weights: Answers(validation.task, validation.manifest) for weights in nets}
    results = {w: evaluate(net, validation, unreadable, quota, warn, answers[w]) for w, net in nets.items()}
    if validation.probe is not None:
        seen: dict[str, str] = {}
        results = {w: result | validation.probe.measure(nets[w], seen) for w, result in results.items()}
        share_new(seen, unreadable, quota, validation.world)
    for weights, result in results.items():
        for line in collapsed(result):
            warn(line if weights == "raw" else f"of the moving average, {line}")
    lines = [_nonfinite_logits(nets[weights], result, weights) for weights, result in results.items()]
    if any(lines):
        fp16 = validation.world.scaler is not None
        warn(
            "validation samples got logits that are not finite (NaN or infinity). They count as wrong, the loss is not "
            "a number, and such an evaluation is never the best by it"
            + "".join(f"\n  {line}" for line in lines if line)
            + "\n  Likely causes: a learning rate that is too high (lower lr, a warm-up, loop.clip), BatchNorm "
            "statistics that have run away (norm: statistics_fixed)"
            + (", numbers too large for loop.precision=fp16 (bf16 or fp32)" if fp16 else "")
        )
    prefixes = {"raw": "", "ema": AVERAGED}
    row = {f"{prefixes[w]}val/{name}": value for w, result in results.items() for name, value in result.items()}
    return row, answers


def _nonfinite_logits(net: nn.Module, result: Mapping[str, Any], weights: Weights) -> str | None:
    """How many samples got them, and a tensor of the network that is not finite itself; None where all are finite."""
    count = result.get("nonfinite", 0)
    if not count:
        return None
    which = "the moving average" if weights == "ema" else "the network"
    broken = broken_tensor(net)
    why = f"{broken} is not finite itself" if broken else "all its weights and statistics are finite"
    return f"{which}: {count} of {result['samples']} samples; {why}"


def broken_tensor(net: nn.Module, *, without: Iterable[int] = ()) -> str | None:
    """The first parameter or buffer that is not finite, by name; `without`: ids of tensors to pass over."""
    named, ignored = [*net.named_parameters(), *net.named_buffers()], set(without)
    return next((name for name, tensor in named if id(tensor) not in ignored and is_broken(tensor)), None)


def is_broken(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


@torch.no_grad()
def evaluate(
    net: nn.Module,
    validation: Validation,
    unreadable: dict[str, str],
    quota: Callable[[], int],
    warn: Warn,
    answers: Answers,
) -> dict[str, Any]:
    """Exact metrics of a network over the validation shards: every sample counts once, on whatever rank.

    Args:
        answers: takes what the network told of each picture.

    Returns:
        See :meth:`tlx.tasks.Meter.result`. The network is left in evaluation mode.

    Raises:
        UserError: more unreadable samples than allowed, or no readable one.
    """
    world = validation.world
    meter = validation.task.meter(world.device, Ranks(world.sum, world.gather))
    net.train()  # some networks compute from their weights once per evaluation mode, and forget it in training mode
    net.eval()
    bad: dict[str, str] = {}
    span = Span()
    world.watch.beat("evaluation")
    for batch in on_device(validation.batches(), world.device):
        world.watch.beat("evaluation")
        bad |= {b.where: b.reason for b in batch.bad}
        if not len(batch.labels):
            continue
        with world.autocast():
            output = net(validation.normalise(batch.images, validation.batch))
        logits = (output[0] if isinstance(output, tuple) else output)[: len(batch.labels)]
        meter.update(logits, batch.targets, batch.ids)
        answers.add(logits, batch.targets, batch.ids)
        span.take(logits)
    of_ranks = world.gather(span.ends())
    share_new(bad, unreadable, quota, world)
    metrics = meter.result()
    if metrics["samples"] > 1 and constant([ends for ends in of_ranks if ends is not None]):
        warn(
            "the network gives every validation sample the same answer: nothing that tells them apart reaches the "
            "head. The learning rate may be too high, or input.mean and std, or the norm policy, not what the weights "
            "were trained with"
        )
    if not metrics["samples"]:
        raise UserError("there is no readable validation sample", where=validation.where)
    return metrics


def share_new(bad: Mapping[str, str], unreadable: dict[str, str], quota: Callable[[], int], world: World) -> None:
    """Adds unreadable samples that this rank has met, and those of the others; all ranks at once.

    Raises:
        UserError: there are more than allowed.
    """
    if any(world.gather(len(bad))):
        unreadable |= bad
        share_unreadable(unreadable, quota, world)


def collapsed(result: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each kind of vectors that hardly differ from picture to picture."""
    for prefix, what in (("", "the head's vectors"), ("feature_", "the features that the head is given")):
        spread, rank = result.get(f"{prefix}spread"), result.get(f"{prefix}rank")
        if spread is not None and rank is not None and (why := collapse(spread, rank, what)):
            yield why


class Span:
    """The least and the greatest logit of every class."""

    def __init__(self) -> None:
        self._ends: torch.Tensor | None = None

    def take(self, logits: torch.Tensor) -> None:
        """Takes in a batch, float [N, classes]."""
        ends = torch.stack([logits.amin(0), logits.amax(0)]).float()
        if self._ends is not None:
            low, high = self._ends
            ends = torch.stack([torch.minimum(low, ends[0]), torch.maximum(high, ends[1])])
        self._ends = ends

    def ends(self) -> list[list[float]] | None:
        """[2][classes]; None before the first batch."""
        return None if self._ends is None else self._ends.tolist()


def constant(spans: Sequence[list[list[float]]]) -> bool:
    """Whether, over all of these spans, no class has logits that differ by more than rounding."""
    ends = torch.tensor(spans, dtype=torch.float64)  # [ranks, 2, classes]
    if not len(ends):
        return False
    low, high = ends[:, 0].amin(0), ends[:, 1].amax(0)
    return bool(((high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())).all())


def update_best(progress: Progress, phase: Phase, row: Mapping[str, Any], *, metric: Metric, keep: int) -> None:
    """Keeps the best evaluation, per run and per phase, and the `keep` best ones, whose checkpoints stay."""
    of_phase = progress.phases[phase.name]
    for weights in WEIGHTS:
        score = metric.score(row, weights)
        if score is None:
            continue
        entry = {"metric": metric.name, **score._asdict(), "step": progress.step}
        if metric.better(score, Score.kept(progress.best) if progress.best else None):
            progress.best = {**entry, "phase": phase.name, "weights": weights}
        if metric.better(score, metric.score(of_phase["best"]) if "best" in of_phase else None):
            of_phase["best"] = {"step": progress.step, "weights": weights, **metrics_of(row, weights)}
    score, leaders = metric.best_of(row), progress.leaders
    if score is not None and metric.better(score, None):
        place = next((i for i, other in enumerate(leaders) if metric.better(score, Score.kept(other))), len(leaders))
        leaders.insert(place, {"step": progress.step, **score._asdict()})
        del leaders[keep:]
    progress.last = of_phase["last"] = {"step": progress.step, **{k: v for k, v in row.items() if "val/" in k}}


def should_stop_early(progress: Progress, phase: Phase, row: Mapping[str, Any], wanted: Evaluate) -> str | None:
    """Why the phase ends here, before its time: early stopping, or its plateau; None where it goes on."""
    reasons = []
    if wanted.patience is not None and (score := Metric.of(wanted.chooses).best_of(row)) is not None:
        stale = progress.patience.watch(phase.name, score.value, metric=Metric.of(wanted.chooses))
        reasons += [f"{wanted.chooses} has not improved for {stale} evaluations"] if stale >= wanted.patience else []
    plateau = phase.plateau
    if plateau is not None and (score := Metric.of(plateau.metric).best_of(row)) is not None:
        metric = Metric.of(plateau.metric)
        stale = progress.plateau.watch(phase.name, score.value, metric=metric, min_delta=plateau.min_delta)
        reasons += [f"{plateau.metric} is on a plateau"] if stale >= plateau.patience else []
    return " and ".join(reasons) or None
