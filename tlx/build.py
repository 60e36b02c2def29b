"""From a configuration to a running training: the only place that sees the whole configuration."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from tlx.config import Config, dump
from tlx.data.order import ORDER_VERSION
from tlx.errors import ConfigError, UserError, did_you_mean
from tlx.feed import Sets, count_samples, evaluation_of, open_sets, stream_of
from tlx.layers import LayerMap
from tlx.parts import Parts, backbone_of, make, parts_of, seed_all, trial_of
from tlx.plan import Plan
from tlx.run_folder import RunFolder, essential
from tlx.terminal import escaped, folded
from tlx.timetable import timetable

if TYPE_CHECKING:
    from tlx.memory import Memory
    from tlx.models import Backbone
    from tlx.preempt import StopRequest
    from tlx.run import Run
    from tlx.saver import Saver
    from tlx.tracking.journal import Journal
    from tlx.world import World


def plan(config: Config, *, memory: bool = False, measure: bool = False) -> tuple[Plan, str]:
    """The plan and its text, without GPU, weights or, where `data.expected` says what they would hold, shards.

    Args:
        memory: whether to estimate what each phase needs; takes a second or so per phase.
        measure: whether to try it on the device here.
    """
    samples = count_samples(config)
    backbone = backbone_of(config, samples.classes, empty=True)
    world = config.world.size or 1
    made = Plan.make(config, backbone.layers, samples=samples.train, world=world)
    check_metrics(config, made, samples.classes, validated=config.data.val is not None)
    notes = [samples.note] if samples.note else []
    peaks: Mapping[str, int | None] = {}
    fitting = config
    if measure:
        peaks, fitting, said = measured(config, made, samples.classes)
        notes += said
    needs = memory_of(fitting, made, backbone, world) if memory else None
    table = timetable(made, memory=needs, measured=peaks)
    return made, "\n".join([folded(header(config, samples.classes)), table, *map(folded, notes)])


def measured(config: Config, made: Plan, classes: int) -> tuple[Mapping[str, int | None], Config, list[str]]:
    """What one rank's part of the training needs on the device here, with untrained weights.

    Returns:
        bytes by phase; the configuration with the micro-batch that fits; lines for people.

    Raises:
        UserError: several processes, a device or network that cannot be used.
    """
    from tlx import world as worlds
    from tlx.micro_batch import Choice, Share, decide, device_words, facts_of, moving_phases, report, search

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("tlx plan --measure measures one process", todo="start it without a launcher")
    ranks = config.world.size or 1
    alone = config.model_copy(
        update={
            "world": config.world.model_copy(update={"size": None}),
            "backbone": config.backbone.model_copy(update={"weights": "none"}),
        }
    )
    world = worlds.enter(alone)
    seed_all(alone)
    validation = max(config.data.batch, config.evaluate.batch or 0) if config.data.val else 0
    share = Share.of(config, made, ranks=ranks, validation=validation)
    found = search(trial_of(alone, world, parts_of(alone, world, [1] * classes), made, ranks=ranks), share, world)
    on = device_words(facts_of(alone, share, world)["devices"][0])
    said = [report(found, share, on=on)]
    if not world.cuda:
        said.append("a CPU does not tell how much was used: nothing measured is shown")
    elif ranks > 1:
        said.append(f"measured is one rank's part of {ranks}, without what NCCL takes")
    if config.loop.fit_micro_batch == "never" and found.refused:
        said.append("training would take what was asked for and run out of memory (loop.fit_micro_batch=never)")
    try:
        decide(found, on=on, moving=moving_phases(made) if config.loop.fit_micro_batch == "auto" else [])
    except UserError as error:
        said.append(f"training would be refused: {error}")
    return found.peaks, Choice(found.fits).over(config), said


def memory_of(config: Config, made: Plan, backbone: Backbone, world: int) -> Mapping[str, Memory]:
    """What a rank needs in each phase, with the micro-batches and the precision of the configuration."""
    from tlx.memory import Images, memory_by_phase

    spec = config.input.over(backbone.input)
    share = -(-config.data.batch // world)
    return memory_by_phase(
        made,
        backbone.module,
        Images(min(share, config.loop.micro_batch or share), (spec.channels, *spec.size), config.loop.precision),
        functools.partial(make, "optimizer", config.optimizer),
        averaged=config.loop.ema is not None,
        recomputed=backbone.blocks if config.loop.gradient_checkpointing else (),
    )


def header(config: Config, classes: int) -> str:
    run, weights = escaped(config.run), escaped(config.backbone.weights)
    head = f"{config.head.name} head, {classes} classes"
    return f"run {run}: {config.backbone.name} (weights {weights}), {head}, seed {config.seed}"


def together(world: World, act: Callable[[], Any]) -> Any:
    """Does something on every rank; a user's mistake that any rank finds is everybody's, so that none waits for it."""
    value, mistake = None, None
    try:
        value = act()
    except UserError as error:
        mistake = error
    first = next((m for m in world.gather(str(mistake) if mistake else None) if m), None)
    if first is not None:
        raise mistake or UserError(first)
    return value


def compose(
    config: Config, world: World, folder: RunFolder, stop: StopRequest | None = None, *, silent: bool = False
) -> Run:
    """Builds every part of a training, every rank at once.

    Args:
        stop: requests to stop, listened to from an earlier time on; by default from now on.
        silent: nothing is shown on the console.

    Raises:
        UserError: what any rank finds, on all of them.
    """
    from tlx.agreement import check_parts
    from tlx.micro_batch import Share, choose
    from tlx.preempt import StopRequest

    def begin() -> tuple[Sets, Parts, Plan]:
        seed_all(config)
        sets = open_sets(config)
        parts = parts_of(config, world, [int(n) for n in sets.train.counts()])
        made = _plan(config, parts.backbone.layers, sets.samples_per_epoch, world.size, {})
        check_metrics(config, made, len(sets.train.classes), validated=sets.val is not None)
        return sets, parts, made

    sets, parts, made = together(world, begin)
    warning = check_parts(world, parts.net, {"data.train": sets.train, "data.val": sets.val})
    validation = -(-len(sets.val) // world.size) if sets.val is not None else 0
    share = Share.of(config, made, ranks=world.size, validation=validation)
    trial = functools.partial(trial_of, config, world, parts, made, ranks=world.size)
    choice = choose(config, made, share, trial, world, folder.path)
    run: Run = together(
        world, lambda: _compose(choice.over(config), world, folder, sets, parts, choice.said, silent=silent)
    )
    run.stop = stop or StopRequest(folder.path, launched=world.launched, after=config.stop_after)
    if warning is not None:
        run.journal.note(warning)
    return run


def _compose(
    config: Config, world: World, folder: RunFolder, sets: Sets, parts: Parts, said: str | None, *, silent: bool
) -> Run:
    from tlx.run import Run

    backbone, spec, objective = parts.backbone, parts.spec, parts.objective
    remake = functools.partial(_plan, config, backbone.layers, sets.samples_per_epoch, world.size)
    try:
        made = remake({})
    except UserError as error:  # of a smaller micro-batch, which BatchNorm may not bear
        raise UserError(f"{said}; {error.what}" if said else error.what, where=error.where, todo=error.todo) from error
    notes = [str(backbone.loaded)] if backbone.loaded else []
    notes += [said] if said else []
    text = "\n".join([header(config, len(sets.train.classes)), timetable(made), *notes])
    journal = journal_of(config, world, folder, made.steps, silent=silent)
    run = Run(
        config=config,
        world=world,
        net=parts.net,
        remake_plan=remake,
        optimizer=parts.optimizer,
        objective=objective,
        normalise=parts.normalise,
        stream=stream_of(config, sets.train, spec, world, objective.class_weights),
        evaluation=evaluation_of(config, sets.val, spec, world),
        classes=len(sets.train.classes),
        identity=identity_of(config, sets, spec),
        saver=saver_of(config, folder, made, journal),
        journal=journal,
        ema=parts.ema,
    )
    run.journal.console.plan(text)
    if world.main:
        folder.write_plan(made.data())
    return run


def check_metrics(config: Config, plan: Plan, classes: int, *, validated: bool) -> None:
    """Whether evaluations will give what is chosen and waited for by.

    Raises:
        ConfigError: unknown metrics, or no validation data where they decide something.
    """
    from tlx.meters import metric_names

    names = metric_names(classes, top_k=config.evaluate.top_k)
    wanted = {"evaluate.metric": config.evaluate.metric}
    waited = {f"phases.{p.name}.duration.metric": p.plateau.metric for p in plan.phases if p.plateau is not None}
    problems = [
        f'{where}: there is no metric "{metric}"{did_you_mean(metric, names)}'
        for where, metric in (wanted | waited).items()
        if metric not in names
    ]
    if not validated and (waited or config.evaluate.patience is not None):
        problems.append("data.val: a plateau or evaluate.patience needs validation data")
    if not validated and any(p.settings.start_from == "best" for p in plan.phases):
        problems.append("data.val: start_from: best needs validation data")
    if problems:
        raise ConfigError(problems)


def _plan(config: Config, layers: LayerMap, samples: int, world: int, ends: Mapping[str, int]) -> Plan:
    return Plan.make(config, layers, samples=samples, world=world, ends=ends)


def identity_of(config: Config, sets: Sets, spec: Any) -> dict[str, Any]:
    """What a checkpoint must agree with, and what a reader of its weights must know."""
    return {
        "backbone": config.backbone.name,
        "classes": list(sets.train.classes),
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(spec).items()},
        "order_version": ORDER_VERSION,
        "train_shards": sets.train.digest,
        "val_shards": sets.val.digest if sets.val is not None else None,
        "config": essential(yaml.safe_load(dump(config))),
    }


def saver_of(config: Config, folder: RunFolder, plan: Plan, journal: Journal) -> Saver:
    """Writes checkpoints after the metrics that they count, and only while the folder is this training's."""
    from tlx.checkpoint import Checkpoints
    from tlx.saver import Saver

    def check() -> None:
        if folder.lock is not None:
            folder.lock.check()

    kept = config.checkpoint.keep
    every = kept.every.steps(epoch=plan.steps_per_epoch, whole=plan.steps) if kept.every else 0
    checkpoints = Checkpoints(folder.checkpoints, keep=kept.last, every=every)
    return Saver(checkpoints, check, journal.sync, journal.note, background=config.checkpoint.background)


def journal_of(config: Config, world: World, folder: RunFolder, steps: int, *, silent: bool = False) -> Journal:
    from tlx.console import Console
    from tlx.tracking import RunInfo, guarded
    from tlx.tracking.journal import Journal
    from tlx.tracking.metrics import MetricsFile

    def trackers(resumed: bool) -> list[Any]:
        said = config.model_dump(mode="json")
        about = RunInfo(folder.path, name=folder.path.name, run_id=folder.id, config=said, resumed=resumed)
        return [guarded(t.name, functools.partial(make, "tracker", t, about)) for t in config.track.trackers]

    console = Console(steps, world.main and not silent)
    return Journal(MetricsFile(folder.metrics, console.note) if world.main else None, console, trackers)
