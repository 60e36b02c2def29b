"""`tlx models`: the backbones that there are, for a person and, as JSON, for a program."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from rich import box
from rich.table import Table

from tlx import models
from tlx.base.errors import UserError
from tlx.base.terminal import drawn
from tlx.models import Only, Row

COUNTED = 100
"""Of more networks than these the parameters are not counted unasked: it takes a second for every five or ten."""

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "b": 1000**3}


_NAME = 40
"""Letters of a name that stay in one line on a narrow terminal."""


def listing(pattern: str = "*", only: Only = Only(), order: str = "name") -> str:  # noqa: B008  # frozen
    """A table of the networks that :func:`tlx.models.search` finds.

    Raises:
        UserError: nothing is left.
    """
    rows = _rows(pattern, only, order)
    weights = f'weights "{only.weights}"' if only.weights else "weights (default first)"
    table = Table(box=box.SIMPLE)
    for column in ("name", "family", "parameters", "input", "top-1 %", weights):
        number = column in ("parameters", "top-1 %")
        whole = min(max(len(row.name) for row in rows), _NAME) if column == "name" else None  # names are copied
        table.add_column(
            column, justify="right" if number else "left", overflow="fold", no_wrap=number, min_width=whole
        )
    for row in rows:
        more = f" and {len(row.weights) - 2} more" if len(row.weights) > 2 else ""
        table.add_row(
            row.name,
            row.family or "-",
            f"{row.parameters:,}" if row.parameters else "",
            " x ".join(map(str, row.input.size)) if row.input else "-",
            f"{100 * row.accuracy:.2f}" if row.accuracy is not None else "-",
            ", ".join(row.weights[:2]) + more if row.weights else "-",
        )
    notes = ["tlx models show NAME tells all about one"]
    if any(row.accuracy is not None for row in rows):
        notes.append("top-1 on ImageNet-1k as the weights' metadata say, which timm's do not")
    if not all(row.parameters for row in rows) and len(rows) > COUNTED:
        notes.append(f"parameters are counted of {COUNTED} or fewer, and for --min-params, --max-params, --sort params")
    found = f"{len(rows)} backbone{'s' if len(rows) > 1 else ''}"
    return "\n".join([drawn(table), "; ".join([found, *notes])])


def json_lines(pattern: str = "*", only: Only = Only(), order: str = "name") -> str:  # noqa: B008  # frozen
    """The same, one JSON object a line; null is not known."""
    return "\n".join(
        json.dumps(
            {
                "name": row.name,
                "library": row.name.partition("/")[0] if "/" in row.name else None,
                "family": row.family,
                "parameters": row.parameters,
                "input": list(row.input.size) if row.input else None,
                "accuracy": row.accuracy,
                "weights": list(row.weights),
            }
        )
        for row in _rows(pattern, only, order)
    )


def number(text: str) -> int:
    """A count such as ``25557032``, ``25.6M``, ``300k`` or ``1B``.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if not found:
        raise UserError(f'"{text}" is not a number of parameters', todo="write 25557032, 25M or 300k")
    return round(float(found[1]) * _UNITS[found[2]])


def size_range(text: str) -> tuple[int | None, int | None]:
    """Least and most pixels of ``224``, ``224-384``, ``256-`` or ``-256``.

    Raises:
        UserError: it is none of these.
    """
    found = re.fullmatch(r"(\d*)(-?)(\d*)", text.strip())
    if not found or not (found[1] or found[3]):
        raise UserError(f'"{text}" is not a size of images', todo="write 224, 224-384, 256- or -256")
    low, high = (int(side) if side else None for side in (found[1], found[3]))
    return (low, high) if found[2] else (low, low)


def _rows(pattern: str, only: Only, order: str) -> Sequence[Row]:
    return list(models.search(pattern, only, order=order, details=0, counted=COUNTED))
