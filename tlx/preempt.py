"""Requests to stop: SIGTERM, Ctrl-C, SIGUSR1 under plain python, or a file named `stop` in the run folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """Notices that somebody wants this training to stop; the loop looks at every step boundary.

    The first signal asks, the same one again ends the process at once. SIGUSR1 is for plain python and srun:
    launchers die of it.
    """

    def __init__(self, folder: Path, *, launched: bool) -> None:
        self.file = folder / "stop"
        self.reason: str | None = None
        self._seen: set[int] = set()
        signals = [signal.SIGTERM, signal.SIGINT] + ([] if launched else [signal.SIGUSR1])
        self._former = {number: signal.signal(number, self._notice) for number in signals}

    def asked(self, *, look: bool) -> bool:
        """Whether a stop was asked for; `look` also at the file (rank 0 does, for all)."""
        if self.reason is None and look and self.file.exists():
            self.reason = f"the file {self.file}"
        return self.reason is not None

    def close(self) -> None:
        """Signals act as before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def clear(self) -> None:
        """Forgets a file left by an earlier request, so that the next start trains."""
        self.file.unlink(missing_ok=True)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._seen.add(number)
        self.reason = signal.Signals(number).name
