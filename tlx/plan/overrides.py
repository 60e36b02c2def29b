"""``key.sub=value`` words over a configuration that is plain data, with its defaults where it says nothing.

The schema tells what a step of a key leads to: a field, a phase's name (which may hold dots itself), an element of a
list by its number or by its part's name, an argument of a part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tlx.base import plug
from tlx.base.durations import Duration, Mark
from tlx.base.errors import UserError, did_you_mean
from tlx.base.parsing import from_word, to_yaml
from tlx.base.plug import Group

_DEPTH = 20  # of a key
_EXAMPLE = "write key=value, for instance data.batch=64"


@dataclass(frozen=True)
class Names:
    """Beside the annotation of a mapping of names: the name whose settings are the defaults of the others; None where
    those depend on more than the configuration."""

    base: str | None


@dataclass(frozen=True)
class Short:
    """Beside the annotation of a value that a name may stand for: what gives its long form, a mapping; of anything
    else the value itself."""

    opened: Callable[[Any], Any]


@dataclass(frozen=True)
class Place:
    """What the schema knows of a place in a configuration.

    Attributes:
        model: of the value, or of each value in a mapping of names (`names`) or a list (`list`); None of plain data.
        group: of a part.
        opened: gives the long form of a value.
        base: see :class:`Names`.
        usual: settings that are the defaults here, before those of the model; None where nobody knows them yet.
        libraries: whether a part of another package is looked up for its defaults, which may import torch.
    """

    model: Any = None
    holds: Literal["one", "names", "list"] = "one"
    group: str = ""
    opened: Callable[[Any], Any] | None = None
    base: str | None = ""
    usual: Mapping[str, Any] | None = field(default_factory=dict)
    libraries: bool = True

    def below(self, name: str, node: Mapping[Any, Any]) -> Place:
        """What a key of `node`, the value here, leads to."""
        if self.holds == "names":
            said = node.get(self.base) if self.base and name != self.base else {}
            usual = None if self.base is None else said if isinstance(said, Mapping) else {}
            return replace(self, holds="one", base="", usual=usual)
        known = self.model.model_fields.get(name) if self.model is not None and not self.group else None
        found = _of_annotation(known.annotation, known.metadata) if known is not None else Place()
        return replace(found, libraries=self.libraries)

    def default(self, name: str, node: Mapping[Any, Any]) -> Any:
        """What a key that `node` does not say is by default, as plain data.

        Raises:
            LookupError: that depends on more than the configuration.
        """
        if self.holds == "names":
            return None
        if self.usual is None:
            raise LookupError
        if name in self.usual:
            return copy.deepcopy(self.usual[name])
        if self.group:
            return _plain(_arguments(self.group, node.get("name"), libraries=self.libraries).get(name))
        known = self.model.model_fields.get(name) if self.model is not None else None
        return _plain(known.get_default()) if isinstance(known, FieldInfo) and not known.is_required() else None


def changed(raw: Mapping[str, Any], word: str, schema: type[BaseModel], *, libraries: bool = True) -> dict[str, Any]:
    """A configuration with one override.

    Args:
        word: ``key.sub=value``; see :func:`tlx.base.parsing.from_word` for the value.
        libraries: False where nothing is to import torch: what an argument of another package's part is by default
            stays out.

    Raises:
        UserError: it is no override, its value cannot be read, or its key leads through what has no keys.
    """
    key, equals, text = word.partition("=")
    steps = key.split(".")
    if not equals or not all(steps):
        raise UserError(f'"{_short(word)}" is not an override', todo=_EXAMPLE)
    if len(steps) > _DEPTH + 1:
        raise UserError(f'"{_short(word)}" goes deeper than any key', todo=_EXAMPLE)
    try:
        value = from_word(text)
    except ValueError as error:
        raise UserError(
            f'"{_short(word)}": the value is not YAML: {error}',
            todo=f"where it is a text, put it in quotes of its own: '{_short(key)}=\"...\"'",
        ) from error
    made: dict[str, Any] = _with(dict(raw), steps, value, Place(schema, libraries=libraries), ())
    return made


def keys_at(schema: type[BaseModel], steps: Sequence[str | int]) -> list[str]:
    """The keys that the schema knows at a place; none of names that are free, nor of a part's arguments."""
    place = Place(schema)
    for step in steps:
        place = replace(place, holds="one") if place.holds == "list" else place.below(str(step), {})
    if place.model is None or place.holds != "one" or place.group:
        return []
    return [name for name, known in place.model.model_fields.items() if not known.exclude]


def _with(node: Any, steps: Sequence[str], value: Any, place: Place, done: tuple[str, ...]) -> Any:
    """`node` with `value` at the steps below it."""
    if not steps:
        return value
    node = _opened(node, place)
    if isinstance(node, list):
        index = _index(node, steps[0], ".".join(done))
        element = replace(place, holds="one") if place.holds == "list" else Place()
        made = _with(node[index], steps[1:], value, element, (*done, steps[0]))
        return [*node[:index], made, *node[index + 1 :]]
    if not isinstance(node, dict):
        raise _without_keys(node, ".".join(done))
    name, rest = _name(node, steps, place)
    here = (*done, str(name))
    try:
        present = node[name] if name in node else place.default(name, node) if rest else None
    except LookupError:
        key, is_part = ".".join(here), bool(place.below(name, node).group)
        raise UserError(
            f"{key} is by default what the phase before it has, which the configuration alone does not tell",
            todo=f"say all of it: {key}={{{'name: ..., ' if is_part else ''}{rest[0]}: ...}}",
        ) from None
    return {**node, name: _with(present, rest, value, place.below(name, node), here)}


def _opened(node: Any, place: Place) -> Any:
    """A value that keys lead into: its long form, as a new mapping or list."""
    if place.holds == "one" and place.opened is not None and node is not None:
        node = place.opened(node)
    if node is None:
        return [] if place.holds == "list" else {}
    if isinstance(node, Mapping):
        return dict(node)
    return list(node) if isinstance(node, list | tuple) else node


def _name(node: Mapping[Any, Any], steps: Sequence[str], place: Place) -> tuple[Any, Sequence[str]]:
    """The name that the first steps are, and the steps after it."""
    known = {str(name): name for name in node}
    for end in range(len(steps), 0, -1):
        if ".".join(steps[:end]) in known:
            return known[".".join(steps[:end])], steps[end:]
    if place.holds == "names":
        for end in range(1, len(steps)):
            if steps[end] in place.model.model_fields:
                return ".".join(steps[:end]), steps[end:]
    return steps[0], steps[1:]


def _index(node: Sequence[Any], step: str, key: str) -> int:
    """Of an element by its number, or by the name of the part that it is."""
    names = [one.get("name") if isinstance(one, Mapping) else one for one in node]
    if step.isdecimal() and int(step) < len(node):
        return int(step)
    if names.count(step) == 1:
        return names.index(step)
    listed = ", ".join(f"{index} ({_short(str(name), 40)})" for index, name in enumerate(names[:20]))
    if step in names:
        raise UserError(f"{key} has more than one {step}", todo=f"say which by its number: {listed}")
    near = did_you_mean(step, [name for name in names if isinstance(name, str)]) if not step.isdecimal() else ""
    has = f"it has {listed}" if node else "it is empty: write the whole list"
    raise UserError(f'{key} has no element "{_short(step)}"{near}', todo=has)


def _without_keys(node: Any, key: str) -> UserError:
    shown = _short(to_yaml(node, flow=True)) if isinstance(node, str | int | float | bool) else type(node).__name__
    return UserError(f"{key} is {shown}, which has no keys below it", todo=f"set the whole value: {key}=...")


def _of_annotation(annotation: Any, metadata: Sequence[Any] = ()) -> Place:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _of_annotation(inner[0], (*inner[1:], *metadata))
    short = next((m for m in metadata if isinstance(m, Short)), None)
    if short is not None:
        return Place(opened=short.opened)
    if origin in (Union, UnionType):
        return next((p for p in (_of_annotation(one, metadata) for one in inner) if p.model is not None), Place())
    if origin in (dict, list):
        found = _of_annotation(inner[-1])
        base = next((m.base for m in metadata if isinstance(m, Names)), "")
        return replace(found, holds="names" if origin is dict else "list", base=base) if found.model else Place()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        group = next((m.name for m in metadata if isinstance(m, Group)), "")
        return Place(annotation, group=group, opened=getattr(annotation, "opened", None))
    return Place()


def _arguments(group: str, name: Any, *, libraries: bool) -> Mapping[str, Any]:
    """The defaults of a part's arguments; none of a part that cannot be found, which the validation tells."""
    if not isinstance(name, str) or not (libraries or plug.is_light(group, name)):
        return {}
    try:
        return plug.defaults(plug.find(group, name))
    except UserError:
        return {}


def _plain(default: Any) -> Any:
    """A default as a configuration says it."""
    if isinstance(default, BaseModel):
        return default.opened(default.model_dump()) if hasattr(default, "opened") else {}
    if isinstance(default, Duration | Mark):
        return str(default)
    if isinstance(default, list | tuple):
        return [_plain(one) for one in default]
    return dict(default) if isinstance(default, Mapping) else default


def _short(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."
