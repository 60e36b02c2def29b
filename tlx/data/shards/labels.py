"""Where a sample of a tar made elsewhere has its label, and its targets: in a member, or the folder in its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from tlx.base.errors import UserError, did_you_mean
from tlx.base.terminal import escaped
from tlx.data.build.sources import EXTENSIONS as PICTURES
from tlx.data.shards.class_names import Numbers
from tlx.data.shards.target_values import TargetSpec, Written, from_json, missing, parse_specs

EXTENSIONS = ("cls", "json", "txt")
"""The members that may hold a label; the first that a sample has does."""

FOLDERS = ("folder", "folders")
PLACES = ("auto", *EXTENSIONS, *FOLDERS, "none")

_KEYS = ("label", "cls", "class")  # of a json, where none is asked for
_DEPTH, _SHOWN, _LONGEST = 6, 40, 1000
_DRIVE = re.compile("[A-Za-z]:")


class NoLabel(ValueError):
    """A sample has no member that could hold a label."""


@dataclass(frozen=True)
class LabelRule:
    """Which parts of a sample are its label and its picture. An extension is what follows the first dot of a name, or
    the last one.

    Attributes:
        place: "cls", "json" or "txt": that member, or else the one whose extension ends so (``label.cls``); or a whole
            extension such as ``label.cls``. "folder": the last folder of its name (``cats/0001.jpg`` -> cats).
            "folders": all of them (``animal/cat/0001.jpg`` -> animal/cat). "none": there is no label.
            "auto": the first of .cls, .json and .txt that it has; or the folder, if no sample has any of them and all
            lie in folders.
        key: a path into the json such as ``annotation.label``; None takes ``label``, ``cls`` or ``class``, or all.
        picture: the extension of the picture, where a sample has several (``image.jpg``); None takes the only one.
        numbers: what numbers as labels are (see `tlx.data.shards.class_names`); None where that was not said.
        last_dot: a sample's name ends at its last dot (``img.2024.0`` of img.2024.0.jpg), not at its first, as
            WebDataset has it.
        targets: what else is known of a sample, by dotted keys of its .json.
    """

    place: str = "auto"
    key: str | None = None
    picture: str | None = None
    numbers: Numbers | None = None
    last_dot: bool = False
    targets: tuple[TargetSpec, ...] = ()

    @staticmethod
    def make(
        place: str | None = None,
        key: str | None = None,
        picture: str | None = None,
        numbers: str | None = None,
        *,
        last_dot: bool = False,
        targets: Sequence[str] = (),
    ) -> LabelRule:
        """
        Raises:
            UserError: an unknown place, a key for something that is no json, no picture's extension, no target.
        """
        if place is None:
            place = "auto" if key is None else "json"
        place = place.lower().removeprefix(".")
        last = place.rpartition(".")[2]
        if place not in PLACES and not ("." in place and last in EXTENSIONS):
            raise UserError(f'labels are not read from "{place}"{did_you_mean(place, PLACES)}')
        if key is not None and last != "json":
            raise UserError(f'the key "{key}" is for a .json, and the labels come from {place}', todo="use one of both")
        if key == "":
            raise UserError("the key of the label is empty")
        if key is not None and len(key) > _LONGEST:
            raise UserError(f"the key of the label has {len(key):,} characters")
        if picture is not None:
            picture = picture.lower().removeprefix(".")
            if picture.rpartition(".")[2] not in PICTURES:
                raise UserError(f'"{picture}" is no extension of a picture', todo="such as jpg, or image.jpg")
        if numbers is not None and numbers not in get_args(Numbers):
            raise UserError(f'numbers as labels are not "{numbers}"{did_you_mean(numbers, get_args(Numbers))}')
        return LabelRule(place, key, picture, numbers, last_dot, parse_specs(targets))  # type: ignore[arg-type]

    @staticmethod
    def read(told: Mapping[str, Any]) -> LabelRule:
        """From `header`.

        Raises:
            UserError, TypeError, AttributeError: it holds something else.
        """
        said = (told.get("from"), told.get("key"), told.get("picture"), told.get("numbers"))
        return LabelRule.make(*said, last_dot=told.get("last_dot") is True, targets=told.get("targets") or ())

    def header(self) -> dict[str, Any]:
        """What an index remembers; nothing for "auto"."""
        said = {"key": self.key, "picture": self.picture, "numbers": self.numbers, "last_dot": self.last_dot or None}
        place = {} if self.place == "auto" else {"from": self.place}
        targets = {"targets": list(map(str, self.targets))} if self.targets else {}
        return {**place, **{name: value for name, value in said.items() if value is not None}, **targets}

    def over(self, before: LabelRule) -> LabelRule:
        """What is said here; where no place is, what was said before of that and of what is not said here. Targets are
        those of before, where none is said here."""
        if self.place != "auto":
            return replace(self, targets=self.targets or before.targets)
        return LabelRule(
            before.place,
            before.key,
            self.picture or before.picture,
            self.numbers or before.numbers,
            self.last_dot or before.last_dot,
            self.targets or before.targets,
        )

    def picture_in(self, group: Collection[str]) -> str:
        """The extension, of those of a sample, that is its picture's.

        Raises:
            ValueError: none is, or several are.
        """
        among = ", ".join(map(escaped, group))
        if self.picture is not None:
            if self.picture not in group:
                raise ValueError(f"no .{self.picture} among {among}")
            return self.picture
        found = pictures_in(group)
        if len(found) != 1:
            hint = f"; --picture {escaped(found[0])} would say which" if found else ""
            if len(found) > 1 and all("." in extension for extension in found):
                hint += ", --last-dot makes each of them a sample"
            raise ValueError(f"{len(found) or 'no'} pictures among {among}{hint}")
        return found[0]

    def label_in(self, group: Collection[str], picture: str) -> str | None:
        """The extension, of those of a sample, that is its label's; None if there is none.

        Raises:
            ValueError: several are.
        """
        wanted = EXTENSIONS if self.place == "auto" else (self.place,)
        exact = next((e for e in wanted if e in group), None)
        if exact is not None:
            return exact
        for extension in wanted:
            # beside a picture that is called as usual, meta.json or caption.txt are hardly the label
            if self.place == "auto" and extension != "cls" and "." not in picture:
                continue
            found = [e for e in group if e.endswith(f".{extension}")]
            if len(found) > 1:
                some = ", ".join(map(escaped, found))
                raise ValueError(f"{len(found)} labels among {some}; --label-from {escaped(found[0])} would say which")
            if found:
                return found[0]
        return None


def pictures_in(group: Collection[str]) -> list[str]:
    """The extensions that are a picture's; those of several parts (``image.jpg``) where there are no others."""
    plain = [e for e in group if e in PICTURES]
    return plain or [e for e in group if e.rpartition(".")[2] in PICTURES]


AUTO = LabelRule()
"""What is done without a rule."""


def folder_of(name: str) -> str:
    """The last folder in a member's name, empty if there is none."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return "" if folder in (".", "..") or _DRIVE.fullmatch(folder) else folder


def folders_of(name: str) -> str:
    """All folders in a member's name, joined by ``/``; empty if there is none."""
    folders = [part for part in name.split("/")[:-1] if part not in ("", ".")]
    if folders and _DRIVE.fullmatch(folders[0]):
        folders = folders[1:]
    return "" if ".." in folders else "/".join(folders)


def label_of(rule: LabelRule, name: str, group: Mapping[str, Any], read: Callable[[str], bytes]) -> str:
    """The label of one sample, as it is written; empty where there is none to be had.

    Args:
        name: its picture's name in the tar.
        group: its members by extension.
        read: the content of the member with an extension.

    Raises:
        NoLabel: nothing that could hold one.
        ValueError: what is there is no label.
    """
    if rule.place == "none":
        return ""
    if rule.place in FOLDERS:
        folder = folder_of(name) if rule.place == "folder" else folders_of(name)
        if not folder:
            raise NoLabel("it lies in no folder, and the label is the folder's name")
        return _valid(folder, "the folder")
    extension = rule.label_in(group, name.rpartition("/")[2].partition(".")[2].lower())
    if extension is None:
        wanted = EXTENSIONS if rule.place == "auto" else (rule.place,)
        raise NoLabel(f"no label among {', '.join(map(escaped, group))}; looked for .{', .'.join(wanted)}")
    text = read(extension).decode("utf-8-sig", "strict").strip()
    value = _from_json(text, rule.key) if extension.endswith("json") else text
    return _valid(value, f".{extension}", text)


@dataclass(frozen=True)
class TargetReader:
    """Reads the targets of samples, and notes what a key that is not there may be called.

    Attributes:
        hints: by target, of the first sample whose .json lacks it.
    """

    rule: LabelRule
    hints: dict[str, str] = field(default_factory=dict)

    def member_in(self, group: Collection[str]) -> str | None:
        """The extension, of those of a sample, that holds them: the one of its label, if that is a .json, or the only
        .json."""
        if not self.rule.targets:
            return None
        place = self.rule.place if self.rule.place.endswith("json") else "json"
        return LabelRule(place).label_in(group, "")

    def read(self, group: Collection[str], read: Callable[[str], bytes]) -> tuple[Written, ...]:
        """The value of each target.

        Raises:
            ValueError: what is there is none.
        """
        extension = self.member_in(group)
        value: object = None if extension is None else _loaded(read(extension).decode("utf-8-sig", "strict"))
        return tuple(self._value(spec, value) for spec in self.rule.targets)

    def _value(self, spec: TargetSpec, value: object) -> Written:
        found: list[object] = []
        for source in spec.sources:
            try:
                found.append(_at(value, source.split(".")))
            except KeyError:
                found.append(None)
                hint = "" if value is None else _hint(source, value)
                self.hints.setdefault(spec.name, f'"{escaped(source)}"{hint}')
        if all(one is None for one in found):
            return missing(spec)
        try:
            return from_json(spec, found)
        except ValueError as error:
            raise ValueError(f"target {spec.name}: {error}") from None


def _valid(value: object, where: str, text: str = "") -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise ValueError(
            f"the label in {escaped(where)} is {escaped((text or str(value))[:60])}, neither a number nor a name"
        )
    label = str(value)
    if not label.isprintable():
        raise ValueError(f"the label {escaped(label[:60])} holds characters that cannot be shown")
    if len(label) > _LONGEST:
        raise ValueError(f"the label {escaped(label[:60])} ... has {len(label):,} characters")
    return label


def _from_json(text: str, key: str | None) -> object:
    value = _loaded(text)
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


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the .json is nested too deep") from None


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
