"""From a configuration to its plan, checked: what `tlx plan` shows, and a training begins with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlx.base.errors import ConfigError, Problems, UserError, did_you_mean
from tlx.base.launcher import environment
from tlx.base.terminal import escaped, folded
from tlx.data.shards.targets import LABEL
from tlx.plan.config import Config
from tlx.plan.feature_cache import savings
from tlx.plan.plan import Plan
from tlx.plan.timetable import timetable
from tlx.tasks import Task, all_targets, outputs_of, views_of
from tlx.train.components import (
    backbone_of,
    check_trackers,
    make,
    optimizer_of,
    output_check,
    parts_of,
    refuse_parts,
    seed_all,
    task_of,
    trial_of,
    unchecked,
    unknown_outputs,
)
from tlx.train.data import Samples, count_samples, known_names, known_scale, training_view, view_of

if TYPE_CHECKING:
    from tlx.models import Backbone
    from tlx.models.weights.pretrained import Origin
    from tlx.plan.memory import Memory


def plan(config: Config, *, memory: bool = False, measure: bool = False) -> tuple[Plan, str]:
    """The plan and its text, without GPU, weights or, where `data.expected` says what they would hold, shards.

    Args:
        memory: whether to estimate what each phase needs; takes a second or so per phase.
        measure: whether to try it on the device here.
    """
    task, backbone, made, untried = prepared(config)
    world = config.world.size or 1
    notes = [*untried]
    peaks: Mapping[str, int | None] = {}
    fitting = config
    if measure:
        peaks, fitting, said = measured(config, made, task)
        notes += said
    needs = memory_of(fitting, made, backbone, world) if memory else None
    table = timetable(made, memory=needs, measured=peaks)
    return made, "\n".join([folded(header(config, task)), table, *map(folded, notes)])


def prepared(config: Config) -> tuple[Task, Backbone, Plan, list[str]]:
    """What a plan is made of, whether training would refuse it, and lines about what could not be tried here.

    Raises:
        UserError: every mistake that can be found without weights and devices, together.
    """
    found = Problems()
    samples = found.of(lambda: count_samples(config))
    task = found.of(lambda: task_of(config, samples)) if samples is not None else None
    outputs = outputs_of(task) if task is not None else unknown_outputs(config)
    names, scale = known_names(config, samples, task), known_scale(samples, task)
    backbone = found.of(lambda: backbone_of(config, outputs, empty=True, names=names, scale=scale))
    made = None
    if backbone is not None:
        made = found.of(lambda: checked_plan(config, backbone, samples, task, config.world.size or 1)[0])
    untried = None
    if backbone is not None and task is not None and made is not None:
        untried = found.of(lambda: try_on_shapes(config, made, backbone, task))
    found.refuse()
    assert samples is not None
    assert task is not None
    assert backbone is not None
    assert made is not None
    notes = [*filter(None, (samples.note, getattr(task, "about_vectors", None)))]
    notes += [
        *savings(config, made),
        *unchecked(config),
        *(untried or []),
        *absent_weights(config),
        *normalisation(config, backbone),
    ]
    return task, backbone, made, notes


def checked_plan(
    config: Config, backbone: Backbone, samples: Samples | None, task: Task | None, world: int
) -> tuple[Plan | None, Callable[..., Any] | None]:
    """The plan of a configuration whose every part can be made: what is looked at before weights, device and pictures;
    and the view of a picture that training shows, which was tried out.

    Args:
        samples, task: None where they are at fault: the rest is looked at all the same, and without samples there is
            no plan.
        world: ranks.

    Raises:
        UserError: every mistake, together.
    """
    found, made = Problems(), None
    if samples is not None:
        made = found.of(lambda: plan_of(config, backbone, samples, world))
    if task is not None and made is not None:
        found.of(lambda: check_metrics(config, made, task, samples))
    if task is not None and samples is not None:
        found.of(lambda: refuse_parts(config, task, samples, world))
    spec = config.input.over(backbone.input)
    view = found.of(lambda: view_of(config, spec))
    if task is not None and view is not None:
        found.of(lambda: training_view(task, view, spec))
    found.of(lambda: optimizer_of(config, backbone.module, backbone.layers))
    found.of(lambda: check_trackers(config))
    found.refuse()
    return made, view


def plan_of(
    config: Config, backbone: Backbone, samples: Samples, world: int, ends: Mapping[str, int] | None = None
) -> Plan:
    """The plan, warnings about the data and the input included; see :meth:`tlx.plan.plan.Plan.make`."""
    noticed = [*samples.warnings, *other_input(config, backbone), *left_out_pixels(config, backbone)]
    return Plan.make(config, backbone.layers, samples=samples.train, world=world, ends=ends, noticed=noticed)


def other_input(config: Config, backbone: Backbone) -> list[str]:
    """Where pretrained weights get to see other colours than they were trained on."""
    known = _own_input(config, backbone)
    if known is None:
        return []
    whose, mean, std = known
    spec = config.input.over(backbone.input)
    return [
        f"input.{name} is {_row(said)}, and {whose} were trained with {_row(own)}: pretrained features fit pictures "
        f"that are normalised like theirs; {todo}"
        for name, said, own, todo in (
            ("mean", spec.mean, mean, "leave it out" if mean == backbone.input.mean else f"set it to {_list(mean)}"),
            ("std", spec.std, std, "leave it out" if std == backbone.input.std else f"set it to {_list(std)}"),
        )
        if len(said) == len(own) and any(abs(a - b) > 0.01 for a, b in zip(said, own, strict=True))
    ]


def absent_weights(config: Config) -> list[str]:
    """A file of weights that is not on this machine: a plan needs none, a training does."""
    origin = _origin(config)
    if origin is None or origin.file is None or origin.file.exists():
        return []
    return [
        f"warning: {escaped(str(origin.file))} (backbone.weights) is not here; a training on this machine refuses that"
    ]


def _origin(config: Config) -> Origin | None:
    """Where the weights come from; None where nothing has that name, which whoever reads them tells."""
    from tlx.models import source
    from tlx.models.weights.pretrained import choose

    try:
        return choose(source(config.backbone.name), config.backbone.weights, there=False)
    except UserError:
        return None


def normalisation(config: Config, backbone: Backbone) -> list[str]:
    """What pictures are normalised by, where weights do not say what they were trained with."""
    from tlx.models.weights.files import location
    from tlx.models.weights.pretrained import HUB

    weights = config.backbone.weights
    if not (weights.startswith(HUB) or location(weights).is_file()) or _own_input(config, backbone) is not None:
        return []
    spec = config.input.over(backbone.input)
    unsaid = f"{escaped(weights)} does not say what it was trained with (input.mean, input.std)"
    if weights.startswith(HUB):
        unsaid = f"what {escaped(weights)} was trained with, its config.json or card may say (input.mean, input.std)"
    return [f"pictures are normalised by means {_row(spec.mean)} and deviations {_row(spec.std)}; {unsaid}"]


def left_out_pixels(config: Config, backbone: Backbone) -> list[str]:
    """Edges of pictures that the network cuts off, because they are no whole patch."""
    from tlx.models.weights.patches import unseen, whole

    size, blocks = config.input.over(backbone.input).size, backbone.blocks
    rows, columns = unseen(backbone.module, size, config.input.channels, blocks)
    if not rows and not columns:
        return []
    multiples = whole(backbone.module, blocks)
    sides = [max(side // multiple, 1) * multiple for side, multiple in zip(size, multiples, strict=True)]
    return [
        f"{config.backbone.name} leaves out {rows} rows and {columns} columns of pixels at the lower and right edge of "
        f"pictures of {size[0]} x {size[1]}, which fill no whole patch; input.size: {sides} has none to leave out"
    ]


def _own_input(config: Config, backbone: Backbone) -> tuple[str, Sequence[float], Sequence[float]] | None:
    """Whose the weights are, in words, and the mean and std that they were trained with; None where that is not known:
    of a file, only a run of tlx says so beside it, or `tlx weights fetch` in it; of the hub, timm's own."""
    from tlx.models.weights.pretrained import HUB
    from tlx.models.weights.provenance import record_of

    origin = _origin(config) if config.backbone.weights != "none" else None
    if origin is None:
        return None
    if origin.tag is None and origin.name.startswith(HUB):
        return None
    if origin.file is None or origin.tag is not None:
        return f"the weights of {config.backbone.name}", backbone.input.mean, backbone.input.std
    record = record_of(origin.file)
    return (f"the weights in {origin.file}", record.mean, record.std) if record is not None else None


def _list(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"


def _row(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def plans_of(config: Config, *, ranks: int) -> Callable[[Config, Mapping[str, int]], Plan]:
    """Compiles configurations over the shards and the network of this one."""
    samples = count_samples(config)
    task = task_of(config, samples)
    backbone = backbone_of(config, outputs_of(task), empty=True)

    def compiled(other: Config, ends: Mapping[str, int]) -> Plan:
        made = plan_of(other, backbone, samples, ranks, ends)
        check_metrics(other, made, task, samples)
        return made

    return compiled


def measured(config: Config, made: Plan, task: Task) -> tuple[Mapping[str, int | None], Config, list[str]]:
    """What one rank's part of the training needs on the device here, with untrained weights.

    Returns:
        bytes by phase; the configuration with the micro-batch that fits; lines for people.

    Raises:
        UserError: several processes, a device or network that cannot be used.
    """
    from tlx.ranks.rendezvous import join_ranks
    from tlx.train.micro_batch import Choice, Share, decide, device_words, facts_of, may_halve, report, search

    if environment().size > 1:
        raise UserError("tlx plan --measure measures one process", todo="start it without a launcher")
    ranks = config.world.size or 1
    alone = config.untrained().model_copy(update={"world": config.world.model_copy(update={"size": None})})
    world = join_ranks(alone)
    seed_all(alone)
    share = Share.of(config, made, ranks=ranks)
    trial = trial_of(alone, *parts_of(alone, world, task), made, ranks=ranks)
    found = search(trial, share, world)
    on = device_words(facts_of(alone, share, world)["devices"][0])
    said = [report(found, share, on=on)]
    if not world.cuda:
        said.append("a CPU does not tell how much was used: nothing measured is shown")
    elif ranks > 1:
        said.append(f"measured is one rank's part of {ranks}, without what NCCL takes")
    if config.loop.fit_micro_batch == "never" and found.refused:
        said.append("training would take what was asked for and run out of memory (loop.fit_micro_batch=never)")
    try:
        moving = made.moving if config.loop.fit_micro_batch == "auto" else ()
        decide(found, on=on, moving=moving, may_halve=may_halve(config))
    except UserError as error:
        said.append(f"training would be refused: {error}")
    return found.peaks, Choice(found.fits, evaluation=found.evaluation or None).over(config), said


def try_on_shapes(config: Config, made: Plan, backbone: Backbone, task: Task) -> list[str]:
    """A forward pass of the network in each mode, which needs no weights; a line for people where that did not tell.

    Raises:
        UserError: the network does not take the images, or returns something else than logits; the task does not take
            what it returns.
    """
    from tlx.train.dry_run import DryRun

    check, outputs = output_check(config, task), outputs_of(task).count
    untried = DryRun(backbone, made, config.input.over(backbone.input), outputs, check).on_shapes()
    if untried is None:
        return []
    return [
        f"whether the network takes the images could not be tried without weights: {untried}; training tries it first"
    ]


def memory_of(config: Config, made: Plan, backbone: Backbone, world: int) -> Mapping[str, Memory]:
    """What a rank needs in each phase, with the micro-batches and the precision of the configuration."""
    from tlx.train.memory_estimate import Images, memory_by_phase

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


def header(config: Config, task: Task) -> str:
    run, weights = escaped(config.run), escaped(config.backbone.weights)
    head = f"{config.head.name} head, {_outputs_in_words(config, task)}"
    return f"run {run}: {config.backbone.name} (weights {weights}), {head}, seed {config.seed}"


def _outputs_in_words(config: Config, task: Task) -> str:
    read = list(all_targets(task).values())
    if views_of(task) is None and len(read) == 1 and read[0].kind == "class" and tuple(task.outputs) == read[0].classes:
        return f"{len(task.outputs)} classes"
    heads = ", ".join(f"{escaped(name)} {count}" if name else str(count) for name, count in task.heads.items())
    of = f" of {', '.join(map(escaped, task.targets))}" if task.targets else ""
    judged = f", {said}" if (said := getattr(task, "judged_by", None)) else ""
    return f"{config.task.name}{of}, outputs: {heads}{_shown_in_words(task)}{judged}"


def _shown_in_words(task: Task) -> str:
    views = views_of(task)
    if views is None:
        return ""
    pictures = f"{views.count} pictures" if views.count > 1 else "a picture"
    return f", of {pictures} for each sample; no label is read"


def check_metrics(config: Config, plan: Plan, task: Task, samples: Samples | None) -> None:
    """Whether evaluations will give what is chosen and waited for by.

    Raises:
        ConfigError: unknown metrics, those of targets that no validation sample has, or no validation data where they
            decide something.
    """
    from tlx.train.feature_probe import METRICS, WITH_LABELS

    validated = config.data.val is not None
    probe = config.evaluate.probe
    probed = WITH_LABELS if probe is not None else METRICS if config.draws_targets else ()
    names = [f"val/{name}" for name in (*task.metrics, *probed)]
    wanted = {"evaluate.metric": config.evaluate.chooses}
    waited = {f"phases.{p.name}.duration.metric": p.plateau.metric for p in plan.phases if p.plateau is not None}
    problems = [
        f'{where}: there is no metric "{metric}"{did_you_mean(metric, names)}'
        for where, metric in (wanted | waited).items()
        if metric not in names
    ]
    problems += _never_numbers(wanted | waited, task, samples)
    if not validated and (waited or config.evaluate.patience is not None):
        problems.append("data.val: a plateau or evaluate.patience needs validation data")
    if not validated and probe is not None:
        problems.append("data.val: evaluate.probe needs validation data; pictures without labels will do, for the loss")
    if not validated and any(p.settings.start_from == "best" for p in plan.phases):
        problems.append("data.val: start_from: best needs validation data")
    if problems:
        raise ConfigError(problems)


def _never_numbers(chosen: Mapping[str, str], task: Task, samples: Samples | None) -> list[str]:
    """Metrics that decide something and are of targets that no validation sample has.

    Args:
        chosen: by the key that names them.
    """
    from tlx.train.part_checks import unmeasured

    of_val = (samples.val if samples is not None else None) or {}
    if (blind := getattr(task, "without_pictures", None)) is not None and LABEL in of_val:
        lost, which = blind(of_val[LABEL].counts)
        odd = {where: metric for where, metric in chosen.items() if metric.removeprefix("val/") in lost}
        if odd:
            what, todo = f"no validation picture is of {which}", "validate on some, or evaluate.metric: val/seen"
            return [f"{where}: {what}, so that {metric} is never a number; {todo}" for where, metric in odd.items()]
    absent = [name for name in task.targets if name in of_val and not of_val[name].samples]
    if not absent:
        return []
    lost = {f"val/{name}" for name in unmeasured(task, absent)}
    which = ", ".join(f'"{name}"' for name in absent)
    others = [name for name in task.metrics if f"val/{name}" not in lost]
    todo = f"choose another one ({', '.join(f'val/{name}' for name in others[:5])}), or " if others else ""
    return [
        f"{where}: no validation sample has a value of target {which}, so that {metric} is never a number; {todo}"
        "validate on samples that have it"
        for where, metric in chosen.items()
        if metric in lost
    ]
