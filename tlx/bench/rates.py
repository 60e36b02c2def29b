"""How many images a second come out of the loader, with so many workers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tlx.bench.clock import Watch
from tlx.bench.measured_view import MeasuredView

_ROUNDS = 3
_LEAST = 0.3  # seconds of a measurement


@dataclass(frozen=True)
class Rate:
    """Attributes:
    images: per second, by the clock.
    cpu: seconds of processors per image, workers included.
    """

    workers: int
    images: float
    cpu: float

    @property
    def per_worker(self) -> float:
        return self.images / max(self.workers, 1)


def measure(
    looks: Sequence[MeasuredView], workers: Sequence[int], *, batch: int, seconds: float, pin: bool
) -> dict[str, list[Rate]]:
    """Medians of three rounds over every view and every number of workers, by the view's name."""
    each = max(seconds / (_ROUNDS * len(looks) * len(workers)), _LEAST)
    few = {look.name: _batch(look, batch, each) for look in looks}
    found: dict[tuple[str, int], list[Rate]] = {}
    for _ in range(_ROUNDS):
        for look in looks:
            for count in workers:
                found.setdefault((look.name, count), []).append(_once(look, count, few[look.name], each, pin))
    return {look.name: [_median(found[look.name, count]) for count in workers] for look in looks}


def _batch(look: MeasuredView, batch: int, seconds: float) -> int:
    """So many pictures at a time that several batches fit into the time; as many as asked for where that is enough."""
    batch = min(batch, len(look.shown))
    return min(batch, max(8, int(seconds / 4 / look.seconds_each())))


def _once(look: MeasuredView, workers: int, batch: int, seconds: float, pin: bool) -> Rate:
    batches = look.batches(batch=batch, workers=workers, pin=pin)
    for _ in range(2 * workers + 1):  # until those that were begun together have come
        next(batches)
    watch, images = Watch(processes=True), 0
    began = time.perf_counter()
    while images < 2 * batch or time.perf_counter() - began < seconds:
        images += len(next(batches))
    spent = watch.read().per(images)
    return Rate(workers, 1 / spent.wall, spent.cpu)


def _median(rates: Sequence[Rate]) -> Rate:
    images, cpu = (statistics.median(getattr(rate, name) for rate in rates) for name in ("images", "cpu"))
    return Rate(rates[0].workers, images, cpu)


def chosen_workers(cores: int) -> list[int]:
    """None, one, and powers of two up to the number of cores."""
    return sorted({0, 1, cores, *(2**n for n in range(1, cores.bit_length()) if 2**n <= cores)})
