"""Requests to stop: SIGTERM, Ctrl-C, SIGUSR1 under plain python, SIGHUP under a launcher, a file `stop` in the run
folder, a time limit. A training is *pruned* where whoever chooses among several wants no more of it: a sweep at an
evaluation, W&B's server.

And what a training cannot go on after, though its state is whole and can be saved: its folder or its launcher is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from tlx.base.files import write_whole
from tlx.base.launcher import environment

FILE = "stop"

Judge = Callable[[int, float], str | None]
"""Hears of an evaluation, its step and the value of `evaluate.metric` (not finite where that is not), on rank 0; why
the training is to end there, or None."""

_PRUNED = "pruned: "

PATIENCE_S = 5.0
"""Under a launcher; alone, ALONE_S, since `timeout` and shells signal a process and its group in one moment."""
ALONE_S = 1.0


class StopRequest:
    """Notices that somebody wants this training to stop; the loop looks at every step boundary.

    The first signal asks; another one, from PATIENCE_S on, ends the process at once. (Not before: a terminal's Ctrl-C
    reaches the whole process group, and then torchrun sends it to the ranks again.) SIGUSR1 is for plain python and
    srun: launchers die of it. SIGHUP, of a terminal that is closed, ends launchers, which pass it on and kill the ranks
    half a minute later; a training without one goes on, as under nohup (the command ignores it). Python lets only
    the main thread handle signals: in another one, such as a notebook's, the file and the time limit remain.

    Args:
        after: seconds since the command was started, with its launcher and all restarts by it; None for no limit.
        began: when that was, in seconds since the epoch; None asks the operating system when this process was started.
        is_displaced: whether the folder was renamed or removed.
        early: what has heard signals so far; one that has come is a request.
        judge: hears of evaluations; see :data:`Judge`.

    Attributes:
        pruned: why whoever chooses among trainings has ended this one; None where nobody has.
        trouble: why the training ends with a fault once it is saved; any thread may set it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        launched: bool,
        after: float | None = None,
        began: float | None = None,
        is_displaced: Callable[[], bool] = lambda: False,
        early: EarlySignals | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.file = folder / FILE
        self.trouble: str | None = None
        self.pruned: str | None = None
        self._judge = judge
        self._is_displaced = is_displaced
        self._patience = PATIENCE_S if launched else ALONE_S
        self._began = _began(launched) if began is None else began
        self._end = None if after is None else self._began + after
        self.reason: str | None = None
        self._since: float | None = None
        signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP if launched else signal.SIGUSR1]
        self._former: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread of the main interpreter
            for number in signals:
                self._former[number] = signal.signal(number, self._notice)
        if early is not None:
            self._former[signal.SIGTERM] = early.release()
            if early.came():
                self._notice(signal.SIGTERM, None)

    def asked(self, *, look: bool) -> bool:
        """Whether a stop was asked for; `look` also at the file (rank 0 does, for all)."""
        if self.reason is None and look and os.path.exists(self.file):  # pathlib raises where a file server hiccups
            self.reason = f"the file {self.file}"
            self.pruned = self.pruned or _why_pruned(self.file)
        if self.reason is None and look and self._end is not None and time.time() >= self._end:
            self.reason = "stop_after, the time limit"
        if self.reason is None and look and self._is_displaced():
            self.reason = "the run folder, which was renamed or removed"
        return any(why is not None for why in (self.reason, self.pruned, self.trouble))

    def consider(self, step: int, value: float) -> None:
        """Tells the judge of an evaluation; rank 0 does, for all. The training that it has seen enough of is pruned."""
        if self._judge is not None and self.pruned is None:
            self.pruned = self._judge(step, value)

    def fail(self, why: str) -> None:
        """A stop that is a fault."""
        self.trouble = self.trouble or why

    def close(self) -> None:
        """Signals act as before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def clear(self) -> None:
        """Forgets the file, so that the next start trains."""
        self.file.unlink(missing_ok=True)

    def clear_older(self) -> None:
        """Forgets a file from before this command; one that was made while it was starting is meant for it."""
        with contextlib.suppress(FileNotFoundError):
            if self.file.stat().st_mtime < self._began:
                self.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self.reason = signal.Signals(number).name
        elif time.monotonic() - self._since > self._patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def prune(folder: Path, why: str) -> None:
    """Asks the training in a folder to end as pruned, from any thread or process.

    Raises:
        OSError: the folder cannot be written.
    """
    write_whole(folder / FILE, _PRUNED + " ".join(why.split()) + "\n")


def _why_pruned(file: Path) -> str | None:
    """What :func:`prune` has written into the file that asks for a stop; None where it is another one's."""
    with contextlib.suppress(OSError):
        said = file.read_bytes()[:1000].decode("utf-8", "replace")
        return said.removeprefix(_PRUNED).strip() or None if said.startswith(_PRUNED) else None
    return None


class EarlySignals:
    """Hears SIGTERM from a rank's first moment until a :class:`StopRequest` does, so that none ends a start without a
    word. While ranks look for each other the main thread may wait inside of C code: Python's handlers would run when
    that returns, but the number of the signal is written into a pipe at once."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._came = False
        self._former: Any = signal.signal(signal.SIGTERM, lambda *_: None)
        self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    @classmethod
    def heard(cls) -> EarlySignals | None:
        """None where this is not the main thread, in which alone Python handles signals."""
        return cls() if threading.current_thread() is threading.main_thread() else None

    def came(self) -> bool:
        """Whether one has come so far."""
        with contextlib.suppress(OSError):  # nothing is in the pipe
            self._came = self._came or signal.SIGTERM in os.read(self._read, 64)
        return self._came

    def release(self) -> Any:
        """Hears no more, where another handler is set already; the handler of before."""
        signal.set_wakeup_fd(self._former_fd)
        return self._former

    def close(self) -> None:
        """Signals act as before; one that has come does now. The pipe stays open: another thread may be reading it."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._former_fd)
            signal.signal(signal.SIGTERM, self._former)
            if self.came():
                os.kill(os.getpid(), signal.SIGTERM)


def _began(launched: bool) -> float:
    """When the command was started, in seconds of the epoch; a batch script may say it in TLX_BEGAN."""
    said = environment().began
    if said is not None:
        return said
    own = psutil.Process()
    launcher = own.parent() if launched else None
    return float((launcher or own).create_time())
