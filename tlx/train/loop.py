"""The loop. It obeys the plan, in execution order; what depends on time is a function of the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tlx.data.stream.reader import BadSample
from tlx.data.stream.stream import Batch
from tlx.data.stream.transfer import on_device
from tlx.plan.plan import Phase
from tlx.runs.checkpoint import read
from tlx.train.evaluation import evaluate_when_due
from tlx.train.nonfinite import meet_nonfinite
from tlx.train.optim import forget
from tlx.train.quota import count_bad
from tlx.train.resume import load_weights, resume, save_when_due
from tlx.train.run import Run
from tlx.train.step import PhaseModel, by_step, prepare_phase, set_rates


def fit(run: Run) -> bool:
    """Trains to the end of the plan, or until a stop is asked for; whether the end was reached.

    Raises:
        UserError: unreadable samples beyond the quota.
        TlxError: the loss or gradient is not finite.
    """
    resume(run)
    run.timer.begin(before_s=run.progress.wall_time_s, samples=run.progress.samples_seen)
    while run.progress.step < run.plan.steps:
        phase = run.plan.phase(run.progress.step)
        begin(run, phase)
        phase_model = prepare_phase(run.net, phase, run.plan, world=run.world, compiled=run.config.loop.compile)
        for step, batches in run.timer.each(steps_of(run, phase)):
            stopping = train_step(run, phase, phase_model, step, batches)
            run.progress.wall_time_s = run.timer.step_done()
            log(run, phase)
            ended = evaluate_when_due(run, phase, phase_model)
            save_when_due(run, phase, now=stopping or ended)
            if stopping:
                return run.progress.step >= run.plan.steps
            if ended:
                break
    return True


def steps_of(run: Run, phase: Phase) -> Iterator[tuple[int, Iterator[Batch]]]:
    """The micro-batches of every step that is left of a phase, on the device."""
    return by_step(on_device(run.stream.batches(run.progress.step, phase.stop), run.world.device))


def train_step(run: Run, phase: Phase, phase_model: PhaseModel, step: int, batches: Iterable[Batch]) -> bool:
    """One step of the plan; whether all ranks agree to stop."""
    run.world.watch.beat("step", step + 1)
    set_rates(run.optimizer, phase, step)
    tally, bad, total = run.updater.update(phase_model, step, batches)
    run.progress.step = step + 1
    stopping = exchange_counts(run, tally, bad, total)
    run.world.watch.beat("batch", step + 2)
    return stopping


def begin(run: Run, phase: Phase) -> None:
    """What happens once, at a phase's first step."""
    run.world.watch.beat("batch", run.progress.step + 1)
    if run.progress.step != phase.start:
        return
    settings = phase.settings
    forget(run.optimizer, run.plan.forgotten(phase))
    if settings.start_from == "best" and run.progress.best is not None:
        start_from_best(run, run.progress.best)
    elif settings.start_from == "best" and run.progress.step:
        run.journal.note(
            f"WARNING: phase {phase.name} begins from the last weights: no evaluation so far gave a finite "
            f"{run.config.evaluate.metric}, so that there are no best ones"
        )
    run.progress.phases[phase.name] = {"start": phase.start, "stop": phase.stop}
    run.journal.note(f"phase {phase.name}: steps {phase.start} to {phase.stop}")


def start_from_best(run: Run, best: Mapping[str, Any]) -> None:
    """The best weights so far, raw or averaged, in place of the last ones."""
    if run.world.main:
        run.saver.settle()
    path = run.checkpoints.path(best["step"])
    damage = run.world.from_main(run.checkpoints.damage(path) if run.world.main else None)
    if damage is not None:
        run.journal.note(
            f"WARNING: the best checkpoint, {path}, is not whole ({damage}); going on from the last weights"
        )
        return
    snapshot = read(path)
    load_weights(run, snapshot.model if best["weights"] == "raw" else snapshot.ema or {})


def exchange_counts(run: Run, tally: torch.Tensor, bad: list[BadSample], total: float) -> bool:
    """Exchanges a step's counts between ranks; whether all ranks agree to stop."""
    asked = run.stop.asked(look=run.world.main)
    # filled on the device: a copy from the host would wait for it
    flags = [torch.full_like(tally[:1], float(flag)) for flag in (len(bad), asked)]
    values = torch.cat([tally[:3], *flags, tally[3:]])
    run.exchange.post(values, step=run.progress.step, total=total)
    run.progress.bad.update({b.where: b.reason for b in bad})
    config, step = run.config, run.progress.step
    due = run.due(config.track.every, config.evaluate.every) or run.due_to_save()
    stopping = apply_readings(run, run.exchange.readings(settle=due or step == run.plan.phase(step - 1).stop))
    if stopping:  # what a GPU has not told yet belongs into the last checkpoint
        apply_readings(run, run.exchange.readings(settle=True))
    return stopping


def apply_readings(run: Run, readings: list[dict[str, float]]) -> bool:
    """Counts what has arrived, the same on every rank; whether any rank was asked to stop."""
    for reading in readings:
        run.progress.absorb(reading, scaled=run.world.scaler is not None)
        if reading["bad"]:
            count_bad(run)
        if reading["unfinite"]:
            meet_nonfinite(run, reading)
        else:
            watch_loss(run, reading)
    return any(reading["stop"] for reading in readings)


def watch_loss(run: Run, reading: Mapping[str, float]) -> None:
    """A loss that leaps up is told; what it means is for a person to say."""
    if not reading["total"]:  # every sample of the batch weighed 0: there is no mean
        return
    step = int(reading["step"])
    phase, loss = run.plan.phase(step - 1).name, reading["loss"] / reading["total"]
    usual = run.progress.trend.mean
    if run.progress.trend.spike(phase, step, loss):
        run.journal.note(
            f"WARNING: the training loss leaps to {loss:.4g} at step {step} of phase {phase}, from {usual:.4g} usually"
        )


def log(run: Run, phase: Phase) -> None:
    """A row of the training curve, when one is due."""
    step = run.progress.step
    if not run.due(run.config.track.every):
        return
    rates = [rate for rate in phase.rates(step - 1).values() if rate]
    run.journal.row(
        {
            "step": step,
            "epoch": step / run.plan.steps_per_epoch,
            "phase": phase.name,
            **run.progress.logged.take(),
            "train/lr_head": phase.rates(step - 1)[run.plan.layers.head.name],
            "train/lr_lowest": min(rates, default=0.0),
            **run.progress.best_so_far(),
            **run.timer.row(samples=run.progress.samples_seen, steps_left=run.plan.steps - step),
        }
    )
