"""The weights that a training leaves, for trackers that keep them: the best and the last, each with its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tlx.base.metrics import Metric, metrics_of
from tlx.runs.run_files import RunFiles, mapping, number, whole

Artifacts = Literal["none", "best", "all"]
"""Which weights a tracker uploads at the end of a training: none, the best, or the best and the last."""


@dataclass(frozen=True)
class TrainedModel:
    """Weights of a training that is done.

    Attributes:
        file: safetensors, whose metadata say what they are; it may be gone where only a copy of the folder is left.
        aliases: ("best",), ("last",), or both.
        step, weights: of which step, raw | ema. metrics: of their evaluation, by name such as ``val/top1``.
        about: as ``model.json`` has it.
    """

    file: Path
    aliases: tuple[str, ...]
    step: int
    weights: str
    metrics: Mapping[str, float]
    about: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for the same weights of a run."""
        return f"{self.step}.{self.weights}"

    @property
    def text(self) -> str:
        """What it is, in Markdown."""
        backbone, task = (mapping(self.about.get(name)).get("name", "?") for name in ("backbone", "task"))
        outputs, came = self.about.get("outputs") or (), mapping(self.about.get("provenance"))
        lines = [
            f"**{backbone}**, {len(outputs)} outputs ({task}): the {' and '.join(self.aliases)} weights"
            f"{' (moving average)' if self.weights == 'ema' else ''} of run `{came.get('run')}`, step {self.step}.",
            f"Trained with tlx {came.get('tlx')} from weights `{came.get('weights')}`.",
        ]
        if self.metrics:
            lines += ["", "| validation | |", "|---|---|"]
            lines += [f"| {name.removeprefix('val/')} | {value:.4f} |" for name, value in self.metrics.items()]
        size = mapping(self.about.get("input")).get("size")
        lines += ["", f"Input {size} pixels. `tlx.load(FILE)` gives a model that predicts."]
        return "\n".join(lines)


def trained_models(folder: Path, wanted: Artifacts = "all") -> list[TrainedModel]:
    """Of a run folder whose training is done; the best first. None of a training that is not, or says nothing."""
    files = RunFiles(folder)
    result, about = files.result, files.read("model.json")
    if result.get("finished") is not True or wanted == "none":
        return []
    best, last = mapping(result.get("best")), whole(result.get("step"))
    found: dict[tuple[int, str], list[str]] = {}
    if (step := whole(best.get("step"))) is not None:
        found.setdefault((step, str(best.get("weights", "raw"))), []).append("best")
    if last is not None and (wanted == "all" or not found):  # without evaluations the last is all there is
        weights = str(best.get("weights", "raw"))
        found.setdefault((last, weights), []).append("last")
    return [
        TrainedModel(
            file=folder / "checkpoints" / f"step-{step:08d}" / f"{'ema' if weights == 'ema' else 'model'}.safetensors",
            aliases=tuple(aliases),
            step=step,
            weights=weights,
            metrics=_metrics(result, step, weights),
            about=about,
        )
        for (step, weights), aliases in found.items()
    ]


def _metrics(result: Mapping[str, Any], step: int, weights: str) -> dict[str, float]:
    """Of the evaluation at a step, as far as the result tells of it."""
    for phase in mapping(result.get("phases")).values():
        best, last = mapping(mapping(phase).get("best")), mapping(mapping(phase).get("last"))
        if (best.get("step"), best.get("weights")) == (step, weights):
            return _judging({k: v for k, v in best.items() if k.startswith("val/")})
        if last.get("step") == step:
            return _judging(metrics_of(last, "ema" if weights == "ema" else "raw"))
    return {}


def _judging(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: number(value) for name, value in values.items() if Metric(name).judges}
    return {name: value for name, value in numbers.items() if value == value}
