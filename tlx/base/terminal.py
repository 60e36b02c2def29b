"""The way to a person's terminal: everything that tlx shows goes through here.

Names of runs, classes, phases and files come from others, and a terminal obeys control characters. So all text is
escaped at this boundary, and a new command gets it for free: it calls `say`, never `print`.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

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

STDOUT = "standard output"
"""The `filename` of an OSError that comes from writing there."""

_WAITING = 1 << 16  # characters that wait for a file to be kept in
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def use_utf8() -> None:
    """Prepares a command's process for names of any language; may start the process again.

    Where the locale knows ASCII alone and Python's UTF-8 mode is off (``LC_ALL=C PYTHONUTF8=0``), no file can be named
    with a letter such as "ü". Python cannot change that in a running process. A character that standard output or
    standard error cannot encode is written as an escape.
    """
    from tlx.base.launcher import environment, export

    ascii_only = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_only and environment().get("PYTHONUTF8") != "1":
        export("PYTHONUTF8", "1")  # for processes that this one starts; and so that this happens once
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):  # it writes what is left in it
                stream.reconfigure(errors="backslashreplace")


_quiet = False


def be_quiet(wanted: bool) -> None:
    """Whether this process, from here on, shows only warnings, mistakes and results."""
    global _quiet
    _quiet = wanted


def is_quiet() -> bool:
    """Whether --quiet was asked for."""
    return _quiet


class BestEffort:
    """A text stream that never raises: what it shows is a courtesy of a process that has other work to do.

    What the stream does not take (its reader or terminal is gone, its disk is full) is appended to the file `instead`,
    once that is known and as soon as it can be written. The loss is said once, on the other standard stream and at the
    top of that file. The stream is tried again each time: a log goes on when its disk has room again.

    Attributes:
        instead: where to keep what the stream does not take; None keeps the newest 64 KiB in memory.
        failed: the last write has failed.
    """

    def __init__(self, stream: IO[str], name: str = STDOUT) -> None:
        self.stream, self.name = stream, name
        self.instead: Path | None = None
        self.failed = False
        self._waiting = ""
        self._told = self._begun = False

    @classmethod
    def over(cls, stream: IO[str] | BestEffort, name: str = STDOUT) -> BestEffort:
        """The stream, made so unless it is."""
        return stream if isinstance(stream, BestEffort) else cls(stream, name)

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding, buffer ...
        return getattr(self.stream, name)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def write(self, text: str) -> int:
        try:
            self.stream.write(encodable(text, self.stream))
            self.stream.flush()
            self.failed = False
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.failed = True
            self._keep(text, getattr(error, "strerror", None) or str(error))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def _keep(self, text: str, why: str) -> None:
        text = _COLOURS.sub("", text)
        if "\x1b" not in text:  # else a frame of a progress bar
            self._waiting = (self._waiting + text)[-_WAITING:]
        kept = f"; what it would show is kept in {self.instead}" if self.instead is not None else ""
        loss = f"warning: {self.name} cannot be written ({why}){kept}\n"
        if not self._told:
            self._told = True
            other = sys.stdout if self.name != STDOUT else sys.stderr
            with contextlib.suppress(OSError, ValueError):
                _write(escaped(loss, lines=True), other.stream if isinstance(other, BestEffort) else other)
        if self.instead is None or not self._waiting:
            return
        with contextlib.suppress(OSError, ValueError):
            with self.instead.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self._waiting if self._begun else loss + self._waiting)
            self._begun, self._waiting = True, ""


def as_courtesy() -> None:
    """From here on nothing that this process prints, or a library in it, can end it; see :class:`BestEffort`."""
    if sys.stdout is not None:
        sys.stdout = BestEffort.over(sys.stdout)  # type: ignore[assignment]
    if sys.stderr is not None:
        sys.stderr = BestEffort.over(sys.stderr, "standard error")  # type: ignore[assignment]


def keep_in(file: Path) -> None:
    """Where standard output and error are kept when they cannot be shown, if they are a courtesy."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, BestEffort):
            stream.instead = file


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


def remark(text: object) -> None:
    """Says on stderr what somebody who waits may want to know; nothing with --quiet."""
    if not _quiet:
        say(text, error=True)


def hand_over(text: object, *, end: str = "\n") -> None:
    """Prints on stdout, as it is, what a program reads: JSON, YAML, a script, a path. In UTF-8 whatever the terminal
    has, as tlx reads it; bytes of a file's name that are no UTF-8 stay what they are."""
    written, file = str(text) + end, sys.stdout
    binary = getattr(file, "buffer", None)
    if binary is None or file.closed:
        _write(written, file)
        return
    with _named():
        file.flush()
        binary.write(written.encode("utf-8", "surrogateescape"))
        binary.flush()


def width() -> int:
    """Columns: COLUMNS where it is set, else those of the terminal, else `WIDE`."""
    return shutil.get_terminal_size((WIDE, 24)).columns


def folded(text: str, *, columns: int | None = None) -> str:
    """A message whose lines are broken between words, at the width of the terminal by default; as it is in a log."""
    most = columns or shutil.get_terminal_size((0, 0)).columns
    if not most:
        return text
    indents = [line[: len(line) - len(line.lstrip())] + "  " for line in text.split("\n")]
    return "\n".join(
        "\n".join(textwrap.wrap(line, most, subsequent_indent=own, break_long_words=False, break_on_hyphens=False))
        for line, own in zip(text.split("\n"), indents, strict=True)
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
        force_terminal=False, force_jupyter=False,
    )  # fmt: skip
    for part in parts:
        out.print(part)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def unread(error: OSError) -> bool:
    """Whether a broken pipe is that of standard output, whose reader has gone (`| head -1`)."""
    stream = getattr(sys.stdout, "wrapped", sys.stdout)  # typer's, after the error
    if error.filename == STDOUT or stream is None or isinstance(stream, BestEffort):
        return bool(error.filename == STDOUT)
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))
    return False


def flush() -> None:
    """Before this process ends: hands over what was printed, and drops what nobody takes, which would change its exit
    code."""
    for file in (sys.stdout, sys.stderr):
        stream = file.stream if isinstance(file, BestEffort) else file
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def encodable(text: str, file: IO[str]) -> str:
    """The text with what the file's encoding lacks escaped: in another encoding, or with a surrogate of a file's name,
    a message must not become a traceback."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _write(text: str, file: IO[str] | None) -> None:
    if file is None or file.closed:  # the shell's `>&-`
        return
    with _named() if file is sys.stdout else contextlib.nullcontext():
        file.write(encodable(text, file))
        file.flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """An error of writing to stdout says so."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = STDOUT
        raise
