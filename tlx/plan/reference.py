"""All keys of a configuration and all parts that come with tlx, as Markdown.

    python -m tlx.plan.reference > configs/REFERENCE.md

Keys, types and defaults are pydantic's; meanings are the docstrings below the fields and in the parts.
:mod:`tlx.plan.explain` says the same of one key on a terminal.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ByteSize, PlainValidator
from pydantic.fields import FieldInfo

from tlx.base import durations, plug
from tlx.base.norms import POLICIES
from tlx.base.parsing import to_yaml
from tlx.base.plug import Group
from tlx.base.terminal import hand_over
from tlx.plan.config import Config
from tlx.plan.overrides import Short
from tlx.plan.parts import Model, Part

_TITLE = """# Every key of a configuration

Made by `python -m tlx.plan.reference > configs/REFERENCE.md`; a test compares. Recipes: [configs/](README.md).
A *length* is `16ep`, `4000` (steps) or `5%`; a *part* is one of the names at the end of this page, or its name with
arguments, or one of your own. Where the default is `null`, it is off, or decided from what is there.
"""
_PARTS = """## Parts

`head: mlp`, or with arguments beside the name `head: {name: mlp, hidden: [512]}`. A name of another package is found by
its entry point, or as `package.module:function`.
"""
_PLAIN = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    ByteSize: "bytes, as 200GB",
}
_READ = {
    **dict.fromkeys(("duration", "_point", "_period"), "length"),
    "ratio": "number or fraction",
    "seconds": "time, as 3h55m",
}
"""By the function of `tlx.base.durations` that reads it."""
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """One key: where it stands, ``NAME`` for any name, and what the page says of it, in Markdown."""

    place: str
    kind: str
    default: str
    meaning: str

    @property
    def group(self) -> str:
        """Of the part, or of the parts in the list, that the value is; empty of anything else."""
        linked = re.search(r"part: \[(\w+)\]", self.kind)
        return linked[1] if linked else ""


@dataclass(frozen=True)
class PartText:
    """A part that comes with tlx; its arguments: name, type, default, which is empty where it must be said."""

    name: str
    arguments: Sequence[tuple[str, str, str]]
    meaning: str


def reference() -> str:
    """The page."""
    models = dict(_models("", Config))
    pages = [_TITLE, *(_section(name, model, models) for name, model in models.items()), _PARTS]
    pages += [_group(group) for group in plug.GROUPS if plug.GROUPS[group]]
    return "\n".join(pages)


def _models(name: str, model: type[Model]) -> Iterator[tuple[str, type[Model]]]:
    """A model and those below it, by their keys, in order."""
    yield name, model
    for key, field in model.model_fields.items():
        hint, names = field.annotation, ""
        if typing.get_origin(hint) is dict:
            hint, names = typing.get_args(hint)[1], ".NAME"
        for below in _alternatives(hint):
            keyed = isinstance(below, type) and issubclass(below, Model) and not issubclass(below, Part)
            if keyed and key != "further":  # settings of phases, which have their place
                yield from _models(f"{name}.{key}{names}".lstrip("."), below)


@cache  # reading the meanings takes a while
def keys() -> tuple[Key, ...]:
    """Every key of a configuration, in the order of the page."""
    return tuple(key for name, model in _models("", Config) for key in _keys(name, model))


@cache
def parts(group: str) -> tuple[PartText, ...]:
    """The parts of a group that come with tlx."""
    return tuple(_part(group, name) for name in importlib.import_module(plug.GROUPS[group]).__all__)


def _keys(name: str, model: type[Model]) -> Iterator[Key]:
    meanings = _meanings(model)
    for key, field in model.model_fields.items():
        if not field.exclude:
            kind, place = _type(field.annotation, field.metadata), f"{name}.{key}".lstrip(".")
            yield Key(place, kind, _default(field), meanings.get(key, ""))


def _section(name: str, model: type[Model], below: Collection[str]) -> str:
    """A table of a model's keys; `below` are the places that have tables."""
    lines = [f"## `{name}`" if name else "## The file", "", " ".join((inspect.getdoc(model) or "").split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in _keys(name, model):
        kind, named = key.kind, next((one for one in (key.place, f"{key.place}.NAME") if one in below), "")
        if named and kind.endswith("mapping"):
            kind = kind.replace("mapping", f"[mapping](#{named.replace('.', '').lower()})")
        lines.append(_row(f"`{key.place}`", kind, key.default, key.meaning))
    return "\n".join([*lines, ""]).replace("``", "`")


def _group(group: str) -> str:
    """The parts of a group and their arguments."""
    lines = [f"### {group}\n", "| name | arguments, with their defaults | |", "|---|---|---|"]
    for part in parts(group):
        said = (f"`{key}`: {kind}" + (f" = {default}" if default else "") for key, kind, default in part.arguments)
        lines.append(_row(f"`{part.name}`", "; ".join(said), part.meaning))
    return "\n".join([*lines, ""])


def _part(group: str, name: str) -> PartText:
    part = plug.find(group, name)
    hints, defaults = typing.get_type_hints(part, include_extras=True), plug.defaults(part)
    said = [
        (key, _type(hints[key], ()), _yaml(defaults[key]) if key in defaults else "")
        for key, parameter in inspect.signature(part).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    return PartText(name, said, (inspect.getdoc(part) or "").split("\n\n")[0])


def _row(*cells: str) -> str:
    words = (" ".join(cell.split()).replace(":func:", "").replace("``", "`") for cell in cells)
    return f"| {' | '.join(word.replace('|', chr(92) + '|') for word in words)} |"


def _meanings(model: type[BaseModel]) -> Mapping[str, str]:
    """The docstrings below the fields."""
    (body,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def _type(hint: Any, metadata: Sequence[Any]) -> str:
    """An annotation in words, with the bounds of numbers."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type(inner[0], (*inner[1:], *metadata))
    read = [getattr(m.func, "__name__", "") for m in metadata if isinstance(m, BeforeValidator | PlainValidator)]
    known = next((_READ[name] for name in read if name in _READ), "")
    limits = {sign: getattr(m, b) for m in _flat(metadata) for b, sign in _BOUNDS.items() if hasattr(m, b)}
    both = limits.keys() == {">=", "<="}
    bounds = f"{limits['>=']} to {limits['<=']}" if both else ", ".join(f"{sign} {n}" for sign, n in limits.items())
    group = next((m.name for m in metadata if isinstance(m, Group)), "")
    if group:
        return f"part: [{group}](#{group})"
    if any(isinstance(m, Short) for m in metadata):
        return ", ".join(f"`{name}`" for name in POLICIES) + ", or a mapping"
    return " ".join(filter(None, [known or _plain_type(hint, origin, inner), bounds]))


def _plain_type(hint: Any, origin: Any, inner: tuple[Any, ...]) -> str:
    if origin is Literal:
        return ", ".join(f"`{_yaml_word(value)}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(one, ()) for one in inner if one is not type(None))
    if origin is dict:
        return "mapping"
    if origin is tuple and ... not in inner:
        kinds = [_type(one, ()) for one in inner]
        return f"{len(kinds)} of {kinds[0]}" if len(set(kinds)) == 1 else f"[{', '.join(kinds)}]"
    if origin is not None and inner:
        return f"list of {_type(inner[0], ())}"
    if hint is durations.Duration:
        return "length"
    if isinstance(hint, type) and (issubclass(hint, BaseModel) or is_dataclass(hint)):
        return "mapping"
    return _PLAIN.get(hint, "anything")


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for one in metadata:  # beside an annotation, Field holds what it means in a list of its own
        yield from one.metadata if isinstance(one, FieldInfo) else (one,)


def _alternatives(hint: Any) -> Sequence[Any]:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _alternatives(typing.get_args(hint)[0])
    return typing.get_args(hint) if origin in (Union, UnionType) else (hint,)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = None if field.default_factory is not None else field.get_default()
    return "" if isinstance(value, Model) and not isinstance(value, Part) else _yaml(value)


def _yaml(value: Any) -> str:
    if isinstance(value, Part):
        value = value.name
    if isinstance(value, durations.Duration | durations.Mark | Path):
        value = str(value)
    return f"`{_yaml_word(list(value) if isinstance(value, tuple) else value)}`"


def _yaml_word(value: Any) -> str:
    return to_yaml(value, flow=True).strip()


if __name__ == "__main__":
    hand_over(reference(), end="")
