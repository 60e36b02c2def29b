"""Rows of a page's tables: what a run was trained on, its phases, its speed, its metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tlx.base.terminal import clock
from tlx.runs.history import Evaluation, History, shown
from tlx.runs.predictions import Predictions
from tlx.runs.run_files import mapping, number, test_values

SAID_TASKS = 12
"""Of more tasks the page shows these."""


def phases(history: History) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    metric = history.shown
    columns = ("phase", "epochs", f"best {metric}", "at epoch", f"last {metric}", "best val/loss", "last val/loss")
    rows: list[tuple[str, ...]] = []
    for phase in history.phases:
        if phase.best is None and phase.last is None:
            continue
        label = next((a.label for a in history.accuracies if a.phase == phase.name), phase.name)
        span = f"{history.epoch(phase.start):.3g} to {history.epoch(phase.stop):.3g}"
        at = f"{history.epoch(phase.best.step):.3g}" if phase.best else "-"
        so_far = "" if phase.over else " so far"
        best, last = _value(phase.best, metric), _value(phase.last, metric) + so_far
        losses = _value(phase.best, "val/loss"), _value(phase.last, "val/loss")
        rows.append((label, span, best, at, last, *losses))
    return columns, rows


def _value(evaluation: Evaluation | None, name: str) -> str:
    return shown(name, evaluation.value(name)) if evaluation is not None else "-"


_SPEED = {
    "time/images_per_s": "pictures a second",
    "time/step_s": "seconds a step",
    "time/data_wait": "share of a step that waits for data",
    "memory/peak_gib": "GPU memory, peak (GiB)",
    "memory/process_gib": "memory of the first process (GiB)",
}


def speed(history: History) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Means of what rows tell of the machine, by phase."""
    skip = ("time/left_s",)
    keys = list(
        dict.fromkeys(k for r in history.rows for k in r if k.startswith(("time/", "memory/")) and k not in skip)
    )
    if not keys:
        return None
    rows = []
    for phase in history.phases:
        own = [r for r in history.rows if phase.start < r["step"] <= phase.stop]
        values = [[r[k] for r in own if k in r and math.isfinite(r[k])] for k in keys]
        means = (_mean(key, v) for key, v in zip(keys, values, strict=True))
        rows.append((phase.name, *("-" if math.isnan(mean) else f"{mean:.4g}" for mean in means)))
    return ("phase", *(_SPEED.get(key, key) for key in keys)), rows


def _mean(key: str, values: Sequence[float]) -> float:
    """The harmonic one of rates, so that they and seconds agree; of memory the highest."""
    if not values:
        return math.nan
    if key.startswith("memory/"):
        return max(values)
    return statistics.harmonic_mean(values) if key == "time/images_per_s" else statistics.fmean(values)


def metrics(best: Evaluation | None) -> list[tuple[str, ...]]:
    found = best.metrics if best is not None else {}
    return [(n, shown(n, v)) for n, v in found.items() if n.rpartition("/")[2] not in ("samples", "nonfinite")]


def test(history: History) -> list[tuple[str, ...]]:
    texts = {name: [shown(name, of) for of in values] for name, values in test_values(history.details).items()}
    return [(name, f"{value} ({low} to {high})") for name, (value, low, high) in texts.items()]


def about(history: History, config: dict[str, Any], best: Predictions | None) -> list[tuple[str, str]]:
    data, backbone, size = mapping(config.get("data")), mapping(config.get("backbone")), mapping(config.get("input"))
    task = mapping(config.get("task")).get("name", "classification")
    weights = backbone.get("weights", "default")
    rows = [
        ("backbone", f"{backbone.get('name', '-')}, {'random weights' if weights == 'none' else f'weights {weights}'}"),
        ("task", f"{task}" + (f": {_names(best)}" if best is not None else "")),
        ("training data", f"{data.get('train', '-')}, {_count(history.plan.get('samples'))} pictures an epoch"),
        (
            "validation data",
            f"{data.get('val') or 'none'}" + (f", {best.samples:,} pictures" if best is not None else ""),
        ),
        ("input", f"{size.get('size') or 'as the weights were trained with'}"),
        (
            "epochs",
            f"{history.epoch(history.step):.4g} done ({history.step:,} steps, batch {history.plan.get('batch', '-')})",
        ),
        ("time", f"{clock(history.number('wall_time_s'))}, {_count(history.number('samples_seen'))} pictures seen"),
    ]
    if data.get("test"):
        rows.insert(4, ("test data", str(data["test"])))
    return rows


def _names(best: Predictions) -> str:
    said = []
    for part in best.parts[:SAID_TASKS]:
        count = len(part.names)
        kinds = {"class": "classes", "rank": "ranks", "labels": "labels", "number": "numbers"}
        few = f" ({', '.join(part.names)})" if count <= 12 else f" ({', '.join(part.names[:6])} ...)"
        said.append((f"{part.about.task}: " if part.about.task else "") + f"{count} {kinds[part.kind]}{few}")
    return "; ".join(said)


def _count(value: Any) -> str:
    found = number(value)
    return f"{found:,.0f}" if math.isfinite(found) else "-"
