"""Where a sample of a tar made elsewhere has its label: a member of its own, or the folder in its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tlx.errors import UserError, did_you_mean
from tlx.terminal import escaped

Place = Literal["auto", "cls", "json", "txt", "folder"]

EXTENSIONS = ("cls", "json", "txt")
"""The members that may hold a label; the first that a sample has does."""

_KEYS = ("label", "cls", "class")  # of a json, where none is asked for
_DEPTH, _SHOWN, _LONGEST = 6, 40, 1000


class NoLabel(ValueError):
    """A sample has no member that could hold a label."""


@dataclass(frozen=True)
class LabelRule:
    """Which part of a sample is its label.

    Attributes:
        place: "cls", "json" or "txt": that member. "folder": the last folder of its name (``cats/0001.jpg`` -> cats).
            "auto": the first of .cls, .json and .txt that it has; or the folder, if no sample has any of them and all
            lie in folders.
        key: a path into the json such as ``annotation.label``; None takes ``label``, ``cls`` or ``class``, or all.
    """

    place: Place = "auto"
    key: str | None = None

    @staticmethod
    def make(place: str | None = None, key: str | None = None) -> LabelRule:
        """
        Raises:
            UserError: an unknown place, or a key for something that is no json.
        """
        if place is None:
            place = "auto" if key is None else "json"
        if place not in get_args(Place):
            raise UserError(f'labels are not read from "{place}"{did_you_mean(place, get_args(Place))}')
        if key is not None and place != "json":
            raise UserError(f'the key "{key}" is for a .json, and the labels come from {place}', todo="use one of both")
        if key == "":
            raise UserError("the key of the label is empty")
        if key is not None and len(key) > _LONGEST:
            raise UserError(f"the key of the label has {len(key):,} characters")
        return LabelRule(place, key)  # type: ignore[arg-type]

    def header(self) -> dict[str, str]:
        """What an index remembers; nothing for "auto"."""
        if self.place == "auto":
            return {}
        return {"from": self.place, **({"key": self.key} if self.key is not None else {})}


AUTO = LabelRule()
"""What is done without a rule."""


def folder_of(name: str) -> str:
    """The last folder in a member's name, empty if there is none."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return "" if folder in (".", "..") else folder


def label_of(rule: LabelRule, name: str, group: Mapping[str, Any], read: Callable[[str], bytes]) -> int | str:
    """The label of one sample, a number or a name.

    Args:
        name: its picture's name in the tar.
        group: its members by extension.
        read: the content of the member with an extension.

    Raises:
        NoLabel: nothing that could hold one.
        ValueError: what is there is no label.
    """
    if rule.place == "folder":
        folder = folder_of(name)
        if not folder:
            raise NoLabel("it lies in no folder, and the label is the folder's name")
        return _valid(folder, "the folder")
    wanted = EXTENSIONS if rule.place == "auto" else (rule.place,)
    extension = next((e for e in wanted if e in group), None)
    if extension is None:
        raise NoLabel(f"no label among {', '.join(map(escaped, group))}; looked for .{', .'.join(wanted)}")
    text = read(extension).decode("utf-8", "strict").strip()
    value = _from_json(text, rule.key) if extension == "json" else text
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return _valid(value, f".{extension}", text)


def _valid(value: object, where: str, text: str = "") -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise ValueError(f"the label in {where} is {escaped((text or str(value))[:60])}, neither a number nor a name")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"the label {escaped(value[:60])} holds characters that cannot be shown")
    if isinstance(value, int) and not 0 <= value < 1 << 31:
        raise ValueError(f"the label {str(value)[:60]} is out of range")
    return value


def _from_json(text: str, key: str | None) -> object:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("the .json is nested too deep") from None
    if key is not None:
        try:
            return _at(value, key.split("."))
        except KeyError:
            raise ValueError(f'the .json has no "{escaped(key)}"{_hint(key, value)}') from None
    if isinstance(value, Mapping):
        known = next((k for k in _KEYS if k in value), None)
        if known is None:
            hint = f"{_hint('label', value)}; --label-key says which holds the label"
            raise ValueError(f"the .json has none of the keys {', '.join(_KEYS)}{hint}")
        return value[known]  # type: ignore[no-any-return]
    return value  # type: ignore[no-any-return]


def _at(value: Any, parts: Sequence[str]) -> object:
    """The value at a dotted path; a name may hold dots itself, a number counts through a list."""
    if not parts:
        return value  # type: ignore[no-any-return]
    if isinstance(value, Mapping):
        for count in range(len(parts), 0, -1):
            name = ".".join(parts[:count])
            if name in value:
                return _at(value[name], parts[count:])
    if isinstance(value, list) and parts[0].isdecimal() and int(parts[0]) < len(value):
        return _at(value[int(parts[0])], parts[1:])
    raise KeyError(parts[0])


def _hint(key: str, value: object) -> str:
    paths = [p for p, _ in zip(_paths(value), range(_SHOWN), strict=False)]
    some = ", ".join(escaped(p[:100]) for p in paths[:10]) + (" ..." if len(paths) > 10 else "")
    listed = f"; its keys: {some}" if paths else ""
    close = did_you_mean(key, paths)
    return close if close.startswith("; did you mean") else listed


def _paths(value: object, depth: int = 0) -> Iterator[str]:
    """The dotted paths of everything that could be a label."""
    if isinstance(value, Mapping) and depth < _DEPTH:
        for name, inner in value.items():
            if isinstance(inner, (Mapping, list)):
                yield from (f"{name}.{rest}" for rest in _paths(inner, depth + 1))
            else:
                yield str(name)
    elif isinstance(value, list) and depth < _DEPTH:
        for place, inner in enumerate(value[:3]):
            deeper = isinstance(inner, (Mapping, list))
            yield from (f"{place}.{rest}" for rest in _paths(inner, depth + 1)) if deeper else iter((str(place),))
