"""The way to a person's terminal: everything that tlx shows goes through here.

Names of runs, classes, phases and files come from others, and a terminal obeys control characters. So all text is
escaped at this boundary, and a new command gets it for free: it calls `say`, never `print`.
"""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 150
"""Columns where neither a terminal nor COLUMNS says how many there are: a log breaks no lines."""


def escaped(text: object, *, lines: bool = False) -> str:
    r"""Text with every character that does not print written as Python escapes it: ``\x1b``, ``\n``, ``\u202e``.

    Args:
        lines: keep line breaks, for whole messages; names in them have been escaped before.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (lines and c == "\n") else ascii(c)[1:-1] for c in text)


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Prints a message for people, escaped, on stdout or stderr."""
    _write(escaped(text, lines=True) + end, sys.stderr if error else sys.stdout)


def hand_over(text: object, *, end: str = "\n") -> None:
    """Prints on stdout, as it is, what a program reads: JSON, YAML, a script, a path."""
    _write(str(text) + end, sys.stdout)


def width() -> int:
    """Columns: COLUMNS where it is set, else those of the terminal, else `WIDE`."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def folded(text: str, *, columns: int | None = None) -> str:
    """A message whose lines are broken between words; `width` wide by default."""
    most = columns or width()
    return "\n".join(
        "\n".join(textwrap.wrap(line, most, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
        for line in text.split("\n")
    )


def clock(seconds: float | None) -> str:
    """A time as h:mm:ss."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def drawn(*parts: RenderableType, columns: int | None = None) -> str:
    """Tables of rich as plain text without markup or colours; `width` wide by default."""
    from rich.console import Console

    out = Console(
        file=io.StringIO(), width=columns or width(), markup=False, highlight=False, emoji=False, color_system=None,
        force_terminal=False,
    )  # fmt: skip
    for part in parts:
        out.print(part)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def _write(text: str, file: IO[str]) -> None:
    # in another encoding, or with a surrogate of a file's name, a message must not become a traceback
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))
    file.flush()
