"""What Pillow, libtiff and libjpeg say while a picture is read, told with the picture's name.

Pillow warns by Python's `warnings` and `logging`. libtiff, and libjpeg within torchvision, write to the process's
standard error, which is a file while they are at work; lines that are not theirs go on to standard error.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO

from PIL import Image

from tlx.data.one_picture import name_here
from tlx.terminal import escaped, say

_STDERR = 2
_PILLOWS = logging.getLogger("PIL")
_MOST_READ = 1 << 16  # bytes of one picture's messages
_MOST_LINES = 3  # of one picture's messages, told
_MOST_TOLD = 50  # pictures, by one process
_LIBRARIES = re.compile(
    r"tempfile\.tif: |[A-Z]\w+: (?=\S)"  # libtiff: its file, or the function that speaks
    r"|(?=Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Invalid SOS|Unknown Adobe"
    r"|Warning: unknown JFIF|Application transferred)"
)
_EXPECTED = (DeprecationWarning, Image.DecompressionBombWarning)  # torchvision's announcement; MAX_PIXELS decides


@dataclass(eq=False)
class Heard:
    """
    Attributes:
        lines: what was said, each once.
        names: what gives the picture's name; then those of pictures that other threads read meanwhile, of which it may
            have been said.
    """

    names: list[Callable[[], str]]
    lines: list[str] = field(default_factory=list)

    @property
    def own(self) -> list[str]:
        """The lines, where they can only be of this picture."""
        return self.lines if len(self.names) == 1 else []

    def tell(self) -> None:
        """On standard error; each message once in a process."""
        if not self.lines:
            return
        more = f" ... and {len(self.lines) - _MOST_LINES} more" if len(self.lines) > _MOST_LINES else ""
        names = " or ".join(dict.fromkeys(name() for name in self.names))
        text = f"{escaped(names)}: {escaped('; '.join(self.lines[:_MOST_LINES]))}{more}"
        if text in _told or len(_told) > _MOST_TOLD:
            return
        _told.add(text)
        say(f"warning: {text}", error=True)
        if len(_told) > _MOST_TOLD:
            say("warning: what decoders say of further pictures is not shown", error=True)


_told: set[str] = set()


class _Log(logging.Handler):
    """Of Pillow's log, which without a handler goes to standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _Ear:
    """Listens while at least one thread of this process reads a picture."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log = _Log()
        self.readers: list[Heard] = []
        self.catching: warnings.catch_warnings[list[warnings.WarningMessage]] | None = None
        self.python: list[warnings.WarningMessage] = []
        self.writers = 0  # readers whose library writes to standard error
        self.file: IO[bytes] | None = None
        self.stderr: int | None = None  # where standard error is meanwhile

    def begin(self, heard: Heard, *, writes: bool) -> None:
        with self.lock:
            if not self.readers:
                self.catching = warnings.catch_warnings(record=True)
                recorded = self.catching.__enter__()
                assert recorded is not None
                self.python = recorded
                _PILLOWS.addHandler(self.log)
                warnings.simplefilter("always")
            if writes:
                self.writers += 1
                self._redirect()
            for other in self.readers:
                other.names.append(heard.names[0])
                heard.names.append(other.names[0])
            self.readers.append(heard)

    def end(self, heard: Heard, *, writes: bool) -> None:
        with self.lock:
            lines = [str(m.message) for m in self.python if not _is_expected(m)] + self.log.lines + self._written()
            heard.lines = list(dict.fromkeys(" ".join(line.split()) for line in lines if line))
            self.python.clear()
            self.log.lines.clear()
            self.readers.remove(heard)
            self.writers -= writes
            if not self.writers:
                self._restore()
            if not self.readers:
                self._close()

    def _close(self) -> None:
        _PILLOWS.removeHandler(self.log)
        if self.catching is not None:
            self.catching.__exit__(None, None, None)

    def _redirect(self) -> None:
        if self.stderr is not None:
            return
        try:
            self.file = self.file or tempfile.TemporaryFile()  # noqa: SIM115, kept as long as the process
            self.stderr = os.dup(_STDERR)
        except OSError:  # it is closed, or there is no room for files: what is written there is not heard
            return
        os.dup2(self.file.fileno(), _STDERR)

    def _restore(self) -> None:
        if self.stderr is not None:
            os.dup2(self.stderr, _STDERR)
            os.close(self.stderr)
            self.stderr = None

    def _written(self) -> list[str]:
        """What libraries have written since the last time."""
        if self.stderr is None or self.file is None:
            return []
        number = self.file.fileno()
        if not os.lseek(number, 0, os.SEEK_CUR):
            return []
        text = os.pread(number, _MOST_READ, 0).decode(errors="backslashreplace")
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        found, others = [], []
        for line in text.splitlines(keepends=True):
            match = _LIBRARIES.match(line)
            if match is None:
                others.append(line)
            else:
                found.append(line[match.end() :].strip())
        if others:
            with suppress(OSError):  # its reader is gone
                os.write(self.stderr, "".join(others).encode(errors="backslashreplace"))
        return found

    def forget(self) -> None:
        """In a forked process: the threads that read pictures are not in it."""
        self._restore()
        if self.readers:
            self._close()
        self.__init__()  # type: ignore[misc]


_ear = _Ear()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ear.forget)


def _is_expected(message: warnings.WarningMessage) -> bool:
    return issubclass(message.category, _EXPECTED) or str(message.message).startswith("Palette images with Transp")


@contextmanager
def listening(*, writes: bool = False) -> Iterator[Heard]:
    """In here a picture is read; afterwards `Heard` has what was said.

    Args:
        writes: a library reads it that writes to standard error.
    """
    heard = Heard([name_here()])
    _ear.begin(heard, writes=writes)
    try:
        yield heard
    finally:
        _ear.end(heard, writes=writes)
