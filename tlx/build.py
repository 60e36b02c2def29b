"""From a configuration to a running training: the only place that sees the whole configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tlx import plug
from tlx.config import Config, Part, dump
from tlx.data.order import ORDER_VERSION
from tlx.errors import ConfigError, UserError, did_you_mean
from tlx.feed import Sets, count_samples, evaluation_of, mixing_of, open_sets, stream_of
from tlx.launcher import rank, relaunched, restarts
from tlx.layers import LayerMap
from tlx.plan import Plan
from tlx.run_folder import RunFolder, essential
from tlx.timetable import timetable

if TYPE_CHECKING:
    import torch

    from tlx.inputs import InputSpec
    from tlx.memory import Memory
    from tlx.models import Backbone
    from tlx.objectives import Objective
    from tlx.run import Run
    from tlx.saver import Saver
    from tlx.step import Normalise
    from tlx.tracking.journal import Journal
    from tlx.trial import Trial
    from tlx.watch import Watch
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
    return made, "\n".join([header(config, samples.classes), timetable(made, memory=needs, measured=peaks), *notes])


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
    settle(alone, world)
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
    head = f"{config.head.name} head, {classes} classes"
    return f"run {config.run}: {config.backbone.name} (weights {config.backbone.weights}), {head}, seed {config.seed}"


def backbone_of(config: Config, classes: int, *, empty: bool = False) -> Backbone:
    from tlx import models

    asked = config.backbone
    return models.load(
        asked.name,
        classes=classes,
        weights=asked.weights,
        args=asked.args,
        head=config.head.name,
        head_args=config.head.args,
        granularity=asked.layers,
        channels=config.input.channels,
        empty=empty,
    )


def make(group: str, part: Part, *given: Any) -> Any:
    """A pluggable part, called with what tlx gives and the user's checked arguments."""
    function = plug.find(group, part.name)
    return function(*given, **plug.arguments(function, part.args, label=f"{group} {part.name}"))


def train(config: Config, *, fresh: bool) -> Mapping[str, Any] | None:
    """Trains, resumes, or finds the run done; its result, or None after a stop request.

    However it ends, status.json of the run folder says so.
    """
    from tlx.watch import Watch

    folder = RunFolder(config.run)
    watch = Watch(folder, patience_s=60 * config.world.timeout_minutes)
    try:
        return _train(config, folder, watch, fresh=fresh)
    except BaseException as error:
        told = watch.explained(error)
        watch.say("user-error" if isinstance(told, UserError) else "fault", str(told))
        if told is error:
            raise
        raise told from error
    finally:
        watch.close()
        folder.release()


def tell_run(file: Path, overrides: Sequence[str], error: UserError) -> None:
    """Writes into status.json that a configuration is wrong, as far as it still says which run it is of."""
    words = [word.partition("=")[2] for word in overrides if word.startswith("run=")]
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        run = words[-1] if words else yaml.safe_load(file.read_text(encoding="utf-8"))["run"]
        if rank() == 0:
            RunFolder(Path(run)).say_if_there("user-error", message=str(error)[:2000])


def _train(config: Config, folder: RunFolder, watch: Watch, *, fresh: bool) -> Mapping[str, Any] | None:
    from tlx import world as worlds
    from tlx.engine import fit
    from tlx.micro_batch import out_of_memory
    from tlx.result import result_of
    from tlx.resume import settle
    from tlx.trial import ran_out

    world = worlds.enter(config, watch)
    done = together(world, lambda: folder.prepare(config, fresh=fresh and not restarts()) if world.main else None)
    done = world.from_main(done)
    if done is not None:
        if world.main:
            folder.say("done")
        return done  # type: ignore[no-any-return]
    watch.beat("loading")
    if world.main:
        folder.say("running")
    together(world, lambda: fetch(config) if world.local_main else None)
    run = compose(config, world, folder)
    finished = False
    try:
        finished = fit(run)
        settle(run)
    except RuntimeError as error:
        if ran_out(error):
            fault = out_of_memory(run.config, run.plan, world, run.progress.step)
            with contextlib.suppress(OSError):  # by whatever rank it is: the others do not know
                folder.say("user-error" if isinstance(fault, UserError) else "fault", message=str(fault))
            raise fault from error
        if "deterministic" not in str(error):
            raise
        raise UserError(str(error).splitlines()[0], where="loop.deterministic", todo="set it to false") from error
    finally:
        watch.beat("finishing")
        try:
            run.saver.close()
        finally:
            result = result_of(run, finished=finished)
            run.journal.finish(result)
            run.stop.close()
        if world.main and result["unreadable"] and not finished:  # their names, however it ended
            with contextlib.suppress(OSError):
                folder.write_result(result)
    if world.main:
        run.stop.clear()
        if finished:
            folder.write_result(result)
        folder.say("done" if finished else "resumable", step=run.progress.step, steps=run.plan.steps)
    watch.close()  # others may now end before this rank does
    world.barrier()
    return result if finished else None


def fetch(config: Config) -> None:
    """Brings weights that are not a file into the cache, once per machine, before every rank looks there."""
    if config.backbone.weights != "none" and not Path(config.backbone.weights).exists():
        backbone_of(config, 2)


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


def compose(config: Config, world: World, folder: RunFolder, *, silent: bool = False) -> Run:
    """Builds every part of a training, every rank at once; a `silent` one shows nothing on the console.

    Raises:
        UserError: what any rank finds, on all of them.
    """
    from tlx.agreement import check_parts
    from tlx.micro_batch import Share, choose

    def begin() -> tuple[Sets, Parts, Plan]:
        settle(config, world)
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
    if warning is not None:
        run.journal.note(warning)
    return run


def _compose(
    config: Config, world: World, folder: RunFolder, sets: Sets, parts: Parts, said: str | None, *, silent: bool
) -> Run:
    from tlx.preempt import StopRequest
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
        stop=StopRequest(folder.path, launched=world.launched, after=config.stop_after),
        ema=parts.ema,
    )
    run.journal.console.plan(text)
    if world.main:
        folder.write_plan(made.data())
        if not relaunched():  # what was asked before a launcher started the ranks again was not yet heard
            run.stop.clear()
    return run


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a training is composed of, but for what depends on how many samples a rank takes at once."""

    backbone: Backbone
    classes: int
    spec: InputSpec
    net: torch.nn.Module
    ema: Any
    objective: Objective
    optimizer: Any
    normalise: Normalise


def parts_of(config: Config, world: World, counts: Sequence[int]) -> Parts:
    """The network on its device, and what works on it.

    Args:
        counts: training samples of each class.

    Raises:
        UserError: the network does not take the input, or does not fit the memory.
    """
    import torch

    from tlx.recompute import recompute_blocks
    from tlx.step import Normalise
    from tlx.sync_norms import synchronise
    from tlx.trial import ran_out

    backbone = backbone_of(config, len(counts))
    spec = config.input.over(backbone.input)
    try:
        net = backbone.module.to(world.device)
        if config.loop.sync_batchnorm:
            synchronise(net, world)
        try_input(net, spec.size, len(counts), spec.channels)
        ema = average_of(net, config)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        what = f"the network alone does not fit the memory of {world.device}"
        raise UserError(what, where=config.backbone.name, todo="is the device free? Or a smaller backbone") from error
    if config.loop.gradient_checkpointing:
        recompute_blocks(net, backbone.blocks)
    if config.loop.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Parts(
        backbone=backbone,
        classes=len(counts),
        spec=spec,
        net=net,
        ema=ema,
        objective=make("objective", config.objective, list(counts)),
        optimizer=optimizer_of(config, net, backbone.layers),
        normalise=Normalise(spec, world.device, channels_last=config.loop.channels_last),
    )


def trial_of(config: Config, world: World, parts: Parts, made: Plan, *, ranks: int) -> Trial:
    """What tries the memory of a training's phases."""
    from tlx.memory import optimizer_bytes
    from tlx.step import Updater
    from tlx.trial import Trial, optimizer_states

    per_weight = optimizer_bytes(functools.partial(make, "optimizer", config.optimizer))
    return Trial(
        updater=Updater(parts.optimizer, parts.objective, parts.normalise, world, config.seed),
        net=parts.net,
        plan=made,
        shape=(parts.spec.channels, *parts.spec.size),
        classes=parts.classes,
        state=optimizer_states(made, per_weight),
        ranks=ranks,
        mixed=mixing_of(config.mix) is not None,
    )


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


def settle(config: Config, world: World) -> None:
    """Seeds, and determinism where it is asked for."""
    import numpy
    import torch

    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.loop.deterministic
    if config.loop.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def try_input(net: torch.nn.Module, size: tuple[int, int], classes: int, channels: int = 3) -> None:
    """One image through the network, so that a size that it does not take is known before training.

    Raises:
        UserError: with what the network said.
    """
    import torch

    from tlx.trial import ran_out

    device = next(net.parameters()).device
    net.eval()
    try:
        with torch.no_grad():
            output = net(torch.zeros(1, channels, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        if ran_out(error):
            raise
        raise UserError(
            f"the backbone does not take images of {size[0]} x {size[1]}: {str(error).splitlines()[0]}",
            where="input.size",
            todo="set input.size, or the backbone's own argument (img_size for most vision transformers)",
        ) from error
    logits = output[0] if isinstance(output, tuple) else output
    if logits.shape != (1, classes):
        raise UserError(
            f"the network gives {tuple(logits.shape)} where (1, {classes}) is needed", where="backbone, head"
        )


def average_of(net: torch.nn.Module, config: Config) -> Any:
    """The moving average of the weights, or None."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    if config.loop.ema is None:
        return None
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.loop.ema.decay))  # type: ignore[no-untyped-call]


def optimizer_of(config: Config, net: torch.nn.Module, layers: LayerMap) -> Any:
    from tlx.optim import parameter_groups

    return make("optimizer", config.optimizer, parameter_groups(net, layers, no_decay=config.no_decay))


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

    def before() -> None:
        if folder.lock is not None:
            folder.lock.check()
        journal.sync()

    kept = config.checkpoint.keep
    every = kept.every.steps(epoch=plan.steps_per_epoch, whole=plan.steps) if kept.every else 0
    checkpoints = Checkpoints(folder.checkpoints, keep=kept.last, every=every)
    return Saver(checkpoints, before, journal.note, background=config.checkpoint.background)


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
