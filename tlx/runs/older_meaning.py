"""Runs that an earlier tlx began: where a setting means something else since, they do not go on by halves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base import plug
from tlx.base.errors import UserError
from tlx.base.metrics import Metric
from tlx.plan.config import Config
from tlx.plan.saved_config import essential, meant
from tlx.runs.run_files import RunFiles, mapping, within

if TYPE_CHECKING:
    from tlx.models import Backbone

WRITERS = {2: "0.1.0"}
"""Formats of checkpoints that are still read -> the last tlx that wrote them."""


def refuse_other_meaning(
    folder: Path, config: Config, written: Mapping[str, Any], *, extensions: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Looks at the newest checkpoint of a run that is to be trained on, and changes nothing.

    Args:
        config: of the run.
        written: config.yaml as it lies there, flat.
        extensions: of the run, in order. An earlier tlx made none: what it trained by is what was before the first one,
            and phases that begin after that are none of its.

    Raises:
        UserError: it is of an earlier tlx, to which this configuration meant another training.
    """
    checkpoint = max(
        (folder / "checkpoints").glob("step-*"), default=folder / "checkpoints" / "latest"
    )  # a copy may lack the links
    state, plan = RunFiles(checkpoint).read("state.json"), RunFiles(folder).plan
    version = WRITERS.get(state.get("format", 0))
    if version is None:
        if _is_of_former_decay(state) and _exempts(config):
            phases = within(plan, "phases")
            begun = [phase for phase in phases if phase.get("start", 0) < state.get("step", 0)]
            changed = [] if phases and not begun else list(_of_the_decay(_backbone(config), begun))
            _refuse(folder, checkpoint, "an earlier tlx", changed)
        return
    if extensions:
        former, until = extensions[0]["before"]["config"], extensions[0]["step"]
        config, written = meant(former), essential(former)
        plan = {**plan, "phases": [p for p in within(plan, "phases") if p.get("start", 0) < until]}
    changed = [*_directions(config, plan, written, version), *_of_0_1(config, plan)]
    _refuse(folder, checkpoint, f"tlx {version}", changed)


def _is_of_former_decay(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this format is of before matrices that networks' authors exempt from decay were exempt:
    `backbone.weights_key` became a key with that, and tlx writes every key that there is."""
    identity = state.get("identity")
    config = identity.get("config") if isinstance(identity, dict) else None
    return isinstance(config, dict) and "backbone.name" in config and "backbone.weights_key" not in config


def _refuse(folder: Path, checkpoint: Path, writer: str, changed: Sequence[str]) -> None:
    """
    Raises:
        UserError: something has changed.
    """
    if changed:
        done = RunFiles(folder).result.get("finished") is True
        raise UserError(
            f"this run was begun by {writer}, to which these settings meant something else:\n    "
            + "\n    ".join(changed),
            where=str(folder),
            todo=("" if done else f"let {writer if writer != 'an earlier tlx' else 'that one'} finish it, or ")
            + "begin anew by the same command with --fresh, which moves the folder aside; or train in another folder, "
            f"from its weights: backbone.weights={checkpoint / 'model.safetensors'}",
        )


def _directions(config: Config, plan: Mapping[str, Any], written: Mapping[str, Any], version: str) -> Iterator[str]:
    """Metrics that were followed in the wrong direction, since `mode` was a setting with a default of its own."""
    name, mode = config.evaluate.metric, written.get("evaluate.mode")
    if config.data.val is not None and _wrong(name, mode):
        yield f"evaluate.metric: {version} kept the worst by {name} (evaluate.mode was {mode})"
    for phase in within(plan, "phases"):
        plateau = phase.get("settings", {}).get("duration")
        if isinstance(plateau, dict) and _wrong(plateau.get("metric"), plateau.get("mode")):
            metric, way = plateau["metric"], "fall" if plateau["mode"] == "min" else "rise"
            where = f"phases.{phase.get('name')}.duration.metric"
            yield f"{where}: {version} waited for {metric} to {way} (its mode was {plateau['mode']})"


def _wrong(name: object, mode: object) -> bool:
    return isinstance(name, str) and mode is not None and mode != Metric.of(name).mode


def _of_0_1(config: Config, plan: Mapping[str, Any]) -> Iterator[str]:
    """What else tlx 0.1.0 read otherwise."""
    names = [str(phase.get("name")) for phase in within(plan, "phases")] or list(config.phases)
    for name in names:
        said = config.settings(name)
        if said.curve.name in ("step", "multi_step") and said.warmup.value:
            yield f"phases.{name}.curve ({said.curve.name}): its points were counted from the end of the warm-up"
    sampling, weights = config.data.sampling, config.objective.args.get("class_weights")
    if weights == "balanced" and (sampling.method != "all" or sampling.limit is not None):
        yield "objective.class_weights (balanced): of all samples, not of those that data.sampling shows"
    in_block = "classifier" in [layer.get("role") for layer in within(plan, "layers")]
    if in_block and config.unfreeze.name in ("gradual", "last_n"):
        yield f"unfreeze ({config.unfreeze.name}): the whole classifier block thawed with the head"
    backbone = _backbone(config)
    if backbone is not None and backbone.auxiliary:
        yield f"backbone ({backbone.name}): auxiliary classifiers trained as part of the head"
    if _exempts(config):
        yield from _of_the_decay(backbone, within(plan, "phases"))


def _of_the_decay(backbone: Backbone | None, phases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Matrices of layers that networks' authors exempt from decay: once they decayed. Where phases of plan.json say
    which layers they train, those that train in one of them."""
    from torch.nn import Embedding

    if backbone is None:
        return
    training = {name for phase in phases for name, how in mapping(phase.get("layers")).items() if _trains(how)}
    told = not phases or any("layers" not in phase for phase in phases)
    layers = [layer for layer in backbone.layers if told or layer.name in training]
    embeddings = [p.name for layer in layers for p in layer.parameters if p.kind == "embedding" and not p.idle]
    computed = [name for name in embeddings if name.endswith(".weight")]  # a layer's matrix and no table
    owners = (backbone.module.get_submodule(name.removesuffix(".weight")) for name in computed)
    exempt = [name for name, owner in zip(computed, owners, strict=True) if not isinstance(owner, Embedding)]
    if exempt:
        yield f"no_decay: {len(exempt)} matrices that the network's authors exempt decayed ({exempt[0]})"


def _trains(how: Any) -> bool:
    """Whether a phase trains the matrices of a layer, by what plan.json says of it."""
    return mapping(how).get("trains") == "all"


def _exempts(config: Config) -> bool:
    """Whether the optimizer decays something, by what is set or what its function has by default, and embeddings are
    exempt."""
    if "embedding" not in config.no_decay:
        return False
    function = plug.find("optimizer", config.optimizer.name)
    usual = inspect.signature(function).parameters.get("weight_decay")
    default = usual.default if usual is not None and usual.default is not inspect.Parameter.empty else 0
    return bool(config.optimizer.args.get("weight_decay", default))


def _backbone(config: Config) -> Backbone | None:
    """The network on shapes alone."""
    from tlx import models

    asked = config.backbone
    try:
        return models.load(
            asked.name,
            classes=2,
            weights="none",
            args=asked.args,
            head=config.head.name,
            head_args=config.head_args,
            granularity=asked.layers,
            channels=config.input.channels,
            empty=True,
        )
    except UserError:  # which the training will tell
        return None
