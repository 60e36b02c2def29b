"""What a sample's targets are as somebody has written them: in cells of a CSV file, in a ``.json``; and as arrays.

A value that is written is one of these, whatever the file:

- of a class: its name, or None where it is missing;
- of labels: `Labels`;
- of numbers: all of them, or None where they are missing: a sample has all of its numbers, or none.

A ``.json`` holds the name of a class; a list of labels, in which ``"?name"`` is a label that may or may not apply, and
``"?"`` stands for all that are not named (or an object, ``{"name": 1}``: 1, 0 or null); a number, or a list of them.
What is null, or not there, is missing. A build writes its targets so, and an index is made of them.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError, did_you_mean
from tlx.base.terminal import escaped
from tlx.data.shards.class_names import in_order, may_be_position, sorted_names
from tlx.data.shards.target_arrays import empty_array
from tlx.data.shards.targets import KINDS, Kind, Target, name_problem

_UNKNOWN = "?"
_LONGEST = 1000  # characters of a name
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_FLAGS = {**dict.fromkeys(("1", "true", "yes"), True), **dict.fromkeys(("0", "false", "no"), False)}


@dataclass(frozen=True)
class TargetSpec:
    """A target that is asked for: ``NAME[:KIND][=SOURCE[,SOURCE...]]``.

    Attributes:
        sources: columns of a CSV file, or dotted keys of a ``.json``; several for numbers, or for labels, one each.
    """

    name: str
    kind: Kind
    sources: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> TargetSpec:
        """From what is written on a command line; the kind is class where none is said, the source the name.

        Raises:
            UserError: it is no target.
        """
        said, equals, rest = text.partition("=")
        name, colon, kind = (word.strip() for word in said.partition(":"))
        problem = name_problem(name)
        if problem:
            raise UserError(f'"{escaped(text[:100])}" is no target: {problem}', where="--target", todo=_EXAMPLE)
        if colon and kind not in KINDS:
            raise UserError(
                f'there is no kind of target "{escaped(kind[:40])}"{did_you_mean(kind, KINDS)}', todo=_EXAMPLE
            )
        kind = KINDS[KINDS.index(kind or "class")]  # type: ignore[arg-type]
        sources = tuple(s.strip() for s in next(csv.reader([rest]), [])) if equals else (name,)
        if not all(sources) or not sources or len(set(sources)) < len(sources):
            raise UserError(f'"{escaped(text[:100])}" names no source, or one twice', where="--target", todo=_EXAMPLE)
        if kind == "class" and len(sources) > 1:
            raise UserError(f'the class "{name}" has {len(sources)} sources', where="--target", todo="name one")
        return TargetSpec(name, kind, sources)  # type: ignore[arg-type]

    def __str__(self) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(self.sources)
        return f"{self.name}:{self.kind}={line.getvalue()}"

    @property
    def flags(self) -> bool:
        """Whether each source says of one label whether it applies."""
        return self.kind == "labels" and len(self.sources) > 1


_EXAMPLE = "such as colour, tags:labels, age:number, or box:number=x,y,w,h (NAME[:KIND][=COLUMN[,COLUMN...]])"


def parse_specs(texts: Iterable[str]) -> tuple[TargetSpec, ...]:
    """
    Raises:
        UserError: one is no target, or two have one name.
    """
    specs = tuple(map(TargetSpec.parse, texts))
    names = [spec.name.casefold() for spec in specs]
    twice = next((spec.name for spec in specs if names.count(spec.name.casefold()) > 1), None)
    if twice:
        raise UserError(f'the target "{twice}" is named twice', where="--target", todo="capitals make no difference")
    return specs


@dataclass(frozen=True, slots=True)
class Labels:
    """Which labels apply to a sample.

    Attributes:
        yes, no: those that do, and do not.
        unknown: those that may or may not.
        rest_unknown: whether that is so of all others, too; else they do not apply.
    """

    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    rest_unknown: bool = False

    @staticmethod
    def of(names: Sequence[str]) -> Labels:
        """Of those that apply, with marks of unknown ones.

        Raises:
            ValueError: one applies and is unknown.
        """
        yes = tuple(dict.fromkeys(sys.intern(n) for n in names if not n.startswith(_UNKNOWN)))
        marked = tuple(dict.fromkeys(sys.intern(n[1:].strip()) for n in names if n.startswith(_UNKNOWN)))
        unknown = tuple(n for n in marked if n)
        both = next((name for name in unknown if name in yes), None)
        if both is not None:
            raise ValueError(f'the label "{escaped(both)}" applies and is unknown')
        return Labels(yes, (), unknown, "" in marked)


NO_LABELS_KNOWN = Labels(rest_unknown=True)
Written: TypeAlias = "str | Labels | tuple[float, ...] | None"


def missing(spec: TargetSpec) -> Written:
    """The value of a sample that lacks the target."""
    return NO_LABELS_KNOWN if spec.kind == "labels" else None


# In cells of a CSV file


def from_cells(spec: TargetSpec, cells: Sequence[str], separator: str) -> Written:
    """The value in a row's cells, one for each source; an empty cell of a class or number is a missing value, of labels
    none applies.

    Args:
        separator: of labels in one cell.

    Raises:
        ValueError: what is there is none.
    """
    if spec.kind == "class":
        return sys.intern(_name(cells[0])) if cells[0] else None
    if spec.kind == "number":
        given = [cell for cell in cells if cell]
        if given and len(given) < len(cells):
            raise ValueError(f"{len(cells) - len(given)} of {len(cells)} numbers are missing; give all, or none")
        return tuple(map(_number, given)) or None
    if not spec.flags:
        return Labels.of([_name(name.strip()) for name in cells[0].split(separator) if name.strip()])
    flags = {name: _flag(cell) for name, cell in zip(spec.sources, cells, strict=True)}
    yes, no, unknown = (tuple(n for n, said in flags.items() if said is wanted) for wanted in (True, False, None))
    return Labels(yes, no, unknown)


def _number(cell: str) -> float:
    if not _NUMBER.fullmatch(cell):
        raise ValueError(f'"{escaped(cell[:40])}" is no number')
    return _finite(float(cell))


def _finite(value: float) -> float:
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError(f"the number {value} is not finite in 32 bits")
    return value


def _flag(cell: str) -> bool | None:
    word = cell.casefold()
    if word in ("", _UNKNOWN):
        return None
    word = str(int(float(word))) if _NUMBER.fullmatch(word) and float(word) in (0, 1) else word
    if word not in _FLAGS:
        raise ValueError(f'"{escaped(cell[:40])}" does not say whether a label applies: 1, 0, or nothing for unknown')
    return _FLAGS[word]


def _name(name: object) -> str:
    if isinstance(name, bool) or not isinstance(name, (int, str)) or name == "":
        raise ValueError(f"{escaped(str(name)[:60])} is neither a name nor a whole number")
    text = str(name).strip()
    if not text or not text.isprintable():
        raise ValueError(f"the name {text[:60]!a} is empty, or holds characters that cannot be shown")
    if len(text) > _LONGEST:
        raise ValueError(f"the name {escaped(text[:60])} ... has {len(text):,} characters")
    return text


# In a json


def from_json(spec: TargetSpec, values: Sequence[object]) -> Written:
    """The value that stands at the keys of a ``.json``, one for each source; None of what is not there.

    Raises:
        ValueError: what is there is none.
    """
    first = values[0]
    if all(value is None for value in values):
        return missing(spec)
    if spec.kind == "class":
        if isinstance(first, list):
            raise ValueError(f"it is a list; {spec.name}:labels takes several")
        return sys.intern(_name(first))
    if spec.kind == "number":
        return _numbers(values)
    if spec.flags:
        return _from_flags(dict(zip(label_names(spec), values, strict=True)))
    if isinstance(first, Mapping):
        return _from_flags({_name(name): value for name, value in first.items()})
    if not isinstance(first, list):
        raise ValueError(f"{escaped(str(first)[:60])} is no list of labels")
    return Labels.of([_name(name) for name in first])


def label_names(spec: TargetSpec) -> tuple[str, ...]:
    """Of labels with a key each: the last part of it, where these differ."""
    last = tuple(source.rpartition(".")[2] for source in spec.sources)
    return last if len(set(last)) == len(last) else spec.sources


def _from_flags(said: Mapping[str, object]) -> Labels:
    for name, value in said.items():
        if value is not None and (not isinstance(value, (bool, int, float)) or value not in (0, 1)):
            raise ValueError(f'the label "{escaped(name[:60])}" is {escaped(str(value)[:40])}, not 1, 0 or null')
    yes = tuple(sys.intern(n) for n, value in said.items() if value is not None and value)
    no = tuple(sys.intern(n) for n, value in said.items() if value is not None and not value)
    return Labels(yes, no, tuple(sys.intern(n) for n, value in said.items() if value is None), rest_unknown=True)


def _numbers(values: Sequence[object]) -> tuple[float, ...]:
    found: list[float] = []
    for value in values:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{escaped(json.dumps(number)[:60])} is no number")
            try:
                found.append(_finite(float(number)))
            except OverflowError:
                raise ValueError("a number is not finite in 32 bits") from None
    if not found:
        raise ValueError("the list of numbers is empty")
    return tuple(found)


def as_json(specs: Sequence[TargetSpec], values: Sequence[Written]) -> str:
    """The ``.json`` of a sample, by the names of targets."""
    said: dict[str, Any] = {}
    for spec, value in zip(specs, values, strict=True):
        if isinstance(value, Labels) and spec.flags:
            flags = {**dict.fromkeys(value.yes, 1), **dict.fromkeys(value.no, 0)}
            said[spec.name] = {name: flags.get(name) for name in spec.sources}
        elif isinstance(value, Labels):
            marks = [*(f"{_UNKNOWN}{name}" for name in value.unknown), *([_UNKNOWN] if value.rest_unknown else [])]
            if value != NO_LABELS_KNOWN:
                said[spec.name] = [*value.yes, *marks]
        elif isinstance(value, tuple):
            said[spec.name] = value[0] if len(value) == 1 else list(value)
        elif value is not None:
            said[spec.name] = value
    return json.dumps(said, ensure_ascii=False, allow_nan=False)


# As arrays


def target_of(spec: TargetSpec, values: Iterable[Written], order: Sequence[str] | None = None) -> Target:
    """The target that has these values, in a build: classes are sorted, or in the order of an earlier list.

    Raises:
        UserError: no sample has it, numbers of different counts, names that cannot be.
    """
    names, widths = names_and_widths(values)
    if spec.kind == "number":
        return Target(spec.name, "number", width=width_of(spec, widths))
    refuse_names(spec, names)
    return Target(spec.name, spec.kind, in_order(names, order or ()))


def listed_target(spec: TargetSpec, names: Iterable[str], known: Sequence[str] | None, *, given: bool) -> Target:
    """The target of an index, with the classes of a list or of an earlier index, where there is one.

    Args:
        given: the list was given now.

    Raises:
        UserError: a name that is not in the list, nor a position in it.
    """
    names = set(names)
    if not known or (not given and not names):
        refuse_names(spec, names)
        return Target(spec.name, spec.kind, sorted_names(names))
    if place_of(names, known) is None:
        odd = next(name for name in sorted_names(names) if name not in known)
        near = did_you_mean(odd, known)
        raise UserError(
            f'{spec.name}: "{escaped(odd[:100])}" is not among the {len(known)} classes of '
            f"{'--target-classes' if given else 'the earlier index'}{near if 'did you mean' in near else ''}",
            where="--target",
            todo=f"give a complete list: --target-classes {spec.name}=FILE (a name per line); or --fresh, which forgets"
            " the earlier index",
        )
    return Target(spec.name, spec.kind, tuple(known))


def names_and_widths(values: Iterable[Written]) -> tuple[set[str], set[int]]:
    """Names of classes or labels in values, and how many numbers they have."""
    names: set[str] = set()
    widths: set[int] = set()
    for value in values:
        if isinstance(value, Labels):
            names.update(value.yes, value.no, value.unknown)
        elif isinstance(value, tuple):
            widths.add(len(value))
        elif value is not None:
            names.add(value)
    return names, widths


def width_of(spec: TargetSpec, widths: Iterable[int]) -> int:
    """
    Raises:
        UserError: there are several, or none.
    """
    widths = sorted(widths)
    if not widths:
        raise UserError(f"{spec.name}: every sample lacks its number", where="--target")
    if len(widths) > 1:
        raise UserError(f"{spec.name}: samples have {widths[0]} to {widths[-1]} numbers", where="--target")
    return widths[0]


def refuse_names(spec: TargetSpec, names: Iterable[str]) -> None:
    """
    Raises:
        UserError: there are no names, or one that means something else.
    """
    names = list(names)
    if not names:
        raise UserError(f"{spec.name}: every sample lacks it, so that it has no classes", where="--target")
    marked = next((name for name in names if spec.kind == "labels" and name.startswith(_UNKNOWN)), None)
    if marked is not None:
        raise UserError(
            f'{spec.name}: the label "{escaped(marked)}" begins with ?, the mark of unknown ones', where="--target"
        )


def place_of(names: Iterable[str], classes: Sequence[str]) -> dict[str, int] | None:
    """Where names are among classes: all by name, or else all by position; None where neither is so."""
    names, place = list(names), {name: i for i, name in enumerate(classes)}
    if all(name in place for name in names):
        return {name: place[name] for name in names}
    if all(may_be_position(name) and int(name) < len(classes) for name in names):
        return {name: int(name) for name in names}
    return None


def array_of(target: Target, values: Sequence[Written]) -> NDArray[Any] | None:
    """The array of a target, one row per value; None where a value is none of it."""
    names, widths = names_and_widths(values)
    place = place_of(names, target.classes)
    if place is None or widths - {target.width}:
        return None
    array = empty_array(target, len(values))
    if target.kind == "class":
        array[:] = [-1 if value is None else place[value] for value in values]  # type: ignore[index]
        return array
    for row, value in enumerate(values):
        if isinstance(value, Labels):
            if not value.rest_unknown:
                array[row] = 0
            for labels, said in ((value.yes, 1), (value.no, 0), (value.unknown, -1)):
                array[row, [place[name] for name in labels]] = said
        elif value is not None:
            array[row] = value
    return array
