"""What holds while one picture is read: the name that warnings give it, and its share of this machine's memory.

A small file can hold a large picture. Decoding one takes up to three times its decoded size, so pictures of more than
16 MiB wait for room: those that are decoded at one time by all of a user's processes on a machine (data workers of all
ranks, builds, checks) take at most half of its memory, or of what its control groups allow, and at most 12 GiB; a
picture that is larger than that has the room to itself.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from tlx.data.file_lock import locked
from tlx.limits import memory_limit

LARGE = 16 << 20
"""Bytes of a decoded picture; larger ones wait for room."""

PEAK = 3
"""The most memory that reading a picture takes, in sizes of the decoded one."""

_UNIT, _UNITS = 128 << 20, 96  # bytes of room that one lock stands for, and the most locks
_PAUSE = 0.02


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
    try:
        _take(picture.room, min(-(-size * peak // _UNIT), _units()))
    except OSError:  # no folder for temporary files, or one without locks: then there is no limit
        return


@cache
def _units() -> int:
    return max(min(memory_limit() // 2 // _UNIT, _UNITS), 1)


def _take(room: ExitStack, count: int) -> None:
    """Locks that go with the process, however it ends. One takes all of its own before the next begins to, so that no
    two wait for each other, and small ones do not keep a large one waiting for ever."""
    folder = _folder()
    taken: set[int] = set()
    with locked(folder / "turn"):
        while True:
            for unit in range(_units()):
                if len(taken) == count:
                    return
                if unit not in taken and _is_taken(room, folder / f"{unit:02d}"):
                    taken.add(unit)
            if len(taken) == count:
                return
            time.sleep(_PAUSE)


def _is_taken(room: ExitStack, file: Path) -> bool:
    try:
        return room.enter_context(locked(file, wait=False)) is not None
    except BlockingIOError:
        return False


def _folder() -> Path:
    """One for each user and machine.

    Raises:
        OSError: it cannot be made, or is somebody else's.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"tlx-picture-memory-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != user:
        raise PermissionError(f"{folder} is somebody else's")
    return folder
