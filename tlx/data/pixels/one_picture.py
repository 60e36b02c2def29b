"""What holds while one picture is read: the name that warnings give it, and its share of this machine's memory.

A small file can hold a large picture. Decoding one takes up to three times its decoded size, so pictures of more than
16 MiB wait for room: those that are decoded at one time by all of a user's processes on a machine (data workers of all
ranks, builds, checks) take at most half of its memory, or of what its control groups allow; a picture that is larger
than that has the room to itself. Where nobody gives any back for a minute (a process that holds some was stopped, and
not ended), pictures are read without.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from tlx.base.errors import TlxError
from tlx.base.limits import memory_limit
from tlx.base.locks import locked
from tlx.base.terminal import escaped, say

LARGE = 16 << 20
"""Bytes of a decoded picture; larger ones wait for room."""

PEAK = 3
"""The most memory that reading a picture takes, in sizes of the decoded one."""

_UNIT, _UNITS = 32 << 20, 256  # the least bytes of room that one lock stands for, and the most locks
_PAUSE = 0.02
_PATIENCE = 60.0  # seconds without any progress


def _nameless() -> str:
    return "a picture"


class _Picture:
    def __init__(self, name: Callable[[], str] | None) -> None:
        self.name = name
        self.room: ExitStack | None = None


_here = threading.local()


@contextmanager
def at_picture(name: Callable[[], str] | None = None) -> Iterator[None]:
    """In here one picture is read and used; its room is given back at the end.

    Args:
        name: what a message calls it. Without one this is a part of the reading around it, if there is any.
    """
    around: _Picture | None = getattr(_here, "picture", None)
    if name is None and around is not None:
        yield
        return
    picture = _here.picture = _Picture(name)
    try:
        yield
    finally:
        _here.picture = around
        if picture.room is not None:
            picture.room.close()


def name_here() -> Callable[[], str]:
    """What gives the name of the picture that this thread reads: "a picture" where nobody has named it."""
    picture: _Picture | None = getattr(_here, "picture", None)
    return picture.name if picture is not None and picture.name is not None else _nameless


def reserve(size: int, *, peak: int = PEAK) -> None:
    """Waits until there is room to read a picture; once for each `at_picture`, outside of which it does nothing.

    Args:
        size: bytes of the decoded picture.
        peak: how many times that its reading takes.
    """
    picture: _Picture | None = getattr(_here, "picture", None)
    if picture is None or picture.room is not None or size <= LARGE:
        return
    picture.room = ExitStack()
    unit, units = _units()
    try:
        found = _take(picture.room, min(-(-size * peak // unit), units))
    except OSError:  # no folder for temporary files, or one without locks: then there is no limit
        return
    _tell(found)


def no_memory(where: str, todo: str) -> TlxError:
    """What a lack of memory while a picture is read is to its user, who can do something about it."""
    return TlxError(f"{where}: there is not enough memory to read it\n  -> {todo}")


@cache
def _units() -> tuple[int, int]:
    """Bytes of one unit of room, and how many there are."""
    room = memory_limit() // 2
    unit = max(room // _UNITS, _UNIT)
    return unit, max(room // unit, 1)


_gave_up = False


def _tell(found: bool) -> None:
    """Once it was in vain, this process waits for nothing until there is room again."""
    global _gave_up
    if not found and not _gave_up:
        say(
            f"warning: {escaped(name_here()())}: for {_PATIENCE:g} s no process has given back its share of the memory "
            "for large pictures (is one stopped?); they are read without a limit",
            error=True,
        )
    _gave_up = not found


def _take(room: ExitStack, count: int) -> bool:
    """Locks that go with the process, however it ends. One takes all of its own before the next begins to, so that no
    two wait for each other, and small ones do not keep a large one waiting for ever.

    Returns:
        False: nothing was given back for _PATIENCE seconds.
    """
    folder, units = _folder(), _units()[1]
    wait = _Wait(folder / "turn")
    taken: set[int] = set()
    with ExitStack() as turn:
        while not _is_taken(turn, wait.turn):
            if not wait.goes_on():
                return False
        os.utime(wait.turn)
        while True:
            for number in range(units):
                unit = (os.getpid() + number) % units  # others begin elsewhere, so that most find a free one at once
                if unit not in taken and _is_taken(room, folder / f"{unit:03d}"):
                    taken.add(unit)
                    wait.again()
                if len(taken) == count:
                    return True
            if not wait.goes_on():
                return False


class _Wait:
    """A wait that ends when nobody has had the turn for too long."""

    def __init__(self, turn: Path) -> None:
        self.turn, self.seen = turn, 0
        self.again()

    def again(self) -> None:
        self.until = time.monotonic() + (0.0 if _gave_up else _PATIENCE)

    def goes_on(self) -> bool:
        seen = self.turn.stat().st_mtime_ns
        if seen != self.seen:
            self.seen = seen
            self.again()
        time.sleep(_PAUSE)
        return time.monotonic() < self.until


def _is_taken(room: ExitStack, file: Path) -> bool:
    try:
        with ExitStack() as held:
            if held.enter_context(locked(file, wait=False)) is None:  # it was removed meanwhile, and is made anew
                return False
            room.push(held.pop_all())
            return True
    except BlockingIOError:
        return False


def _folder() -> Path:
    """One for each user and machine, and for each limit there: a job's may be its own.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    user, (unit, units) = os.getuid(), _units()
    name = f"tlx-picture-memory-{user}-{socket.gethostname()}-{units}x{unit >> 20}"
    folder = Path(tempfile.gettempdir()) / name  # which several machines may share
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != user:
        raise PermissionError(f"{folder} is somebody else's")
    return folder
