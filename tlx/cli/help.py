"""The help of commands: what there is, in groups; examples that can be pasted."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

GROUPS = {
    "Look at data": ("init", "shards", "neighbours"),
    "Choose": ("models", "weights", "probe", "lr-find", "sweep"),
    "Train": ("train", "plan", "config"),
    "See": ("status", "report", "track"),
    "Use": ("evaluate", "predict", "embed", "serve"),
    "Ship": ("export", "soup"),
    "Cluster and machine": ("submit", "doctor", "bench"),
    "Shell": ("completion",),
}
"""Commands by title, in order; one that is missing here is listed at the end."""


class Grouped(TyperGroup):
    """Commands under the titles of their groups."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        left = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        titled = [
            (title, [(name, left.pop(name)) for name in names if name in left]) for title, names in GROUPS.items()
        ]
        for title, found in (*titled, ("Others", list(left.items()))):
            rows = [
                (name, command.get_short_help_str(200)) for name, command in found if command and not command.hidden
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=12)


def examples(*commands: str, more: str = "") -> str:
    """What stands below a command's options: a line for each example, which no width breaks."""
    lines = ["\b", "Example:" if len(commands) == 1 else "Examples:", *(f"  {command}" for command in commands)]
    return "\n".join([*lines, *(["", more] if more else [])])
