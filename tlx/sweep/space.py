"""All that a sweep varies, together: points of it, how many there are, and those that nobody has tried."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tlx.sweep.grammar import Dimension, Range

Point = tuple[str, ...]
"""The overrides of a trial, one for each dimension."""

FEW = 10_000
"""A space with more points is not searched for those that are left: drawing finds one."""


def point(space: Sequence[Dimension], values: Mapping[str, Any]) -> Point:
    """The overrides that set each key to its value."""
    return tuple(dimension.word(values[dimension.key]) for dimension in space)


def middle(space: Sequence[Dimension]) -> dict[str, Any]:
    """A value of each key: half way, or the first one named."""
    return {dimension.key: dimension.middle for dimension in space}


def count(space: Sequence[Dimension]) -> int | None:
    """How many points there are; None where a key takes any number of a range."""
    counts = [dimension.count for dimension in space]
    return None if None in counts else math.prod(n for n in counts if n is not None)


def every(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """The points of a space that has a count, the last key's values first."""
    places = (range(dimension.count or 0) for dimension in space)
    for combination in itertools.product(*places):
        yield {dimension.key: dimension.at(place) for dimension, place in zip(space, combination, strict=True)}


def untried(space: Sequence[Dimension], tried: Collection[Point], seed: str | None) -> dict[str, Any] | None:
    """A point of a space that has a count which is not among `tried`: by the seed, or without one the first; None
    where all are."""
    left = (values for values in every(space) if point(space, values) not in tried)
    if seed is None:
        return next(left, None)
    listed = list(left)
    return random.Random(seed).choice(listed) if listed else None


def varied(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Points to look at beforehand: the middle, and from there each key's ends or choices, one key at a time."""
    start = middle(space)
    yield start
    for dimension in space:
        yield from ({**start, dimension.key: end} for end in dimension.ends if end != start[dimension.key])


def described(space: Sequence[Dimension]) -> list[str]:
    """A line for each key."""
    return [f"{dimension.key:<{max(len(d.key) for d in space)}}  {_words(dimension)}" for dimension in space]


def _words(dimension: Dimension) -> str:
    if not isinstance(dimension, Range):
        return f"one of {', '.join(dimension.values)}"
    low, high = (f"{_shown(dimension, end)}{dimension.unit}" for end in dimension.ends)
    if dimension.step is not None:
        return f"{low} to {high} in steps of {dimension.step:g}{dimension.unit}"
    kind = "whole numbers, " if dimension.whole else ""
    return f"{low} to {high} ({kind}{'by the logarithm' if dimension.log else 'evenly'})"


def _shown(dimension: Range, value: float) -> str:
    return str(int(value)) if dimension.whole else f"{value:g}"
