"""`tlx models`: the backbones that there are, as a person reads them."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from tlx import models
from tlx.errors import UserError


def listing(pattern: str) -> str:
    """Names that match a shell pattern, with their pretrained weights.

    Raises:
        UserError: nothing matches.
    """
    rows = list(models.search(pattern))
    if not rows:
        raise UserError(f'no backbone matches "{pattern}"', todo='try a shorter pattern, such as "*resnet*"')
    table = Table("name", "parameters", "features", "input", "head", "weights (default first)", box=box.SIMPLE)
    for row in rows:
        more = f" and {len(row.weights) - 2} more" if len(row.weights) > 2 else ""
        table.add_row(
            row.name,
            f"{row.parameters:,}" if row.parameters else "",
            str(row.features or ""),
            _size(row),
            row.head or "",
            ", ".join(row.weights[:2]) + more if row.weights else "-",
        )
    counted = "" if any(row.parameters for row in rows) else "; fewer matches are built and counted"
    return f"{_text(table)}\n{len(rows)} backbones; tlx models show NAME tells all about one{counted}"


def _size(row: models.Row) -> str:
    return " x ".join(map(str, row.input.size)) if row.input else ""


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{v:.4g}" for v in values)


def _text(table: Table) -> str:
    out = Console(file=io.StringIO(), width=150, highlight=False, color_system=None)
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())
