"""What a phase has come to, for trackers: tables, confusions, pictures with predictions. Told when a phase ends, and
read from the run folder later, so that a start that goes on and ``tlx track sync`` have the same."""

from __future__ import annotations

import contextlib
import io
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.errors import TlxError
from tlx.base.files import write_whole
from tlx.base.metrics import metrics_of
from tlx.runs.run_files import RunFiles, mapping, whole

if TYPE_CHECKING:
    from tlx.data.shards.manifest import Manifest
    from tlx.report.classes import ClassRow
    from tlx.runs.predictions import Part, Predictions

PICTURES = "predictions/pictures"
"""Thumbnails of the pictures that trackers show, by their id in the validation shards."""

EVEN, MISTAKES = 24, 8
"""Pictures of a phase: the same ones in each, evenly over all, and its most confident mistakes."""

SIDE = 160
"""Pixels of a thumbnail's longer side."""

_THUMBNAILS = threading.Lock()
"""Several trackers make the same ones, each in its thread."""

LISTED = 200
"""Rows of a list of confusions."""


@dataclass(frozen=True)
class Table:
    """Rows under named columns; texts and numbers, None for what is not known."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Confusions:
    """Counts by class, of the truth (row) and of what was told (column): `matrix` is int64 [classes, classes].

    Attributes:
        largest: of one class told as another, the most frequent first.
    """

    name: str
    classes: tuple[str, ...]
    matrix: Any
    truth: Any
    told: Any
    largest: Table


@dataclass(frozen=True)
class Picture:
    """A validation picture: its id, what it is, what was told and with which probability, each in words.

    Attributes:
        jpeg: None where it cannot be read, or is not in the run folder.
        right: None where that cannot be said.
    """

    id: int
    label: str
    told: str
    probability: float | None
    right: bool | None
    jpeg: bytes | None


@dataclass(frozen=True)
class PhaseEnd:
    """A phase that has ended. What is read of files is read when it is asked for.

    Attributes:
        folder: the run's.
        name, index: the phase and its place, from 0. step: its last; start: its first.
        best, last: its evaluations, as result.json has them; empty without validation data.
        shards: of validation; None when it is read later, from the run folder alone.
    """

    folder: Path
    name: str
    index: int
    start: int
    step: int
    best: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    shards: Manifest | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Of its last evaluation, by the raw weights: ``val/top1`` ..."""
        return _numbers(metrics_of(self.last, "raw"))

    @property
    def best_metrics(self) -> dict[str, float]:
        """Of its best evaluation."""
        return _numbers({k: v for k, v in self.best.items() if k.startswith("val/")})

    @cached_property
    def predictions(self) -> Predictions | None:
        """Of its last evaluation, by the raw weights; None where the folder does not have them."""
        from tlx.runs.predictions import read

        found = read(self.folder, self.name, "last")
        return found if found is not None and found.matches({"step": self.step}) else None

    def tables(self) -> list[Table]:
        """By class (label, rank): support, precision, recall and F1; one for each of several tasks."""
        from tlx.report.classes import by_class

        columns = ("class", "support", "told", "precision", "recall", "f1")
        return [
            Table(_named("per_class", part), columns, tuple(_row(row) for row in by_class(part)))
            for part in self._parts("class", "rank", "labels")
        ]

    def confusions(self) -> list[Confusions]:
        """Of one class or rank per picture; one for each of several tasks."""
        from tlx.report.classes import confusion, largest_confusions

        found = []
        for part in self._parts("class", "rank"):
            rows = tuple((c.truth, c.told, c.pictures, c.of) for c in largest_confusions(part, LISTED))
            largest = Table(_named("largest_confusions", part), ("truth", "told", "pictures", "of"), rows)
            counted = part.known & (part.told >= 0)
            own = (part.truth[counted], part.told[counted])
            found.append(Confusions(_named("confusion_matrix", part), part.names, confusion(part), *own, largest))
        return found

    def pictures(self) -> list[Picture]:
        """At most `EVEN` + `MISTAKES`, of the first task; thumbnails are kept in the run folder."""
        if self.predictions is None or not self.predictions.parts:
            return []
        part, ids = self.predictions.parts[0], self.predictions.ids
        chosen = _chosen(part, len(ids))
        return [Picture(int(ids[place]), *_words(part, place), self._thumbnail(int(ids[place]))) for place in chosen]

    def _parts(self, *kinds: str) -> Iterator[Part]:
        parts = self.predictions.parts if self.predictions is not None else ()
        return (part for part in parts if part.kind in kinds)

    def _thumbnail(self, place: int) -> bytes | None:
        with _THUMBNAILS:
            file = self.folder / PICTURES / f"{place}.jpg"
            with contextlib.suppress(OSError):
                return file.read_bytes()
            return self._made(place, file) if self.shards is not None else None

    def _made(self, place: int, file: Path) -> bytes | None:
        """A thumbnail from the shards; kept where that can be."""
        assert self.shards is not None
        # Pillow raises all of these
        with contextlib.suppress(OSError, ValueError, SyntaxError, TlxError, MemoryError):
            from tlx.data.stream.reader import ShardReader

            small = _small(ShardReader(self.shards).read(place))
            with contextlib.suppress(OSError):
                file.parent.mkdir(exist_ok=True)  # not its parents: a run folder that was removed stays so
                write_whole(file, small)
            return small
        return None


def phase_ends(folder: Path) -> list[PhaseEnd]:
    """The phases of a run folder that have ended, as its result says, or its newest checkpoint."""
    files = RunFiles(folder)
    told = files.result or mapping(files.checkpoint.get("progress"))
    reached, phases = whole(told.get("step")) or 0, mapping(told.get("phases"))
    planned = [str(phase.get("name")) for phase in files.plan.get("phases") or () if isinstance(phase, dict)]
    found = []
    for place, (name, about) in enumerate((name, mapping(about)) for name, about in phases.items()):
        start, stop = whole(about.get("start")) or 0, whole(about.get("stop"))
        if stop is not None and 0 < stop <= reached:
            index = planned.index(name) if name in planned else place
            best, last = mapping(about.get("best")), mapping(about.get("last"))
            found.append(PhaseEnd(folder, name, index, start, stop, best, last))
    return found


def _row(row: ClassRow) -> tuple[Any, ...]:
    return (row.name, row.support, row.told, *map(_finite, (row.precision, row.recall, row.f1)))


def _named(table: str, part: Part) -> str:
    return f"{table}/{part.about.task}" if part.about.task else table


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _chosen(part: Part, pictures: int) -> list[int]:
    """Places: evenly over all, then the most confident mistakes among the others."""
    import numpy as np

    if not pictures:
        return []
    even = [int(place) for place in np.unique(np.linspace(0, pictures - 1, min(EVEN, pictures)).astype(np.int64))]
    if part.kind not in ("class", "rank"):
        return even
    wrong = np.flatnonzero(part.known & ~part.right & (part.told >= 0))
    surest = wrong[np.argsort(-part.confidence[wrong], kind="stable")]
    return even + [int(place) for place in surest if place not in set(even)][:MISTAKES]


def _words(part: Part, place: int) -> tuple[str, str, float | None, bool | None]:
    """Label, what was told, its probability, and whether it is right."""
    names, truth, told = part.names, part.truth[place], part.told[place]
    if part.kind in ("class", "rank"):
        label = names[truth] if truth >= 0 else "unknown"
        right = bool(told == truth) if truth >= 0 else None
        return label, names[told] if told >= 0 else "not finite", _finite(part.confidence[place]), right
    if part.kind == "labels":
        has = ", ".join(name for name, own in zip(names, truth, strict=True) if own == 1)
        said = ", ".join(name for name, own in zip(names, told, strict=True) if own)
        right = bool(((truth == 1) == told)[truth >= 0].all()) if (truth >= 0).any() else None
        return has or "none", said or "none", None, right
    number = (", ".join(f"{n} {v:.4g}" if len(names) > 1 else f"{v:.4g}" for n, v in zip(names, of, strict=True))
              for of in (truth, told))  # fmt: skip
    return next(number), next(number), None, None


def _small(data: bytes) -> bytes:
    """A picture of any format as a JPEG whose longer side has `SIDE` pixels.

    Raises:
        OSError, ValueError, SyntaxError: it is none.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as image, io.BytesIO() as file:
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        upright = ImageOps.exif_transpose(image)
        upright.thumbnail((SIDE, SIDE))
        upright.convert("RGB").save(file, "JPEG", quality=80)
        return file.getvalue()
