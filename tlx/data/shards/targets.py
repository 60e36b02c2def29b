"""Targets: what an index knows of each sample beside its picture.

The class (``label``) stands in `index.npy` itself; every other target has an array of its own beside it,
``targets/NAME.npy``, one row per sample, memory-mapped. A sample may lack a target.

| kind | array | missing |
|---|---|---|
| class | int32 [samples], a position in `classes` | -1 |
| labels | int8 [samples, classes], 1 where a label applies, 0 where it does not | -1, label by label |
| number | float32 [samples, width] | NaN |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

LABEL = "label"
"""The name of the class that stands in `index.npy` itself."""

Kind = Literal["class", "labels", "number"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Target:
    """A target of an index.

    Attributes:
        classes: names, of kinds `class` and `labels`.
        width: numbers per sample, of kind `number`.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    width: int = 1


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_WIDEST = 1 << 16


def name_problem(name: object) -> str | None:
    """Why a target cannot have this name, which becomes that of a file; None where it can."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "a name has letters (a to z), digits, _ and -, no - in front, and at most 100 characters"
    return f'"{LABEL}" is the name of the class' if name.casefold() == LABEL else None


def read_target(said: Mapping[str, Any]) -> Target:
    """From what ``index.json`` says.

    Raises:
        ValueError: it is no target.
    """
    name, kind, classes, width = said.get("name"), said.get("kind"), said.get("classes", []), said.get("width", 1)
    problem = name_problem(name)
    if problem:
        raise ValueError(problem)
    if kind not in KINDS:
        raise ValueError(f"there is no kind {str(kind)[:40]!r}")
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError("its classes are no list of names")
    if bool(classes) != (kind != "number") or len(set(classes)) < len(classes):
        raise ValueError("its classes are none, or not those of its kind, or two have one name")
    if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= _WIDEST:
        raise ValueError(f"its width is not from 1 to {_WIDEST}")
    return Target(str(name), KINDS[KINDS.index(kind)], tuple(classes), width)
