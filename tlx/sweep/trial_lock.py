"""Which trials somebody is at: a lock for each, held by its worker and the process that trains it, gone with both."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tlx.base.locks import FileLock

BEAT_S, SILENT_S = 20.0, 180.0
"""Where the file system has no locks, whoever holds one touches its file this often, and is gone after that."""


@dataclass(eq=False)
class TrialLock:
    """A held lock. `handle`: of the open file; a process that inherits it holds the lock, too."""

    lock: FileLock
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def handle(self) -> int:
        return self.lock.handle

    @classmethod
    def take(cls, file: Path) -> TrialLock | None:
        """None where somebody else holds it.

        Raises:
            OSError: the file cannot be made.
        """
        age = _age(file)
        try:
            lock = FileLock.acquire(file, in_forks=True)
        except BlockingIOError:
            return None
        if lock.refused is not None and age is not None and age < SILENT_S:
            lock.release()
            return None
        lock.sign()
        made = cls(lock)
        if lock.refused is not None:
            threading.Thread(target=made._beat, name="tlx-trial", daemon=True).start()
        return made

    def release(self) -> None:
        """A process that has inherited it holds it on."""
        self._over.set()
        if self.lock.refused is not None:
            self.lock.path.unlink(missing_ok=True)
        self.lock.release()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                self.lock.path.touch()


def _age(file: Path) -> float | None:
    """Seconds since a file was touched, by the clock of its file server; None where there is none."""
    probe = file.with_name(f"{file.name}.now")
    try:
        written = file.stat().st_mtime
        probe.touch()
        return probe.stat().st_mtime - written
    except OSError:
        return None
    finally:
        probe.unlink(missing_ok=True)
