"""What a page says of one target: its table by class, confusions, calibration, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.report.classes import (
    ClassRow,
    by_class,
    by_column,
    confusion,
    largest_confusions,
    most_confused,
    reliability,
    similar_order,
)
from tlx.report.parts import Parts
from tlx.report.samples import Gallery, Pictures, Shown, galleries, suspects
from tlx.report.told_figures import NAMED, NUMBERED, confusion_image, numbers, reliability_diagram
from tlx.runs.predictions import Part

OPEN = 30
"""Rows of a table that stand open; of more, the worst."""

CONFUSIONS = 15

MOST_CONFUSED = 60
"""Classes that the image has where there are too many for all."""


@dataclass(frozen=True)
class Cell:
    """Of a confusion matrix; `share`: how strong its colour is."""

    count: int
    share: float
    told: str
    right: bool


@dataclass(frozen=True)
class MatrixRow:
    name: str
    of: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class MatrixTable:
    names: tuple[str, ...]
    rows: tuple[MatrixRow, ...]


@dataclass(frozen=True)
class Figure:
    """A PNG, and what is said below it."""

    png: bytes
    caption: str


@dataclass
class TargetReport:
    """
    Attributes:
        key: that its figures' names end in; "" of a single target.
        columns: of the table; `worst`: rows that stand open, `rest`: all rows after them.
        figures: by name.
    """

    key: str
    heading: str
    columns: tuple[str, ...]
    worst: list[tuple[Any, ...]]
    rest: list[tuple[Any, ...]]
    said: str = ""
    by_class: Sequence[ClassRow] = ()
    matrix: MatrixTable | None = None
    confusions: list[tuple[Any, ...]] = field(default_factory=list)
    calibration: str = ""
    galleries: list[Gallery] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    ece: tuple[float, float] | None = None


def target_report(part: Part, ids: NDArray[np.int64], metrics: Mapping[str, Any], parts: Parts) -> TargetReport:
    """All but pictures, which :func:`with_pictures` adds.

    Args:
        metrics: of the evaluation, by name such as ``val/tags/ap_per_class``.
    """
    task = part.about.task
    key, of = (f"-{_slug(task)}", f" of {task}") if task else ("", "")
    if part.kind == "number":
        found = _of_numbers(part, key, of, parts)
        found.galleries = parts.make(f"mistakes{of}", lambda: galleries(part, ids)) or []
        return found
    rows = by_class(part)
    found = TargetReport(key, _HEADINGS[part.kind] + of, (_NAMES[part.kind], *_COLUMNS), [], [], by_class=rows)
    cells = [_cells(row) for row in rows]
    if part.kind == "labels":
        precision = metrics.get(f"val/{task}/ap_per_class" if task else "val/ap_per_class")
        if isinstance(precision, list) and len(precision) == len(rows):
            found.columns = (*found.columns, "AP")
            cells = [(*c, _share(math.nan if ap is None else ap)) for c, ap in zip(cells, precision, strict=True)]
            found.said = "AP is average precision, which no threshold changes. "
        found.said = f"Labels are told by a probability above 1/2. {found.said}"
    found.said += _order_said(rows, part.kind)
    order = _worst_first(rows) if part.kind != "rank" else list(range(len(rows)))
    found.worst = [cells[i] for i in order[:OPEN]]
    found.rest = [cells[i] for i in order[OPEN:]]
    if part.kind != "labels":
        parts.make(f"confusion matrix{of}", lambda: _confusions(found, part, of))
    parts.make(f"reliability diagram{of}", lambda: _calibration(found, part, of))
    found.galleries = parts.make(f"mistakes{of}", lambda: galleries(part, ids)) or []
    return found


_NAMES = {"class": "class", "rank": "rank", "labels": "label"}
_COLUMNS = ("pictures", "told", "precision", "recall", "F1")
_HEADINGS = {"class": "Classes", "rank": "Ranks", "labels": "Labels"}


def _cells(row: ClassRow) -> tuple[Any, ...]:
    return (row.name, f"{row.support:,}", f"{row.told:,}", *map(_share, (row.precision, row.recall, row.f1)))


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _worst_first(rows: Sequence[ClassRow]) -> list[int]:
    """By F1; those without pictures last."""
    return sorted(range(len(rows)), key=lambda i: (math.isnan(rows[i].f1), rows[i].f1, i))


def _order_said(rows: Sequence[ClassRow], kind: str) -> str:
    said = "The lowest first." if kind == "rank" else "The lowest F1 first."
    return said + (f" {OPEN} of {len(rows)} stand open." if len(rows) > OPEN else "")


def _of_numbers(part: Part, key: str, of: str, parts: Parts) -> TargetReport:
    columns = ("column", "pictures", "mean absolute error", "RMSE", "bias", "largest error")
    rows = [
        (r.name, f"{r.known:,}", *(f"{v:.4g}" if not math.isnan(v) else "-" for v in (r.mae, r.rmse, r.bias, r.worst)))
        for r in by_column(part)
    ]
    found = TargetReport(key, f"Numbers{of}", columns, rows[:OPEN], rows[OPEN:])
    found.said = "In the target's own units; bias is the mean of told less true."
    png = parts.make(f"told against true{of}", lambda: numbers(part))
    if png is not None:
        found.figures[f"numbers{key}"] = Figure(png, f"Told against true{of}; on the line they agree.")
    return found


def _confusions(found: TargetReport, part: Part, of: str) -> None:
    matrix = confusion(part)
    ordered = part.kind == "rank"
    if len(part.names) <= NUMBERED:
        found.matrix = matrix_table(matrix, part.names, ordered=ordered)
    together = "" if ordered else " Classes that are confused stand together."
    chosen = np.arange(len(matrix)) if len(matrix) <= NAMED else most_confused(matrix, MOST_CONFUSED)
    which = "" if len(chosen) == len(matrix) else f" Of {len(matrix):,} classes the {len(chosen)} with most confusions."
    caption = f"Confusions{of}: a row is what it is, a column what was told; the diagonal is right.{together}{which}"
    shown, names = matrix[np.ix_(chosen, chosen)], [part.names[i] for i in chosen]
    png = confusion_image(shown, names, ordered=ordered, of=matrix.sum(1)[chosen])
    found.figures[f"confusion{found.key}"] = Figure(png, caption)
    found.confusions = [(c.truth, c.told, f"{c.pictures:,}", f"{c.of:,}") for c in largest_confusions(part, CONFUSIONS)]


def matrix_table(matrix: NDArray[np.int64], names: Sequence[str], *, ordered: bool) -> MatrixTable:
    """With numbers. Ranks keep their order."""
    order = list(range(len(names))) if ordered else similar_order(matrix)
    rows = []
    for i in order:
        total = int(matrix[i].sum())
        cells = tuple(
            Cell(int(matrix[i, j]), round(0.9 * int(matrix[i, j]) / max(total, 1), 3), names[j], i == j) for j in order
        )
        rows.append(MatrixRow(names[i], total, cells))
    return MatrixTable(tuple(names[i] for i in order), tuple(rows))


def _calibration(found: TargetReport, part: Part, of: str) -> None:
    reliable = reliability(part)
    if reliable is None:
        return
    found.ece = (reliable.gap, reliable.ece)
    if part.kind == "labels":
        words = (
            f"its probabilities are {100 * abs(reliable.gap):.1f} points too {'high' if reliable.gap > 0 else 'low'}"
        )
    else:
        words = f"it is {100 * abs(reliable.gap):.1f} points {'surer' if reliable.gap > 0 else 'less sure'} than right"
    found.calibration = (
        f"On average {words}; in {len(reliable.count)} bins the distance is {100 * reliable.ece:.1f} points "
        "(expected calibration error)."
    )
    png = reliability_diagram(reliable, of_labels=part.kind == "labels")
    caption = f"Reliability{of}: of all told with a probability (red dot), how many were so (blue bar)."
    found.figures[f"reliability{found.key}"] = Figure(png, caption)


def add_suspects(found: TargetReport, part: Part, ids: NDArray[np.int64], parts: Parts) -> None:
    """Labels that may be wrong, by cleanlab."""
    of = f" of {part.about.task}" if part.about.task else ""
    if part.kind != "class" or not part.known.any():
        return
    if not part.is_whole:
        parts.left_out.append(f"wrong labels{of}: of so many pictures and classes not all probabilities are kept")
        return
    made = parts.make(f"wrong labels{of}", lambda: suspects(part, ids), needs_s=3.0)
    if made is None:
        return
    count, gallery = made
    if not count:
        none = f"cleanlab finds none among {int(part.known.sum()):,} validation labels."
        found.galleries.append(Gallery("Labels that may be wrong", none, ()))
        return
    about = (
        f"{count:,} of {int(part.known.sum()):,} validation labels look wrong to cleanlab (confident learning on these "
        "predictions); the most suspect first. A hard picture looks the same: a person has to decide."
    )
    if part.right.sum() < 0.9 * part.known.sum():
        about += " At this accuracy most of them are the network's mistakes."
    found.galleries.append(Gallery(gallery.title, about, gallery.pictures))


def with_pictures(found: TargetReport, pictures: Pictures | None) -> None:
    """Reads the thumbnails; without shards the words stay."""
    if pictures is not None:
        found.galleries = [pictures.of(gallery) for gallery in found.galleries]


def _slug(task: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in task)[:40]


__all__ = ["Figure", "MatrixTable", "Shown", "TargetReport", "add_suspects", "target_report", "with_pictures"]
