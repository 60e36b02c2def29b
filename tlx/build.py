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
from tlx.config import Config, Part
from tlx.data.order import ORDER_VERSION
from tlx.errors import ConfigError, UserError, did_you_mean
from tlx.feed import Sets, count_samples, evaluation_of, open_sets, stream_of
from tlx.launcher import rank, restarts
from tlx.layers import LayerMap
from tlx.plan import Plan
from tlx.run_folder import RunFolder
from tlx.timetable import timetable

if TYPE_CHECKING:
    import torch

    from tlx.memory import Memory
    from tlx.models import Backbone
    from tlx.run import Run
    from tlx.world import World


def plan(config: Config, *, memory: bool = False) -> tuple[Plan, str]:
    """The plan and its text, without GPU, weights or, where `data.expected` says what they would hold, shards.

    Args:
        memory: whether to estimate what each phase needs; takes a second or so per phase.
    """
    samples = count_samples(config)
    backbone = backbone_of(config, samples.classes, empty=True)
    world = config.world.size or 1
    made = Plan.make(config, backbone.layers, samples=samples.train, world=world)
    check_metrics(config, made, samples.classes, validated=config.data.val is not None)
    needs = memory_of(config, made, backbone, world) if memory else None
    notes = [samples.note] if samples.note else []
    return made, "\n".join([header(config, samples.classes), timetable(made, memory=needs), *notes])


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
    folder = RunFolder(config.run)
    try:
        return _train(config, folder, fresh=fresh)
    except BaseException as error:
        if rank() == 0:
            folder.say_if_there("user-error" if isinstance(error, UserError) else "fault", message=str(error)[:2000])
        raise


def tell_run(file: Path, overrides: Sequence[str], error: UserError) -> None:
    """Writes into status.json that a configuration is wrong, as far as it still says which run it is of."""
    words = [word.partition("=")[2] for word in overrides if word.startswith("run=")]
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        run = words[-1] if words else yaml.safe_load(file.read_text(encoding="utf-8"))["run"]
        if rank() == 0:
            RunFolder(Path(run)).say_if_there("user-error", message=str(error)[:2000])


def _train(config: Config, folder: RunFolder, *, fresh: bool) -> Mapping[str, Any] | None:
    from tlx import world as worlds
    from tlx.engine import fit
    from tlx.result import result_of

    world = worlds.enter(config)
    done = together(world, lambda: folder.prepare(config, fresh=fresh and not restarts()) if world.main else None)
    done = world.from_main(done)
    if done is not None:
        if world.main:
            folder.say("done")
        return done  # type: ignore[no-any-return]
    if world.main:
        folder.say("running")
    together(world, lambda: fetch(config) if world.local_main else None)
    run = together(world, lambda: compose(config, world, folder))
    finished = False
    try:
        finished = fit(run)
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(str(error).splitlines()[0], where="loop.deterministic", todo="set it to false") from error
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
    """Builds every part of a training; a `silent` one shows nothing on the console."""
    import torch

    from tlx.checkpoint import Checkpoints
    from tlx.preempt import StopRequest
    from tlx.recompute import recompute_blocks
    from tlx.run import Run
    from tlx.step import Normalise
    from tlx.sync_norms import synchronise

    settle(config, world)
    sets = open_sets(config)
    backbone = backbone_of(config, len(sets.train.classes))
    spec = config.input.over(backbone.input)
    net = backbone.module.to(world.device)
    if config.loop.sync_batchnorm:
        synchronise(net, world)
    try_input(net, spec.size, len(sets.train.classes), spec.channels)
    ema = average_of(net, config)
    if config.loop.gradient_checkpointing:
        recompute_blocks(net, backbone.blocks)
    if config.loop.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = make("objective", config.objective, [int(n) for n in sets.train.counts()])
    remake = functools.partial(_plan, config, backbone.layers, sets.samples_per_epoch, world.size)
    made = remake({})
    check_metrics(config, made, len(sets.train.classes), validated=sets.val is not None)
    loaded = [str(backbone.loaded)] if backbone.loaded else []
    text = "\n".join([header(config, len(sets.train.classes)), timetable(made), *loaded])
    run = Run(
        config=config,
        world=world,
        net=net,
        remake_plan=remake,
        optimizer=optimizer_of(config, net, backbone.layers),
        objective=objective,
        normalise=Normalise(spec, world.device, channels_last=config.loop.channels_last),
        stream=stream_of(config, sets.train, spec, world, objective.class_weights),
        evaluation=evaluation_of(config, sets.val, spec, world),
        classes=len(sets.train.classes),
        identity=identity_of(config, sets, spec),
        checkpoints=Checkpoints(folder.checkpoints, keep=config.checkpoint.keep.last),
        journal=journal_of(config, world, folder, made.steps, silent=silent),
        stop=StopRequest(folder.path, launched=world.launched),
        ema=ema,
    )
    run.journal.console.plan(text)
    if world.main:
        folder.write_plan(made.data())
        run.stop.clear()
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

    device = next(net.parameters()).device
    net.eval()
    try:
        with torch.no_grad():
            output = net(torch.zeros(1, channels, *size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
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
    }


def journal_of(config: Config, world: World, folder: RunFolder, steps: int, *, silent: bool = False) -> Any:
    from tlx.console import Console
    from tlx.tracking import RunInfo, guarded
    from tlx.tracking.journal import Journal
    from tlx.tracking.metrics import MetricsFile

    def trackers(resumed: bool) -> list[Any]:
        said = config.model_dump(mode="json")
        about = RunInfo(folder.path, name=folder.path.name, run_id=folder.id, config=said, resumed=resumed)
        return [guarded(t.name, functools.partial(make, "tracker", t, about)) for t in config.track.trackers]

    console = Console(steps, world.main and not silent)
    return Journal(MetricsFile(folder.metrics) if world.main else None, console, trackers)
