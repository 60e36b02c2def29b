"""What Pillow, libtiff and libjpeg say while a picture is read, told with the picture's name.

Pillow warns by Python's `warnings` and `logging`, within the thread that reads. libtiff, and libjpeg within
torchvision, write to the process's standard error. That is a file while they decode: one picture at a time, so that
what comes is of this one; and what is not certainly theirs goes on to standard error. Where other threads may write
there (in training's main process: a watchdog that ends it), it stays as it is, and what the libraries say is nameless.
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
from functools import partial
from typing import IO, Any

from PIL import Image

from tlx.base.terminal import escaped, say
from tlx.data.pixels.one_picture import name_here
from tlx.data.stream.threads import NAMED
from tlx.data.stream.workers import is_worker

_STDERR = 2
_PILLOWS = logging.getLogger("PIL")
_MOST_LINES = 3  # of one picture's messages, told
_MOST_TOLD = 50  # pictures, by one process
_LIBRARIES = re.compile(
    # libtiff: the name that Pillow gives its file, or the function that speaks; each message ends with a full stop
    rb"(?:tempfile\.tif|(?:_?TIFF|LZW|ZIP|ZSTD|LZMA|WebP|LERC|O?JPEG|JBIG|Fax|PackBits|PixarLog|LogL|Predictor"
    rb"|ThunderDecode|NeXTDecode|Dump)\w*): (?=.*\.$)"
    rb"|(?=Corrupt JPEG data: |Premature end of JPEG file$|Inconsistent progression sequence for component "
    rb"|Invalid SOS parameters for sequential JPEG$|Unknown Adobe color transform code |Warning: unknown JFIF "
    rb"|Application transferred too many scanlines$)"
)
_EXPECTED = (DeprecationWarning, Image.DecompressionBombWarning)  # torchvision's announcement; MAX_PIXELS decides


@dataclass(eq=False)
class Heard:
    """
    Attributes:
        name: gives the picture's.
        lines: what was said of it, as it came.
    """

    name: Callable[[], str]
    lines: list[str] = field(default_factory=list)

    @property
    def said(self) -> list[str]:
        """The lines, each once."""
        return list(dict.fromkeys(" ".join(line.split()) for line in self.lines if line))

    def tell(self) -> None:
        """On standard error; each message once in a process."""
        lines = self.said
        if not lines:
            return
        more = f" ... and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
        text = f"{escaped(self.name())}: {escaped('; '.join(lines[:_MOST_LINES]))}{more}"
        if text in _told or len(_told) > _MOST_TOLD:
            return
        _told.add(text)
        say(f"warning: {text}", error=True)
        if len(_told) > _MOST_TOLD:
            say("warning: what decoders say of further pictures is not shown", error=True)


_told: set[str] = set()
_here = threading.local()  # heard: of the picture that this thread reads


@contextmanager
def listening() -> Iterator[Heard]:
    """In here this thread reads a picture; `Heard` has what was said of it."""
    _hear_python()
    around, heard = getattr(_here, "heard", None), Heard(name_here())
    _here.heard = heard
    try:
        yield heard
    finally:
        _here.heard = around


def _hear_python() -> None:
    """Once for each process, and each `warnings.catch_warnings`, which undoes it."""
    shows: Any = warnings.showwarning
    if getattr(shows, "func", None) is not _shown:
        warnings.showwarning = partial(_shown, shows)
        # each picture's, not each text's first; behind all filters that somebody has chosen
        warnings.filterwarnings("always", category=UserWarning, module=r"PIL\.", append=True)
    if _log not in _PILLOWS.handlers:
        _PILLOWS.addHandler(_log)


def _shown(
    shows: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any, **more: Any
) -> None:
    """In place of `warnings.showwarning`, which is `shows`."""
    heard: Heard | None = getattr(_here, "heard", None)
    if heard is None:
        shows(message, category, *place, **more)
    elif not issubclass(category, _EXPECTED) and not str(message).startswith("Palette images with Transp"):
        heard.lines.append(str(message))


class _Log(logging.Handler):
    """Of Pillow's log, which without a handler goes to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        heard: Heard | None = getattr(_here, "heard", None)
        if heard is not None:
            heard.lines.append(record.getMessage())
        elif logging.lastResort is not None and not logging.getLogger().handlers:
            logging.lastResort.handle(record)


_log = _Log(logging.WARNING)

# Standard error

_one = threading.RLock()  # that reads while standard error is a file
_file: IO[bytes] | None = None  # kept as long as the process


@contextmanager
def written() -> Iterator[None]:
    """In here, within `listening`, libtiff or libjpeg decodes, which write to standard error."""
    heard: Heard | None = getattr(_here, "heard", None)
    if heard is None or _others_write():
        yield
        return
    with _one:
        stderr = _redirected()
        try:
            yield
        finally:
            if stderr is not None:
                os.dup2(stderr, _STDERR)
                os.close(stderr)
                heard.lines += _messages()


def _others_write() -> bool:
    """Whether threads other than those that read pictures, and a progress bar's, may write to standard error."""
    return not is_worker() and any(
        thread is not threading.main_thread()
        and not thread.name.startswith(NAMED)
        and not type(thread).__module__.startswith("rich.")
        for thread in threading.enumerate()
    )


def _redirected() -> int | None:
    """Where standard error is while it is a file; None where it cannot be one."""
    global _file
    try:
        _file = _file or tempfile.TemporaryFile()  # noqa: SIM115
        stderr = os.dup(_STDERR)
    except OSError:  # it is closed, or there is no room for files: what is written there is not heard
        return None
    os.dup2(_file.fileno(), _STDERR)
    return stderr


def _messages() -> list[str]:
    """What the libraries have written; the rest goes on to standard error."""
    assert _file is not None
    number = _file.fileno()
    size = os.lseek(number, 0, os.SEEK_CUR)
    if not size:
        return []
    text = os.pread(number, size, 0)
    os.ftruncate(number, 0)
    os.lseek(number, 0, os.SEEK_SET)
    found: list[str] = []
    for line in text.splitlines(keepends=True):
        match = _LIBRARIES.match(line.rstrip(b"\r\n"))
        if match is not None:
            found.append(line[match.end() :].decode(errors="backslashreplace"))
        else:
            with suppress(OSError):  # its reader is gone
                os.write(_STDERR, line)
    return found


def _forget() -> None:
    """In a forked process, which would share the file, and the place in it, with its parent."""
    global _file
    _one.release()
    _file = None


if hasattr(os, "register_at_fork"):  # not while another thread has standard error redirected
    os.register_at_fork(before=_one.acquire, after_in_parent=_one.release, after_in_child=_forget)
