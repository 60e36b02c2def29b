"""What a page says of one run, put together from its folder; part by part, so that what fails is told and the rest
stands."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tlx.base.location import is_remote
from tlx.base.terminal import clock
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.report import figures, notes
from tlx.report.chance import Difference, difference
from tlx.report.defaults_changed import changed
from tlx.report.parts import Parts
from tlx.report.plan_picture import picture
from tlx.report.samples import Gallery, Pictures, maps_for, of_maps, some
from tlx.report.target_report import Figure, TargetReport, add_suspects, target_report, with_pictures
from tlx.report.told_figures import embedding
from tlx.report.verdict import verdict
from tlx.report.written_plan import WrittenPlan
from tlx.runs.history import Evaluation, History, shown
from tlx.runs.predictions import Part, Predictions, read
from tlx.runs.run_files import RunFiles, items, mapping, number, test_values

EMBEDDED = 1000
"""Pictures of the map."""

SAID_TASKS = 12
"""Of more tasks the page shows these."""


class Network(Protocol):
    """A run's best network; see :class:`tlx.use.inside.Inside`."""

    def features(self, ids: NDArray[np.int64], until: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...

    def maps(self, wanted: Sequence[tuple[int, int]], until: float) -> list[tuple[int, NDArray[np.uint8]]]: ...


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
    found.about = parts.make("what was trained on what", lambda: _about(history, config, best)) or []
    found.metrics = _metrics(history.best)
    found.test = _test(history)
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
        "phases": lambda: figures.phases([history], [found.name]),
    }
    for name, draw in drawn.items():
        png = parts.make(CAPTIONS[name], draw)
        if png is not None:
            found.figures[name] = Figure(png, CAPTIONS[name])
    found.best_weights = "EMA" if history.best is not None and history.best.weights == "ema" else "raw"
    found.phase_columns, found.phases = parts.make("phases", lambda: _phases(history)) or ((), [])
    found.speed_columns, found.speed = parts.make("speed", lambda: _speed(history)) or ((), [])


def _plan(history: History) -> bytes | None:
    plan = WrittenPlan.of(history.plan)
    return None if plan is None else picture(plan, title="The plan as it was made")


def _phases(history: History) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    metric = history.shown
    columns = ("phase", "epochs", f"best {metric}", "at epoch", f"last {metric}", "best val/loss", "last val/loss")
    rows = []
    for phase in history.phases:
        if phase.best is None and phase.last is None:
            continue
        label = next((a.label for a in history.accuracies if a.phase == phase.name), phase.name)
        span = f"{history.epoch(phase.start):.3g} to {history.epoch(phase.stop):.3g}"
        best, last = ((lambda name, e=e: shown(name, e.value(name)) if e else "-") for e in (phase.best, phase.last))
        at = f"{history.epoch(phase.best.step):.3g}" if phase.best else "-"
        so_far = "" if phase.over else " so far"
        rows.append((label, span, best(metric), at, last(metric) + so_far, best("val/loss"), last("val/loss")))
    return columns, rows


_SPEED = {
    "time/images_per_s": "pictures a second",
    "time/step_s": "seconds a step",
    "time/data_wait": "waiting for data",
}


def _speed(history: History) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
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
        means = (
            max(v) if key.startswith("memory/") and v else sum(v) / len(v) if v else math.nan
            for key, v in zip(keys, values, strict=True)
        )
        rows.append((phase.name, *("-" if math.isnan(mean) else f"{mean:.4g}" for mean in means)))
    return ("phase", *(_SPEED.get(key, key) for key in keys)), rows


def _metrics(best: Evaluation | None) -> list[tuple[str, ...]]:
    found = best.metrics if best is not None else {}
    return [(n, shown(n, v)) for n, v in found.items() if n.rpartition("/")[2] not in ("samples", "nonfinite")]


def _test(history: History) -> list[tuple[str, ...]]:
    texts = {name: [shown(name, of) for of in values] for name, values in test_values(history.details).items()}
    return [(name, f"{value} ({low} to {high})") for name, (value, low, high) in texts.items()]


def _about(history: History, config: dict[str, Any], best: Predictions | None) -> list[tuple[str, str]]:
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
    inside = parts.make("the network", lambda: network(source), needs_s=6.0)
    if inside is not None:
        look_inside(found, best, inside, source, parts)


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
            lambda part=part: target_report(part, best.ids, best.metrics, parts),
        )
        if target is None:
            continue
        add_suspects(target, part, best.ids, parts)
        parts.make("pictures", lambda target=target: with_pictures(target, pictures))
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


# Inside the network


def look_inside(
    found: RunReport, best: Predictions, inside: Network, source: Manifest | FileList, parts: Parts
) -> None:
    """Maps of a few pictures, and a map of many, of the first target that is a class."""
    part = next((p for p in best.parts if p.kind == "class"), None)
    if part is None or len(best.parts) > 1:
        parts.left_out.append("attention maps and the map of pictures: they are drawn of a single classification")
        return
    found.maps = parts.make("attention maps", lambda: _maps(part, best, inside, source, parts), needs_s=5.0)
    png = parts.make("map of pictures", lambda: _embedded(part, best, inside, parts), needs_s=5.0)
    if png is not None:
        caption = (
            "Validation pictures by what reaches the head (t-SNE of their features): what is near is alike to the "
            "network. A ring is a mistake; distances between groups mean little."
        )
        found.figures["embedding"] = Figure(png, caption)


def _maps(part: Part, best: Predictions, inside: Network, source: Manifest | FileList, parts: Parts) -> Gallery | None:
    wanted = maps_for(part, best.ids)
    until = time.monotonic() + (parts.until - time.monotonic()) / 2
    drawn = inside.maps([(place, output) for place, output, _, _ in wanted], until)
    said = {place: (lines, kind) for place, _, lines, kind in wanted}
    return of_maps(drawn, said) if drawn else None


def _embedded(part: Part, best: Predictions, inside: Network, parts: Parts) -> bytes | None:
    """t-SNE of at most 50 principal components (van der Maaten & Hinton 2008).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = some(part, EMBEDDED)
    left = parts.until - time.monotonic()
    ids, features = inside.features(best.ids[chosen], time.monotonic() + 0.6 * left)
    if len(ids) < 10:
        return None
    rows = np.searchsorted(best.ids, ids)
    few = min(50, *features.shape)
    reduced = PCA(few, random_state=0).fit_transform(features.astype(np.float64))
    places = TSNE(2, perplexity=min(30.0, (len(ids) - 1) / 3), init="pca", random_state=0).fit_transform(reduced)
    return embedding(places, part, rows)
