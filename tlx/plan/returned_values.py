"""What schedules, layer-decay rules and curves return, checked: they may come from anybody's package.

A part that returns the wrong thing, or raises, is its user's mistake, told with the part's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from tlx.base.durations import Duration
from tlx.base.errors import UserError, did_you_mean
from tlx.base.layers import LayerMap
from tlx.base.plug import raised
from tlx.plan.unfreeze import Assignment, Mode

_EACH = 2048
"""Of longer curves, about so many steps are looked at, the ends among them."""


def assignments(value: Any, layers: LayerMap, *, label: str) -> list[Assignment]:
    """The phases that a schedule made.

    Raises:
        UserError: no list of assignments, names that are missing or not unique, unknown layers or modes ...
    """
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(a, Assignment) for a in value):
        kinds = [type(a).__name__ for a in value] if isinstance(value, (list, tuple)) else type(value).__name__
        raise UserError(
            f"{label} returned {_short(kinds)}",
            todo="it must return a list of tlx.plan.unfreeze.Assignment, one per phase",
        )
    names = [a.name for a in value]
    if len(set(map(repr, names))) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{label} must make at least one phase, each with a name of its own: {_short(names)}")
    for assignment in value:
        _check_assignment(assignment, layers, label=label)
    return list(value)


def _check_assignment(assignment: Assignment, layers: LayerMap, *, label: str) -> None:
    where, modes = f"phases.{assignment.name}", get_args(Mode)
    if not isinstance(assignment.trains, Mapping):
        raise UserError(
            f"{label}: `trains` is of type {type(assignment.trains).__name__}, not a mapping of layers to modes",
            where=where,
        )
    unknown = [name for name in assignment.trains if name not in layers.names]
    if unknown:
        near = did_you_mean(str(unknown[0]), layers.names)
        raise UserError(f"{label} names layers that are not there: {_short(unknown[:5])}{near}", where=where)
    odd = {name: mode for name, mode in assignment.trains.items() if mode not in modes}
    if odd:
        name, mode = next(iter(odd.items()))
        raise UserError(
            f"{label} gives layer {name} the mode {_short(mode)}{did_you_mean(str(mode), modes)}", where=where
        )
    duration = assignment.duration
    if duration is not None and not (isinstance(duration, Duration) and 0 <= duration.value < math.inf):
        raise UserError(
            f"{label}: the duration {_short(assignment.duration)} is not a tlx.base.durations.Duration",
            where=where,
            todo="annotate the argument as tlx.base.durations.Length, or call tlx.base.durations.duration",
        )


def factors(value: Any, layers: LayerMap, *, label: str) -> dict[str, float]:
    """The factor of every layer's rate.

    Raises:
        UserError: no mapping, layers without factor, unknown ones, or factors that are not finite and 0 or more.
    """
    if not isinstance(value, Mapping):
        raise UserError(
            f"{label} returned {type(value).__name__}",
            todo="it must return a dictionary: a factor for each layer's name",
        )
    missing = [name for name in layers.names if name not in value]
    if missing:
        raise UserError(f"{label} gives no factor for {', '.join(missing[:5])}")
    unknown = [name for name in value if name not in layers.names]
    if unknown:
        near = did_you_mean(str(unknown[0]), layers.names)
        raise UserError(f"{label} gives factors for layers that are not there: {_short(unknown[:5])}{near}")
    found = {name: number(value[name]) for name in layers.names}
    for name, factor in found.items():
        if factor is None or not math.isfinite(factor) or factor < 0:
            raise UserError(
                f"{label} gives layer {name} the factor {_short(value[name])}", todo="a finite number, 0 or more"
            )
    return {name: float(factor) for name, factor in found.items() if factor is not None}


def check_curve(curve: Callable[[int, int], Any], *, warmup: int, length: int, label: str) -> None:
    """Asks a curve for its values over a phase.

    Args:
        warmup: steps of the phase before the curve begins.
        length: steps of the phase, the warm-up's included.

    Raises:
        UserError: a value that is not finite and 0 or more, or 0 at every step; an exception.
    """
    steps, top = length - warmup, 0.0
    for step in sampled(steps):
        at = _step(warmup + step, length)
        try:
            value = curve(step, steps)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{label} fails {at}: {raised(error)}") from error
        shape = number(value)
        if shape is None or not math.isfinite(shape) or shape < 0:
            raise no_rate(value, warmup + step, length, label=label)
        top = max(top, shape)
    if not top:
        raise UserError(f"{label} gives 0 at every step: nothing would train")


def no_rate(value: Any, at: int, length: int, *, label: str) -> UserError:
    """For a curve's value, at a step of a phase, that is no factor of a rate."""
    todo = "a finite factor of the rate, 0 or more"
    return UserError(f"{label} gives {_short(value)} {_step(at, length)}", todo=todo)


def _step(at: int, length: int) -> str:
    return f"at step {at} of {length} of the phase"


def sampled(steps: int) -> Iterable[int]:
    """Steps of a curve to look at: all, or of very many an even selection with both ends."""
    if steps <= _EACH:
        return range(steps)
    return sorted({*range(8), *range(0, steps, -(-steps // _EACH)), *range(steps - 8, steps)})


def number(value: Any) -> float | None:
    """The value as a float; None if it is no real number."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array of several, complex, beyond all floats
        return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
