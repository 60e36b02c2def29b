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

from dataclasses import dataclass
from typing import Literal

LABEL = "label"
"""The name of the class that stands in `index.npy` itself."""

Kind = Literal["class", "labels", "number"]


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
