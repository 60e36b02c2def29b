"""The way to a person's terminal: everything that tlx shows goes through here.

Names of runs, classes, phases and files come from others, and a terminal obeys control characters. So all text is
escaped at this boundary, and a new command gets it for free: it calls `say`, never `print`.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDE = 150
"""Columns where neither a terminal nor COLUMNS says how many there are: a log breaks no lines."""


_BETWEEN = 3
"""Columns between two of a table, and at its edges."""

_LONGEST, _LONGEST_NAME = 40, 26
"""A value and a column's name of more letters go on in a further line."""

_WORDS = ("steps", "warm-up", "layer")
"""Columns that stand at the left although they may hold numbers alone."""


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
    """Prints a message for people, escaped, on stdout or stderr. What stderr does not take is left out: a message about
    a mistake must not become a fault of its own."""
    written = escaped(text, lines=True) + end
    if not error:
        _write(written, sys.stdout)
        return
    with contextlib.suppress(OSError, ValueError):
        _write(written, sys.stderr)


def hand_over(text: object, *, end: str = "\n") -> None:
    """Prints on stdout, as it is, what a program reads: JSON, YAML, a script, a path."""
    _write(str(text) + end, sys.stdout)


def width() -> int:
    """Columns: COLUMNS where it is set, else those of the terminal, else `WIDE`."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def folded(text: str, *, columns: int | None = None) -> str:
    """A message whose lines are broken between words, at the width of the terminal by default; as it is in a log."""
    most = columns or shutil.get_terminal_size((0, 0)).columns
    if not most:
        return text
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


def tables(
    title: str,
    about: Mapping[str, Sequence[str]],
    columns: Mapping[str, Sequence[str]],
    columns_wide: int,
    *,
    more: str,
    lines: bool = False,
) -> Iterator[Table]:
    """As few tables as fit the terminal, so that no column is squeezed: what has no room beside the columns before it
    comes in a further table, after `about`.

    Args:
        about: what says which row it is, by name of the column: repeated in every table.
        columns: of texts, by name.
        more: the title of further tables.
        lines: draw one between rows.
    """
    left = dict(columns)
    while left:
        beside: dict[str, Sequence[str]] = dict(about)
        for name in list(left):
            if len(beside) > len(about) and _wide({**beside, name: left[name]}) > columns_wide:
                break
            beside[name] = left.pop(name)
        yield _table(title, beside, lines=lines)
        title = more


def _table(title: str, columns: Mapping[str, Sequence[str]], *, lines: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=title or None, title_justify="left", show_lines=lines)
    for name, values in columns.items():
        number = name not in _WORDS and all(value[:1] in "0123456789-<u" and "\n" not in value for value in values)
        table.add_column(name, justify="right" if number else "left", overflow="fold", min_width=_width(name, values))
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _wide(columns: Mapping[str, Sequence[str]]) -> int:
    return _BETWEEN + sum(_width(name, values) + _BETWEEN for name, values in columns.items())


def _width(name: str, values: Sequence[str]) -> int:
    longest = max((len(line) for value in values for line in value.split("\n")), default=1)
    return max(min(longest, _LONGEST), min(len(name), _LONGEST_NAME))


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


def flush() -> None:
    """Before this process ends: hands over what was printed, and drops what nobody takes, which would change its exit
    code."""
    for file in (sys.stdout, sys.stderr):
        if file is None:
            continue
        try:
            file.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def _write(text: str, file: IO[str] | None) -> None:
    if file is None or file.closed:  # the shell's `>&-`
        return
    # in another encoding, or with a surrogate of a file's name, a message must not become a traceback
    encoding = getattr(file, "encoding", None) or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))
    file.flush()
