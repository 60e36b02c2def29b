"""What a plan says aloud: settings that can be trained with and were probably unintended, and what results depend on.

Each function of `CHECKS` looks at one thing and returns sentences, none where all is well. They know what a plan knows;
what only data or a backbone tells is handed to :meth:`tlx.plan.plan.Plan.make` as `noticed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tlx.base import plug
from tlx.base.durations import Duration, Mark
from tlx.data.stream.order import micro_batch_sizes, micro_batches
from tlx.plan import stale_state
from tlx.plan.config import Config
from tlx.plan.loop_config import Checkpoint, Evaluate, NonFinite, Track
from tlx.plan.parts import Part
from tlx.plan.returned_values import sampled

if TYPE_CHECKING:
    from tlx.plan.plan import Phase, Plan

HIGHEST = {"adam": 0.1, "adamw": 0.1, "rmsprop": 0.1, "sgd": 10.0}
"""Rates above this are probably unintended. Adam and its kin move every weight by about the rate, whatever the
gradient: 0.1 a step is more than most weights are. SGD's rates go up to about 10, for very large batches (You et al.
2017, LARS); of optimizers from elsewhere nothing more is known."""

LOWEST = 1e-8
"""A rate below this moves no fp32 weight of ordinary size within thousands of steps."""

HARDLY = 1e-4
"""A layer, or a stretch of a curve, at less than this share of the rate hardly trains."""

SHORT = 5
"""A moving average that comes to less than one in so many of the steps that its decay asks for is worth a note."""

FEW = 1000
"""A number without a unit up to this may have been meant as epochs."""


def of(config: Config, plan: Plan, world: int) -> list[str]:
    """Everything there is to say about a plan on `world` ranks."""
    return [sentence for check in CHECKS for sentence in check(config, plan, world)]


def moving_statistics(config: Config, plan: Plan, world: int) -> list[str]:
    """What results depend on where statistics move."""
    if not plan.moving:
        return []
    batch, most = config.data.batch, config.loop.micro_batch
    moving, parts = f"BatchNorm statistics move in {', '.join(plan.moving)}", micro_batches(batch, world, most)
    if not config.loop.sync_batchnorm:
        of = f"the micro-batch size ({micro_batch_sizes(batch, world, most)[1]} at {world} ranks)"
        return [f"{moving}: results depend on {of}"]
    if parts == 1:
        return [f"{moving}: they are of the global batch of {batch}, whatever the number of ranks"]
    of = f"they are of all ranks' micro-batches together, so results depend on the {parts} parts of a global batch"
    return [f"{moving}: {of} ({-(-batch // parts)} samples at a time)"]


def statistics_of_episodes(config: Config, plan: Plan, world: int) -> list[str]:
    """Of batches that are no picture of all classes."""
    if not plan.moving or config.composes_batches is None:
        return []
    return [
        f"BatchNorm statistics that move (in {', '.join(plan.moving)}) are of a batch of episodes, its few classes "
        "and its queries together, and evaluations use the running ones; norm: norms_fixed avoids the difference"
    ]


def idle_parameters(config: Config, plan: Plan, world: int) -> list[str]:
    idle = [p.name for layer in plan.layers for p in layer.parameters if p.idle]
    if not idle:
        return []
    names = ", ".join(idle[:4]) + (" ..." if len(idle) > 4 else "")
    return [f"{len(idle)} tensors never train, since no gradient reaches them or the network fixes them: {names}"]


def short_epoch(config: Config, plan: Plan, world: int) -> list[str]:
    if plan.samples >= config.data.batch:
        return []
    return [f"an epoch is one short batch: {plan.samples} samples, data.batch={config.data.batch}"]


def no_validation(config: Config, plan: Plan, world: int) -> list[str]:
    if config.data.val is not None:
        return []
    return [
        "there is no validation data (data.val): nothing measures the training while it runs, and nothing chooses the "
        "best checkpoint; the last weights are the result"
    ]


def steps_meant_as_epochs(config: Config, plan: Plan, world: int) -> list[str]:
    """A duration of 8 is 8 steps."""
    epoch = plan.steps_per_epoch
    said = [
        ("duration", config.duration),
        *((_written_at(config, p), _duration(p.settings.duration)) for p in plan.phases),
    ]
    return _together(
        (
            where,
            f"{length.value:g} is {_steps(length)}, {_epochs(length.value, epoch)}; "
            f'did you mean "{length.value:g}ep"? If not, write "{_steps(length)}"',
        )
        for where, length in said
        if length is not None and length.bare and epoch > 1 and length.value <= min(2 * epoch, FEW)
    )


def _epochs(steps: float, epoch: int) -> str:
    if steps < epoch:
        return f"less than an epoch ({epoch} steps)"
    return "one epoch" if steps == epoch else f"{steps / epoch:.3g} epochs of {epoch} steps"


def _written_at(config: Config, phase: Phase) -> str:
    """The key that says how long a phase lasts."""
    if phase.name in config.further:
        return f"further.{phase.name}.duration"
    own = config.phases.get(phase.name)
    if own is not None and own.duration is not None:
        return f"phases.{phase.name}.duration"
    if config.settings(phase.name).duration is not None:
        return "phases.each.duration"
    schedule = plug.find("unfreeze", config.unfreeze.name)
    arguments = plug.arguments(schedule, config.unfreeze.args, label=f"unfreeze {config.unfreeze.name}")
    named = [name for name, value in arguments.items() if value == phase.settings.duration]
    return f"unfreeze.{named[0]}" if named else f"unfreeze, phase {phase.name}"


def parts_of_the_whole(config: Config, plan: Plan, world: int) -> list[str]:
    """Phases of the schedule that do not add up to `duration`."""
    if config.duration is None:
        return []
    whole = config.duration.steps(epoch=plan.steps_per_epoch, whole=0)
    phases = [p for p in plan.phases if p.name not in config.further]  # what comes after the whole is no part of it
    planned = sum(p.length for p in phases)
    if abs(planned - whole) <= len(phases):  # each is rounded
        return []
    shares = ", ".join(f"{p.name} {100 * p.length / whole:.4g}%" for p in phases) if whole else ""
    return [
        f"the phases add up to {planned} steps, {100 * planned / max(whole, 1):.4g}% of duration: "
        f"{config.duration} ({whole} steps){f': {shares}' if shares else ''}; training ends after {plan.planned} steps"
    ]


def rates_out_of_bounds(config: Config, plan: Plan, world: int) -> list[str]:
    """Rates that no training needs."""
    name, sentences = config.optimizer.name, list[tuple[str, str]]()
    most = HIGHEST.get(name, max(HIGHEST.values()))
    for phase in plan.phases:
        rate = phase.lr * _shape(phase)[0] * max(phase.factors[y.name] for y in plan.layers if phase.trained(y))
        if rate > most:
            said = f"the learning rate reaches {rate:.4g}, and {name} hardly ever trains above {most:g}"
            sentences.append((f"phases.{phase.name}", f"{said}: is lr={phase.lr:g} meant?"))
        elif rate < LOWEST:
            said = f"the learning rate is {rate:.4g} at most, below {LOWEST:g}: nothing will move"
            sentences.append((f"phases.{phase.name}", f"{said}; is lr={phase.lr:g} meant?"))
    return _together(sentences)


def layers_left_behind(config: Config, plan: Plan, world: int) -> list[str]:
    """Layers that train, at next to nothing of the rate."""
    sentences = []
    for phase in plan.phases:
        factors = {y.name: phase.factors[y.name] for y in plan.layers if phase.trained(y)}
        top = max(factors.values())
        behind = {name: factor / top for name, factor in factors.items() if factor < HARDLY * top}
        if behind:
            lowest = min(behind, key=lambda name: behind[name])
            said = (
                f"the layer decay ({phase.settings.layer_decay.name}) leaves {lowest} {behind[lowest]:.1g} of the "
                f"rate, and {len(behind)} of {len(factors)} layers less than {HARDLY:g}: they hardly train; take a "
                "milder decay, or freeze them, which is faster"
            )
            sentences.append((f"phases.{phase.name}", said))
    return _together(sentences)


def curves_gone_out(config: Config, plan: Plan, world: int) -> list[str]:
    """Curves that spend most of the phase near zero."""
    return _together(
        (
            f"phases.{phase.name}",
            f"the curve ({phase.settings.curve.name}) is below {HARDLY:g} of the rate for {100 * share:.0f}% of the "
            "phase: hardly anything trains then; take a milder curve, or a shorter phase",
        )
        for phase in plan.phases
        if (share := _shape(phase)[1]) > 0.5
    )


def periods_without_end(config: Config, plan: Plan, world: int) -> list[str]:
    """Curves with a period of which no multiple is within the phase."""
    return _together(
        (
            f"phases.{phase.name}",
            f"the curve ({phase.settings.curve.name}) does something every {mark}, which is not shorter than the "
            "phase: it never comes to that",
        )
        for phase in plan.phases
        for mark in _periods(phase.settings.curve)
        if mark.steps(epoch=plan.steps_per_epoch, whole=phase.length) >= phase.length
    )


def stale_optimizer_state(config: Config, plan: Plan, world: int) -> list[str]:
    return stale_state.warnings(plan, config.optimizer)


def average(config: Config, plan: Plan, world: int) -> list[str]:
    """Where the moving average's decay and the number of steps do not fit."""
    ema = config.loop.ema
    if ema is None:
        return []
    begins = [p.start for p in plan.phases if p.settings.start_from == "best"]  # there the average begins anew
    steps, span = plan.steps - max(begins, default=0), round(1 / (1 - ema.decay))
    reach = max(round(1 / (1 - ema.at(max(steps - 1, 1)))), 1)
    if ema.ramp and reach * SHORT < span:
        return [
            f"loop.ema: decay={ema.decay:g} is a mean over about the last {span:,} steps, and in {steps:,} steps the "
            f"ramp comes to a mean over about the last {reach:,}. That suits so short a training: nothing need be done"
        ]
    if not ema.ramp and span > steps:
        fit = f"decay={_below(1 - 10 / steps):g} (a mean over the last tenth) or " if steps > 20 else ""
        return [
            f"loop.ema: a decay of {ema.decay:g} without ramp is a mean over about {span:,} steps, and there are "
            f"{steps:,}: at the end the averaged weights are still {ema.decay ** (steps - 1):.0%} those of the first "
            f"step. Set {fit}ramp=true"
        ]
    return []


def intervals_without_end(config: Config, plan: Plan, world: int) -> list[str]:
    """What is due for the first time after the last step."""
    whole, often = _length(plan.steps, plan), '"1ep"'
    said = [
        (
            "checkpoint.keep.every",
            config.checkpoint.keep.every,
            "no checkpoint is kept for good by it; set a shorter one, or leave it out",
        ),
        (
            "checkpoint.every",
            config.checkpoint.every if config.checkpoint.every != Checkpoint().every else None,
            "a checkpoint is saved only at the end of a phase and at the best evaluations, and a training that is "
            f"killed before then begins anew; set a shorter one, such as {often}",
        ),
        (
            "evaluate.every",
            config.evaluate.every if config.data.val and config.evaluate.every != Evaluate().every else None,
            f"validation runs only at the end of each phase; set a shorter one, such as {often}",
        ),
        (
            "track.every",
            config.track.every if config.track.every != Track().every else None,
            "the training loss and the learning rate are never written down; set a shorter one, such as 10 (steps)",
        ),
    ]
    return [
        f"{key}: {every} is longer than the whole training ({whole}): {then}"
        for key, every, then in said
        if every is not None and plan.interval(every) > plan.steps
    ]


def patience_without_end(config: Config, plan: Plan, world: int) -> list[str]:
    """Early stops that cannot come before the end of a phase: it takes one evaluation to compare with, then as many
    without progress as `patience` says, and the one at a phase's last step ends nothing early."""
    if config.data.val is None:
        return []
    every = plan.interval(config.evaluate.every)
    counts = {p.name: (p.stop - 1) // every - p.start // every for p in plan.phases}
    longest, patience = max(counts.values()), config.evaluate.patience
    remedy = "set a smaller patience, or evaluate more often (evaluate.every)"
    sentences = []
    if patience is not None and longest <= patience:
        has = f"no phase has more than {_times(longest)} before its last step"
        sentences = [
            f"evaluate.patience: {patience} never stops a phase early: that takes {patience + 1} evaluations, and "
            f"{has}; {remedy}"
        ]
    return sentences + _together(
        (
            f"phases.{p.name}.duration.patience",
            f"{p.plateau.patience} never ends the phase early: that takes {p.plateau.patience + 1} evaluations, and "
            f"the phase has {_times(counts[p.name])} before its last step; {remedy}",
        )
        for p in plan.phases
        if p.plateau is not None and counts[p.name] <= p.plateau.patience
    )


def _times(evaluations: int) -> str:
    return f"{evaluations} evaluation{'' if evaluations == 1 else 's'}" if evaluations else "none"


def _length(steps: int, plan: Plan) -> str:
    return f"{steps:,} steps, {_epochs(steps, plan.steps_per_epoch)}"


def settings_of_what_is_off(config: Config, plan: Plan, world: int) -> list[str]:
    """Settings that only matter with another one."""
    mix, met, sentences = config.mix, config.loop.nonfinite, []
    if mix is not None and not (mix.mixup or mix.cutmix):
        sentences.append(
            "mix: nothing is mixed, since mixup and cutmix are both 0; set mix.mixup=0.2, or leave mix out"
        )
    if config.loop.sync_batchnorm and not plan.moving:
        sentences.append("loop.sync_batchnorm: does nothing here, since no BatchNorm statistics move in any phase")
    if met.policy == "stop" and met.limit != NonFinite().limit:
        sentences.append("loop.nonfinite.limit: does nothing with policy stop, which ends at the first such step")
    return sentences


def _below(decay: float) -> float:
    """The decay rounded towards 0 to two digits of what is left to 1, so that it is reached."""
    left = 1 - decay
    digits = 1 - math.floor(math.log10(left))
    return round(1 - math.ceil(left * 10.0**digits - 1e-6) / 10.0**digits, digits)


CHECKS: tuple[Callable[[Config, Plan, int], list[str]], ...] = (
    moving_statistics,
    statistics_of_episodes,
    idle_parameters,
    short_epoch,
    no_validation,
    steps_meant_as_epochs,
    parts_of_the_whole,
    rates_out_of_bounds,
    layers_left_behind,
    curves_gone_out,
    periods_without_end,
    intervals_without_end,
    patience_without_end,
    settings_of_what_is_off,
    average,
    stale_optimizer_state,
)


def _together(sentences: Iterable[tuple[str, str]]) -> list[str]:
    """From (key, sentence): each sentence once, after all keys that it is about."""
    keys: dict[str, list[str]] = {}
    for key, sentence in dict.fromkeys(sentences):
        keys.setdefault(sentence, []).append(key)
    return [f"{', '.join(own[:4])}{_more(own[4:])}: {sentence}" for sentence, own in keys.items()]


def _more(rest: Sequence[str]) -> str:
    return f" and {len(rest)} more" if rest else ""


def _steps(length: Duration) -> str:
    return f"{length.value:g} step{'' if length.value == 1 else 's'}"


def _duration(said: object) -> Duration | None:
    said = getattr(said, "max", said)  # of a plateau
    return said if isinstance(said, Duration) else None


def _periods(curve: Part) -> list[Mark]:
    arguments = plug.arguments(plug.find("curve", curve.name), curve.args, label=f"curve {curve.name}")
    return [value for value in arguments.values() if isinstance(value, Mark) and value.repeated]


def _shape(phase: Phase) -> tuple[float, float]:
    """The curve's highest value, and the share of its steps that are below `HARDLY` of that."""
    steps = phase.length - phase.warmup
    values = [float(phase.curve(step, steps)) for step in sampled(steps)]
    top = max(values)
    return top, sum(value < HARDLY * top for value in values) / len(values)
