"""One training at a time in a run folder.

The lock is the operating system's, on the file ``.lock`` in the folder: it goes with the process that holds it, however
that ends, and where a shared file system passes locks on (NFS since version 4, Lustre mounted with ``flock``) it holds
between nodes. Where it does not, or where there are no locks at all, the second training writes its name into the file
and the first one notices at its next checkpoint, and ends without writing it; what both have appended to metrics.jsonl
until then is mixed. `BeeGFS` and Lustre mounted with ``localflock`` are such.

The folder itself is held open as well. Whoever renames or removes it changes what its path leads to, and not what is
open: so the training notices, and finds it again (:meth:`RunLock.place`). A folder is the same where device and inode
are; a file server may number both anew, so that where they differ the token in ``.lock`` decides. On NFS another
machine's renaming is seen once this one's attribute cache has run out, after a minute at most by default.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import environment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 15.0
"""Seconds. The workers of a training that was killed hold its lock until they notice."""


@dataclass(frozen=True)
class RunLock:
    """A held lock.

    Attributes:
        directory: the folder, open.
        token: what this training has written into the file.
        enforced: whether the file system has locks.
    """

    file: Path
    handle: int
    directory: int
    token: str
    enforced: bool

    @classmethod
    def take(cls, folder: Path, *, patience: float = PATIENCE) -> RunLock:
        """Waits for the lock of a folder, which must exist.

        Raises:
            UserError: another training still has it after `patience` seconds.
            OSError: the folder cannot be written.
        """
        file, end = folder / ".lock", time.monotonic() + patience
        was_there = False
        while True:
            try:
                # NFS locks only what is open for writing
                handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                if not was_there or time.monotonic() > end:
                    raise
                time.sleep(0.1)  # whoever has moved the folder aside makes a new one
                continue
            was_there = True
            try:
                taken = _try(handle)
                if taken is not False and _same(handle, file):  # else the folder was moved aside meanwhile
                    directory = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        return cls(file, handle, directory, _sign(handle), enforced=bool(taken))
                    except BaseException:
                        os.close(directory)
                        raise
                if time.monotonic() > end:
                    raise _taken(folder)
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            time.sleep(0.1)

    def check(self) -> None:
        """Whether the folder is still this training's.

        Raises:
            TlxError: another one has begun in it, on a file system whose locks do not reach so far.
        """
        owner = _read(self.file)
        if owner.get("token", self.token) != self.token:
            raise TlxError(
                f"{self.file.parent}: another training has begun in this folder ({_said(owner)}); this one ends and "
                "writes nothing more"
            )

    def place(self) -> Path | None:
        """Where the folder is now: at its path, or where it was renamed to; None where it was removed, or nobody can
        tell. One look at the file system while nothing has happened to it."""
        here = self.file.parent
        if _leads_to(here, self.directory) or _read(self.file).get("token") == self.token:
            return here
        there = _name_of(self.directory)
        return there if there is not None and _leads_to(there, self.directory) else None

    def at(self, folder: Path) -> RunLock:
        """The same lock, of a folder that was renamed."""
        return replace(self, file=folder / self.file.name)

    def release(self) -> None:
        if not self.enforced:
            with contextlib.suppress(OSError, TlxError):
                self.check()
                os.ftruncate(self.handle, 0)
        os.close(self.handle)
        os.close(self.directory)


def wait_until_free(folder: Path, *, patience: float = PATIENCE) -> None:
    """Waits until no training holds a folder, and takes nothing. Where there are no locks, nobody can tell, and nobody
    is waited for.

    Raises:
        UserError: another training still holds it after `patience` seconds.
    """
    end = time.monotonic() + patience
    while _is_busy(folder / ".lock"):
        if time.monotonic() > end:
            raise _taken(folder)
        time.sleep(0.1)


def _is_busy(file: Path) -> bool:
    try:
        handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _try(handle) is False
    finally:
        os.close(handle)


def _taken(folder: Path) -> UserError:
    return UserError(
        f"another training runs in this folder: {_owner(folder / '.lock')}",
        where=str(folder),
        todo=f"wait for it, stop it (touch {folder / 'stop'}), or set run to another folder",
    )


def holder(folder: Path) -> str | None:
    """Who trains in a folder now; None where nobody does. Where there are no locks to tell, who was the last to begin
    there and has not said that it ended."""
    file = folder / ".lock"
    try:
        handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        taken = _try(handle)
        return None if taken or (taken is None and not _read(file)) else _owner(file)
    finally:
        os.close(handle)


def _try(handle: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: by file system
        return None
    return True


def _same(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _leads_to(path: Path, directory: int) -> bool:
    """Whether a path is that of an open folder. A file server that does not answer well is no reason to say no."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        return os.path.samestat(os.fstat(directory), there)
    except OSError:  # ESTALE: it was removed by another machine
        return False


def _name_of(directory: int) -> Path | None:
    """By what path the operating system knows an open folder."""
    with contextlib.suppress(OSError):
        asks = getattr(fcntl, "F_GETPATH", None)  # macOS
        if asks is not None:
            return Path(os.fsdecode(fcntl.fcntl(directory, asks, bytes(1024)).rstrip(b"\0")))
        return Path(os.readlink(f"/proc/self/fd/{directory}"))
    return None


def _sign(handle: int) -> str:
    token = secrets.token_hex(8)
    who = {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "slurm_job": environment().job,
    }
    text = json.dumps(who).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    return token


def _owner(file: Path) -> str:
    return _said(_read(file))


def _read(file: Path) -> Mapping[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _said(owner: Mapping[str, Any]) -> str:
    job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
    known = all(name in owner for name in ("host", "pid", "since"))
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}{job}" if known else "unknown"
