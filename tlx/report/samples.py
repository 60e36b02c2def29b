"""Validation pictures on a page: read from the shards by id, made small."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import TlxError
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.data.stream.reader import ShardReader
from tlx.runs.predictions import Part

SIZE, QUALITY = 144, 72
"""Of a thumbnail: pixels of its longer side, of JPEG."""

MOST = 12
"""Pictures of a kind."""


@dataclass(frozen=True)
class Shown:
    """A picture, and what is said below it.

    Attributes:
        id: in the shards. `lines`: short texts, the first the truth.
        kind: right | wrong | odd: its colour.
    """

    id: int
    lines: tuple[str, ...]
    kind: str
    where: str = ""
    jpeg: bytes | None = None

    @property
    def file(self) -> str:
        """The end of `where`."""
        return self.where.rpartition("/")[2]


@dataclass(frozen=True)
class Gallery:
    title: str
    about: str
    pictures: tuple[Shown, ...]


@dataclass
class Pictures:
    """Thumbnails by id; each is read once."""

    source: Manifest | FileList
    _read: dict[int, bytes | None] = field(default_factory=dict)

    def of(self, gallery: Gallery) -> Gallery:
        """With their pictures and where they lie."""
        shown = (
            Shown(p.id, p.lines, p.kind, self.source.describe(p.id), self.thumbnail(p.id)) for p in gallery.pictures
        )
        return Gallery(gallery.title, gallery.about, tuple(shown))

    def thumbnail(self, place: int) -> bytes | None:
        """A JPEG; None where it cannot be read."""
        if place not in self._read:
            try:
                self._read[place] = small(self._bytes(place))
            except (OSError, ValueError, SyntaxError, TlxError, MemoryError):  # Pillow raises all of these
                self._read[place] = None
        return self._read[place]

    def _bytes(self, place: int) -> bytes:
        if isinstance(self.source, Manifest):
            return ShardReader(self.source).read(place)
        with open(self.source.paths[place], "rb") as file:
            return file.read()


def small(data: bytes) -> bytes:
    """A picture of any format as a JPEG whose longer side has `SIZE` pixels.

    Raises:
        OSError, ValueError, SyntaxError: it is none.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (2 * SIZE, 2 * SIZE))
        upright = ImageOps.exif_transpose(image)
        upright.thumbnail((SIZE, SIZE))
        return jpeg(np.asarray(upright.convert("RGB")))


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """Of uint8 [H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


# Which pictures are shown


def galleries(part: Part, ids: NDArray[np.int64], most: int = MOST) -> list[Gallery]:
    """The most confident mistakes and the least confident hits; of numbers the largest errors."""
    if part.kind == "number":
        return [_largest_errors(part, ids, most)]
    if part.kind == "labels":
        return _of_labels(part, ids, most)
    wrong = np.flatnonzero(part.known & ~part.right & (part.told >= 0))
    hits = np.flatnonzero(part.right)
    surest = wrong[np.argsort(-part.confidence[wrong], kind="stable")][:most]
    unsure = hits[np.argsort(part.confidence[hits], kind="stable")][:most]
    found = [
        Gallery(
            "Most confident mistakes",
            "What the label says and how likely that was to the network; below what it told. Hard pictures, or wrong "
            "labels.",
            tuple(_of_class(part, ids, i, "wrong") for i in surest),
        ),
        Gallery(
            "Least confident hits",
            "Right, but other classes were likely, too.",
            tuple(_of_class(part, ids, i, "right") for i in unsure),
        ),
    ]
    return [gallery for gallery in found if gallery.pictures]


def _of_class(part: Part, ids: NDArray[np.int64], i: int, kind: str) -> Shown:
    truth, told = part.names[part.truth[i]], part.names[part.told[i]]
    sure = _percent(part.confidence[i])
    lines = (f"is {truth}", f"told {told}, {sure}") if kind != "right" else (truth, sure)
    if kind != "right" and not np.isnan(part.of_truth[i]):
        lines = (f"is {truth} ({_percent(part.of_truth[i])})", lines[1])
    return Shown(int(ids[i]), lines, kind)


def _of_labels(part: Part, ids: NDArray[np.int64], most: int) -> list[Gallery]:
    p, truth = part.probabilities.astype(np.float32), part.truth
    found = []
    for title, about, wrong, sure in (
        ("Labels told that do not apply", "The most probable first.", (truth == 0) & (p > 0.5), p),
        ("Labels missed", "The least probable first.", (truth == 1) & (p <= 0.5), 1 - p),
    ):
        rows, columns = wrong.nonzero()
        order = np.argsort(-sure[rows, columns], kind="stable")[:most]
        pictures = tuple(
            Shown(int(ids[i]), (part.names[j], f"probability {_percent(p[i, j])}", _has(part, i)), "wrong")
            for i, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
        )
        found += [Gallery(title, about, pictures)] if pictures else []
    return found


def _has(part: Part, i: int) -> str:
    own = [part.names[j] for j in np.flatnonzero(part.truth[i] == 1)]
    return "has " + (", ".join(own[:4]) + (" ..." if len(own) > 4 else "") if own else "none")


def _largest_errors(part: Part, ids: NDArray[np.int64], most: int) -> Gallery:
    errors = np.abs(part.told - part.truth)
    worst = np.where(np.isnan(errors), -1, errors)
    rows = np.argsort(-worst.max(1), kind="stable")[:most] if len(ids) else np.zeros(0, np.int64)
    pictures = []
    for i in rows.tolist():
        column = int(worst[i].argmax())
        if worst[i, column] < 0:
            continue
        name = f"{part.names[column]}: " if len(part.names) > 1 else ""
        lines = (f"{name}is {part.truth[i, column]:.4g}", f"told {part.told[i, column]:.4g}")
        pictures.append(Shown(int(ids[i]), lines, "wrong"))
    return Gallery("Largest errors", "", tuple(pictures))


def suspects(part: Part, ids: NDArray[np.int64], most: int = MOST) -> tuple[int, Gallery]:
    """Pictures whose label is probably wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068): how many
    there are, and the most suspect ones.

    Raises:
        ImportError: cleanlab is not installed.
    """
    from cleanlab.filter import find_label_issues

    counted = np.flatnonzero(part.known & (part.told >= 0))
    p = part.probabilities[counted].astype(np.float64)
    p /= p.sum(1, keepdims=True)
    found = find_label_issues(
        part.truth[counted], p, return_indices_ranked_by="self_confidence", filter_by="prune_by_noise_rate", n_jobs=1
    )
    pictures = tuple(_of_class(part, ids, int(i), "odd") for i in counted[found][:most])
    return len(found), Gallery("Labels that may be wrong", "", pictures)


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f}%"  # no space: it would break the line


def maps_for(part: Part, ids: NDArray[np.int64], most: int = 8) -> list[tuple[int, int, tuple[str, ...], str]]:
    """A chosen few, half of them mistakes and half hits: id, the output to explain, lines, kind; of a class alone."""
    if part.kind != "class":
        return []
    wrong = np.flatnonzero(part.known & ~part.right & (part.told >= 0))
    hits = np.flatnonzero(part.right)
    chosen = [*wrong[np.argsort(-part.confidence[wrong], kind="stable")][: most // 2]]
    chosen += [*hits[np.argsort(-part.confidence[hits], kind="stable")][: most - len(chosen)]]
    found = []
    for i in chosen:
        kind = "right" if part.right[i] else "wrong"
        found.append((int(ids[i]), int(part.told[i]), _of_class(part, ids, int(i), kind).lines, kind))
    return found


def some(part: Part, most: int) -> NDArray[np.int64]:
    """Places of at most so many pictures, evenly over all."""
    places = np.flatnonzero(part.known)
    return places if len(places) <= most else places[np.linspace(0, len(places) - 1, most).astype(np.int64)]


def of_maps(drawn: Sequence[tuple[int, NDArray[np.uint8]]], said: Mapping[int, tuple[tuple[str, ...], str]]) -> Gallery:
    """Pictures with their maps over them."""
    pictures = tuple(Shown(place, said[place][0], said[place][1], "", jpeg(pixels)) for place, pixels in drawn)
    about = "Where what was told comes from: warm colours speak for it (gradient times activation of a late layer)."
    return Gallery("What the network looked at", about, pictures)
