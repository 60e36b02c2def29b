"""Locks on files: held by one process, gone with it however it ends, and kept by no process that was forked from it.

The lock is the operating system's (``flock``). Where a shared file system passes it on (NFS since version 4, Lustre
mounted with ``flock``) it holds between nodes; where the file system refuses it (BeeGFS, Lustre with ``localflock``)
:attr:`FileLock.refused` says so, and the caller decides.

The library filelock (4.2) does not carry this: it hands its holder no open file, and ours hold what is locked (a shard
that arrives) or who holds it (host, process, Slurm job); it notices a lock file that was removed and not one that was
renamed away; where ``flock`` is missing it falls back to a marker file, which a killed process of another host leaves
for ever, and where it is refused (ENOLCK, EOPNOTSUPP) it raises. Its versions for Python 3.10 stay held in forks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.parsing import from_json

FILE = ".lock"
PATIENCE = 15.0
"""Seconds. What a killed process has started, a worker perhaps, may hold its lock until it notices."""

_LOOK_S = 0.1


@dataclass(eq=False)
class FileLock:
    """A file that is open for writing, and its lock.

    Attributes:
        refused: why the file system has given no lock; None where it has.
        in_forks: whether processes that are forked meanwhile hold it too.
    """

    path: Path
    handle: int
    in_forks: bool = False
    refused: OSError | None = None

    @classmethod
    def acquire(cls, path: Path, *, wait: bool = False, create: bool = True, in_forks: bool = False) -> FileLock:
        """
        Raises:
            BlockingIOError: somebody else holds it, without `wait`.
            OSError: the file cannot be opened, or made.
        """
        # a file and not its folder: NFS locks only what is open for writing, and a folder's lock is each node's own
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        with _forking:
            lock = cls(path, os.open(path, flags, 0o666), in_forks)
            _open[lock.handle] = lock
        try:
            fcntl.flock(lock.handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            lock.release()
            raise
        except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP: by file system; ESTALE: removed by another NFS client
            lock.refused = error
        except BaseException:
            lock.release()
            raise
        return lock

    @property
    def is_current(self) -> bool:
        """Whether the path leads to the locked file, which others may have removed or renamed."""
        try:
            again = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)  # NFS answers this, unlike stat, from the server
        except OSError:
            return False
        try:
            return os.path.sameopenfile(self.handle, again)
        except OSError:  # ESTALE
            return False
        finally:
            os.close(again)

    def sign(self, **about: Any) -> None:
        """Writes into the file who holds it, for :func:`holder_of`."""
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "slurm_job": environment().job}
        self.write(json.dumps({**about, **who}).encode())

    def write(self, content: bytes) -> None:
        """Replaces the file's content, while the lock is held here."""
        if _open.get(self.handle) is self:
            os.ftruncate(self.handle, 0)
            os.pwrite(self.handle, content, 0)

    def release(self) -> None:
        with _forking:
            if _open.pop(self.handle, None) is not self:  # in a fork, where the number may be another file's by now
                return
            if not self.in_forks:
                with suppress(OSError):
                    fcntl.flock(self.handle, fcntl.LOCK_UN)
            os.close(self.handle)


def acquire_within(path: Path, patience: float, *, in_forks: bool = False) -> FileLock | None:
    """Waits for a lock, of the file that has this name in the end; None where others hold it after `patience` seconds.

    Raises:
        OSError: the file cannot be opened, or made.
    """
    end, was_there = time.monotonic() + patience, False
    while True:
        try:
            lock = FileLock.acquire(path, in_forks=in_forks)
            removed = lock.refused is not None and lock.refused.errno == errno.ESTALE
            if lock.is_current and not removed:
                return lock
            lock.release()
            was_there = True
        except BlockingIOError:
            was_there = True
        except FileNotFoundError:
            if not was_there or time.monotonic() > end:
                raise  # else whoever has moved the folder aside makes a new one
        if time.monotonic() > end:
            return None
        time.sleep(_LOOK_S)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
    """Opens a file, made if need be, and holds its lock; None where its name stands for another file by now, or none.

    Raises:
        BlockingIOError: somebody holds it, without `wait`.
        OSError: the file system has no locks.
    """
    lock = FileLock.acquire(path, wait=wait)
    try:
        if lock.refused is not None:
            raise lock.refused
        if not lock.is_current:
            yield None
            return
        with os.fdopen(lock.handle, "r+b", closefd=False) as file:
            yield file
    finally:
        lock.release()


@contextmanager
def locked_folder(folder: Path, what: str, *, todo: str) -> Iterator[None]:
    """Holds the lock of the file ``.lock`` in a folder, together with processes that are forked meanwhile: the workers
    of a killed writer finish what they are at. The file is removed afterwards; what a killed process has left of it
    does no harm. Where the file system has no locks, there is none.

    Args:
        what, todo: of the error if others still hold it after `PATIENCE` seconds.

    Raises:
        UserError: others hold it.
        OSError: the folder cannot be written.
    """
    lock = acquire_within(folder / FILE, PATIENCE, in_forks=True)
    if lock is None:
        raise UserError(what, where=str(folder), todo=todo)
    try:
        yield
    finally:
        if lock.is_current:  # else it is another's: the folder was moved aside
            with suppress(OSError):
                lock.path.unlink()
        lock.release()


def is_held(path: Path) -> bool | None:
    """Whether somebody holds the lock of a file, which stays as it is; None where the file system cannot tell."""
    try:
        lock = FileLock.acquire(path, create=False)
    except BlockingIOError:
        return True
    except OSError:  # none there, or not ours to open
        return False
    lock.release()
    return False if lock.refused is None else None


def signature(path: Path) -> Mapping[str, Any]:
    """What whoever holds a lock has written into its file; empty where that is nothing."""
    with suppress(OSError, ValueError):
        content = from_json(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def holder_of(path: Path) -> str:
    """Who holds a lock, or was the last to, in words: process, host, since when, Slurm job."""
    who = signature(path)
    job = f", Slurm job {who['slurm_job']}" if who.get("slurm_job") else ""
    known = all(name in who for name in ("host", "pid", "since"))
    return f"process {who['pid']} on {who['host']} since {who['since']}{job}" if known else "unknown"


_open: dict[int, FileLock] = {}
_forking = threading.Lock()


def _let_go() -> None:
    """In a forked process, which would keep the lock of its parent, when that is killed, for as long as it lives."""
    for handle, lock in _open.items():
        if not lock.in_forks:
            os.close(handle)
    _open.clear()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_let_go)
