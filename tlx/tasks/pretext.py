"""Views of pretext tasks, whose target is drawn with the view: a rotation, where a patch lies, an order of patches."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from tlx.data.shards.targets import Target
from tlx.data.stream.views import Shown

_AROUND = tuple((row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1))
_NAMES = ("upper left", "above", "upper right", "left", "right", "lower left", "below", "lower right")


@dataclass(frozen=True)
class Rotated:
    """A view turned by 0, 90, 180 or 270 degrees, counterclockwise."""

    name: str = "rotation"
    count: int = 1
    joined: bool = True
    evaluated_plainly: bool = True

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.name: Target(self.name, "class", ("0", "90", "180", "270"))}

    def draw(self, rng: random.Random) -> Mapping[str, int]:
        return {self.name: rng.randrange(4)}

    def pictures(self, image: Tensor, shown: Shown, drawn: Mapping[str, int]) -> Iterator[Tensor]:
        yield torch.rot90(shown.view(image), drawn[self.name], (1, 2))


@dataclass(frozen=True)
class Grid:
    """A part of a picture as cells, and a patch of the input's size at a random place in each: the gap between patches,
    and its chance, leave no edge that goes on from one to the next.

    Attributes:
        cells: in a row and in a column.
        gap: between patches, on average, as a share of their size.
        area: least and most of the picture's area that the grid takes.
    """

    cells: int
    gap: float
    area: tuple[float, float]

    def cut(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 [channels, cells * cell height, cells * cell width]; where is drawn.

        Args:
            size: height and width of a patch.
        """
        sides = [self.cells * self._cell(side) for side in size]
        grid: Tensor = v2.RandomResizedCrop(sides, self.area, antialias=True)(image)
        return grid

    def patch(self, grid: Tensor, place: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """That of a cell, by row and column."""
        starts = [at * self._cell(side) + _drawn(self._cell(side) - side) for at, side in zip(place, size, strict=True)]
        (top, left), (height, width) = starts, size
        return grid[:, top : top + height, left : left + width]

    def _cell(self, side: int) -> int:
        return side + round(self.gap * side)


@dataclass(frozen=True)
class Neighbour:
    """The middle patch of nine, and one of those around it: which one is the target."""

    grid: Grid
    name: str = "position"
    count: int = 2
    joined: bool = True
    evaluated_plainly: bool = False

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.name: Target(self.name, "class", _NAMES)}

    def draw(self, rng: random.Random) -> Mapping[str, int]:
        return {self.name: rng.randrange(len(_AROUND))}

    def pictures(self, image: Tensor, shown: Shown, drawn: Mapping[str, int]) -> Iterator[Tensor]:
        cut = self.grid.cut(image, shown.size)
        for place in ((1, 1), _AROUND[drawn[self.name]]):
            yield shown.view(self.grid.patch(cut, place, shown.size))


@dataclass(frozen=True)
class Shuffled:
    """All patches in one of some orders: which one is the target."""

    grid: Grid
    orders: Sequence[Sequence[int]] = field(repr=False)
    name: str = "order"
    joined: bool = True
    evaluated_plainly: bool = False

    @property
    def count(self) -> int:
        return self.grid.cells**2

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.name: Target(self.name, "class", tuple(" ".join(map(str, order)) for order in self.orders))}

    def draw(self, rng: random.Random) -> Mapping[str, int]:
        return {self.name: rng.randrange(len(self.orders))}

    def pictures(self, image: Tensor, shown: Shown, drawn: Mapping[str, int]) -> Iterator[Tensor]:
        cut = self.grid.cut(image, shown.size)
        for cell in self.orders[drawn[self.name]]:
            yield shown.view(self.grid.patch(cut, divmod(cell, self.grid.cells), shown.size))


def _drawn(most: int) -> int:
    """From 0 to `most`."""
    return int(torch.randint(most + 1, ()))


@functools.cache
def far_orders(cells: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Orders of the numbers below `cells`, each as far from those before it as can be: of the orders left, the first
    with the largest least Hamming distance to them (the sum of distances decides between equal ones).

    As algorithm 1 of Noroozi and Favaro 2016 (arXiv:1603.09246), from the order 0, 1, 2 ... on, and with the least
    distance for their average one.
    """
    every = np.array(list(itertools.permutations(range(cells))), dtype=np.int8)
    chosen, least, total = [0], np.full(len(every), cells, np.int32), np.zeros(len(every), np.int32)
    while len(chosen) < min(count, len(every)):
        distance = (every != every[chosen[-1]]).sum(1, dtype=np.int32)
        least, total = np.minimum(least, distance), total + distance
        rank = least.astype(np.int64) * (cells * count + 1) + total
        rank[chosen] = -1
        chosen.append(int(rank.argmax()))
    return tuple(tuple(int(n) for n in every[at]) for at in chosen)
