"""What a page says of one run, put together from its folder; part by part, so that what fails is told and the rest
stands."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlx.base.location import is_remote
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.report import figures, notes, run_facts
from tlx.report.chance import Difference, difference
from tlx.report.defaults_changed import changed
from tlx.report.inside_report import NOT_INSIDE, Inner, Network, is_single_class, look_inside
from tlx.report.parts import Parts
from tlx.report.plan_picture import picture
from tlx.report.run_facts import SAID_TASKS
from tlx.report.samples import Gallery, Pictures
from tlx.report.target_report import Figure, TargetReport, add_suspects, target_report, with_pictures
from tlx.report.verdict import verdict
from tlx.report.written_plan import WrittenPlan
from tlx.runs.history import History
from tlx.runs.predictions import Predictions, read
from tlx.runs.run_files import RunFiles, items, mapping, number

Open = Callable[[Manifest | FileList], Network]
"""Opens the network, to be shown pictures of these."""


@dataclass
class RunReport:
    """
    Attributes:
        look: of `tlx evaluate`, of its own data; else of the training.
        about, metrics, phases, speed, test: rows of tables.
        changed: what differs from the defaults; None where that is not known.
        figures: by name, which is also the file's in ``figures/``.
    """

    history: History
    name: str
    verdict: str = ""
    notes: list[str] = field(default_factory=list)
    about: list[tuple[str, str]] = field(default_factory=list)
    phases: list[tuple[str, ...]] = field(default_factory=list)
    phase_columns: tuple[str, ...] = ()
    best_weights: str = "raw"
    differences: list[str] = field(default_factory=list)
    metrics: list[tuple[str, ...]] = field(default_factory=list)
    metric_columns: tuple[str, ...] = ("", "value")
    test: list[tuple[str, ...]] = field(default_factory=list)
    speed: list[tuple[str, ...]] = field(default_factory=list)
    speed_columns: tuple[str, ...] = ()
    targets: list[TargetReport] = field(default_factory=list)
    maps: Gallery | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    changed: list[str] | None = None
    command: str = ""
    left_out: list[str] = field(default_factory=list)
    seconds: str = ""
    look: bool = False


def run_report(history: History, name: str, parts: Parts, *, network: Open | None = None) -> RunReport:
    """
    Args:
        parts: makes them, within its time.
        network: None: nothing is asked of the network.
    """
    found, config = RunReport(history, name), RunFiles(history.path).config
    _training(found, parts)
    best = _best(history)
    found.about = parts.make("what was trained on what", lambda: run_facts.about(history, config, best)) or []
    found.metrics = run_facts.metrics(history.best)
    found.test = run_facts.test(history)
    if best is not None:
        _told(found, best, config, parts, network)
    elif history.best is not None:
        parts.left_out.append(
            "classes, confusions, calibration, mistakes: the run has no predictions of its best evaluation (an earlier "
            "tlx, a task of your own without `told`, or a folder copied without predictions/); tlx evaluate judges it"
        )
    gains = parts.make("what each phase brought", lambda: _gains(history)) or []
    found.differences = [_gain_line(*gain) for gain in gains]
    found.notes = parts.make("notes", lambda: _notes(found, best, gains)) or []
    network_name = str(mapping(config.get("backbone")).get("name", "The network"))
    gain = gains[-1] if gains else None
    made = parts.make("verdict", lambda: verdict(history, best, gain, backbone=network_name))
    found.verdict = made or f"{network_name}: {history.state}."
    found.changed = parts.make("what differs from the defaults", lambda: changed(config))
    found.command = str(history.details.get("reproduce") or history.details.get("command") or "")
    found.left_out, found.seconds = parts.left_out, _seconds(parts)
    return found


def _seconds(parts: Parts) -> str:
    slowest = sorted(parts.took.items(), key=lambda part: -part[1])[:3]
    said = ", ".join(f"{what} {took:.1f} s" for what, took in slowest if took >= 0.5)
    return f"{time.monotonic() - parts.begun:.1f} s" + (f" ({said})" if said else "")


# The training


CAPTIONS = {
    "curves": "Loss, metric and learning rate over training",
    "tasks": "Each task over training",
    "plan": "The plan: which layer trains when, the colour its learning rate; grey is frozen",
    "phases": "Validation of each phase, best and last",
}


def _training(found: RunReport, parts: Parts) -> None:
    history = found.history
    drawn = {
        "curves": lambda: figures.curves(history),
        "tasks": lambda: figures.tasks(history),
        "plan": lambda: _plan(history),
        "phases": lambda: figures.phases(history),
    }
    for name, draw in drawn.items():
        png = parts.make(CAPTIONS[name], draw)
        if png is not None:
            found.figures[name] = Figure(png, CAPTIONS[name])
    found.best_weights = "EMA" if history.best is not None and history.best.weights == "ema" else "raw"
    found.phase_columns, found.phases = parts.make("phases", lambda: run_facts.phases(history)) or ((), [])
    found.speed_columns, found.speed = parts.make("speed", lambda: run_facts.speed(history)) or ((), [])


def _plan(history: History) -> bytes | None:
    plan = WrittenPlan.of(history.plan)
    return None if plan is None else picture(plan, title="The plan as it was made")


# What the network told


def _best(history: History) -> Predictions | None:
    """Those of the run's best evaluation."""
    best = history.best
    for phase in reversed(history.phases):
        found = read(history.path, phase.name) if best is not None else None
        if found is not None and best is not None and (found.step, found.weights) == (best.step, best.weights):
            return found
    return None


def _gains(history: History) -> list[tuple[str, str, Difference]]:
    """What each later phase brought over the best of those before, over the same pictures, of the first task."""
    known = [(p.name, p.best, read(history.path, p.name)) for p in history.phases]
    told = [
        (name, of) for name, best, of in known if best and of and (of.step, of.weights) == (best.step, best.weights)
    ]
    found = []
    for (before, first), (after, second) in itertools.pairwise(told):
        gain = difference(first, second)
        if gain is not None:
            found.append((before, after, gain))
    return found


def _gain_line(before: str, after: str, gain: Difference) -> str:
    points = "error" not in gain.unit

    def said(value: float) -> str:
        return f"{100 * value:+.1f}" if points else f"{value:+.3g}"

    pairs = "" if gain.gained is None else f"; {gain.gained} pictures only {after} has right, {gain.lost} only {before}"
    return (
        f"{after} against {before}, best against best on the same {gain.pictures:,} pictures: {said(gain.value)}"
        f"{' points' if points else ''} of {gain.unit} (95 %: {said(gain.low)} to {said(gain.high)}){pairs}."
    )


def _notes(found: RunReport, best: Predictions | None, gains: list[tuple[str, str, Difference]]) -> list[str]:
    history = found.history
    said = [notes.overfitting(history), notes.still_improving(history)]
    said += [notes.tuning(*gain) for gain in gains[-1:]]
    for target, part in zip(found.targets, best.parts if best is not None else (), strict=False):
        said += [
            notes.never(target.by_class, part.about.task),
            notes.too_few(part),
            notes.small_classes(target.by_class),
        ]
        said += [notes.miscalibrated(*target.ece)] if target.ece is not None else []
    test = mapping(history.details.get("test"))
    looks = _looks(history.path, test.get("digest"))
    said.append(
        notes.looked(max(looks, int(number(test.get("look")) if test.get("look") else 0)), str(test.get("data")))
    )
    return [note for note in said if note]


def _looks(run: Path, digest: Any) -> int:
    """How often data were looked at, by what `tlx evaluate` has recorded."""
    files = sorted((run / "evaluations").glob("*.json")) if digest else []
    found = [RunFiles(run).read(f"evaluations/{file.name}") for file in files]
    return max((len(items(f.get("looks"))) for f in found if f.get("digest") == digest), default=0)


def _told(found: RunReport, best: Predictions, config: dict[str, Any], parts: Parts, network: Open | None) -> None:
    source = parts.make("pictures", lambda: _source(config, best))
    judge(found, best, source, parts)
    if source is None or network is None:
        return
    if not is_single_class(best):
        parts.left_out.append(NOT_INSIDE)
        return
    inside = parts.make("the network", lambda: network(source), needs_s=6.0)
    if inside is not None:
        add_inner(found, look_inside(best, inside, parts))


def add_inner(found: RunReport, inner: Inner) -> None:
    found.maps = inner.maps
    if inner.embedding is not None:
        found.figures["embedding"] = inner.embedding


def judge(found: RunReport, best: Predictions, source: Manifest | FileList | None, parts: Parts) -> None:
    """A section for each target of these predictions.

    Args:
        source: of their pictures.
    """
    pictures = Pictures(source) if source is not None else None
    if len(best.parts) > SAID_TASKS:
        parts.left_out.append(f"{len(best.parts) - SAID_TASKS} of {len(best.parts)} tasks, the last ones")
    for part in best.parts[:SAID_TASKS]:
        target = parts.make(
            f"classes of {part.about.task or part.about.target}",
            functools.partial(target_report, part, best.ids, best.metrics, parts),
        )
        if target is None:
            continue
        add_suspects(target, part, best.ids, parts)
        parts.make("pictures", functools.partial(with_pictures, target, pictures))
        found.targets.append(target)
        found.figures |= target.figures


def _source(config: dict[str, Any], best: Predictions) -> Manifest | None:
    """The validation shards.

    Raises:
        UserError: they are not there.
        ValueError: they are others now, or lie elsewhere.
    """
    location = mapping(config.get("data")).get("val")
    if not isinstance(location, str):
        return None
    if is_remote(location):
        raise ValueError("the validation shards are remote, and are not fetched for a page")
    manifest = Manifest.open(location)
    if manifest.digest != best.digest:
        raise ValueError("the validation shards are others now than in training")
    return manifest
