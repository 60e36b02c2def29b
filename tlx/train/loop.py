"""The loop. It obeys the plan, in execution order; what depends on time is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tlx.base.errors import TlxError
from tlx.base.metrics import Metric, Weights
from tlx.data.stream.stream import Batch, ShardStream
from tlx.data.stream.transfer import on_device
from tlx.plan.plan import Phase, Plan
from tlx.runs.checkpoint import damage, read
from tlx.runs.progress import Progress
from tlx.tracking.phase_end import PhaseEnd
from tlx.train.answers import keep_answers
from tlx.train.cached import PhaseInput, input_of
from tlx.train.evaluation import evaluate_weights, should_stop_early, update_best
from tlx.train.filling import Stopped
from tlx.train.freeze import train_mode
from tlx.train.memory_use import begin_phase, memory_row
from tlx.train.nonfinite import explain, tolerated
from tlx.train.optim import forget
from tlx.train.resume import load_weights, resume
from tlx.train.run import Run, save
from tlx.train.solved import solve_head
from tlx.train.step import PhaseModel, by_step, prepare_phase, set_rates, share_unreadable
from tlx.train.step_timer import StepTimer
from tlx.train.update_size import UpdateSize


def fit(run: Run) -> bool:
    """Trains to the end of the plan, or until a stop is asked for; whether the end was reached.

    Raises:
        UserError: unreadable samples beyond the quota.
        TlxError: the loss or gradient is not finite.
    """
    resume(run)
    progress, timer, every = run.progress, run.timer, run.config.evaluate.every
    timer.begin(before_s=progress.wall_time_s, samples=progress.samples_seen)
    while progress.step < run.plan.steps:
        phase = run.plan.phase(progress.step)
        begin(run, phase)
        try:
            source = input_of(run, phase)
        except Stopped:
            save(run)
            return False
        if run.config.solves_head and not progress.step:
            solve_head(run, source)
        compiled, cut = run.config.loop.compile, source.cut
        phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=compiled, cut=cut)
        steps = steps_of(source.stream, phase, progress.step, run.world.device, timer=timer)
        for step, batches in timer.each(steps):
            stopping = train_step(run, phase, phase_model, step, batches)
            progress.wall_time_s = timer.step_done()
            if run.due(run.config.track.every):
                run.journal.row(training_row(run, phase))
            ended = (run.due(every) or progress.step == phase.stop) and validate(run, phase, phase_model, source)
            is_leader = any(leader["step"] == progress.step for leader in progress.leaders)
            if stopping or ended or is_leader or progress.step == phase.stop or run.due_to_save():
                save(run)
            if stopping:
                return progress.step >= run.plan.steps
            if ended:
                break
    return True


def steps_of(
    stream: ShardStream, phase: Phase, start: int, device: torch.device, *, timer: StepTimer | None = None
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """The micro-batches of every step of a phase from `start` on, on the device; `timer` is told how long each is
    waited for."""
    batches = on_device(stream.batches(start, phase.stop), device)
    return by_step(batches if timer is None else timer.waited(batches))


def begin(run: Run, phase: Phase) -> None:
    """What happens once, at a phase's first step: optimizer state and weights, as its settings say."""
    progress, note = run.progress, run.journal.note
    run.world.watch.beat("batch", progress.step + 1)
    if progress.step != phase.start:
        return
    forget(run.optimizer, run.plan.forgotten(phase))
    if phase.settings.start_from == "best" and progress.best is not None:
        if run.world.main:
            run.saver.settle()
        path = run.checkpoints.path(progress.best["step"])
        wrong = run.world.from_main(damage(path) if run.world.main else None)
        if wrong is not None:
            note(f"WARNING: the best checkpoint, {path}, is not whole ({wrong}); going on from the last weights")
        else:
            best = read(path)
            load_weights(run.net, run.ema, best.model if progress.best["weights"] == "raw" else best.ema or {})
    elif phase.settings.start_from == "best" and progress.step:
        note(
            f"WARNING: phase {phase.name} begins from the last weights: no evaluation so far gave a finite "
            f"{run.config.evaluate.chooses}, so that there are no best ones"
        )
    progress.phases[phase.name] = {"start": phase.start, "stop": phase.stop}
    begin_phase(run.world.device)
    note(f"phase {phase.name}: steps {phase.start} to {phase.stop}")


def train_step(run: Run, phase: Phase, phase_model: PhaseModel, step: int, batches: Iterable[Batch]) -> bool:
    """One step of the plan, and its counts all-reduced; whether all ranks agree to stop."""
    world, progress = run.world, run.progress
    world.watch.beat("step", step + 1)
    set_rates(run.optimizer, phase, step)
    is_logged = (step + 1) % run.plan.interval(run.config.track.every) == 0
    run.size = UpdateSize() if is_logged and world.main else None
    tally, bad, total = run.updater.update(phase_model, step, batches, size=run.size)
    progress.step = step + 1
    asked = run.stop.asked(look=world.main)
    # filled on the device: a copy from the host would wait for it
    flags = [torch.full_like(tally[:1], float(flag)) for flag in (len(bad), asked)]
    run.exchange.post(torch.cat([tally[:3], *flags, tally[3:]]), step=progress.step, total=total)
    progress.bad.update({b.where: b.reason for b in bad})
    due = run.due(run.config.track.every, run.config.evaluate.every) or run.due_to_save()
    stopping = apply_readings(run, run.exchange.readings(settle=due or progress.step == phase.stop))
    if stopping:  # counts still in flight on a GPU belong into the last checkpoint
        apply_readings(run, run.exchange.readings(settle=True))
    world.watch.beat("batch", step + 2)
    return stopping


def apply_readings(run: Run, readings: Sequence[Mapping[str, float]]) -> bool:
    """Counts the steps that have arrived, the same on every rank; whether any rank was asked to stop.

    Raises:
        UserError: unreadable samples beyond the quota.
        TlxError: a loss or gradient that is not finite ends the training.
    """
    progress, scaled = run.progress, run.world.scaler is not None
    for reading in readings:
        progress.absorb(reading, scaled=scaled)
        if reading["bad"]:
            share_unreadable(progress.bad, run.quota, run.world)
        if reading["nonfinite"]:
            warning = tolerated(reading, progress, run.config.loop.nonfinite, scaled=scaled)
            if warning is None:
                raise TlxError(explain(run, int(reading["step"])))
            if warning:
                run.journal.note(warning)
        else:
            watch_loss(reading, progress, run.plan, run.journal.note)
    return any(reading["stop"] for reading in readings)


def watch_loss(reading: Mapping[str, float], progress: Progress, plan: Plan, note: Callable[[str], None]) -> None:
    """Tells of a loss spike; what it means is for a person to say."""
    if not reading["total"]:  # every sample of the batch weighed 0: there is no mean
        return
    step = int(reading["step"])
    phase, loss, usual = plan.phase(step - 1).name, reading["loss"] / reading["total"], progress.trend.mean
    if progress.trend.spike(phase, step, loss):
        note(f"WARNING: loss spike: {loss:.4g} at step {step} of phase {phase} (running mean {usual:.4g})")


def training_row(run: Run, phase: Phase) -> dict[str, Any]:
    """A row of the training curve: means since the last one, rates and sizes of the step that was made."""
    plan, progress = run.plan, run.progress
    step, rates = progress.step, {layer: rate for layer, rate in phase.rates(progress.step - 1).items() if rate}
    return {
        "step": step,
        "epoch": step / plan.steps_per_epoch,
        "phase": phase.name,
        "phase_index": plan.index(phase),
        **progress.logged.take(),
        "train/lr_head": rates.get(plan.layers.head.name, 0.0),
        "train/lr_lowest": min(rates.values(), default=0.0),
        **{f"lr/{layer}": rate for layer, rate in rates.items()},
        **(run.size.row() if run.size is not None else {}),
        **progress.best_so_far(),
        **run.timer.row(samples=progress.samples_seen, steps_left=plan.steps - step),
        **memory_row(run.world.device),
    }


def validate(run: Run, phase: Phase, phase_model: PhaseModel, source: PhaseInput) -> bool:
    """Evaluates the weights as they are; whether the phase ends here, early or on a plateau: which changes the plan."""
    progress, wanted, step, note = run.progress, run.config.evaluate, run.progress.step, run.journal.note
    row: dict[str, Any] = {"step": step, "epoch": step / run.plan.steps_per_epoch, "phase": phase.name}
    row["phase_index"] = run.plan.index(phase)
    row |= progress.evaluated.take()
    why = None
    if source.validation is not None:
        nets: dict[Weights, torch.nn.Module] = {"raw": source.network(run.net)}
        nets |= {"ema": source.network(run.ema.module)} if run.ema is not None else {}
        found, answers = evaluate_weights(
            nets, source.validation, progress.bad, run.quota, lambda odd: note(f"WARNING: at step {step} {odd}")
        )
        row |= found
        update_best(progress, phase, row, metric=Metric.of(wanted.chooses), keep=run.config.checkpoint.keep.best)
        why = should_stop_early(progress, phase, row, wanted) if step < phase.stop else None
        keep_answers(run, phase, row, answers, last=step == phase.stop or why is not None)
    if why is not None:
        progress.ends[phase.name] = progress.phases[phase.name]["stop"] = step
        run.plan = run.remake_plan(progress.ends)
        note(f"phase {phase.name} ends at step {step}: {why}")
    train_mode(phase_model.net, phase, run.plan)
    run.world.watch.beat("batch")
    run.journal.row({k: v for k, v in row.items() if not isinstance(v, list)} | progress.best_so_far())
    if run.world.main and step < run.plan.steps and source.validation is not None:
        score = Metric.of(wanted.chooses).best_of(row)
        run.stop.consider(step, math.nan if score is None else score.value)
    if run.world.main and (step == phase.stop or why is not None):
        run.journal.phase_ended(phase_end(run, phase, source))
    return why is not None


def phase_end(run: Run, phase: Phase, source: PhaseInput) -> PhaseEnd:
    """What a phase that ends with this step has come to, for trackers."""
    about = dict(run.progress.phases[phase.name])  # as it is now: trackers read it in threads of their own
    shards = source.validation.manifest if source.validation is not None else None
    own = (about.get("best", {}), about.get("last", {}))
    return PhaseEnd(run.folder, phase.name, run.plan.index(phase), phase.start, run.progress.step, *own, shards)
