"""The loop. It obeys the plan, in execution order; what depends on time is a function of the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from tlx.checkpoint import Checkpoints, Snapshot, optimizer_state, read, restore_optimizer, weights_of
from tlx.config import Config
from tlx.data.stream import BadSample, Batch, ShardStream
from tlx.errors import TlxError, UserError
from tlx.meters import EvaluationMeter
from tlx.objectives import Objective
from tlx.phasing import train_mode
from tlx.plan import Phase, Plan
from tlx.preempt import StopRequest
from tlx.progress import Exchange, Progress, better
from tlx.step import Normalise, Trainee, Updater, by_step, dress, set_rates
from tlx.tracking.journal import Journal
from tlx.world import World


@dataclass
class Run:
    """One training, composed: its parts, and where it stands."""

    config: Config
    world: World
    net: nn.Module
    remake_plan: Callable[[Mapping[str, int]], Plan]
    optimizer: Optimizer
    objective: Objective
    normalise: Normalise
    stream: ShardStream
    evaluation: Callable[[], Iterable[Batch]] | None
    classes: int
    identity: Mapping[str, Any]  # what a checkpoint must agree with: classes, shards, order version, preprocessing
    checkpoints: Checkpoints
    journal: Journal
    stop: StopRequest
    ema: AveragedModel | None = None
    progress: Progress = field(default_factory=Progress)
    saved: int = -1

    def __post_init__(self) -> None:
        self.plan = self.remake_plan({})
        self.exchange = Exchange(self.world)
        loop = self.config.loop
        self.updater = Updater(
            self.optimizer, self.objective, self.normalise, self.world, self.config.seed, clip=loop.clip, ema=self.ema
        )


def fit(run: Run) -> bool:
    """Trains to the end of the plan, or until a stop is asked for; whether the end was reached.

    Raises:
        UserError: unreadable samples beyond the quota.
        TlxError: the loss or gradient is not finite.
    """
    resume(run)
    started = time.monotonic() - run.progress.wall_time_s
    while run.progress.step < run.plan.steps:
        phase = run.plan.phase(run.progress.step)
        begin(run, phase)
        trainee = dress(run.net, phase, run.plan, world=run.world, compiled=run.config.loop.compile)
        for step, batches in by_step(run.stream.batches(run.progress.step, phase.stop)):
            set_rates(run.optimizer, phase, step)
            tally, bad, total = run.updater.update(trainee, step, batches)
            run.progress.step = step + 1
            stopping = share(run, tally, bad, total)
            run.progress.wall_time_s = time.monotonic() - started
            log(run, phase)
            ended = evaluate_when_due(run, phase, trainee)
            save_when_due(run, phase, now=stopping or ended)
            if stopping:
                return run.progress.step >= run.plan.steps
            if ended:
                break
    return True


def resume(run: Run) -> None:
    """Goes on from the newest whole checkpoint; then every rank has rank 0's weights."""
    path = run.world.from_main(run.checkpoints.newest(run.journal.note) if run.world.main else None)
    if path is not None:
        snapshot = read(path)
        check_identity(snapshot.state["identity"], run.identity, where=str(path))
        load_weights(run, snapshot.model, snapshot.ema)
        restore_optimizer(run.optimizer, snapshot.optimizer)
        if run.world.scaler is not None and snapshot.state["scaler"]:
            run.world.scaler.load_state_dict(snapshot.state["scaler"])
        run.progress = Progress.of(snapshot.state["progress"])
        run.plan = run.remake_plan(run.progress.ends)
        run.journal.cut(snapshot.state["metrics_bytes"])
        run.saved = run.progress.step
        run.journal.note(f"resumed from {path} at step {run.progress.step} of {run.plan.steps}")
    else:
        run.journal.cut(0)
    run.world.broadcast([*run.net.parameters(), *run.net.buffers()])


def begin(run: Run, phase: Phase) -> None:
    """What happens once, at a phase's first step."""
    if run.progress.step != phase.start:
        return
    settings = phase.settings
    if settings.optimizer_state == "reset":
        run.optimizer.state.clear()
    best = run.progress.best
    if settings.start_from == "best" and best is not None:
        snapshot = read(run.checkpoints.path(best["step"]))
        load_weights(run, snapshot.model if best["weights"] == "raw" else snapshot.ema or {}, None)
    run.progress.phases[phase.name] = {"start": phase.start, "stop": phase.stop}
    run.journal.note(f"phase {phase.name}: steps {phase.start} to {phase.stop}")


def share(run: Run, tally: torch.Tensor, bad: list[BadSample], total: float) -> bool:
    """Exchanges a step's counts between ranks; whether all ranks agree to stop."""
    loss_correct_seen, unfinite = tally[:3], tally[3:]
    asked = run.stop.asked(look=run.world.main)
    flags = tally.new_tensor([len(bad), float(asked)])
    run.exchange.post(torch.cat([loss_correct_seen, flags, unfinite]), total=total)
    run.progress.bad.update({b.where: b.reason for b in bad})
    due = run.progress.step in (run.plan.phase(run.progress.step - 1).stop, run.plan.steps)
    stopping = False
    for reading in run.exchange.readings(settle=due or _any_due(run)):
        run.progress.absorb(reading)
        stopping |= reading["stop"] > 0
        if reading["bad"]:
            count_bad(run)
        if reading["unfinite"]:
            refuse_unfinite(run)
    return stopping


def count_bad(run: Run) -> None:
    """Every rank learns the names of unreadable samples.

    Raises:
        UserError: there are more than the configuration allows.
    """
    run.progress.bad = {where: why for part in run.world.gather(run.progress.bad) for where, why in part.items()}
    quota = run.config.data.quota(run.plan.samples)
    if len(run.progress.bad) > quota:
        names = [f"{where}: {why}" for where, why in sorted(run.progress.bad.items())]
        raise UserError(
            f"{len(names)} unreadable samples, {quota} allowed:\n    " + "\n    ".join(names[:10]),
            where="data.bad_samples",
            todo="`tlx shards check` names all of them; mend the shards, or allow some: data.bad_samples=1%",
        )


def refuse_unfinite(run: Run) -> None:
    """fp16 overflows now and then, and its scaler mends it; anything else is a fault.

    Raises:
        TlxError: the gradient is not finite, or stays so.
    """
    allowed = 20 if run.world.scaler is not None else 0
    if run.progress.unfinite_in_a_row > allowed:
        raise TlxError(
            f"the gradient is not finite at step {run.progress.step - 1} of phase "
            f"{run.plan.phase(run.progress.step - 1).name}; nothing was updated, the last checkpoint is from step "
            f"{max(run.saved, 0)}. Lower the learning rate, warm up, or set loop.clip"
        )


def log(run: Run, phase: Phase) -> None:
    """A row of the training curve, when one is due."""
    step = run.progress.step
    if not _due(run, run.config.track.every):
        return
    rates = [rate for rate in phase.rates(step - 1).values() if rate]
    run.journal.row(
        {
            "step": step,
            "epoch": step / run.plan.steps_per_epoch,
            "phase": phase.name,
            **run.progress.logged.take(),
            "train/lr_head": phase.rates(step - 1)[run.plan.layers.head.name],
            "train/lr_lowest": min(rates),
        }
    )


def evaluate_when_due(run: Run, phase: Phase, trainee: Trainee) -> bool:
    """Evaluates at its interval and at the end of a phase; whether the phase ends here for want of progress."""
    step = run.progress.step
    if not (_due(run, run.config.evaluate.every) or step == phase.stop):
        return False
    row = {"step": step, "epoch": step / run.plan.steps_per_epoch, "phase": phase.name}
    row |= run.progress.evaluated.take()
    ended = False
    if run.evaluation is not None:
        row |= evaluate_both(run)
        ended = judge(run, phase, row)
    train_mode(trainee.net, phase, run.plan)
    run.journal.row({k: v for k, v in row.items() if k != "per_class"})
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
    net.eval()
    bad: dict[str, str] = {}
    for batch in run.evaluation():
        bad |= {b.where: b.reason for b in batch.bad}
        if not len(batch.labels):
            continue
        batch = batch.to(run.world.device)
        with run.world.autocast():
            output = net(run.normalise(batch.images))
        logits = output[0] if isinstance(output, tuple) else output
        meter.update(logits, batch.labels, run.objective.evaluation_loss(logits, batch.labels))
    if any(run.world.gather(len(bad))):
        run.progress.bad |= bad
        count_bad(run)
    metrics = meter.result()
    if not metrics["samples"]:
        raise UserError("there is no readable validation sample", where=str(run.config.data.val))
    return metrics


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
    values = {k: v for k, v in row.items() if "val/" in k}
    progress.last = {"step": progress.step, **values}
    progress.phases[phase.name]["last"] = progress.last
    return progress.step < phase.stop and end_of_patience(run, phase, row)


def end_of_patience(run: Run, phase: Phase, row: Mapping[str, Any]) -> bool:
    """Ends the phase on its plateau, or by early stopping; the plan is made again from where it ended."""
    progress, wanted, plateau = run.progress, run.config.evaluate, phase.plateau
    reasons = []
    if wanted.patience is not None:
        stale = progress.patience.watch(phase.name, row[wanted.metric], mode=wanted.mode)
        reasons += [f"{wanted.metric} has not improved for {stale} evaluations"] if stale >= wanted.patience else []
    if plateau is not None:
        value = row[plateau.metric]
        stale = progress.plateau.watch(phase.name, value, mode=plateau.mode, min_delta=plateau.min_delta)
        reasons += [f"{plateau.metric} is on a plateau"] if stale >= plateau.patience else []
    if not reasons:
        return False
    progress.ends[phase.name] = progress.step
    progress.phases[phase.name]["stop"] = progress.step
    run.plan = run.remake_plan(progress.ends)
    run.journal.note(f"phase {phase.name} ends at step {progress.step}: {' and '.join(reasons)}")
    return True


def save_when_due(run: Run, phase: Phase, *, now: bool) -> None:
    """Saves at its interval, at the end of a phase, at a new best, and when `now`."""
    step, best = run.progress.step, run.progress.best
    new_best = best is not None and best["step"] == step
    due = now or new_best or step == phase.stop or _due(run, run.config.checkpoint.every)
    if not due or step == run.saved:
        return
    run.journal.sync()
    if run.world.main:
        try:
            run.checkpoints.save(step, snapshot(run))
        except OSError as error:
            run.journal.note(f"WARNING: checkpoint at step {step} could not be written ({error}); training goes on, "
                             "earlier checkpoints are untouched. Make room or mend permissions")  # fmt: skip
    run.saved = step
    run.world.barrier()


def snapshot(run: Run) -> Snapshot:
    """Everything needed to go on from here."""
    scaler = run.world.scaler
    return Snapshot(
        model=weights_of(run.net),
        optimizer=optimizer_state(run.optimizer),
        ema=weights_of(run.ema.module) if run.ema else None,
        state={
            "step": run.progress.step,
            "best": run.progress.best,
            "progress": run.progress.data(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "metrics_bytes": run.journal.position(),
            "identity": dict(run.identity),
        },
    )


def load_weights(run: Run, weights: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor] | None) -> None:
    """Into the network, and into the moving average: its own, or anew from the network."""
    run.net.load_state_dict(weights, strict=True)
    if run.ema is not None:
        run.ema.module.load_state_dict(ema if ema is not None else weights, strict=True)
        run.ema.n_averaged.fill_(1)


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """A checkpoint goes on only with the same classes, shards and preprocessing.

    Raises:
        UserError: with the differences.
    """
    differ = [f"{k}: {saved.get(k)!r} there, {now[k]!r} now" for k in now if saved.get(k) != now[k]]
    if differ:
        raise UserError(
            "the checkpoint belongs to another training:\n    " + "\n    ".join(d[:300] for d in differ),
            where=where,
            todo="use the same shards and settings, another run folder, or --fresh",
        )


def _due(run: Run, every: Any) -> bool:
    interval = max(every.steps(epoch=run.plan.steps_per_epoch, whole=run.plan.steps), 1)
    return bool(run.progress.step % interval == 0)


def _any_due(run: Run) -> bool:
    config = run.config
    return any(_due(run, e) for e in (config.track.every, config.evaluate.every, config.checkpoint.every))
