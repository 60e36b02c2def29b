"""Near-duplicates and outliers among vectors: an exact search over blocks, so that no matrix of all pairs is in memory.

Closeness is the cosine of two vectors' angle. A picture is an outlier by its distance, 1 - cosine, to its k-th nearest
neighbour (Ramaswamy et al. 2000, Efficient algorithms for mining outliers), as a multiple of the median of that over
the pictures that it is compared with: those of its class, where that is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import UserError
from tlx.use.vector_file import Embeddings

_BLOCK = 4096
_MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class Pair:
    """Two pictures, by place; the second is of those that are searched."""

    a: int
    b: int
    cosine: float


@dataclass(frozen=True)
class Outlier:
    """A picture that lies far from those of its kind.

    Attributes:
        distance: to its k-th nearest neighbour of its class, or of all; to the last one where there are fewer.
        ratio: how many times the median of these distances of its class.
        others: the label that most of its k nearest neighbours of any class have.
    """

    place: int
    distance: float
    ratio: float
    others: str | None


@dataclass(frozen=True)
class Neighbours:
    """What was found.

    Attributes:
        pairs: the closest first.
        outliers: all pictures whose distance is known, the farthest first.
        left_out: pictures without a vector.
    """

    pairs: Sequence[Pair]
    outliers: Sequence[Outlier]
    left_out: int


@dataclass(frozen=True)
class Search:
    """Looks for the neighbours of every picture of `x` in `base`.

    Attributes:
        base: None: the others of `x`.
        threshold: the least cosine of near-duplicates.
        k: which neighbour's distance counts.
    """

    x: Embeddings
    base: Embeddings | None = None
    threshold: float = 0.95
    k: int = 5
    block: int = field(default=_BLOCK, repr=False)

    def run(self) -> Neighbours:
        """
        Raises:
            UserError: vectors of other networks; too many pairs.
        """
        searched = self.base or self.x
        self._refuse_other(searched)
        known = sorted({label for label in [*self.x.labels, *searched.labels] if label is not None})
        number = {label: place for place, label in enumerate(known)}
        classes, of_base = (_numbers(one.labels, number) for one in (self.x, searched))
        pairs, outliers = list[Pair](), list[Outlier]()
        far, others = np.full(len(self.x.files), np.nan), np.full(len(self.x.files), -1)
        for start, rows, there in _blocks(self.x.vectors, self.block):
            own = slice(start, start + len(rows))
            every = _Nearest(len(rows), self.k)
            alike = _Nearest(len(rows), self.k)
            for at, columns, known_there in _blocks(searched.vectors, self.block):
                cosines = rows @ columns.T
                cosines[:, ~known_there] = -torch.inf
                cosines[~there] = -torch.inf
                self._forget_itself(cosines, start, at)
                pairs += self._close(cosines, start, at)
                if len(pairs) > _MOST_PAIRS:
                    what = f"more than {_MOST_PAIRS:,} pairs have a cosine of {self.threshold:g} or more"
                    raise UserError(what, where="--threshold", todo="a higher one")
                theirs = of_base[at : at + len(columns)]
                every.add(cosines, theirs.expand(len(rows), -1))
                is_other = classes[own, None] != theirs[None]
                alike.add(cosines.masked_fill(is_other & (classes[own, None] >= 0), -torch.inf), None)
            far[own], others[own] = alike.distances(), every.majority()
        outliers = [
            Outlier(place, float(far[place]), ratio, known[others[place]] if others[place] >= 0 else None)
            for place, ratio in _ratios(far, classes.numpy())
        ]
        pairs.sort(key=lambda pair: (-pair.cosine, pair.a, pair.b))
        return Neighbours(pairs, outliers, int((~_usable(self.x.vectors, self.block)).sum()))

    def _refuse_other(self, base: Embeddings) -> None:
        of_x, of_base = ({k: v for k, v in one.about.items() if k in ("weights", "layer")} for one in (self.x, base))
        if self.x.vectors.shape[1] != base.vectors.shape[1] or (of_x and of_base and of_x != of_base):
            what = f"its vectors are of another network or layer than those of {self.x.name}"
            raise UserError(what, where=base.name, todo="embed both alike")

    def _forget_itself(self, cosines: Tensor, start: int, at: int) -> None:
        if self.base is None:
            first, last = max(start, at), min(start + len(cosines), at + cosines.shape[1])
            same = torch.arange(first, max(last, first))
            cosines[same - start, same - at] = -torch.inf

    def _close(self, cosines: Tensor, start: int, at: int) -> list[Pair]:
        places = (cosines >= self.threshold).nonzero().tolist()
        found = (Pair(start + a, at + b, min(float(cosines[a, b]), 1.0)) for a, b in places)
        return [pair for pair in found if self.base is not None or pair.a < pair.b]


def groups_of(pairs: Sequence[Pair], *, across: bool) -> list[list[tuple[int, int]]]:
    """Pictures that hang together by pairs, the largest group first: (which set, place), 0 for the first of a pair.

    Args:
        across: the second of a pair is of another set, 1.
    """
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(one: tuple[int, int]) -> tuple[int, int]:
        while parent.setdefault(one, one) != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for pair in pairs:
        first, second = sorted((root((0, pair.a)), root((int(across), pair.b))))
        parent[second] = first
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for one in sorted(parent):
        found.setdefault(root(one), []).append(one)
    return sorted(found.values(), key=lambda group: (-len(group), group))


class _Nearest:
    """The k largest cosines of each row so far, with the class of each."""

    def __init__(self, rows: int, k: int) -> None:
        self.cosines = torch.full((rows, k), -torch.inf)
        self.classes = torch.full((rows, k), -1)

    def add(self, cosines: Tensor, classes: Tensor | None) -> None:
        k = self.cosines.shape[1]
        top = cosines.topk(min(k, cosines.shape[1]), 1)
        self.cosines, kept = torch.cat([self.cosines, top.values], 1).topk(k, 1)
        if classes is not None:
            self.classes = torch.cat([self.classes, classes.gather(1, top.indices)], 1).gather(1, kept)

    def distances(self) -> NDArray[np.float64]:
        """To the last one that there is; NaN where there is none."""
        there = self.cosines.isfinite()
        last = (there.sum(1) - 1).clamp(min=0)
        found = (1 - self.cosines.gather(1, last[:, None])[:, 0].double()).clamp(min=0)
        return torch.where(there.any(1), found, torch.nan).numpy()

    def majority(self) -> NDArray[np.int64]:
        """The class of most; -1 where none is known. Of two that are as many, that of the nearest."""
        rows = torch.where(self.cosines.isfinite(), self.classes, -1).tolist()
        counts = (Counter(label for label in row if label >= 0).most_common(1) for row in rows)
        return np.array([most[0][0] if most else -1 for most in counts], np.int64)


def _ratios(far: NDArray[np.float64], classes: NDArray[Any]) -> list[tuple[int, float]]:
    """Places by their distance over the median of their class, the largest first."""
    medians = {label: float(np.nanmedian(far[classes == label])) for label in set(classes[np.isfinite(far)].tolist())}
    known = np.flatnonzero(np.isfinite(far)).tolist()
    found = [(place, far[place] / (medians[int(classes[place])] or np.finfo(np.float64).tiny)) for place in known]
    return sorted(found, key=lambda one: (-one[1], one[0]))


def _numbers(labels: Sequence[str | None], number: dict[str, int]) -> Tensor:
    return torch.tensor([-1 if label is None else number[label] for label in labels], dtype=torch.int64)


def _blocks(vectors: NDArray[Any], size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """From where on, vectors of length 1, and which of them are vectors."""
    for start in range(0, len(vectors), size):
        rows = torch.from_numpy(np.array(vectors[start : start + size], np.float32))
        there = rows.isfinite().all(1) & (rows.square().sum(1) > 0)
        yield start, torch.nn.functional.normalize(rows.nan_to_num(), dim=1), there


def _usable(vectors: NDArray[Any], size: int) -> NDArray[np.bool_]:
    return np.concatenate([there.numpy() for _, _, there in _blocks(vectors, size)] or [np.zeros(0, bool)])
