"""`tlx evaluate`: how good a trained model is on data, with intervals; each look is recorded in the run.

Scores are gathered over ranks, pictures are not: every rank then has the same numbers in the same order, however many
there are.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlx.base.errors import UserError
from tlx.base.files import json_text, scratch, sha256_of, write_whole
from tlx.base.location import command_line, shown
from tlx.base.location import place as place_of
from tlx.base.locks import locked_folder
from tlx.base.parsing import from_json
from tlx.base.terminal import remark, say
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.data.stream.reader import BadSample
from tlx.ranks.collectives import World
from tlx.ranks.sharing import join_sharing
from tlx.ranks.together import by_main, together
from tlx.runs.predictions import read_file
from tlx.runs.run_files import RunFiles, mapping
from tlx.tasks.classification import Classification
from tlx.tasks.gathered import Scores
from tlx.use import temperature
from tlx.use.asked import name_of
from tlx.use.judged import SEED, Classified, drawn, fitted_temperature, largest_confusions, with_interval
from tlx.use.judged_data import JudgedData, Reading, data_of, scored
from tlx.use.load import Which, find_file, load
from tlx.use.model import Model
from tlx.use.report import PREDICTIONS, folder_of, keep_predictions, report_look
from tlx.use.row_text import RowText, format_of, refuse_output, written

FOLDER = "evaluations"

_MATRIX = 100  # classes; of more, only confusions that happened are kept
_ROWS = 4096


@dataclass(frozen=True)
class Options:
    """What is asked for besides the model.

    Attributes:
        data: shards, or a folder of class folders; None: the run's own validation data.
        out: a file of predictions to write.
        bootstrap: resamples for intervals; 0 for none.
    """

    data: str | None = None
    out: Path | None = None
    bootstrap: int = 1000
    reading: Reading = field(default_factory=Reading)


def evaluate(
    place: Path, options: Options, *, which: Which = "best", device: str | None = None, trusted: bool = False
) -> dict[str, Any] | None:
    """Judges a model, records it in its run, and writes the predictions that were asked for.

    Returns:
        What :data:`FOLDER` has of it; None on other ranks than the first.

    Raises:
        UserError: no model, no data, other classes, a picture that cannot be read, a run that cannot be written.
    """
    world = join_sharing()
    try:
        by_main(world, lambda: refuse_output(options.out))
        model = together(world, lambda: load(place, which=which, device=device or str(world.device), trusted=trusted))
        weights = find_file(place, which)[0]
        look = Look(model, weights, by_main(world, lambda: hash_of(weights)), run_of(place), options, world)
        data = look.opened()
        found = look.taken(data)
    finally:
        world.close()
    return look.reported(data, found) if world.main else None  # the other ranks do not wait


def run_of(place: Path) -> Path | None:
    """The run that a folder is, or that a checkpoint or a file of weights lies in."""
    for folder in (place, *list(place.absolute().parents)[:3]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


@dataclass(frozen=True)
class AtTheEnd:
    """What a training looks with at its end, where its shards are open already.

    Attributes:
        step: at which it has ended.
        accept: hears which pictures cannot be read, the same on every rank; raises a UserError for too many.
    """

    data: JudgedData
    validation: JudgedData | None
    step: int
    accept: Callable[[Sequence[BadSample]], None]


@dataclass(frozen=True)
class Look:
    """One evaluation.

    Attributes:
        sha256: of the file of weights.
        run: None where the file lies in none: nothing is recorded then.
        end: of the training that looks; None of `tlx evaluate`.
    """

    model: Model
    weights: Path
    sha256: str
    run: Path | None
    options: Options
    world: World
    end: AtTheEnd | None = None
    begun: float = field(default_factory=time.monotonic)

    def taken(self, data: JudgedData | None = None) -> dict[str, Any]:
        """What is recorded, on every rank.

        Args:
            data: as :meth:`opened` gives them, where somebody needs them afterwards.
        """
        end, faults = self.end, self.options.reading.faults
        if data is None:
            data = end.data if end is not None else self.opened()
        by_main(self.world, self._say_read_only)
        recorded = by_main(self.world, lambda: self._of_before(data), faults=faults)
        if recorded is not None:
            return recorded
        scores, bad = scored(self.model, data, self.options.reading, self.world)
        if end is not None:
            end.accept(bad)
        skipped = [str(one) for one in bad]
        if end is None and self.world.main:
            for text in skipped:
                say(f"skipped: {text}", error=True)
        scaling = self._temperature(data, scores) if isinstance(self.model.task, Classification) else {}
        together(self.world, self.options.reading.between)
        return by_main(self.world, lambda: self._told(data, scores, skipped, scaling), faults=faults)

    def opened(self) -> JudgedData:
        """The data that were asked for."""
        location = together(self.world, self._location)
        return together(self.world, lambda: data_of(location, self.model))

    def reported(self, data: JudgedData, look: dict[str, Any]) -> dict[str, Any]:
        """The same with the path of the page, which is a courtesy: what fails is told."""
        told = read_file(folder_of(look) / PREDICTIONS) if "recorded" in look else None
        if self.run is None or told is None:
            return look
        took_s = time.monotonic() - self.begun
        try:
            return {**look, "report": str(report_look(self.run, self.model, data, told, look, took_s=took_s))}
        except Exception as error:
            say(f"warning: no report was drawn ({' '.join(str(error).split()) or type(error).__name__})", error=True)
            return look

    def _of_before(self, data: JudgedData) -> dict[str, Any] | None:
        """The look at the end of this very training, where it was recorded and nobody could be told: killed, or no room
        for the result."""
        if self.run is None or self.end is None:
            return None
        file, looks = _looks(self.run / FOLDER, data)
        for number, look in enumerate(looks, 1):
            if (look.get("training_ended"), look["weights"]["sha256"]) == (self.end.step, self.sha256):
                return {**look, "recorded": str(file), "look": number}
        return None

    def _say_read_only(self) -> None:
        if self.run is not None and not self._records:
            say(f"note: this look is not recorded, since the run cannot be written: {self.run}", error=True)

    @property
    def _records(self) -> bool:
        """Whether the run's folder can be written; asked on the first rank."""
        run = self.run
        return run is not None and all(os.access(at, os.W_OK) for at in (run, run / FOLDER) if at.exists())

    def _told(self, data: JudgedData, scores: Scores, skipped: list[str], scaling: Mapping[str, Any]) -> dict[str, Any]:
        found = self._about(data, scores, skipped)
        if isinstance(self.model.task, Classification):
            found |= _classified(self.model.task, scores, self.options, scaling)
        else:
            found |= _by_meter(self.model, scores, replace(self.options, bootstrap=self._resamples))
        if self.options.out is not None:
            with written(self.options.out):
                _write(self.options.out, self.model, data.source, scores)
        if self.run is not None and self._records:
            with written(self.run):
                found |= _record(self.run, data, found)
            keep_predictions(self.model, data, scores, found)
        return found

    def _location(self) -> str:
        if self.options.data is not None:
            return self.options.data
        own = mapping(RunFiles(self.run).config.get("data")) if self.run is not None else {}
        validation, test = own.get("val"), own.get("test")
        if not isinstance(validation, str):
            what = "the run has no data.val" if self.run is not None else "it lies in no run, which would name its data"
            raise UserError(what, where=str(self.run or self.weights), todo="--data SHARDS|FOLDER")
        if self.world.main:
            remark(f"data: the run's own data.val, {shown(validation)}")
            if isinstance(test, str):
                remark(f"note: it has a data.test, too: --data {shlex.quote(shown(test))}")
        return str(place_of(validation))

    @property
    def _resamples(self) -> int:
        """None where the task says itself how sure its metrics are."""
        return 0 if getattr(self.model.task, "own_interval", False) else self.options.bootstrap

    def _about(self, data: JudgedData, scores: Scores, skipped: list[str]) -> dict[str, Any]:
        reading, provenance = self.options.reading, self.model.description.provenance
        return {
            "data": data.name,
            "digest": data.digest,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command_line(["tlx", *sys.argv[1:]]),
            "weights": {"file": str(self.weights), "sha256": self.sha256, "step": provenance.get("step")},
            "task": self.model.description.task["name"],
            "samples": len(scores.ids),
            "skipped": skipped,
            "batch": reading.batch or self.model.description.batch,
            "tta": "flip" if reading.flip else None,
            "bootstrap": {"resamples": self._resamples, "seed": SEED},
            **({"training_ended": self.end.step} if self.end is not None else {}),
        }

    # Temperature: fitted on the run's validation data alone, whatever is judged

    def _temperature(self, data: JudgedData, scores: Scores) -> dict[str, Any]:
        """From the run's folder, where it was fitted for these weights before; empty where it cannot be."""
        run, tta = self.run, "flip" if self.options.reading.flip else None
        if run is None:
            return {}
        kept = by_main(self.world, lambda: temperature.kept(run, self.sha256, tta))
        found = self._fitted(run, data, scores, tta) if kept is None else kept
        if not found:
            return {}
        by_main(self.world, lambda: self._keep(run, found), faults=self.options.reading.faults)
        return found | {"judged": found["digest"] == data.digest}

    def _fitted(self, run: Path, data: JudgedData, scores: Scores, tta: str | None) -> dict[str, Any]:
        validation = self.end.validation if self.end is not None else self._validation(run)
        if validation is None:
            return {}
        if validation.digest != data.digest:
            of_validation = self._of_validation(validation)
            if of_validation is None:
                return {}
            scores = of_validation
        logits, labels = _known(self.model.task, scores)
        if not len(labels):
            return {}
        about = {"data": validation.name, "digest": validation.digest, "samples": len(labels)}
        fitted = together(self.world, lambda: fitted_temperature(logits, labels), faults=self.options.reading.faults)
        return {"temperature": fitted, "weights": self.sha256, "tta": tta, **about}

    def _of_validation(self, validation: JudgedData) -> Scores | None:
        reading = replace(self.options.reading, skip_bad=True)
        try:
            scores, bad = scored(self.model, validation, reading, self.world)
        except UserError as error:
            together(self.world, reading.between)  # a stop that was asked for ends the look
            if self.world.main:
                say(f"note: no temperature is fitted: {error}", error=True)
            return None
        if bad and self.world.main:
            say(f"note: the temperature is fitted without {len(bad)} validation pictures: {bad[0]} ...", error=True)
        return scores

    def _keep(self, run: Path, found: Mapping[str, Any]) -> None:
        if not self._records:
            return
        with written(run):
            if temperature.kept(run, self.sha256, found["tta"]) is None:
                temperature.keep(run, found)
            if found["tta"] is None:
                step = self.model.description.provenance.get("step")
                temperature.tell_model(run, self.weights, step, found["temperature"])

    def _validation(self, run: Path) -> JudgedData | None:
        location = mapping(RunFiles(run).config.get("data")).get("val")
        if not isinstance(location, str):
            return None
        try:
            return together(self.world, lambda: data_of(str(place_of(location)), self.model))
        except UserError as error:
            if self.world.main:
                say(f"note: no temperature, since the run's validation data are not there: {error}", error=True)
            return None


def hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return sha256_of(opened)


# Metrics


def _known(task: Any, scores: Scores) -> tuple[Tensor, Tensor]:
    """Logits and classes of pictures that have a class."""
    labels = scores.own[task.target.name]
    return scores.output[labels >= 0].double(), labels[labels >= 0]


def _classified(task: Classification, scores: Scores, options: Options, scaling: Mapping[str, Any]) -> dict[str, Any]:
    logits, labels = _known(task, scores)
    if not len(labels):
        raise UserError("none of these pictures has a class")
    judged = Classified(logits, labels, task.top_k, scaling.get("temperature"))
    by_class, confusion = judged.by_class(), judged.confusion()
    intervals = judged.intervals(options.bootstrap, options.reading.between)
    names = dict(enumerate(task.classes))
    return {
        "metrics": {name: interval.data() for name, interval in intervals.items()},
        "classes": list(task.classes),
        "pictures": judged.counts.tolist(),
        "per_class": {name: values.tolist() for name, values in by_class.items()},
        "confusions": largest_confusions(confusion, names),
        **({"confusion": confusion.tolist()} if len(task.classes) <= _MATRIX else {}),
        "temperature": dict(scaling) or None,
    }


def _by_meter(model: Model, scores: Scores, options: Options) -> dict[str, Any]:
    """The task's own metrics; a resample is judged as if it were the data."""
    whole = _metered(model, scores)
    points = {name: float(value) for name, value in whole.items() if not isinstance(value, list)}
    counts = {name: points.pop(name) for name in ("samples", "nonfinite") if name in points}
    values: dict[str, list[float]] = {name: [] for name in points}
    for block in drawn(len(scores.ids), options.bootstrap):
        options.reading.between()
        for places in block:
            own = {name: of[places] for name, of in scores.own.items()}
            found = _metered(model, Scores(scores.output[places], own, torch.arange(len(places))))
            for name, of_all in values.items():
                of_all.append(float(found.get(name, float("nan"))))
    metrics = {name: with_interval(value, torch.tensor(values[name]).double()) for name, value in points.items()}
    lists = {name: value for name, value in whole.items() if isinstance(value, list)}
    names = {name: list(of) for name, of in model.task.lists.items()}
    return {"metrics": {n: i.data() for n, i in metrics.items()}, "counts": counts, "lists": lists, "names": names}


def _metered(model: Model, scores: Scores) -> dict[str, Any]:
    meter = model.task.meter(torch.device("cpu"))
    meter.update(scores.output, scores.own, scores.ids)
    return meter.result()


# What is kept


def _record(run: Path, data: JudgedData, look: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a look to the file of its data; which that is, and how many looks there are.

    Raises:
        UserError: somebody else writes there.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    with locked_folder(folder, "another evaluation writes here", todo="try again"):
        file, before = _looks(folder, data)
        looks = [*before, dict(look)]
        write_whole(file, json_text({"data": data.name, "digest": data.digest, "looks": looks}))
    return {"recorded": str(file), "look": len(looks)}


def _looks(folder: Path, data: JudgedData) -> tuple[Path, list[dict[str, Any]]]:
    """The file of these data, and the looks at them so far."""
    for file in sorted(folder.glob("*.json")):
        before = _read(file) or {}
        if before.get("digest") == data.digest:
            return file, before.get("looks") or []
    return next(file for file in _files(folder, data.name) if not file.exists()), []


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Where looks at data of this name may be kept: other data may have had it."""
    parts = re.split(r"[^A-Za-z0-9._-]+", name)
    stem = "-".join([part for part in parts if part.strip(".-")][-2:])[-80:] or "data"
    yield folder / f"{stem}.json"
    number = 1
    while True:
        number += 1
        yield folder / f"{stem}-{number}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """None where there is none; of one that is damaged nothing, and it is kept."""
    with suppress(FileNotFoundError):
        try:
            found = from_json(file.read_bytes())
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}
    return None


def _write(out: Path, model: Model, source: Manifest | FileList, scores: Scores) -> None:
    """The predictions: a row for each picture, with its truth."""
    first = next(_rows(model, source, scores, slice(0, 1)))
    text = RowText(format_of(out), first)
    with scratch(out) as beside:
        part = beside.with_name(f"{beside.name}.part")
        try:
            with part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                for at in range(0, len(scores.ids), _ROWS):
                    file.write(text.text(list(_rows(model, source, scores, slice(at, at + _ROWS)))))
            with beside.open("wb") as whole:
                text.join([part], whole)
                whole.flush()
                os.fsync(whole.fileno())
        finally:
            part.unlink(missing_ok=True)
        os.replace(beside, out)


def _rows(model: Model, source: Manifest | FileList, scores: Scores, some: slice) -> Iterator[dict[str, Any]]:
    output, task = scores.output[some], model.task
    names = [name_of(source, place) for place in scores.ids[some].tolist()]
    if not isinstance(task, Classification):
        truths = {name: values[some].tolist() for name, values in scores.own.items()}
        for i, row in enumerate(task.rows(output, model.description.kept)):
            yield {"file": names[i], **{f"true/{name}": values[i] for name, values in truths.items()}, **row}
        return
    labels, shares = scores.own[task.target.name][some].tolist(), output.double().softmax(1)
    for name, label, told, p in zip(names, labels, output.argmax(1).tolist(), shares.tolist(), strict=True):
        true = task.classes[label] if label >= 0 else ""
        probabilities = dict(zip(task.classes, p, strict=True))
        yield {"file": name, "label": true, "predicted": task.classes[told], "probabilities": probabilities}
