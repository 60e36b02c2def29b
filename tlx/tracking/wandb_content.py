"""What W&B shows beside numbers: tables, charts and pictures of a phase, weights as artifacts."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tlx.tracking import surroundings
from tlx.tracking.phase_end import Confusions, PhaseEnd, Picture, Table
from tlx.tracking.trained import TrainedModel

CHART = 50
"""Classes up to which all confusions are charted; of more the largest are listed."""


def of_phase(end: PhaseEnd) -> dict[str, Any]:
    """For the row of the phase's last step, by ``PHASE/...``."""
    found: dict[str, Any] = {table.name: _table(table) for table in end.tables()}
    for confusions in end.confusions():
        found[confusions.largest.name] = _table(confusions.largest)
        if len(confusions.classes) <= CHART:
            found[confusions.name] = _chart(confusions)
    pictures = end.pictures()
    if pictures:
        found["predictions"] = _pictures(pictures)
    return {f"{end.name}/{name}": of for name, of in found.items()}


def of_phases(ends: Iterable[PhaseEnd]) -> Any:
    """The phases that have ended so far, one row each."""
    import wandb as library

    ends = sorted(ends, key=lambda end: end.index)
    names = sorted({name for end in ends for name in (*end.best_metrics, *end.metrics)})
    columns = ["phase", "index", "first step", "last step", *(f"{w} {n}" for n in names for w in ("best", "last"))]
    rows = [
        [end.name, end.index, end.start + 1, end.step]
        + [of.get(name) for name in names for of in (end.best_metrics, end.metrics)]
        for end in ends
    ]
    return library.Table(columns=columns, data=rows)


def of_model(model: TrainedModel, run_id: str) -> Any:
    """An artifact of the run's own name, whose versions are its weights."""
    import wandb as library

    # `name` is of the project's, so that two runs do not share one
    made = library.Artifact(
        f"model-{_safe(run_id)}", type="model", description=model.text,
        metadata={**dict(model.about), "step": model.step, "weights": model.weights, "metrics": dict(model.metrics)},
    )  # fmt: skip
    made.add_file(str(model.file), name="model.safetensors", policy="immutable", skip_cache=True)
    return made


def of_code(folder: Path, run_id: str) -> Any | None:
    """How files differ from the commit, as an artifact; None where that was not kept, or nothing differs."""
    import wandb as library

    file = surroundings.patch(folder)
    if file is None:
        return None
    made = library.Artifact(f"code-{_safe(run_id)}", type="code", description="git diff HEAD")
    made.add_file(str(file), name=file.name, policy="immutable", skip_cache=True)
    return made


def _table(table: Table) -> Any:
    import wandb as library

    return library.Table(columns=list(table.columns), data=[list(row) for row in table.rows])


def _chart(confusions: Confusions) -> Any:
    import wandb as library

    return library.plot.confusion_matrix(
        y_true=confusions.truth.tolist(), preds=confusions.told.tolist(), class_names=list(confusions.classes),
        title="Confusion matrix",
    )  # fmt: skip


def _pictures(pictures: Iterable[Picture]) -> Any:
    import wandb as library
    from PIL import Image

    def shown(picture: Picture) -> Any:
        if picture.jpeg is None:
            return None
        with Image.open(io.BytesIO(picture.jpeg)) as image:
            return library.Image(image.convert("RGB"), file_type="jpg")

    columns = ["id", "picture", "label", "prediction", "probability", "right"]
    rows = [[p.id, shown(p), p.label, p.told, p.probability, p.right] for p in pictures]
    return library.Table(columns=columns, data=rows)


def _safe(text: str) -> str:
    """As an artifact may be called."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)
