"""Time spent: by the clock, and by all processors that work for this process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True)
class Spent:
    """Seconds by the clock, and seconds of processors."""

    wall: float
    cpu: float

    def per(self, count: int) -> Spent:
        return Spent(self.wall / count, self.cpu / count)


def median(spent: Sequence[Spent]) -> Spent:
    return Spent(statistics.median(s.wall for s in spent), statistics.median(s.cpu for s in spent))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval of the median that assumes no distribution: between two values whose ranks a fair coin's throws
    leave outside in at most 1 - confidence of cases.

    Raises:
        ValueError: there are too few values (six are enough for 0.95).
    """
    count, ordered = len(values), sorted(values)
    outside, rank = 0.0, 0
    while rank < count / 2:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - confidence:
            break
        rank += 1
    if not rank:
        raise ValueError(f"{count} values are too few")
    return ordered[rank - 1], ordered[count - rank]


class Watch:
    """Runs from when it is made; `read` leaves it running.

    Args:
        processes: count those that this one has started as well. Their time comes in ticks of 10 ms.
    """

    def __init__(self, *, processes: bool = False) -> None:
        self._processes = processes
        self._others = _of_children() if processes else 0.0
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> Spent:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return Spent(wall, cpu + (_of_children() - self._others if self._processes else 0.0))


def _of_children() -> float:
    """User and system time of all descendants, those that have ended and were waited for included."""
    here = psutil.Process()
    ended = here.cpu_times()
    total = getattr(ended, "children_user", 0.0) + getattr(ended, "children_system", 0.0)
    for child in here.children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(total)


def in_turn(tasks: Mapping[str, Callable[[], Any]], *, seconds: float) -> dict[str, Spent]:
    """Medians of each task, in this process.

    Every task runs once without being counted; then they run in turn until `seconds` are over, three times at least,
    so that a machine whose speed drifts changes all alike.
    """
    for task in tasks.values():
        task()
    found: dict[str, list[Spent]] = {name: [] for name in tasks}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, task in tasks.items():
            watch = Watch()
            task()
            found[name].append(watch.read())
        rounds += 1
    return {name: median(spent) for name, spent in found.items()}
