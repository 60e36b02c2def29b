"""Exact evaluation over ranks, the best so far, and the end of patience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tlx.base.errors import UserError
from tlx.base.location import shown
from tlx.base.metrics import AVERAGED, WEIGHTS, Metric, Score, Weights, metrics_of
from tlx.data.stream.transfer import on_device
from tlx.plan.plan import Phase
from tlx.train.freeze import train_mode
from tlx.train.meters import EvaluationMeter
from tlx.train.nonfinite import broken_tensor
from tlx.train.quota import count_bad
from tlx.train.run import Run
from tlx.train.step import PhaseModel


def evaluate_when_due(run: Run, phase: Phase, phase_model: PhaseModel) -> bool:
    """Evaluates at its interval and at the end of a phase; whether the phase ends here for want of progress."""
    step = run.progress.step
    if not (run.due(run.config.evaluate.every) or step == phase.stop):
        return False
    row = {"step": step, "epoch": step / run.plan.steps_per_epoch, "phase": phase.name}
    row |= run.progress.evaluated.take()
    ended = False
    if run.evaluation is not None:
        row |= evaluate_both(run)
        ended = update_best(run, phase, row)
    train_mode(phase_model.net, phase, run.plan)
    run.world.watch.beat("batch")
    run.journal.row({k: v for k, v in row.items() if not k.endswith("per_class")} | run.progress.best_so_far())
    return ended


def evaluate_both(run: Run) -> dict[str, Any]:
    """Metrics of the raw weights and, where there is one, of the moving average."""
    nets: dict[Weights, nn.Module] = {"raw": run.net}
    if run.ema is not None:
        nets["ema"] = run.ema.module
    results = {weights: evaluate(run, net) for weights, net in nets.items()}
    lines = [nonfinite_logits(nets[weights], result, weights) for weights, result in results.items()]
    if any(lines):
        precision = run.config.loop.precision
        run.journal.note(
            f"WARNING: at step {run.progress.step} validation samples got logits that are not finite (NaN or "
            "infinity). They count as wrong, the loss is not a number, and such an evaluation is never the best by it"
            + "".join(f"\n  {line}" for line in lines if line)
            + "\n  Likely causes: a learning rate that is too high (lower lr, a warm-up, loop.clip), BatchNorm "
            "statistics that have run away (norm: statistics_fixed)"
            + (f", numbers too large for loop.precision={precision} (bf16 or fp32)" if precision == "fp16" else "")
        )
    prefixes = {"raw": "", "ema": AVERAGED}
    return {f"{prefixes[w]}val/{name}": value for w, result in results.items() for name, value in result.items()}


def nonfinite_logits(net: nn.Module, result: Mapping[str, Any], weights: Weights) -> str | None:
    """How many samples got them, and a tensor of the network that is not finite itself; None where all are finite."""
    count = result.get("nonfinite", 0)
    if not count:
        return None
    which = "the moving average" if weights == "ema" else "the network"
    spoilt = broken_tensor(net)
    why = f"{spoilt} is not finite itself" if spoilt else "all its weights and statistics are finite"
    return f"{which}: {count} of {result['samples']} samples; {why}"


@torch.no_grad()
def evaluate(run: Run, net: nn.Module) -> dict[str, Any]:
    """Exact metrics of a network over the validation shards: every sample counts once, on whatever rank."""
    assert run.evaluation is not None
    meter = EvaluationMeter(run.classes, top_k=run.config.evaluate.top_k, world=run.world)
    net.train()  # some networks compute from their weights once per evaluation mode, and forget it in training mode
    net.eval()
    bad: dict[str, str] = {}
    span = Span()
    run.world.watch.beat("evaluation")
    for batch in on_device(run.evaluation(), run.world.device):
        run.world.watch.beat("evaluation")
        bad |= {b.where: b.reason for b in batch.bad}
        if not len(batch.labels):
            continue
        with run.world.autocast():
            output = net(run.normalise(batch.images))
        logits = output[0] if isinstance(output, tuple) else output
        meter.update(logits, batch.labels, run.objective.evaluation_loss(logits, batch.labels))
        span.take(logits)
    of_ranks = run.world.gather((len(bad), span.ends()))
    if any(count for count, _ in of_ranks):
        run.progress.bad |= bad
        count_bad(run)
    metrics = meter.result()
    if metrics["samples"] > 1 and constant([ends for _, ends in of_ranks if ends is not None]):
        run.journal.note(
            f"WARNING: at step {run.progress.step} the network gives every validation sample the same answer: nothing "
            "that tells them apart reaches the head. The learning rate may be too high, or input.mean and std, or the "
            "norm policy, not what the weights were trained with"
        )
    if not metrics["samples"]:
        raise UserError("there is no readable validation sample", where=shown(run.config.data.val or ""))
    return metrics


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


def update_best(run: Run, phase: Phase, row: Mapping[str, Any]) -> bool:
    """Keeps the best, per run and per phase; whether patience with this phase is at its end."""
    metric, progress = Metric.of(run.config.evaluate.metric), run.progress
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
    update_top_k(run, metric.best_of(row))
    values = {k: v for k, v in row.items() if "val/" in k}
    progress.last = {"step": progress.step, **values}
    of_phase["last"] = progress.last
    return progress.step < phase.stop and should_stop_early(run, phase, row)


def update_top_k(run: Run, score: Score | None) -> None:
    """Whether this evaluation is among the best ones, whose checkpoints stay."""
    metric, leaders = Metric.of(run.config.evaluate.metric), run.progress.leaders
    if score is None or not metric.better(score, None):
        return
    place = next((i for i, other in enumerate(leaders) if metric.better(score, Score.kept(other))), len(leaders))
    leaders.insert(place, {"step": run.progress.step, **score._asdict()})
    del leaders[run.config.checkpoint.keep.best :]


def should_stop_early(run: Run, phase: Phase, row: Mapping[str, Any]) -> bool:
    """Ends the phase on its plateau, or by early stopping; the plan is made again from where it ended."""
    progress, wanted, plateau = run.progress, run.config.evaluate, phase.plateau
    reasons = []
    if wanted.patience is not None and (score := Metric.of(wanted.metric).best_of(row)) is not None:
        stale = progress.patience.watch(phase.name, score.value, metric=Metric.of(wanted.metric))
        reasons += [f"{wanted.metric} has not improved for {stale} evaluations"] if stale >= wanted.patience else []
    if plateau is not None and (score := Metric.of(plateau.metric).best_of(row)) is not None:
        metric = Metric.of(plateau.metric)
        stale = progress.plateau.watch(phase.name, score.value, metric=metric, min_delta=plateau.min_delta)
        reasons += [f"{plateau.metric} is on a plateau"] if stale >= plateau.patience else []
    if not reasons:
        return False
    progress.ends[phase.name] = progress.step
    progress.phases[phase.name]["stop"] = progress.step
    run.plan = run.remake_plan(progress.ends)
    run.journal.note(f"phase {phase.name} ends at step {progress.step}: {' and '.join(reasons)}")
    return True
