"""Lengths of training in any unit (``"16ep"`` epochs, ``4000`` steps, ``"5%"`` of the whole); of time: ``"3h55m"``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, PlainValidator
from pydantic_core import PydanticSerializationUnexpectedValue

_TIME = re.compile(r"^\s*(?=\d)(?:(\d+)\s*d)?\s*(?:(\d+)\s*h)?\s*(?:(\d+)\s*m)?\s*(?:(\d+)\s*s)?\s*$")
_MOST = 2.0**53  # steps, or seconds, that a float counts exactly
_FORM = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ep|epochs?|steps?|%)?\s*$")


@dataclass(frozen=True)
class Duration:
    """A stretch of training, not yet counted in steps.

    Attributes:
        bare: written as a number without a unit, which means steps, and which a person may have meant otherwise.
    """

    value: float
    unit: Literal["ep", "steps", "%"]
    bare: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        number = format(Decimal(repr(self.value)).normalize(), "f")  # every digit, and no exponent: it is read back
        return number + {"ep": "ep", "steps": " steps", "%": "%"}[self.unit]

    def steps(self, *, epoch: int, whole: int) -> int:
        """In steps, for an epoch of `epoch` steps and, for percent, a whole of `whole` steps; rounded to nearest."""
        return round(self.value * {"ep": epoch, "steps": 1, "%": whole / 100}[self.unit])


@dataclass(frozen=True)
class Mark:
    """A place in a phase, counted from its first step; or with `repeated` every multiple of it inside the phase."""

    at: Duration
    repeated: bool = False

    def __str__(self) -> str:
        return str(self.at)

    def steps(self, *, epoch: int, whole: int) -> int:
        """In steps of the phase, at least 1 where it is repeated; see :meth:`Duration.steps`."""
        count = self.at.steps(epoch=epoch, whole=whole)
        return max(count, 1) if self.repeated else count


def duration(value: Any) -> Duration:
    """Reads ``"16ep"``, ``"2.5 epochs"``, ``400``, ``"400 steps"`` or ``"5%"``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, Duration):
        return value
    match = _FORM.match(str(value)) if not isinstance(value, bool) else None
    number = float(match[1]) if match else math.inf
    if not match or number > _MOST or (match[2] in (None, "step", "steps") and number != int(number)):
        raise ValueError(f'{repr(value)[:100]} is not a length; write "16ep" (epochs), 4000 (steps) or "5%"')
    unit = {"e": "ep", "s": "steps", "%": "%"}[(match[2] or "s")[0]]
    return Duration(number, unit, bare=match[2] is None)  # type: ignore[arg-type]


def seconds(value: Any) -> int:
    """Reads ``"3h55m"``, ``"2d"``, ``"90s"``, or a number of seconds; how many seconds it is.

    Raises:
        ValueError: anything else, or no time at all.
    """
    match = _TIME.match(value) if isinstance(value, str) else None
    if match:
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        value = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise ValueError(f'{repr(value)[:100]} is not a time; write "3h55m", "90s", or seconds')
    return value


def ratio(value: Any) -> float:
    """Reads a finite number or a fraction such as ``"1/3"``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f'{repr(value)[:100]} is not a number or a fraction such as "1/3"') from error
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number")
    return number


def _point(value: Any) -> Mark:
    return value if isinstance(value, Mark) else Mark(duration(value))


def _period(value: Any) -> Mark:
    mark = value if isinstance(value, Mark) else Mark(duration(value), repeated=True)
    if not mark.at.value:
        raise ValueError("a period of nothing; write 1 for every step")
    return mark


def _text(value: Any) -> str:
    if not isinstance(value, Duration):  # what else a field may hold says itself how it is written
        raise PydanticSerializationUnexpectedValue("not a length")
    return str(value)


Length = Annotated[Duration, BeforeValidator(duration), PlainSerializer(_text, return_type=str)]
"""A configuration's duration."""

Steps = Annotated[int, PlainValidator(duration)]
"""A curve's argument that is a length: the user writes a duration, percent being of the phase; the curve receives
steps."""

Point = Annotated[int, PlainValidator(_point)]
"""A curve's argument that is a place in the phase: the user writes it as a duration since the phase's first step,
percent being of the phase. The curve receives it in its own count, which begins after the warm-up. The plan refuses a
place within the warm-up, at the phase's first step, or beyond its last."""

Period = Annotated[Sequence[int], PlainValidator(_period)]
"""A curve's argument that says how often: the user writes a duration, percent being of the phase. The curve receives a
sequence, ascending, of its multiples in the phase, in its own count: negative within the warm-up. There may be none."""

Ratio = Annotated[float, BeforeValidator(ratio)]
"""A finite number that may be written as a fraction."""

TimeSpan = Annotated[int, BeforeValidator(seconds)]
"""Seconds, that may be written ``3h55m``."""
