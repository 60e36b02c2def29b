"""The parts of a training that compute: network, head, objective, optimizer, made from a configuration."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlx.base import plug
from tlx.base.differences import differences
from tlx.base.errors import Problems, UserError
from tlx.base.launcher import export
from tlx.base.layers import LayerMap
from tlx.plan.config import Config, plain
from tlx.plan.parts import INIT, KEEP, Part, chosen_by, known_part
from tlx.plan.plan import Plan
from tlx.tasks import Ranks, outputs_of, scale_of, views_of
from tlx.train.data import check_targets, mixing_of

if TYPE_CHECKING:
    import torch

    from tlx.models import Backbone, Outputs
    from tlx.models.weights.provenance import RunRecord
    from tlx.ranks.collectives import World
    from tlx.tasks import Task
    from tlx.tasks.objectives import Objective
    from tlx.tracking import RunInfo, Tracker
    from tlx.train.data import Samples
    from tlx.train.dry_run import DryRun
    from tlx.train.memory_trial import Trial
    from tlx.train.step import Updater


def parts_of(config: Config, world: World, task: Task, names: Sequence[str] | None = None) -> tuple[Backbone, Updater]:
    """The network on its device, and what updates it.

    Args:
        names: of the outputs; see :func:`backbone_of`.

    Raises:
        UserError: the network does not fit the memory.
    """
    import torch

    from tlx.data.pixels.normalise import Normalise, NormaliseViews
    from tlx.train.averaging import MovingAverage
    from tlx.train.freeze import synchronise
    from tlx.train.memory_trial import ran_out
    from tlx.train.recompute import recompute_blocks
    from tlx.train.step import Updater

    views = views_of(task)
    scale = scale_of(task) if names is not None else None
    backbone, loop = backbone_of(config, outputs_of(task), names=names, scale=scale), config.loop
    net = backbone.module
    try:
        net.to(world.device)
        if loop.sync_batchnorm:
            synchronise(net, world)
        ema = MovingAverage(net, loop.ema) if loop.ema is not None else None
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise _too_large(config.backbone.name, world.device) from error
    if loop.gradient_checkpointing:
        recompute_blocks(net, backbone.blocks)
    if loop.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalise = Normalise(config.input.over(backbone.input), world.device, channels_last=loop.channels_last)
    return backbone, Updater(
        task=task,
        optimizer=optimizer_of(config, net, backbone.layers),
        normalise=normalise if views is None or views.count == 1 else NormaliseViews(normalise, views.count),
        world=world,
        seed=config.seed,
        clip=loop.clip,
        ema=ema,
        skips=loop.nonfinite.policy == "skip",
        ranks=Ranks(world.sum, world.gather, world.joined),
    )


def unknown_outputs(config: Config) -> Outputs:
    """As good as any, where the task cannot be made, or is not yet: as many as its arguments say, if they do; for a
    head of class vectors some that say nothing."""
    from tlx.models import ClassVectors, Outputs

    said = config.task.args.get("width")
    width = said if isinstance(said, int) else 2
    if getattr(plug.find("head", config.head.name), "starts", "") == "vectors":
        return Outputs({"": 2}, vectors=ClassVectors(np.ones((2, width), np.float32), "not known yet"))
    return Outputs({"": width})


def backbone_of(
    config: Config,
    outputs: int | Outputs,
    *,
    empty: bool = False,
    names: Sequence[str] | None = None,
    scale: Mapping[str, Any] | None = None,
) -> Backbone:
    """The network with its head, or a head for each of several tasks.

    Args:
        names: of the outputs, by which a head is kept where that is wanted; without them it is new.
        scale: of the task, where it is known.

    Raises:
        UserError: it cannot be had, or the head that is to be kept is one for other classes.
    """
    from tlx import models

    asked, kept = config.backbone, config.keeps_head and names is not None
    if config.keeps_head:
        refuse_other_head(config, names, scale, there=not empty)
    return models.load(
        asked.name,
        classes=outputs,
        weights=asked.weights,
        args=asked.args,
        head=config.head.name,
        head_args=config.head_args,
        granularity=asked.layers,
        channels=config.input.channels,
        empty=empty,
        options=models.WeightsOptions(
            key=asked.weights_key or "",
            size=asked.trained_size,
            new=tuple(asked.allow.new),
            unused=tuple(asked.allow.unused),
            keep_head=kept,
            projection=config.keeps_projection,
        ),
    )


def refuse_other_head(
    config: Config, names: Sequence[str] | None, scale: Mapping[str, Any] | None, *, there: bool
) -> None:
    """Whether the head that is to be kept is for these classes, in this order, or for numbers of this scale.

    Args:
        names: of the classes; None where they are not known yet.
        scale: of the task; None where it is not known yet.
        there: whether its file must exist.

    Raises:
        UserError: nothing says what it is for, or it is for others, or is another head.
    """
    from tlx import models
    from tlx.models.weights import pretrained
    from tlx.models.weights.provenance import record_of

    asked, key = config.backbone, "head.keep"
    file = pretrained.choose(models.source(asked.name), asked.weights, there=False).file
    if file is not None and not file.exists() and not there:
        return
    record = record_of(file) if file is not None else None
    if record is None:
        raise UserError(
            f"backbone.weights ({asked.weights}) is no file in a checkpoint of tlx, so that nothing says "
            "which classes its head is for",
            where=key,
            todo="set backbone.weights to RUN/checkpoints/best/model.safetensors, where it lies beside its state.json; "
            "without head.keep the head is new",
        )
    differ = differences({"classes": list(record.classes)}, {"classes": list(names)}) if names is not None else []
    differ += differences({"scale": record.scale}, {"scale": scale}) if scale is not None else []
    differ += [] if record.head == config.head.name else [f"head: {record.head} -> {config.head.name}"]
    differ += _other_arguments(record, config) if record.head == config.head.name else []
    if differ:
        raise UserError(
            f"the head of {file} is another one:\n    " + "\n    ".join(differ),
            where=key,
            todo="go on with the same classes, in the same order, numbers of the same mean and deviation, and the same "
            "head; without head.keep the head is new",
        )


def _other_arguments(record: RunRecord, config: Config) -> list[str]:
    """What differs in the arguments of a head that a run has recorded and those of now, but for a dropout: the same
    values would be another function."""
    from tlx.models.weights.provenance import comparable

    now = comparable(plain(config)["head"])
    aside = ("name", KEEP, INIT, "dropout")
    before = {key: value for key, value in record.head_args.items() if key not in aside}
    return differences({"head": before}, {"head": {key: now.get(key) for key in before}})


def make(group: str, part: Part, *given: Any) -> Any:
    """A pluggable part, called with what tlx gives and the user's checked arguments.

    Raises:
        UserError: with its name, for whatever it raises.
    """
    function, label = plug.find(group, part.name), f"{group} {part.name}"
    return plug.call(label, function, *given, **plug.arguments(function, part.args, label=label))


def try_network(trial: DryRun, device: torch.device) -> None:
    """A forward pass in each mode; on shapes alone, and on the device where those do not tell or say no.

    Raises:
        UserError: the network does not take the images, or returns something else than logits; what its check finds.
    """
    from tlx.train.memory_trial import ran_out

    try:
        untried = trial.on_shapes()
    except UserError as error:
        untried = str(error)
    if untried is None:
        return
    try:
        trial.on_device(device)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise _too_large(trial.backbone.name, device) from error


def _too_large(name: str, device: torch.device) -> UserError:
    what = f"the network alone does not fit the memory of {device}"
    return UserError(what, where=name, todo="is the device free? Or a smaller backbone")


def task_of(config: Config, samples: Samples) -> Task:
    """What is learned.

    Raises:
        UserError: it cannot be made of these shards, they lack what it learns, or it does not give what the loop needs.
    """
    from tlx.tasks import TaskData
    from tlx.train.part_checks import check_objective, check_task

    objective, label = config.objective, f"task {config.task.name}"
    mixed, asked = mixing_of(config.mix) is not None, list[object]()

    def objective_of(counts: Sequence[int]) -> Objective:
        asked.append(objective)
        made: Objective = make("objective", objective, list(counts))
        check_objective(made, len(counts), mixed=mixed, label=f"objective {objective.name}")
        return made

    data = TaskData(samples.targets, samples.train, config.evaluate.top_k, objective_of)
    task: Task = make("task", config.task, data)
    if mixed and views_of(task) is not None:
        raise UserError(f"{label} draws its own targets, which do not mix", where="mix", todo="leave mix out")
    if config.data.test and views_of(task) is not None:
        todo = "leave it out; a classification that begins with this run's weights is tested on labelled shards"
        raise UserError(f"{label} draws what it is asked, which no test set holds", where="data.test", todo=todo)
    check_task(task, mixed=mixed, label=label, metric=chosen_by(config.task.name))
    check_targets(samples, task)
    if not asked and objective != known_part("objective", Part(name="cross_entropy")):
        raise UserError(
            f"{label} does not minimise it", where="objective", todo="leave it out; see the task's own arguments"
        )
    return task


def refuse_parts(config: Config, task: Task, samples: Samples, world: int) -> None:
    """Whether a loss that compares the samples of a batch gets whole batches, of two samples or more.

    Raises:
        UserError: it does not.
    """
    why, batch = getattr(task, "whole", None), config.data.batch
    if why is None:
        return
    share, most = -(-batch // world), config.loop.micro_batch
    if most is not None and most < share:
        raise UserError(
            f"a rank's {share} samples of a batch would be taken in parts of {most}, with another loss: {why}",
            where="loop.micro_batch",
            todo="leave it out; for less memory loop.gradient_checkpointing=true, loop.precision=bf16, more ranks, or "
            "a smaller data.batch, which is another training, too",
        )
    if batch == 1 or (samples.train % batch == 1 and not config.data.drop_last):
        what = "an epoch's last batch" if batch > 1 else "a batch"
        raise UserError(
            f"{what} has one sample: {why}", where="data.batch", todo="drop_last: true, or another data.batch"
        )


def output_check(config: Config, task: Task) -> Callable[[Any], None]:
    """What raises a UserError where the task does not take an output of the network in training mode."""
    from tlx.train.part_checks import check_training_output

    is_own = config.task.args.get("objective") is None and getattr(task, "objective", None) is not None
    label = f"objective {config.objective.name}" if is_own else f"task {config.task.name}"
    mixed = mixing_of(config.mix) is not None
    return lambda output: check_training_output(task, output, mixed=mixed, label=label)


def optimizer_of(config: Config, net: torch.nn.Module, layers: LayerMap) -> Any:
    """An optimizer over the parameters of all layers.

    Raises:
        UserError: it cannot be made, or is not one over all of them.
    """
    from tlx.train.optim import parameter_groups
    from tlx.train.part_checks import check_optimizer

    groups = parameter_groups(net, layers, no_decay=config.no_decay)
    made = make("optimizer", config.optimizer, [dict(group) for group in groups])
    check_optimizer(made, groups, label=f"optimizer {config.optimizer.name}")
    return made


def unchecked(config: Config) -> list[str]:
    """Lines about parts from elsewhere whose arguments could not be checked by their types."""
    parts = [(group, getattr(config, group)) for group in ("unfreeze", "head", "task", "objective", "optimizer")]
    parts += [("transform", part) for part in config.transforms or ()]
    parts += [("tracker", part) for part in config.track.trackers]
    whys = {f"{group} {part.name}": plug.unchecked(plug.find(group, part.name)) for group, part in parts if part.args}
    return [f"warning: the arguments of {label} are not checked: {why}" for label, why in whys.items() if why]


def check_trackers(config: Config) -> None:
    """
    Raises:
        UserError: packages that trackers need are not installed; all of them.
    """
    problems = Problems()
    for part in config.track.trackers:
        function, label = plug.find("tracker", part.name), f"tracker {part.name}"
        problems.of(functools.partial(plug.check_packages, function, label=label, where="track.trackers"))
    problems.refuse()


def tracker_of(part: Part, about: RunInfo) -> Tracker:
    """A tracker; what its making raises is its own matter, which the guard around it meets.

    Raises:
        UserError: it lacks a method.
    """
    from tlx.train.part_checks import check_methods

    function, label = plug.find("tracker", part.name), f"tracker {part.name}"
    made: Tracker = function(about, **plug.arguments(function, part.args, label=label))
    check_methods(made, ("log", "finish"), label=label)
    return made


def trial_of(config: Config, backbone: Backbone, updater: Updater, plan: Plan, *, ranks: int) -> Trial:
    """What tries the memory of a training's phases."""
    from tlx.train.memory_estimate import optimizer_bytes
    from tlx.train.memory_trial import Trial, optimizer_states

    spec, views = config.input.over(backbone.input), views_of(updater.task)
    pictures = views.count if views is not None else 1
    per_weight = optimizer_bytes(functools.partial(make, "optimizer", config.optimizer))
    return Trial(
        updater=updater,
        net=backbone.module,
        plan=plan,
        shape=(spec.channels, pictures * spec.size[0], spec.size[1]),
        state=optimizer_states(plan, per_weight),
        ranks=ranks,
        mixed=mixing_of(config.mix) is not None,
    )


def seed_all(config: Config) -> None:
    """Seeds, and determinism where it is asked for.

    Compiled code draws dropout from a generator of its own, so that its losses are not those of eager code; where
    determinism is asked for it draws from torch's, which takes a kernel of its own for each dropout.
    """
    import numpy
    import torch

    random.seed(config.seed)
    numpy.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.loop.deterministic
    if config.loop.compile:
        import torch._inductor.config

        torch._inductor.config.fallback_random = config.loop.deterministic
    if config.loop.deterministic:
        export("CUBLAS_WORKSPACE_CONFIG", ":4096:8", replace=False)
        torch.use_deterministic_algorithms(True)
