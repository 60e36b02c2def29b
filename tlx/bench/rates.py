"""How many images a second come out of the loader, with so many workers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tlx.bench.clock import Watch
from tlx.bench.look import Look
from tlx.data.stream.loader import slot_count

_ROUNDS = 3
_LEAST = 0.3  # seconds of a measurement


@dataclass(frozen=True)
class Rate:
    """Attributes:
    images: per second, by the clock.
    cpu: seconds of processors per image, workers included.
    first: seconds to the first batch.
    memory: bytes that processes share for batches under way.
    """

    workers: int
    images: float
    cpu: float
    first: float
    memory: int

    @property
    def per_worker(self) -> float:
        return self.images / max(self.workers, 1)


def measure(
    looks: Sequence[Look], workers: Sequence[int], *, batch: int, seconds: float, pin: bool
) -> dict[str, list[Rate]]:
    """Medians of three rounds over every view and every number of workers, by the view's name."""
    each = max(seconds / (_ROUNDS * len(looks) * len(workers)), _LEAST)
    few = {look.name: _batch(look, batch, each) for look in looks}
    found: dict[tuple[str, int], list[Rate]] = {}
    for _ in range(_ROUNDS):
        for look in looks:
            for count in workers:
                found.setdefault((look.name, count), []).append(_once(look, count, few[look.name], each, pin))
    return {
        look.name: [_median(found[look.name, count], batch / few[look.name]) for count in workers] for look in looks
    }


def _batch(look: Look, batch: int, seconds: float) -> int:
    """So many pictures at a time that several batches fit into the time; as many as asked for where that is enough."""
    batch = min(batch, len(look.shown))
    few = min(8, batch)
    batches = look.batches(batch=few, workers=0)
    next(batches)
    began = time.perf_counter()
    next(batches)
    each = (time.perf_counter() - began) / few
    return min(batch, max(few, int(seconds / 4 / each)))


def _once(look: Look, workers: int, batch: int, seconds: float, pin: bool) -> Rate:
    began = time.perf_counter()
    batches = look.batches(batch=batch, workers=workers, pin=pin)
    memory = slot_count(workers) * next(batches).nbytes
    first = time.perf_counter() - began
    for _ in range(2 * workers):  # until those that were begun together have come
        next(batches)
    watch, images = Watch(processes=True), 0
    began = time.perf_counter()
    while images < 2 * batch or time.perf_counter() - began < seconds:
        images += len(next(batches))
    spent = watch.read().per(images)
    return Rate(workers, 1 / spent.wall, spent.cpu, first, memory)


def _median(rates: Sequence[Rate], larger: float) -> Rate:
    """Memory is said of the batch that was asked for, which is so many times larger."""
    middle = {name: statistics.median(getattr(r, name) for r in rates) for name in ("images", "cpu", "first")}
    return Rate(rates[0].workers, **middle, memory=round(larger * rates[0].memory))


def to_device(look: Look, *, batch: int, device: torch.device, repeats: int = 20) -> float:
    """Seconds per image of the copy from page-locked memory to a GPU, which runs beside the computation."""
    images = next(look.batches(batch=min(batch, len(look.shown)), workers=0, pin=True))
    for again in (False, True):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats if again else 2):
            images.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / (repeats * len(images))


def chosen_workers(cores: int) -> list[int]:
    """None, one, and powers of two up to the number of cores."""
    return sorted({0, 1, cores, *(2**n for n in range(1, cores.bit_length()) if 2**n <= cores)})
