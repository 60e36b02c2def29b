"""Pluggable parts: find one by name and check its arguments before anything is built.

A part is a function. What tlx hands to it comes first and positionally; **what the user may set in the
configuration comes after a bare ``*``**, annotated, so that it can be checked here::

    def exponential(layers: Sequence[Layer], *, factor: Ratio = 0.75) -> dict[str, float]: ...

A name is one of ours (a public function of the group's module, listed in its ``__all__``), an entry point of
another installed package (group ``tlx.<group>``), or ``package.module:function``. Two owners of one name is an error.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tlx.base.durations import Duration, Mark
from tlx.base.errors import ConfigError, TlxError, UserError, below, did_you_mean
from tlx.base.key_aliases import right_key
from tlx.base.parsing import scalar
from tlx.base.paths import expanded, written
from tlx.base.validation import mistakes, refuse_truth

P = TypeVar("P", bound=Callable[..., Any])

GROUPS: dict[str, str] = {
    "unfreeze": "tlx.plan.unfreeze",
    "curve": "tlx.plan.curves",
    "layer_decay": "tlx.plan.layer_decay",
    "transform": "tlx.data.pixels.transforms",
    "head": "tlx.models.heads",
    "task": "tlx.tasks.kinds",
    "objective": "tlx.tasks.objectives",
    "optimizer": "tlx.train.optim",
    "tracker": "tlx.tracking",
    "backbone": "",  # torchvision's and timm's names are looked up by tlx.models
}
"""Group -> the module whose ``__all__`` lists our own parts. Outside packages: entry-point group ``tlx.<group>``."""


@dataclass(frozen=True)
class Group:
    """Beside the annotation of a part in a configuration, or of an argument that is a part, or of the values of a
    mapping of them: the group that its name is of."""

    name: str


PURE = ("unfreeze", "curve", "layer_decay")
"""Groups whose parts need no torch, whoever wrote them."""

OWN_PURE = ("task",)
"""Groups of which our own parts need none."""


def is_pure(group: str, name: str) -> bool:
    """Whether a part can be looked up where its package, or torch, may not be installed."""
    return ":" not in name and (group in PURE or (group in OWN_PURE and name in _ours(group)))


def is_light(group: str, name: str) -> bool:
    """Whether a part can be looked up without importing torch: ours can, others' may import whatever they like."""
    if ":" in name:
        return False
    return group in PURE or name in _ours(group) or all(e.name != name for e in _theirs(group))


def names(group: str) -> list[str]:
    """Every name that a configuration can use in this group, dotted paths aside."""
    return sorted({*_ours(group), *(e.name for e in _theirs(group))})


def find(group: str, name: str) -> Callable[..., Any]:
    """The part called `name`.

    Raises:
        UserError: no such part (with a suggestion), two owners of the name, or an import that fails.
    """
    owners = [f"{GROUPS[group]}:{name}"] if name in _ours(group) else []
    owners += [e.value for e in _theirs(group) if e.name == name]
    if len(owners) > 1:
        raise UserError(
            f'{group} "{name}" has {len(owners)} owners: {", ".join(owners)}',
            todo="write one of these paths instead of the name, or uninstall one of the packages",
        )
    if owners:
        return _load(group, name, owners[0])
    if ":" in name:
        return _load(group, name, name)
    raise UserError(f'there is no {group} "{name}"{did_you_mean(name, names(group))}', todo=_how_to_add(group))


def arguments(part: Callable[..., Any], given: Mapping[str, Any], *, label: str) -> dict[str, Any]:
    """The user's arguments for `part`, checked against its signature and converted to its annotated types.

    Paths (arguments annotated as such) may hold ``~`` and variables.

    Raises:
        ConfigError: unknown, missing or ill-typed arguments, all together, each with its name as key.
        UserError: the part does not say what it takes.
    """
    hints, _ = _hints(part)
    settable = _settable(part, label)
    problems, checked = list[UserError](), {}
    for key, value in given.items():
        if key not in settable:
            near = right_key(str(key), group=label.partition(" ")[0]) or did_you_mean(str(key), settable)
            problems.append(UserError(f'{label} has no argument "{key}"{near or "; it takes none"}', where=str(key)))
            continue
        if (odd := not_finite(value)) is not None:
            problems.append(UserError(f"holds {odd}, which is not a finite number", where=str(key)))
            continue
        hint = hints.get(key, Any)
        try:
            checked[key] = _adapter(hint).validate_python(_with_paths(refuse_truth(value, hint), hint))
        except UserError as error:
            problems += below(error, str(key))
        except ValidationError as error:
            problems += below(ConfigError(mistakes(error, value)), str(key))
        except ValueError as error:
            problems.append(UserError(f"{error} (given: {value!r})", where=str(key)))
    for key, parameter in settable.items():
        if parameter.default is parameter.empty and key not in given:
            problems.append(UserError(f'{label} needs the argument "{key}"', where=key))
    if problems:
        raise ConfigError(problems, where=label)
    return checked


def inner_groups(part: Callable[..., Any]) -> dict[str, tuple[str, bool]]:
    """Arguments of a part that are parts themselves, by their annotation (see :class:`Group`): the group, and whether
    it is a mapping of names to parts."""
    found: dict[str, tuple[str, bool]] = {}
    for name, hint in _hints(part)[0].items():
        inner = typing.get_args(hint)
        is_mapping = typing.get_origin(hint) is dict
        marks = getattr(inner[1] if is_mapping else hint, "__metadata__", ())
        found.update((name, (mark.name, is_mapping)) for mark in marks if isinstance(mark, Group))
    return found


def unchecked(part: Callable[..., Any]) -> str | None:
    """Why the arguments of a part are not checked by their types, in words; None where they are."""
    return _hints(part)[1]


def _hints(part: Callable[..., Any]) -> tuple[dict[str, Any], str | None]:
    """The types of a part's arguments; none, and why, where names in them are not there when it runs, such as those of
    an import under TYPE_CHECKING. Of our own parts that is a fault."""
    try:
        return typing.get_type_hints(part if inspect.isfunction(part) else part.__init__, include_extras=True), None  # type: ignore[misc]
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        if str(getattr(part, "__module__", "")).startswith("tlx."):
            raise
        return {}, str(error)


def needs(package: str, *, install: str) -> Callable[[P], P]:
    """Decorates a part that imports a package only when it is made. A tracker is made when the run folder is claimed
    already: whether the package is installed is looked at before.

    Args:
        package: at the top, without dots.
        install: the command that brings it.
    """

    def mark(part: P) -> P:
        part.needs = (*getattr(part, "needs", ()), (package, install))  # type: ignore[attr-defined]
        return part

    return mark


def check_packages(part: Callable[..., Any], *, label: str, where: str | None = None) -> None:
    """Imports nothing.

    Raises:
        UserError: a package is not installed that the part needs; see :func:`needs`.
    """
    missing = [(name, install) for name, install in getattr(part, "needs", ()) if not _is_installed(name)]
    if missing:
        names, installs = zip(*missing, strict=True)
        what = f"{label} needs the package{'s' * (len(names) > 1)} {' and '.join(names)}, not installed here"
        raise UserError(what, where=where, todo="; ".join(dict.fromkeys(installs)))


def _is_installed(package: str) -> bool:
    """A folder that only has its name, such as those that trackers write, is no package."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def as_written(given: Any, checked: Any) -> Any:
    """An argument as a configuration says it: what the part takes for a number or a truth is one, also where it was
    given as text; lengths and paths are text.

    Args:
        given: by the user.
        checked: what :func:`arguments` made of it.
    """
    if isinstance(checked, bool):
        return checked
    if isinstance(checked, Path):
        return written(checked)
    if isinstance(given, Duration | Mark):
        return str(given)
    if isinstance(given, str) and isinstance(checked, int | float):
        number = scalar(given)
        return number if isinstance(number, int | float) and number == checked else given
    if isinstance(given, list | tuple) and isinstance(checked, list | tuple) and len(given) == len(checked):
        return type(given)(map(as_written, given, checked))
    if isinstance(given, Mapping) and isinstance(checked, Mapping) and given.keys() == checked.keys():
        return {name: as_written(value, checked[name]) for name, value in given.items()}
    return given


def _with_paths(value: Any, hint: Any) -> Any:
    return _expanded(value) if _takes_paths(hint) else value


def _takes_paths(hint: Any) -> bool:
    return hint is Path or any(map(_takes_paths, typing.get_args(hint)))


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_expanded(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _expanded(one) for name, one in value.items()}
    return expanded(value) if isinstance(value, str) else value


def call(label: str, part: Callable[..., Any], *given: Any, **arguments: Any) -> Any:
    """What a part returns.

    Raises:
        UserError: with the part's name and the line, for whatever the part raises: it is the mistake of who wrote or
            named it. Errors of tlx and a lack of memory stay what they are.
    """
    try:
        return part(*given, **arguments)
    except TlxError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            raise
        raise UserError(f"{label} fails: {raised(error)}") from error


def raised(error: BaseException) -> str:
    """An exception in one line: its type, what it says, and where it was raised."""
    words = (str(error).strip().splitlines() or [""])[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{f': {words}' if words else ''}{where}"


def not_finite(value: Any) -> float | None:
    """A number in plain data that is infinite or NaN, or None."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((odd for odd in map(not_finite, value) if odd is not None), None)
    return value if isinstance(value, float) and not math.isfinite(value) else None


def takes(part: Callable[..., Any], name: str) -> bool:
    """Whether the user may set this argument of a part."""
    return name in _settable(part, "the part")


def defaults(part: Callable[..., Any]) -> dict[str, Any]:
    """The user's arguments that have a default value, for a configuration that says everything."""
    return {name: p.default for name, p in _settable(part, "the part").items() if p.default is not p.empty}


def _settable(part: Callable[..., Any], label: str) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(part).parameters.values()
    except (ValueError, TypeError) as error:  # some of Python's own functions do not say what they take
        raise UserError(f"{label} cannot be used: {error}") from error
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except PydanticUserError:  # dataclasses and models carry their own configuration
        return TypeAdapter(hint)


def _ours(group: str) -> list[str]:
    return list(importlib.import_module(GROUPS[group]).__all__) if GROUPS[group] else []


def _theirs(group: str) -> list[EntryPoint]:
    return _installed(group, tuple(sys.path))


@cache
def _installed(group: str, _path: tuple[str, ...]) -> list[EntryPoint]:
    """Entry points of installed packages: read once per search path, since reading takes milliseconds."""
    return list(entry_points(group=f"tlx.{group}"))


def _load(group: str, name: str, path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    try:
        part: Any = importlib.import_module(module)
        for step in attribute.split("."):
            part = getattr(part, step)
    except Exception as error:  # whatever a module raises while it is imported, and names that cannot be one's
        why = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        raise UserError(f'{group} "{name}" cannot be loaded: {why}', where=path, todo=_how_to_add(group)) from error
    if not callable(part):
        raise UserError(f'{group} "{name}" is not a function', where=path)
    return part  # type: ignore[no-any-return]


def _how_to_add(group: str) -> str:
    return f"use one of these, an entry point of an installed package (group tlx.{group}), or package.module:function"
