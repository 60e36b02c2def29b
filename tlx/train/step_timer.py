"""How fast training goes: pictures a second, seconds a step, time left, how much of it waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

PREFIX = "time/"
"""Of values in a row that come from the machine and not from the training: two runs whose rows agree bit for bit differ
in them."""

Item = TypeVar("Item")


class StepTimer:
    """Times the steps of one start of a training.

    A step lasts from asking for its batch to the end of its update on the host; evaluating, saving and logging lie
    between steps. The device is not waited for: rows are written at steps whose counts the host has received, so that
    at most one step of a GPU is still under way.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin()

    def begin(self, *, before_s: float = 0.0, samples: int = 0) -> None:
        """Training begins, or goes on after `before_s` seconds and `samples` of earlier starts."""
        self._started, self._before_s = self._clock(), before_s
        self._samples = samples
        self._asked = self._started
        self._steps = self._row_steps = 0
        self._in_steps_s = self._row_s = self._waited_s = 0.0

    def waited(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same micro-batches; how long each is waited for counts as waiting for data."""
        remaining = iter(batches)
        while True:
            asked = self._clock()
            try:
                batch = next(remaining)
            except StopIteration:
                return
            self._waited_s += self._clock() - asked
            yield batch

    def each(self, steps: Iterable[Item]) -> Iterator[Item]:
        """The same steps, each timed from when it is asked for."""
        remaining = iter(steps)
        while True:
            self._asked = self._clock()
            try:
                step = next(remaining)
            except StopIteration:
                return
            yield step

    def step_done(self) -> float:
        """A step has ended; seconds of training so far, with those of earlier starts and all between the steps."""
        now = self._clock()
        self._row_s += now - self._asked
        self._row_steps += 1
        return self._before_s + now - self._started

    def row(self, *, samples: int, steps_left: int) -> dict[str, float]:
        """Means over the steps since the last row; the time left, with what lay between steps so far; the share of
        the steps' time in which batches were waited for.

        Args:
            samples: that all ranks have seen since the training began.
        """
        if not self._row_steps or self._row_s <= 0:
            return {}
        self._steps += self._row_steps
        self._in_steps_s += self._row_s
        step_s = self._row_s / self._row_steps
        between_s = max(self._clock() - self._started - self._in_steps_s, 0.0) / self._steps
        found = {
            "images_per_s": (samples - self._samples) / self._row_s,
            "step_s": step_s,
            "left_s": steps_left * (step_s + between_s),
            "data_wait": min(self._waited_s / self._row_s, 1.0),
        }
        self._samples, self._row_steps, self._row_s, self._waited_s = samples, 0, 0.0, 0.0
        return {PREFIX + name: float(f"{value:.4g}") for name, value in found.items()}
