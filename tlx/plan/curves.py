"""Learning-rate curves: a factor of the phase's rate as a pure function of the step.

``curve(step, steps, *, ...) -> float`` with 0 <= step < steps, counted from the phase's first step after its warm-up.
An own curve comes by ``package.module:function`` or an entry point of the group ``tlx.curve``. Arguments
annotated as one of `tlx.base.durations`' types are written as durations and arrive counted: a length (``Steps``), a
place in the phase (``Point``) or all multiples of a length (``Period``). The user counts places from the phase's own
first step, the warm-up's; they arrive in the curve's count. The plan refuses values that are negative or not finite.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from tlx.base.durations import Period, Point, Ratio

__all__ = ["constant", "cosine", "linear", "multi_step", "one_cycle", "step"]

NotNegative = Annotated[Ratio, Field(ge=0)]
Share = Annotated[Ratio, Field(ge=0, le=1)]
Gamma = Annotated[Ratio, Field(gt=0)]


def constant(step: int, steps: int) -> float:
    """1 throughout."""
    return 1.0


def cosine(step: int, steps: int, *, final: NotNegative = 0.0) -> float:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, without restarts)."""
    return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2


def linear(step: int, steps: int, *, final: NotNegative = 0.0) -> float:
    """A straight line from 1 to `final`."""
    return 1 + (final - 1) * step / steps


def step(step: int, steps: int, *, every: Period, gamma: Gamma = 0.1) -> float:
    """Times `gamma` at every multiple of `every` (torch's StepLR), counted from the phase's first step.

    Multiples within the warm-up count: the rate after it is lower by them, as timm's schedules have it.
    """
    return float(gamma ** _passed(every, step))


def multi_step(step: int, steps: int, *, at: Annotated[list[Point], Field(min_length=1)], gamma: Gamma = 0.1) -> float:
    """Times `gamma` at each of these places of the phase (torch's MultiStepLR)."""
    return float(gamma ** _passed(sorted(at), step))


def one_cycle(step: int, steps: int, *, rise: Share = 0.3, start: Share = 0.04, final: Share = 4e-6) -> float:
    """Up from `start` to 1 over the share `rise` of the steps, then down to `final`, both along cosines.

    Smith and Topin 2018; the defaults are torch's OneCycleLR (div_factor 25, final_div_factor 1e4). Where the rise is
    one step or less, the first step is the top.
    """
    # torch's top may lie before the first step, and then a short cycle never sees it
    top, last = max(rise * steps - 1, 0.0), steps - 1
    if step <= top:
        return _ease(start, 1.0, step / top if top > 0 else 1.0)
    return _ease(1.0, final, (step - top) / (last - top) if last > top else 1.0)


def _passed(places: Sequence[int], step: int) -> int:
    """How many of the ascending places are not after `step`."""
    return bisect_right(places, step)


def _ease(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
