"""`tlx config`: what a key of a configuration means, and which value it has."""

from __future__ import annotations

from typing import Annotated

import typer

from tlx.base.errors import UserError
from tlx.base.terminal import drawn, folded, say, width
from tlx.cli.words import path

_WORDS = "A configuration's file, if its value is asked for; then a key, such as phases.each.lr. Without: all keys."


def config(
    words: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [KEY] [KEY=VALUE]", help=_WORDS)] = None,
) -> None:
    """Explain a key of configurations; with a configuration, tell its value there and who says so."""
    from tlx.plan.explain import explain, value_in

    given = list(words or ())
    file = path(given.pop(0)) if given and given[0].lower().endswith((".yaml", ".yml")) else None
    overrides, named = [word for word in given if "=" in word], [word for word in given if "=" not in word]
    if overrides and file is None:
        raise UserError("a value is changed in a configuration", todo="tlx config CONFIG.yaml KEY key=value")
    if file is None and not named:
        say(_all())
    for key in named:
        say(folded(explain(key)) if file is None else value_in(file, key, overrides))
    if file is not None and not named:
        raise UserError(
            "say which key", where=str(file), todo=f"tlx config {file} phases.each.lr; tlx config lists them"
        )


def _all() -> str:
    """A line for each key, as wide as the terminal."""
    from rich import box
    from rich.table import Table

    from tlx.plan.explain import listing

    table, rows = Table(box=box.SIMPLE), list(listing())
    table.add_column("key", no_wrap=True, min_width=max(len(key) for key, _, _ in rows))
    table.add_column("default", overflow="fold", max_width=24)
    table.add_column("meaning")
    for row in rows:
        table.add_row(*row)
    return f"{drawn(table, columns=max(width(), 60))}\n\ntlx config KEY explains one of them."


EXAMPLES = ("tlx config phases.each.lr", "tlx config optimizer", "tlx config mine.yaml phases.fine_tuning.lr")
