"""Exact evaluation over ranks, the best so far, and the end of patience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tlx.data.location import shown
from tlx.data.transfer import on_device
from tlx.errors import UserError
from tlx.meters import EvaluationMeter
from tlx.phasing import train_mode
from tlx.plan import Phase
from tlx.progress import better
from tlx.quota import count_bad
from tlx.run import Run
from tlx.step import Trainee


def evaluate_when_due(run: Run, phase: Phase, trainee: Trainee) -> bool:
    """Evaluates at its interval and at the end of a phase; whether the phase ends here for want of progress."""
    step = run.progress.step
    if not (run.due(run.config.evaluate.every) or step == phase.stop):
        return False
    row = {"step": step, "epoch": step / run.plan.steps_per_epoch, "phase": phase.name}
    row |= run.progress.evaluated.take()
    ended = False
    if run.evaluation is not None:
        row |= evaluate_both(run)
        ended = judge(run, phase, row)
    train_mode(trainee.net, phase, run.plan)
    run.world.watch.beat("batch")
    run.journal.row({k: v for k, v in row.items() if not k.endswith("per_class")} | run.progress.best_so_far())
    return ended


def evaluate_both(run: Run) -> dict[str, Any]:
    """Metrics of the raw weights and, where there is one, of the moving average."""
    metrics: dict[str, Any] = {}
    for prefix, net in (("", run.net), ("ema/", run.ema.module if run.ema else None)):
        if net is not None:
            found = evaluate(run, net)
            metrics |= {f"{prefix}val/{name}": value for name, value in found.items()}
    return metrics


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


def judge(run: Run, phase: Phase, row: Mapping[str, Any]) -> bool:
    """Keeps the best, per run and per phase; whether patience with this phase is at its end."""
    wanted, progress = run.config.evaluate, run.progress
    for weights, prefix in (("raw", ""), ("ema", "ema/")):
        value = row.get(prefix + wanted.metric)
        if value is None:
            continue
        best = {"metric": wanted.metric, "value": value, "step": progress.step, "phase": phase.name, "weights": weights}
        if progress.best is None or better(value, progress.best["value"], wanted.mode):
            progress.best = best
        of_phase = progress.phases[phase.name]
        if "best" not in of_phase or better(value, of_phase["best"][wanted.metric], wanted.mode):
            own = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix + "val/")}
            of_phase["best"] = {"step": progress.step, "weights": weights, **own}
    lead(run, row)
    values = {k: v for k, v in row.items() if "val/" in k}
    progress.last = {"step": progress.step, **values}
    progress.phases[phase.name]["last"] = progress.last
    return progress.step < phase.stop and end_of_patience(run, phase, row)


def lead(run: Run, row: Mapping[str, Any]) -> None:
    """Whether this evaluation is among the best ones, whose checkpoints stay."""
    wanted, leaders = run.config.evaluate, run.progress.leaders
    if wanted.metric not in row:
        return
    value = best_of(row, wanted.metric, wanted.mode)
    place = next((i for i, other in enumerate(leaders) if better(value, other["value"], wanted.mode)), len(leaders))
    leaders.insert(place, {"step": run.progress.step, "value": value})
    del leaders[run.config.checkpoint.keep.best :]


def end_of_patience(run: Run, phase: Phase, row: Mapping[str, Any]) -> bool:
    """Ends the phase on its plateau, or by early stopping; the plan is made again from where it ended."""
    progress, wanted, plateau = run.progress, run.config.evaluate, phase.plateau
    reasons = []
    if wanted.patience is not None:
        value = best_of(row, wanted.metric, wanted.mode)
        stale = progress.patience.watch(phase.name, value, mode=wanted.mode)
        reasons += [f"{wanted.metric} has not improved for {stale} evaluations"] if stale >= wanted.patience else []
    if plateau is not None:
        value = best_of(row, plateau.metric, plateau.mode)
        stale = progress.plateau.watch(phase.name, value, mode=plateau.mode, min_delta=plateau.min_delta)
        reasons += [f"{plateau.metric} is on a plateau"] if stale >= plateau.patience else []
    if not reasons:
        return False
    progress.ends[phase.name] = progress.step
    progress.phases[phase.name]["stop"] = progress.step
    run.plan = run.remake_plan(progress.ends)
    run.journal.note(f"phase {phase.name} ends at step {progress.step}: {' and '.join(reasons)}")
    return True


def best_of(row: Mapping[str, Any], metric: str, mode: str) -> float:
    """The better of the raw weights' metric and the moving average's."""
    raw, *averaged = [float(row[name]) for name in (metric, f"ema/{metric}") if name in row]
    return averaged[0] if averaged and better(averaged[0], raw, mode) else raw
