"""Lengths of training in any unit (``"16ep"`` epochs, ``4000`` steps, ``"5%"`` of the whole); of time: ``"3h55m"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
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
    """A stretch of training, not yet counted in steps."""

    value: float
    unit: Literal["ep", "steps", "%"]

    def __str__(self) -> str:
        number = format(Decimal(repr(self.value)).normalize(), "f")  # every digit, and no exponent: it is read back
        return number + {"ep": "ep", "steps": " steps", "%": "%"}[self.unit]

    def steps(self, *, epoch: int, whole: int) -> int:
        """In steps, for an epoch of `epoch` steps and, for percent, a whole of `whole` steps; rounded to nearest."""
        return round(self.value * {"ep": epoch, "steps": 1, "%": whole / 100}[self.unit])


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
    return Duration(number, unit)  # type: ignore[arg-type]


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
    """Reads a number or a fraction such as ``"1/3"``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f'{repr(value)[:100]} is not a number or a fraction such as "1/3"') from error


def _text(value: Any) -> str:
    if not isinstance(value, Duration):  # what else a field may hold says itself how it is written
        raise PydanticSerializationUnexpectedValue("not a length")
    return str(value)


Length = Annotated[Duration, BeforeValidator(duration), PlainSerializer(_text, return_type=str)]
"""A configuration's duration."""

Steps = Annotated[int, PlainValidator(duration)]
"""An argument of a curve: the user writes a duration, the plan counts it, the curve receives steps."""

Ratio = Annotated[float, BeforeValidator(ratio)]
"""A number that may be written as a fraction."""

TimeSpan = Annotated[int, BeforeValidator(seconds)]
"""Seconds, that may be written ``3h55m``."""
