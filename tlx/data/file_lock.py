"""Locks on files that go with the process that holds them, and stay with no process that was forked from it."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
    """Opens a file, made if need be, and holds its lock; None where its name stands for another file by now, or none.

    Raises:
        BlockingIOError: somebody holds it, without `wait`.
    """
    number = _open(path)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            same = os.path.samestat(os.fstat(number), os.stat(path))
        except FileNotFoundError:
            same = False
        if not same:
            yield None
            return
        with os.fdopen(number, "r+b", closefd=False) as file:
            yield file
    finally:
        _close(number)


_open_locks: set[int] = set()
_forking = threading.Lock()


def _open(path: Path) -> int:
    with _forking:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open_locks.add(number)
    return number


def _close(number: int) -> None:
    with _forking:
        _open_locks.discard(number)
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _let_go() -> None:
    """In a forked process, which would keep the lock of its parent, when that is killed, for as long as it lives."""
    for number in _open_locks:
        os.close(number)
    _open_locks.clear()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_let_go)
