"""From a run's folder, a checkpoint or a file of weights to a model that answers: ``tlx.load("runs/mine")``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tlx import models
from tlx.base.errors import UserError, did_you_mean
from tlx.base.inputs import EVALUATION_BATCH
from tlx.data.shards.targets import LABEL, Target
from tlx.data.stream.randomness import own_randomness
from tlx.models import Backbone
from tlx.runs.checkpoint import DESCRIBED, read_state
from tlx.runs.run_files import RunFiles, mapping
from tlx.tasks import TargetSummary, Task, TaskData, outputs_of
from tlx.tasks.nested import made
from tlx.use.description import FILE as MODEL
from tlx.use.description import ModelDescription, input_of, temperature_of
from tlx.use.model import Model

Which = Literal["best", "last"]
_FILES = {"raw": "model.safetensors", "ema": "ema.safetensors"}


def load(path: str | Path, *, which: Which = "best", device: str | None = None, trusted: bool = False) -> Model:
    """A trained network in evaluation mode, with everything that its use takes.

    Args:
        path: a run's folder, one of its checkpoints, or a file of weights that tlx wrote (``model.safetensors``,
            wherever it lies: it says itself what it is).
        which: of a run: its best checkpoint, with the moving average's weights where these were the best; or the last.
        device: where it computes, such as ``cuda:1``; by default a GPU where there is one.
        trusted: the file may name parts by path (``package.module:function``), which are imported and called. A run's
            own folder is trusted.

    Raises:
        UserError: no run, no checkpoint in it yet, a file that does not say what it is, a part that is not installed,
            weights that do not fit.
    """
    place = Path(path)
    file, is_own = find_file(place, which)
    description = describe(file)
    if which == "best" and (place / "checkpoints").is_dir():
        description = replace(description, temperature=_temperature(place, description))
    if not (trusted or is_own):
        refuse_paths(description, file)
    on = device_of(device)
    task, built = settled(task_of(description), description), network(description)
    module = built.module
    try:
        module.load_state_dict(load_file(file), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        what = f"the weights do not fit the network that they are said to be of: {_first(error)}"
        raise UserError(what, where=str(file)) from error
    return Model(module.to(on).eval(), task, description, on, built.heads)


def device_of(name: str | None) -> torch.device:
    """
    Raises:
        UserError: there is none of this name.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = _first(error).partition(". ")[0]
        raise UserError(f"torch cannot compute there: {why}", where=f"device {name}") from error
    return device


def describe(file: Path) -> ModelDescription:
    """What a file of weights says of itself; of one that an earlier tlx wrote, what its run's folder says.

    Raises:
        UserError: neither says it.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(DESCRIBED)
    except (OSError, SafetensorError) as error:
        raise UserError(f"it is no file of weights: {_first(error)}", where=str(file)) from error
    if text is not None:
        return ModelDescription.read(text, where=str(file))
    return _of_earlier(file)


def _temperature(run: Path, description: ModelDescription) -> float | None:
    """Of the best weights, from the run's model.json, unless that is of earlier ones."""
    said, step = RunFiles(run).read(MODEL), description.provenance.get("step")
    is_same = step is not None and mapping(said.get("provenance")).get("step") == step
    return temperature_of(said) if is_same else None


def task_of(description: ModelDescription) -> Task:
    """What the outputs mean."""

    def objective(counts: Any) -> Any:
        return made("objective", description.objective, list(counts))

    data = TaskData(description.targets, description.samples, description.top_k, objective)
    task: Task = made("task", description.task, data)
    return task


def settled(task: Task, description: ModelDescription) -> Task:
    """With what the evaluation that chose the weights has found, where outputs mean nothing without it."""
    act = getattr(task, "settled", None)
    return task if act is None else act(description.kept)  # type: ignore[no-any-return]


def network(description: ModelDescription) -> Backbone:
    """The network, with values that are to be replaced."""
    task, backbone, head = task_of(description), description.backbone, description.head
    with own_randomness() as seed:
        seed(0)
        return models.load(
            backbone["name"],
            classes=outputs_of(task),
            weights="none",
            args=backbone.get("args", {}),
            head=head["name"],
            head_args={name: value for name, value in head.items() if name != "name"},
            channels=description.input.channels,
        )


def find_file(place: Path, which: Which) -> tuple[Path, bool]:
    """The file of weights that is meant, and whether it lies in a run's folder.

    Raises:
        UserError: there is none.
    """
    if place.is_file():
        return place, (place.parent / "state.json").is_file()
    if not place.is_dir():
        near = did_you_mean(place.name, [p.name for p in place.parent.glob("*")]) if place.parent.is_dir() else ""
        near = near if "did you mean" in near else ""  # not all that lies there
        raise UserError(f"there is no such file or folder{near}", where=str(place))
    checkpoint = place
    if (place / "checkpoints").is_dir():
        checkpoint = place / "checkpoints" / {"best": "best", "last": "latest"}[which]
        if which == "best" and not checkpoint.exists():  # a training without validation has no best one
            checkpoint = place / "checkpoints" / "latest"
        if not checkpoint.exists():
            raise UserError("this run has no checkpoint yet", where=str(place), todo="tlx status says how it stands")
    if not (checkpoint / _FILES["raw"]).is_file():
        raise UserError(
            "this is neither a run's folder nor a checkpoint",
            where=str(place),
            todo="give the folder that `run:` names in the configuration, or a model.safetensors",
        )
    best = mapping(read_state(checkpoint).get("best"))
    ema = which == "best" and best.get("weights") == "ema" and (checkpoint / _FILES["ema"]).is_file()
    return checkpoint / _FILES["ema" if ema else "raw"], True


def find_weights(place: Path, which: Which, weights: str | None) -> tuple[Path, bool]:
    """The same, or where that is asked for the ``raw`` weights or the moving average's (``ema``) of its checkpoint.

    Raises:
        UserError: there are none.
    """
    file, own = find_file(place, which)
    if weights is not None and not own:
        raise UserError("this file lies in no checkpoint, which would have both", where=str(file), todo="no --weights")
    if weights is not None:
        file = file.with_name(_FILES[weights])
        if not file.is_file():
            raise UserError("this checkpoint has no moving average", where=str(file), todo="--weights raw")
    return file, own


def refuse_paths(description: ModelDescription, file: Path) -> None:
    """
    Raises:
        UserError: it would have a module of its choice imported and called.
    """
    said = json.dumps([description.backbone, description.head, description.task, description.objective])
    names = [text for text in _texts(json.loads(said)) if ":" in text]
    if names:
        raise UserError(
            f"it names a part by path ({names[0][:100]}), which would be imported and called",
            where=str(file),
            todo="trusted=True (of a command: --trusted), where you know who wrote it",
        )


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for one in value.values() for text in _texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def _of_earlier(file: Path) -> ModelDescription:
    """From state.json beside the file, which tlx wrote before files of weights said what they are.

    Raises:
        UserError: there is none.
    """
    if not (file.parent / "state.json").is_file():
        raise UserError(
            "the file does not say which network it is of, with which classes and input",
            where=str(file),
            todo="a file that a training of tlx wrote; other weights: backbone.weights in a configuration",
        )
    state = read_state(file.parent)
    try:
        identity = state["identity"]
        config = _nested(identity["config"])
        classes = tuple(map(str, identity["classes"]))
        spec = input_of(identity["input"])
        backbone, head = mapping(config.get("backbone")), config.get("head", "linear")
        objective = config.get("objective", "cross_entropy")
        head = dict(head) if isinstance(head, Mapping) else {"name": str(head)}
        head.pop("keep", None)
        return ModelDescription(
            backbone={"name": str(identity["backbone"]), "args": dict(mapping(backbone.get("args")))},
            head=head,
            task={"name": "classification"},
            objective=dict(objective) if isinstance(objective, Mapping) else {"name": str(objective)},
            targets={LABEL: TargetSummary(Target(LABEL, "class", classes), (1,) * len(classes), len(classes))},
            samples=len(classes),
            top_k=int(mapping(config.get("evaluate")).get("top_k", 5)),
            outputs=classes,
            input=spec,
            batch=int(mapping(config.get("evaluate")).get("batch") or EVALUATION_BATCH),
            upright=mapping(config.get("data")).get("exif_orientation", True) is not False,
            provenance={"step": state.get("step"), "weights": backbone.get("weights")},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"its checkpoint does not say what the network is ({type(error).__name__}: {error})"
        raise UserError(what, where=str(file)) from error


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose keys were joined by dots."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return found


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
