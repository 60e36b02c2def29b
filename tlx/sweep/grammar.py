"""What a sweep varies, from words of a command line.

====================================  =====================================================================
``phases.each.lr=1e-4..1e-2:log``      any number between, drawn evenly by its logarithm
``backbone.args.drop_path_rate=0..1``  any number between; whole ones where the key takes no others
``data.batch=16..64/16``               16, 32, 48, 64
``phases.fine_tuning.duration=4ep..16ep``  whole numbers of epochs
``backbone.name=a,b``                  one of these; a comma inside of brackets or quotes divides nothing
``seed=3``                             no variation: as for ``tlx train``
====================================  =====================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tlx.base.errors import Problems, UserError, did_you_mean
from tlx.base.parsing import from_word

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_VALUE = re.compile(rf"(?P<number>{_NUMBER})(?P<unit>[a-zA-Z%]*)")
_WHOLE = re.compile(r"[-+]?\d+")
_ON_STEPS = 1e-9
_MOST_STEPS = 1e9
_EXAMPLE = "write key=1e-4..1e-2:log, key=2..8, key=0..1/0.1 or key=a,b"


@dataclass(frozen=True)
class Range:
    """Numbers between two, both among them.

    Attributes:
        step: from `low` on; None for any number.
        whole: only whole numbers; where neither ends nor step have a point that is decided by what the key takes.
        unit: of durations, such as ``ep``.
        text: as it was written, without the key.
    """

    key: str
    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False
    unit: str = ""
    text: str = ""

    def word(self, value: float) -> str:
        """The override that sets the key to a value."""
        if self.step is not None:
            value = float(f"{value:.12g}")  # 0.30000000000000004 is the step 0.3
        return f"{self.key}={int(value) if self.whole else repr(float(value))}{self.unit}"

    @property
    def ends(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def middle(self) -> float:
        """The one half way, on the grid."""
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.step is not None:
            return self.low + round((value - self.low) / self.step) * self.step
        return round(value) if self.whole else value

    @property
    def count(self) -> int | None:
        """How many values there are; None for any number."""
        step = self.step if self.step is not None else 1.0 if self.whole else None
        return None if step is None else round((self.high - self.low) / step) + 1

    def at(self, place: int) -> float:
        """Of a range with a count: the value at a place, from 0."""
        return self.low + place * (self.step or 1)


@dataclass(frozen=True)
class Choices:
    """One of several values, as they were written."""

    key: str
    values: tuple[str, ...]
    text: str = ""

    def word(self, value: str) -> str:
        """The override that sets the key to a value."""
        return f"{self.key}={value}"

    @property
    def ends(self) -> tuple[str, ...]:
        return self.values

    @property
    def middle(self) -> str:
        return self.values[0]

    @property
    def count(self) -> int:
        return len(self.values)

    def at(self, place: int) -> str:
        return self.values[place]


Dimension = Range | Choices


def parse(words: Sequence[str]) -> tuple[tuple[Dimension, ...], list[str]]:
    """What varies, and the overrides that do not. Whether the configuration has the keys is not looked at.

    Raises:
        UserError, ConfigError: every word that is neither.
    """
    found, varied, fixed = Problems(), dict[str, Dimension](), list[str]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            found.add(UserError(f'"{word[:200]}" is neither key=value nor a range', todo=_EXAMPLE))
            continue
        made = found.of(lambda key=key, text=text: _dimension(key, text))  # type: ignore[misc]
        if made is not None and key in varied:
            found.add(UserError("stands twice", where=key, todo="say all of its values in one word"))
        elif isinstance(made, Range | Choices):
            varied[key] = made
        elif made is not None:
            fixed.append(word)
    for word in fixed:
        if (key := word.partition("=")[0]) in varied:
            found.add(UserError("is varied, and set to one value", where=key, todo="leave one of the two out"))
    found.refuse()
    return tuple(varied.values()), fixed


def _dimension(key: str, text: str) -> Dimension | str:
    """A dimension; the text itself where it is one value."""
    low, dots, rest = text.partition("..")
    high = re.split(r"[:/]", rest, maxsplit=1)[0]
    if dots and (_VALUE.fullmatch(low) or _VALUE.fullmatch(high)):  # else a path such as ../data
        return _range(key, text, low, high, rest[len(high) :])
    values = divided(text)
    if len(values) == 1:
        return text
    return _choices(key, text, values)


def _range(key: str, text: str, low: str, high: str, more: str) -> Range:
    ends = _VALUE.fullmatch(low), _VALUE.fullmatch(high)
    for end, said, which in zip(ends, (low, high), ("begins", "ends"), strict=True):
        if end is None:
            raise UserError(f'{text}: the range {which} with "{said}", which is no number', where=key, todo=_EXAMPLE)
    first, last = ends
    assert first is not None
    assert last is not None
    if first["unit"] != last["unit"]:
        raise UserError(
            f"{text}: both ends must be of one unit", where=key, todo=f"write {low}..{last['number']}{first['unit']}"
        )
    numbers = float(first["number"]), float(last["number"])
    step, log = _manner(key, text, more)
    whole = all(_WHOLE.fullmatch(said) for said in (first["number"], last["number"], step or "1"))
    made = Range(key, *numbers, float(step) if step else None, log, whole, first["unit"], text)
    _check(made)
    return made


def _manner(key: str, text: str, more: str) -> tuple[str | None, bool]:
    """What follows the ends: the step, and whether it is by the logarithm."""
    step, log = None, False
    for sign, said in re.findall(r"([:/])([^:/]*)", more):
        if sign == ":" and said == "log":
            log = True
        elif sign == ":" and re.fullmatch(_NUMBER, said):
            raise UserError(
                f"{text}: a step is written with /", where=key, todo=f"write {text.replace(':' + said, '/' + said)}"
            )
        elif sign == ":":
            raise UserError(f'{text}: there is no ":{said}"{did_you_mean(said, ["log"])}', where=key, todo=_EXAMPLE)
        elif not re.fullmatch(_NUMBER, said):
            raise UserError(f'{text}: the step "{said}" is no number', where=key, todo=_EXAMPLE)
        else:
            step = said
    return step, log


def _check(made: Range) -> None:
    """
    Raises:
        UserError: a range of nothing, or one that cannot be drawn from.
    """

    def wrong(what: str, todo: str) -> UserError:
        return UserError(f"{made.text}: {what}", where=made.key, todo=todo)

    low, high, step = made.low, made.high, made.step
    if not (math.isfinite(low) and math.isfinite(high)):
        raise wrong("the ends must be finite", _EXAMPLE)
    if low >= high:
        ends = made.text.partition("..")[0], re.split(r"[:/]", made.text.partition("..")[2], maxsplit=1)[0]
        todo = f"write {ends[1]}..{ends[0]}" if low > high else f"set one value: {made.key}={ends[0]}"
        raise wrong("the range is empty", todo)
    if made.log and low <= 0:
        raise wrong("there is no logarithm of 0 or less", "begin above 0, for instance 1e-5, or leave :log out")
    if step is None:
        return
    if made.log:
        raise wrong("log has no steps", f"list the values: {made.key}=1e-4,1e-3,1e-2; or leave one of the two out")
    if step <= 0 or step > high - low:
        raise wrong("the step must be above 0, and not longer than the range", _EXAMPLE)
    steps = (high - low) / step
    if steps > _MOST_STEPS or abs(steps - round(steps)) > _ON_STEPS * max(steps, 1):
        last = low + math.floor(steps) * step
        raise wrong("the last step does not meet its end", f"write {low:g}..{last:.12g}/{step:g}")


def _choices(key: str, text: str, values: Sequence[str]) -> Choices:
    if not all(values):
        raise UserError(f"{text}: a value is missing beside a comma", where=key, todo='an empty text is written ""')
    read: list[object] = []
    for value in values:
        try:
            read.append(from_word(value))
        except ValueError as error:
            raise UserError(f"{value}: the value is not YAML: {error}", where=key) from error
    for place, one in enumerate(read):
        same = [first for first in range(place) if read[first] == one and type(read[first]) is type(one)]
        if same:
            what = "stands twice" if values[place] == values[same[0]] else f"is the same as {values[same[0]]}"
            raise UserError(f"{text}: {values[place]} {what}", where=key, todo="leave one of them out")
    return Choices(key, tuple(values), text)


def divided(text: str) -> list[str]:
    """The values that commas divide, but for commas inside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not parts[-1].strip(" [{("):
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts] if len(parts) > 1 else [text]
