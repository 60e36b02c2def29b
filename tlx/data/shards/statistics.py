"""What the pictures of a split are like: collected shard by shard, then summed up.

``Facts`` is what one pass over a shard leaves; ``summarise(facts, classes)`` makes `Statistics` of those of a split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from tlx.data.shards.examine import Examined
from tlx.data.stream.order import derive, permutation

FACT = np.dtype(
    [
        ("place", "<i8"),
        ("label", "<i4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("bytes", "<u4"),
        ("format", "S20"),
        ("digest", "<u8", (2,)),
    ]
)
"""One picture: its place in its split, class, size in pixels and bytes, format, content digest."""

MEASURED = 1000
"""The mean and spread of pixels come from at most so many pictures of a split, each decoded for it; the mean is then
known to about 0.005."""

SMALL = 224
"""The usual side of a network's input, in pixels: below it pictures are enlarged."""

_NOTHING = (0.0,) * 7


@dataclass
class Facts:
    """What is known of some pictures.

    Attributes:
        rows: one tuple per picture, in the order of `FACT`.
        pixels: how many were measured, then the sums of their means of R, G, B and of the means of squares.
    """

    rows: list[tuple[int, int, int, int, int, bytes, tuple[int, int]]] = field(default_factory=list)
    pixels: tuple[float, ...] = _NOTHING

    def add(self, place: int, label: int, size: int, seen: Examined) -> None:
        """Notes one picture of `size` bytes."""
        low, high = int.from_bytes(seen.digest[:8], "little"), int.from_bytes(seen.digest[8:], "little")
        format = seen.format.encode("ascii", "replace")
        self.rows.append((place, label, seen.width, seen.height, size, format, (low, high)))
        if seen.moments:
            self.pixels = _sum(self.pixels, (1.0, *seen.moments))

    def packed(self) -> tuple[NDArray[np.void], tuple[float, ...]]:
        """(records, pixels): the same, in little memory; records are `FACT`."""
        return np.array(self.rows, dtype=FACT), self.pixels


@dataclass(frozen=True)
class Statistics:
    """The pictures of one split.

    Attributes:
        samples: how many there are.
        counts: class name -> samples; nothing where there is no class.
        width, height: least, median, greatest; pixels, the camera's orientation applied.
        small: the share of pictures whose short side is below 224 pixels.
        bytes: per picture, the mean.
        formats: name -> samples.
        measured: how many pictures `mean` and `std` come from (a seeded choice of at most 1000).
        mean, std: of R, G, B in [0, 1], from some 64 rows of each measured picture, which all count the same.
    """

    samples: int
    counts: dict[str, int]
    width: tuple[int, int, int]
    height: tuple[int, int, int]
    small: float
    bytes: int
    formats: dict[str, int]
    measured: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def read(said: Mapping[str, Any]) -> Statistics:
        """From what `dataclasses.asdict` made, by way of JSON.

        Raises:
            ValueError: it is something else.
        """
        return TypeAdapter(Statistics).validate_python(said)


def chosen_for_measuring(split: str, samples: int) -> frozenset[int]:
    """The places of a split whose pictures are measured: all, or `MEASURED` that only `split` and `samples` decide."""
    if samples <= MEASURED:
        return frozenset(range(samples))
    return frozenset(permutation(derive(0, f"measure {split}"), samples)[:MEASURED].tolist())


def summarise(
    records: NDArray[np.void], pixels: Sequence[tuple[float, ...]], classes: Sequence[str]
) -> Statistics | None:
    """Sums up a split; None if it has no readable picture.

    Args:
        records: `FACT` of all its pictures.
        pixels: of its shards, in their order.
    """
    if not len(records):
        return None
    total: tuple[float, ...] = _NOTHING
    for part in pixels:
        total = _sum(total, part)
    counts = np.bincount(records["label"], minlength=len(classes)).tolist() if classes else []
    names, found = np.unique(records["format"], return_counts=True)
    measured = int(total[0])
    mean = [m / max(measured, 1) for m in total[1:4]]
    std = [max(q / max(measured, 1) - m * m, 0.0) ** 0.5 for m, q in zip(mean, total[4:], strict=True)]
    return Statistics(
        samples=len(records),
        counts=dict(zip(classes, counts, strict=True)),
        width=_spread(records["width"]),
        height=_spread(records["height"]),
        small=round(float((np.minimum(records["width"], records["height"]) < SMALL).mean()), 4),
        bytes=round(float(records["bytes"].mean())),
        formats={n.decode(): c for n, c in zip(names.tolist(), found.tolist(), strict=True)},
        measured=measured,
        mean=tuple(round(m, 4) for m in mean),
        std=tuple(round(s, 4) for s in std),
    )


def _sum(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _spread(values: NDArray[np.uint32]) -> tuple[int, int, int]:
    return int(values.min()), round(float(np.median(values))), int(values.max())
