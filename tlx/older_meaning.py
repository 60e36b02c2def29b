"""Runs that an earlier tlx began: where a setting means something else since, they do not go on by halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlx.config import Config
from tlx.errors import UserError
from tlx.metrics import Metric
from tlx.parsing import from_json
from tlx.written_config import essential, meant

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
    version = WRITERS.get(_json(checkpoint / "state.json").get("format", 0))
    if version is None:
        return
    plan = _json(folder / "plan.json")
    if extensions:
        former, until = extensions[0]["before"]["config"], extensions[0]["step"]
        config, written = meant(former), essential(former)
        plan = {**plan, "phases": [p for p in _listed(plan, "phases") if p.get("start", 0) < until]}
    changed = [*_directions(config, plan, written, version), *_of_0_1(config, plan)]
    if changed:
        done = _json(folder / "result.json").get("finished") is True
        raise UserError(
            f"this run was begun by tlx {version}, to which these settings meant something else:\n    "
            + "\n    ".join(changed),
            where=str(folder),
            todo=("" if done else f"let tlx {version} finish it, or ")
            + "begin anew by the same command with --fresh, which moves the folder aside; or train in another folder, "
            f"from its weights: backbone.weights={checkpoint / 'model.safetensors'}",
        )


def _directions(config: Config, plan: Mapping[str, Any], written: Mapping[str, Any], version: str) -> Iterator[str]:
    """Metrics that were followed in the wrong direction, since `mode` was a setting with a default of its own."""
    name, mode = config.evaluate.metric, written.get("evaluate.mode")
    if config.data.val is not None and _wrong(name, mode):
        yield f"evaluate.metric: {version} kept the worst by {name} (evaluate.mode was {mode})"
    for phase in _listed(plan, "phases"):
        plateau = phase.get("settings", {}).get("duration")
        if isinstance(plateau, dict) and _wrong(plateau.get("metric"), plateau.get("mode")):
            metric, way = plateau["metric"], "fall" if plateau["mode"] == "min" else "rise"
            where = f"phases.{phase.get('name')}.duration.metric"
            yield f"{where}: {version} waited for {metric} to {way} (its mode was {plateau['mode']})"


def _wrong(name: object, mode: object) -> bool:
    return isinstance(name, str) and mode is not None and mode != Metric.of(name).mode


def _of_0_1(config: Config, plan: Mapping[str, Any]) -> Iterator[str]:
    """What else tlx 0.1.0 read otherwise."""
    names = [str(phase.get("name")) for phase in _listed(plan, "phases")] or list(config.phases)
    for name in names:
        said = config.settings(name)
        if said.curve.name in ("step", "multi_step") and said.warmup.value:
            yield f"phases.{name}.curve ({said.curve.name}): its points were counted from the end of the warm-up"
    sampling, weights = config.data.sampling, config.objective.args.get("class_weights")
    if weights == "balanced" and (sampling.method != "all" or sampling.limit is not None):
        yield "objective.class_weights (balanced): of all samples, not of those that data.sampling shows"
    in_block = "classifier" in [layer.get("role") for layer in _listed(plan, "layers")]
    if in_block and config.unfreeze.name in ("gradual", "last_n"):
        yield f"unfreeze ({config.unfreeze.name}): the whole classifier block thawed with the head"
    yield from _of_the_network(config)


def _of_the_network(config: Config) -> Iterator[str]:
    """What tlx 0.1.0 did otherwise with some networks."""
    from torch.nn import Embedding

    from tlx.parts import backbone_of

    try:
        backbone = backbone_of(config, 2, empty=True)
    except UserError:  # which the training will tell
        return
    if backbone.auxiliary:
        yield f"backbone ({backbone.name}): auxiliary classifiers trained as part of the head"
    embeddings = [p.name for y in backbone.layers for p in y.parameters if p.kind == "embedding"]
    computed = [name for name in embeddings if name.endswith(".weight")]  # a layer's matrix and no table
    owners = (backbone.module.get_submodule(name.removesuffix(".weight")) for name in computed)
    exempt = [name for name, owner in zip(computed, owners, strict=True) if not isinstance(owner, Embedding)]
    if exempt and "embedding" in config.no_decay and config.optimizer.args.get("weight_decay"):
        yield f"no_decay: {len(exempt)} matrices that the network's authors exempt decayed ({exempt[0]})"


def _listed(plan: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = plan.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = from_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
