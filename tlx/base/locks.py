"""One writer at a time in a folder."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tlx.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
PATIENCE = 15.0
"""Seconds. The workers of a writer that was killed finish what they are at, and hold its lock until then."""


@contextmanager
def locked(folder: Path, what: str, *, todo: str) -> Iterator[None]:
    """Holds the lock of the file ``.lock`` in a folder, which goes with the processes, however they end.

    The file is removed afterwards; what a killed process has left of it does no harm. Where the file system has no
    locks, there is none.

    Args:
        what, todo: of the error if others still hold it after `PATIENCE` seconds.

    Raises:
        UserError: others hold it.
        OSError: the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    handle = _take(folder, what, todo)
    try:
        yield
    finally:
        if _same(handle, folder / FILE):  # else it is another's: the folder was moved aside
            with suppress(OSError):
                (folder / FILE).unlink()
        os.close(handle)


def _take(folder: Path, what: str, todo: str) -> int:
    file, end = folder / FILE, time.monotonic() + PATIENCE
    while True:
        # a file and not the folder: NFS locks only what is open for writing, and a folder's lock is each node's own
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _taken(handle) and _same(handle, file):  # else whoever held it has removed it meanwhile
                return handle
            if time.monotonic() > end:
                raise UserError(what, where=str(folder), todo=todo)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(0.1)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks, unless NFS says that the file was removed
        return error.errno != errno.ESTALE
    return True


def _same(handle: int, file: Path) -> bool:
    try:
        again = os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # NFS answers this, unlike stat, from the server
    except OSError:
        return False
    try:
        return os.path.sameopenfile(handle, again)
    finally:
        os.close(again)
