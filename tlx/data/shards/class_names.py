"""Which class a label is: one rule for folders, members of tars, CSV files and lists of classes.

A label is a name. Names that are all integers are sorted by value, all others as text (as torchvision's `ImageFolder`
sorts folders); a list of classes, or an index that is there already, keeps its order, and labels find their place in it
by name. A number that a sample's own .cls, .txt or .json holds may also be a position from 0 in the list. Where only
one of the two readings is possible, or both give the same, it is taken; where they differ, it has to be said which is
meant (``--numbers``). The name of a folder and the label in a CSV file are always names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from tlx.base.errors import UserError, did_you_mean
from tlx.base.terminal import escaped

Numbers = Literal["names", "positions"]

_DIGITS = 18  # of a number that 64 bits hold
_MOST = 1 << 20  # classes that positions alone may stand for


@dataclass(frozen=True)
class ClassList:
    """Classes, and where the labels of samples are among them.

    Attributes:
        names: in the order of labels.
        place: label as it was found -> position in `names`.
    """

    names: tuple[str, ...]
    place: Mapping[str, int]


NO_CLASS = ClassList((), {"": -1})
"""Where there is no class, every label is empty."""


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: by value if all are integers, else as text."""
    different = set(names)
    if all(map(is_integer, different)):
        return tuple(sorted(different, key=lambda name: (int(name), name)))
    return tuple(sorted(different))


def in_order(names: Collection[str], earlier: Sequence[str]) -> tuple[str, ...]:
    """The names, sorted; in the order of an earlier list, if that holds the same ones."""
    return tuple(earlier) if set(earlier) == set(names) and len(earlier) == len(set(names)) else sorted_names(names)


def is_integer(name: str) -> bool:
    """Whether it is an integer in decimal digits."""
    digits = name.removeprefix("-")
    return digits.isdecimal() and len(digits) <= _DIGITS


def may_be_position(label: str) -> bool:
    """Whether it is an integer of 0 or more."""
    return is_integer(label) and not label.startswith("-")


def are_ambiguous(names: Sequence[str]) -> bool:
    """Whether some position in a list is also the name of another class in it."""
    place = {name: i for i, name in enumerate(names)}
    return any(place.get(str(i), i) != i for i in range(len(names)))


def by_position(names: Sequence[str]) -> ClassList:
    """For labels that are positions."""
    return ClassList(tuple(names), {str(i): i for i in range(len(names))})


def class_list(
    labels: Collection[str], known: Sequence[str] | None, *, numbers: Numbers | None, named: bool, where: str
) -> ClassList:
    """The classes of labels, by the rule of this module.

    Args:
        labels: the different ones, as they were found.
        known: the classes of a list or an earlier index; None where there is none.
        numbers: what was said that numbers are.
        named: the labels are names even where they are numbers, unless `numbers` says otherwise: folders' names.

    Raises:
        UserError: labels that are not in the list, or that could be read in two ways; with the option that answers.
    """
    if known is None:
        return _without_list(labels, numbers, named=named, where=where)
    place = {name: i for i, name in enumerate(known)}
    name_of = {label: place[label] for label in labels} if all(label in place for label in labels) else None
    position_of = _positions(labels, len(known))
    if numbers is None and not named:
        if name_of is not None and position_of not in (None, name_of):
            _ask(name_of, position_of or {}, known, where)
        chosen = position_of if name_of is None else name_of
    else:
        chosen = position_of if numbers == "positions" else name_of
    if chosen is None:
        _unknown(labels, known, numbers, maybe_positions=position_of is not None, where=where)
    return ClassList(tuple(known), chosen)


def _without_list(labels: Collection[str], numbers: Numbers | None, *, named: bool, where: str) -> ClassList:
    names = sorted_names(labels)
    by_name = ClassList(names, {name: i for i, name in enumerate(names)})
    if numbers == "names" or (named and numbers is None):
        return by_name
    integers = [label for label in names if may_be_position(label)]
    others = [label for label in names if not may_be_position(label)]
    if not integers and numbers is None:
        return by_name
    if others:
        raise UserError(
            f"some labels are numbers ({escaped(integers[0])}), others names ({escaped(others[0])})"
            if integers
            else f"the label {escaped(others[0])} is no position",
            where=where,
            todo="--numbers names, if each number is the name of a class too",
        )
    values = {int(label) for label in integers}
    if numbers == "positions":
        if values and max(values) >= _MOST:
            raise UserError(f"a label is {max(values)}: too large for a position", where=where, todo="--numbers names")
        return ClassList(tuple(map(str, range(max(values, default=-1) + 1))), {i: int(i) for i in integers})
    if all(int(name) == i for i, name in enumerate(names)):  # both readings are one
        return by_name
    raise UserError(
        _gap(values, names),
        where=where,
        todo="where numbers are positions: name the classes, also those without samples: --classes FILE (a name per "
        "line) or an indexed folder; where each number is the name of a class: --numbers names",
    )


def _gap(values: set[int], names: Sequence[str]) -> str:
    absent = next((i for i, number in enumerate(sorted(values)) if i != number), None)
    if absent is None:
        return f"two labels are one number: {', '.join(names[:4])}"
    return f"labels go from {min(values)} to {max(values)}, but none is {absent}"


def _positions(labels: Collection[str], count: int) -> dict[str, int] | None:
    if all(may_be_position(label) and int(label) < count for label in labels):
        return {label: int(label) for label in labels}
    return None


def _ask(name_of: Mapping[str, int], position_of: Mapping[str, int], known: Sequence[str], where: str) -> NoReturn:
    label = next(label for label in sorted_names(name_of) if name_of[label] != position_of[label])
    raise UserError(
        f'labels are numbers, and so are names of classes, in another order: {label} may be the class "{label}", '
        f'or the one at position {label}, which is "{escaped(known[int(label)])}"',
        where=where,
        todo="--numbers names, or --numbers positions",
    )


def _unknown(
    labels: Collection[str], known: Sequence[str], numbers: Numbers | None, *, maybe_positions: bool, where: str
) -> NoReturn:
    possible = set(known) if numbers != "positions" else set()
    strange = [label for label in sorted_names(labels) if label not in possible]
    if numbers != "names":  # one that is no position either tells more
        strange = [label for label in strange if not may_be_position(label) or int(label) >= len(known)] or strange
    hint = did_you_mean(strange[0], known) if "did you mean" in did_you_mean(strange[0], known) else ""
    either = "; --numbers positions, if numbers are positions in the list" if maybe_positions else ""
    raise UserError(
        f"the label {escaped(strange[0])} is not among the {len(known)} classes of --classes or the earlier index"
        + hint,
        where=where,
        todo="give a complete list: --classes FILE (a name per line); or --fresh, which forgets the earlier index"
        + either,
    )
