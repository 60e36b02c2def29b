"""Runs that an earlier tlx began: where a setting means something else since, they do not go on by halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlx.config import Config
from tlx.errors import UserError
from tlx.parsing import from_json

WRITERS = {2: "0.1.0"}
"""Formats of checkpoints that are still read -> the last tlx that wrote them."""

AUXILIARY = ("torchvision/googlenet", "torchvision/inception_v3")
"""Networks whose auxiliary classifiers counted as the head in tlx 0.1.0."""


def refuse_other_meaning(folder: Path, config: Config) -> None:
    """Looks at the newest checkpoint of a run that is to be trained on, and changes nothing.

    Args:
        config: that the checkpoint was trained by.

    Raises:
        UserError: it is of an earlier tlx, to which this configuration meant another training.
    """
    written = _json(folder / "checkpoints" / "latest" / "state.json").get("format")
    if written != 2:
        return
    layers = _json(folder / "plan.json").get("layers")
    roles = {y.get("role") for y in layers if isinstance(y, dict)} if isinstance(layers, list) else set()
    changed = list(_of_0_1(config, in_block="classifier" in roles))
    if changed:
        version = WRITERS[written]
        raise UserError(
            f"this run was begun by tlx {version}, to which these settings meant something else:\n    "
            + "\n    ".join(changed),
            where=str(folder),
            todo=f"let tlx {version} finish it, or begin anew: --fresh moves the folder aside; a checkpoint's weights "
            "can be begun from (backbone.weights)",
        )


def _of_0_1(config: Config, *, in_block: bool) -> Iterator[str]:
    """What tlx 0.1.0 read otherwise.

    Args:
        in_block: whether the network's classifier has layers beside the head.
    """
    phases = {name: config.settings(name) for name in config.phases}
    for name, said in phases.items():
        if said.curve.name in ("step", "multi_step") and said.warmup.value:
            yield f"phases.{name}.curve ({said.curve.name}): its points were counted from the end of the warm-up"
    sampling, weights = config.data.sampling, config.objective.args.get("class_weights")
    if weights == "balanced" and (sampling.method != "all" or sampling.limit is not None):
        yield "objective.class_weights (balanced): of all samples, not of those that data.sampling shows"
    if in_block and config.unfreeze.name in ("gradual", "last_n"):
        yield f"unfreeze ({config.unfreeze.name}): the whole classifier block thawed with the head"
    if config.backbone.name in AUXILIARY:
        yield f"backbone ({config.backbone.name}): auxiliary classifiers trained as part of the head"


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = from_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
