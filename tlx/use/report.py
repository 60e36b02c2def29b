"""The report's way into a network, and the report of a look at data, in a folder of its own beside the record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlx.base.files import write_whole
from tlx.base.terminal import escaped, say
from tlx.report import notes
from tlx.report.inside_report import Network, look_inside
from tlx.report.parts import LEAST_S, SHARE, Parts
from tlx.report.report import write_pages
from tlx.report.run_report import RunReport, add_inner, judge
from tlx.runs.history import read_history, shown
from tlx.runs.predictions import Part, Predictions
from tlx.runs.run_files import mapping

if TYPE_CHECKING:
    from tlx.data.shards.manifest import Manifest
    from tlx.data.stream.file_list import FileList
    from tlx.tasks.gathered import Scores
    from tlx.use.judged_data import JudgedData
    from tlx.use.model import Model


PREDICTIONS = "predictions.npz"


def opened(run: Path, source: Manifest | FileList) -> Network:
    """A run's best network, to be shown pictures of these.

    Raises:
        UserError: it has no weights that can be loaded.
    """
    from tlx.use.inside import Inside

    return Inside.of(run, source)


def folder_of(look: Mapping[str, Any]) -> Path:
    """Of a look that is recorded: its own, beside the record."""
    return Path(look["recorded"]).with_suffix("") / f"look-{look['look']}"


def keep_predictions(model: Model, data: JudgedData, scores: Scores, look: Mapping[str, Any]) -> None:
    """Writes what was told in a look into its folder, where the task says it; what cannot be written is told."""
    tell = getattr(model.task, "told", None)
    if tell is None:
        return
    told = tell(scores.output, scores.own, len(scores.ids))
    parts = [Part(about, {name: of.numpy() for name, of in arrays.items()}) for about, arrays in told]
    metrics = {f"val/{name}": value for name, value in mapping(look.get("lists")).items()}
    step, ids = look["weights"].get("step") or 0, scores.ids.numpy().astype(np.int64)
    found = Predictions("", "look", step, "", data.digest, None, len(data.source), metrics, ids, tuple(parts))
    try:
        folder_of(look).mkdir(parents=True, exist_ok=True)
        write_whole(folder_of(look) / PREDICTIONS, found.data())
    except OSError as error:
        say(f"warning: predictions of this look could not be written: {error}", error=True)


def report_look(
    run: Path, model: Model, data: JudgedData, told: Predictions, look: Mapping[str, Any], *, took_s: float
) -> Path:
    """Writes ``look-N/report.html``, ``report.md`` and ``figures/`` in the folder of these data; the page.

    Raises:
        UserError: it cannot be written.
    """
    from tlx.use.inside import Inside

    parts = Parts(max(LEAST_S, SHARE * took_s), "nothing")
    found = RunReport(read_history(run), f"Evaluation of {escaped(run.resolve().name)}", look=True)
    found.about, found.metrics = _about(look), _metrics(look["metrics"])
    found.metric_columns = ("", "value", f"95 % of {look['bootstrap']['resamples']:,} resamples")
    found.verdict, found.command = _verdict(look), str(look["command"])
    judge(found, told, data.source, parts)
    inside = Inside.around(run, model, data.source)
    add_inner(found, look_inside(told, inside, parts))
    found.notes = [note for note in _notes(found, told.parts, look) if note]
    found.left_out, found.seconds = parts.left_out, f"{time.monotonic() - parts.begun:.1f} s"
    return write_pages(folder_of(look), found)[-1]


def _notes(found: RunReport, parts: Sequence[Part], look: Mapping[str, Any]) -> list[str | None]:
    said: list[str | None] = []
    for target, part in zip(found.targets, parts, strict=False):
        said += [notes.never(target.by_class, part.about.task), notes.small_classes(target.by_class)]
        said += [notes.miscalibrated(*target.ece)] if target.ece is not None else []
    return [*said, notes.looked(look["look"], look["data"])]


def _about(look: Mapping[str, Any]) -> list[tuple[str, str]]:
    weights = look["weights"]
    step = f", step {weights['step']}" if weights.get("step") is not None else ""
    return [
        ("data", f"{look['data']}, {look['samples']:,} pictures"),
        ("weights", f"{weights['file']}{step}"),
        ("task", str(look["task"])),
        ("look", f"number {look['look']} at these data, {look['time']}"),
        ("left out", f"{len(look['skipped'])} pictures that cannot be read"),
        ("asked", "mirrored, too (the mean)" if look["tta"] else "once, as in training's evaluations"),
    ]


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    return [
        (name, shown(name, of["value"]), f"{shown(name, of['low'])} to {shown(name, of['high'])}")
        for name, of in metrics.items()
    ]


def _verdict(look: Mapping[str, Any]) -> str:
    metrics = look["metrics"]
    name = next((n for n in ("top1", "map", "score", "mae") if n in metrics), next(iter(metrics)))
    value, low, high = _metrics({name: metrics[name]})[0][1], metrics[name]["low"], metrics[name]["high"]
    said = f"On {look['samples']:,} pictures of {look['data']}, {name} is {value}"
    said += f" (95 %: {shown(name, low)} to {shown(name, high)})." if look["bootstrap"]["resamples"] else "."
    times = "the first look" if look["look"] == 1 else f"look {look['look']}"
    return f"{said} This is {times} at these data in this run."
