"""Learning-rate curves: a factor of the phase's rate as a pure function of the step.

``curve(step, steps, *, ...) -> float`` with 0 <= step < steps, counted from the phase's first step after its warm-up.
An own curve comes by ``package.module:function`` or an entry point of the group ``tlx.curve``. Arguments
annotated :data:`tlx.durations.Steps` are written as durations and arrive counted in steps.
"""

from __future__ import annotations

import math

from tlx.durations import Ratio, Steps

__all__ = ["constant", "cosine", "linear", "multi_step", "one_cycle", "step"]


def constant(step: int, steps: int) -> float:
    """1 throughout."""
    return 1.0


def cosine(step: int, steps: int, *, final: Ratio = 0.0) -> float:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, without restarts)."""
    return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2


def linear(step: int, steps: int, *, final: Ratio = 0.0) -> float:
    """A straight line from 1 to `final`."""
    return 1 + (final - 1) * step / steps


def step(step: int, steps: int, *, every: Steps, gamma: Ratio = 0.1) -> float:
    """Times `gamma` at every multiple of `every` (torch's StepLR)."""
    return float(gamma ** (step // max(every, 1)))


def multi_step(step: int, steps: int, *, at: list[Steps], gamma: Ratio = 0.1) -> float:
    """Times `gamma` at each of these points (torch's MultiStepLR)."""
    return float(gamma ** sum(step >= point for point in at))


def one_cycle(step: int, steps: int, *, rise: Ratio = 0.3, start: Ratio = 0.04, final: Ratio = 4e-6) -> float:
    """Up from `start` to 1 over the share `rise` of the phase, then down to `final`, both along cosines.

    Smith and Topin 2018; the defaults are torch's OneCycleLR (div_factor 25, final_div_factor 1e4).
    """
    top, last = rise * steps - 1, steps - 1
    if step <= top:
        return _ease(start, 1.0, step / top if top > 0 else 1.0)
    return _ease(1.0, final, (step - top) / (last - top) if last > top else 1.0)


def _ease(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
