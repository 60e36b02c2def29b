"""TensorBoard: scalars, and what it shows beside them: texts, pictures, figures, hyperparameters and their results."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tlx.tracking.phase_end import Confusions, PhaseEnd, Table
from tlx.tracking.tracker import RunInfo, of_test
from tlx.tracking.trained import TrainedModel

NAMED = 60
"""Classes up to which the axes of a confusion matrix are named, and 200 up to which it is drawn."""

DRAWN = 200


class TensorBoardRun:
    """Writes events of a run.

    Args:
        writer: torch's SummaryWriter.
        plan: as ``plan.json`` has it. begun: phases that an earlier start has told of.
    """

    def __init__(self, run: RunInfo, writer: Any, plan: Mapping[str, Any], begun: Collection[str] = ()) -> None:
        self.run, self.writer = run, writer
        self._begun, self._plan = set(begun), plan
        if not run.resumed:
            writer.add_text("config", _code(run.config), 0)
            writer.add_text("plan", _table(_phases(plan)), 0)

    def log(self, row: Mapping[str, Any]) -> None:
        phase = row.get("phase")
        if phase is not None and phase not in self._begun:
            self._begun.add(phase)
            self.writer.add_text(
                "phase", f"{_cell(phase)}, from step {_start(self._plan, phase, row['step'])}", row["step"]
            )
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not math.isnan(value):
                self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def phase_ended(self, end: PhaseEnd) -> None:
        for table in (*end.tables(), *(c.largest for c in end.confusions())):
            self.writer.add_text(f"{end.name}/{table.name}", _table(table), end.step)
        for confusions in end.confusions():
            if len(confusions.classes) <= DRAWN:
                self._draw(f"{end.name}/{confusions.name}", confusions, end.step)
        for place, picture in enumerate(end.pictures()):
            about = f"{end.name}/predictions/{place:02d}"
            said = f"{picture.label} | {picture.told}"
            said += f" ({picture.probability:.2f})" if picture.probability is not None else ""
            if picture.jpeg is not None:
                self.writer.add_image(about, _pixels(picture.jpeg), end.step, dataformats="HWC")
            self.writer.add_text(about, f"label | prediction: {_cell(said)}", end.step)
        self.writer.flush()

    def model_trained(self, model: TrainedModel) -> None:
        for alias in model.aliases:
            self.writer.add_text(f"model/{alias}", f"{model.text}\n\n`{model.file}`", model.step)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Hyperparameters stand with what they gave once a training is done: in the same events, not in a run beside,
        as SummaryWriter.add_hparams would have it."""
        test = of_test(result)
        if test:
            self.log({"step": result["step"], **test})
        if result.get("finished", True) and (best := result.get("best")):
            self._hyperparameters(
                {f"hparam/best/{best['metric']}": float(best["value"]), **_prefixed("hparam/", test)}, result
            )
        self.writer.close()

    def _hyperparameters(self, metrics: Mapping[str, float], result: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(dict(_flat(self.run.config)), dict(metrics)):  # type: ignore[no-untyped-call]
            self.writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, result.get("step", 0))

    def _draw(self, name: str, confusions: Confusions, step: int) -> None:
        from matplotlib.figure import Figure

        classes = len(confusions.classes)
        figure = Figure(figsize=(min(4 + classes * 0.2, 14),) * 2, dpi=100, layout="constrained")
        axes = figure.subplots()
        shares = confusions.matrix / confusions.matrix.sum(1, keepdims=True).clip(min=1)
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set(xlabel="told", ylabel="truth", title="share of each class")
        if classes <= NAMED:
            names = [name[:24].replace("$", r"\$") for name in confusions.classes]
            axes.set_xticks(range(classes), names, rotation=90)
            axes.set_yticks(range(classes), names)
        figure.colorbar(image, ax=axes)
        self.writer.add_figure(name, figure, step, close=False)


def _pixels(jpeg: bytes) -> Any:
    """uint8 [H, W, 3]."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def _phases(plan: Mapping[str, Any]) -> Table:
    phases = [phase for phase in plan.get("phases") or () if isinstance(phase, dict)]
    rows = tuple((phase.get("name"), phase.get("start"), phase.get("stop")) for phase in phases)
    return Table("phases", ("phase", "from step", "to step"), rows)


def _start(plan: Mapping[str, Any], phase: str, otherwise: int) -> int:
    found = (own.get("start") for own in plan.get("phases") or () if isinstance(own, dict) and own.get("name") == phase)
    return int(next((start + 1 for start in found if isinstance(start, int)), otherwise))


def _table(table: Table) -> str:
    lines = ["| " + " | ".join(map(_cell, table.columns)) + " |", "|---" * len(table.columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str("" if value is None else value).replace("|", "\\|").replace("<", "&lt;").split())


def _code(config: Mapping[str, Any]) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in json.dumps(config, indent=2, default=str).splitlines())


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Numbers, texts and truths, which is what TensorBoard takes; others as text."""
    for name, value in flat(config):
        yield name, value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by their keys with dots between."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
