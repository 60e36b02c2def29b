"""What a trained network is: enough to build it, to feed it and to read its outputs, without its run. Plain data.

It stands in the metadata of every ``model.safetensors`` (:data:`tlx.runs.checkpoint.DESCRIBED`), and as
``model.json`` in the run's folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast, get_args

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec, Interpolation
from tlx.base.parsing import from_json
from tlx.data.shards.targets import Kind, Target
from tlx.runs.run_files import number
from tlx.tasks import TargetSummary

FORMAT = 1
FILE = "model.json"


@dataclass(frozen=True)
class ModelDescription:
    """What stands in the file.

    Attributes:
        backbone, head, task, objective: name and arguments, as a configuration has them.
        targets: what the task was made with, by name.
        samples: of a training epoch.
        outputs: names, in the order of the network's columns.
        input: how pictures were shown to the network in evaluations; nothing in it is left to a library.
        batch: how many of them at once.
        upright: they were turned as the camera noted.
        provenance: where it comes from: weights that training began with, shards (hashes), run, step, versions.
        metrics: of the evaluation that chose it, by name without ``val/``.
        kept: its lists (thresholds ...), by name.
        temperature: that logits are to be divided by for calibrated probabilities, where `tlx evaluate` or a look at
            data.test has fitted it on validation data; nothing here divides by it.
        test: what the look at data.test gave, where there was one, as result.json has it.
    """

    backbone: Mapping[str, Any]
    head: Mapping[str, Any]
    task: Mapping[str, Any]
    objective: Mapping[str, Any]
    targets: Mapping[str, TargetSummary]
    samples: int
    top_k: int
    outputs: tuple[str, ...]
    input: InputSpec
    batch: int
    upright: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)
    temperature: float | None = None

    def judged(self, row: Mapping[str, Any]) -> ModelDescription:
        """With the metrics and lists of an evaluation, by name such as ``val/top1``."""
        named = {name.removeprefix("val/"): value for name, value in row.items()}
        numbers = {name: float(value) for name, value in named.items() if not isinstance(value, list)}
        metrics = {name: value for name, value in numbers.items() if math.isfinite(value)}
        kept = {name: value for name, value in named.items() if isinstance(value, list)}
        return dataclasses.replace(self, metrics=metrics, kept=kept)

    def at(self, step: int) -> ModelDescription:
        """Of the weights that a training has at a step."""
        return dataclasses.replace(self, provenance={**self.provenance, "step": step})

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        targets = {name: dataclasses.asdict(summary) for name, summary in self.targets.items()}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: value for name, value in given.items() if value or name not in ("test", "temperature")}
        return {"format": FORMAT, **plain, "targets": targets, "input": dataclasses.asdict(self.input)}

    @staticmethod
    def read(text: bytes | str, *, where: str) -> ModelDescription:
        """
        Raises:
            UserError: it is of a newer format, or no description.
        """
        try:
            said = from_json(text)
            version = said["format"]
        except (ValueError, KeyError, TypeError):
            _damaged(where, "it is not one of tlx")
        if version != FORMAT:
            raise UserError(
                f"the model's description has format {str(version)[:40]}; this tlx reads {FORMAT}",
                where=where,
                todo="use the version of tlx that wrote it, or a newer one",
            )
        try:
            return _of_data(said)
        except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
            _damaged(where, f"{type(error).__name__}: {error}")


def _of_data(said: Mapping[str, Any]) -> ModelDescription:
    parts = {name: _part(said[name]) for name in ("backbone", "head", "task", "objective")}
    return ModelDescription(
        **parts,
        targets={str(name): _summary(of) for name, of in said["targets"].items()},
        samples=int(said["samples"]),
        top_k=int(said["top_k"]),
        outputs=tuple(map(str, said["outputs"])),
        input=input_of(said["input"]),
        batch=max(1, int(said["batch"])),
        upright=said["upright"] is True,
        provenance=dict(said["provenance"]),
        metrics={str(name): float(value) for name, value in said["metrics"].items()},
        kept={str(name): list(values) for name, values in said["kept"].items()},
        test=dict(said.get("test", {})),
        temperature=temperature_of(said),
    )


def _part(said: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(said["name"], str):
        raise TypeError("a part without a name")
    return dict(said)


def _summary(said: Mapping[str, Any]) -> TargetSummary:
    target = said["target"]
    if target["kind"] not in get_args(Kind):
        raise ValueError(f"a target of kind {target['kind']}")
    classes = tuple(map(str, target["classes"]))
    known = said["known"]
    return TargetSummary(
        Target(str(target["name"]), cast(Kind, target["kind"]), classes, int(target["width"])),
        counts=tuple(map(int, said["counts"])),
        known=tuple(map(int, known)) if isinstance(known, list) else int(known),
        mean=tuple(map(float, said["mean"])),
        std=tuple(map(float, said["std"])),
    )


def temperature_of(said: Mapping[str, Any]) -> float | None:
    found = number(said.get("temperature"))
    return found if found > 0 else None


def input_of(said: Mapping[str, Any]) -> InputSpec:
    """From its fields as JSON has them; raises whatever they lead to where they are something else."""
    height, width = map(int, said["size"])
    if said["interpolation"] not in get_args(Interpolation):
        raise ValueError(f"interpolation {said['interpolation']}")
    return InputSpec(
        size=(height, width),
        mean=tuple(map(float, said["mean"])),
        std=tuple(map(float, said["std"])),
        interpolation=cast(Interpolation, said["interpolation"]),
        crop_pct=float(said["crop_pct"]),
    )


def _damaged(where: str, why: str) -> NoReturn:
    raise UserError(f"the description of the model cannot be used: {why}", where=where)
