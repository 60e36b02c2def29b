"""One writer at a time in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tlx.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 15.0
"""Seconds. The workers of a writer that was killed finish what they are at, and hold its lock until then."""


@contextmanager
def locked(folder: Path, what: str, *, todo: str) -> Iterator[None]:
    """Holds a folder's lock; it is the folder's own, so no file is left behind, and it goes with the processes.

    Where the file system has no locks, there is none.

    Args:
        what, todo: of the error if others still hold it after `PATIENCE` seconds.

    Raises:
        UserError: others hold it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        while not _taken(handle):
            if time.monotonic() > end:
                raise UserError(what, where=str(folder), todo=todo)
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
