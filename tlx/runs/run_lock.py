"""One training at a time in a run folder.

The lock (:mod:`tlx.base.locks`) is on the file ``.lock`` in the folder. Where the file system's locks do not reach so
far, or where there are none, the second training writes its name into the file and the first one notices at its next
checkpoint, and ends without writing it; what both have appended to metrics.jsonl until then is mixed.

The folder itself is held open as well. Whoever renames or removes it changes what its path leads to, and not what is
open: so the training notices, and finds it again (:meth:`RunLock.place`). A folder is the same where device and inode
are; a file server may number both anew, so that where they differ the token in ``.lock`` decides. On NFS another
machine's renaming is seen once this one's attribute cache has run out, after a minute at most by default.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tlx.base.errors import TlxError, UserError
from tlx.base.locks import FILE, PATIENCE, FileLock, acquire_within, holder_of, is_held, signature


@dataclass(frozen=True)
class RunLock:
    """A held lock.

    Attributes:
        file: ``.lock`` in the folder; `lock`: on it.
        directory: the folder, open.
        token: what this training has written into the file.
    """

    file: Path
    lock: FileLock
    directory: int
    token: str

    @classmethod
    def take(cls, folder: Path, *, patience: float = PATIENCE) -> RunLock:
        """Waits for the lock of a folder, which must exist.

        Raises:
            UserError: another training still has it after `patience` seconds.
            OSError: the folder cannot be written.
        """
        lock = acquire_within(folder / FILE, patience)
        if lock is None:
            raise _taken(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            directory = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, directory)
            made = cls(lock.path, lock, directory, secrets.token_hex(8))
            lock.sign(token=made.token)
            undo.pop_all()
        return made

    @property
    def enforced(self) -> bool:
        """Whether the file system has locks."""
        return self.lock.refused is None

    def check(self) -> None:
        """Whether the folder is still this training's.

        Raises:
            TlxError: another one has begun in it, on a file system whose locks do not reach so far.
        """
        if signature(self.file).get("token", self.token) != self.token:
            raise TlxError(
                f"{self.file.parent}: another training has begun in this folder ({holder_of(self.file)}); this one "
                "ends and writes nothing more"
            )

    def place(self) -> Path | None:
        """Where the folder is now: at its path, or where it was renamed to; None where it was removed, or nobody can
        tell. One look at the file system while nothing has happened to it."""
        here = self.file.parent
        if _leads_to(here, self.directory) or signature(self.file).get("token") == self.token:
            return here
        there = _name_of(self.directory)
        return there if there is not None and _leads_to(there, self.directory) else None

    def at(self, folder: Path) -> RunLock:
        """The same lock, of a folder that was renamed."""
        return replace(self, file=folder / FILE)

    def release(self) -> None:
        if not self.enforced:
            with contextlib.suppress(OSError, TlxError):
                self.check()
                self.lock.write(b"")
        self.lock.release()
        os.close(self.directory)


def wait_until_free(folder: Path, *, patience: float = PATIENCE) -> None:
    """Waits until no training holds a folder, and takes nothing. Where there are no locks, nobody can tell, and nobody
    is waited for.

    Raises:
        UserError: another training still holds it after `patience` seconds.
    """
    end = time.monotonic() + patience
    while is_held(folder / FILE):
        if time.monotonic() > end:
            raise _taken(folder)
        time.sleep(0.1)


def _taken(folder: Path) -> UserError:
    return UserError(
        f"another training runs in this folder: {holder_of(folder / FILE)}",
        where=str(folder),
        todo=f"wait for it, stop it (touch {folder / 'stop'}), or set run to another folder",
    )


def holder(folder: Path) -> str | None:
    """Who trains in a folder now; None where nobody does. Where there are no locks to tell, who was the last to begin
    there and has not said that it ended."""
    file = folder / FILE
    held = is_held(file)
    return holder_of(file) if held or (held is None and signature(file)) else None


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
