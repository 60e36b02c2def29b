"""RUN/stacks/rank-N.txt: where the threads of a rank are when it hangs, and what explains stacks written by a timer."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tlx.ranks.state import Heartbeat

_BLIND_S = 15.0  # after the patience; then the threads of this process cannot run any more
_WENT_ON = b"It went on after that: it had been suspended, or the interpreter's lock was kept.\n"


class Stacks:
    """The stacks of one rank; to standard error as long as there is no file.

    Args:
        run: the run folder once it may be written to, else None.
        own: which rank this is, of `size`.
        patience_s: how long the main thread may make no progress.
    """

    def __init__(self, run: Callable[[], Path | None], own: Heartbeat, size: int, patience_s: float) -> None:
        self._run, self._own, self._size, self._patience_s = run, own, size, patience_s
        self._file: IO[bytes] | None = None
        self._lock = threading.RLock()  # the main thread arms once, when the run folder is claimed
        self._before = self._header_end = self._explained = 0  # bytes

    @property
    def folder(self) -> str | None:
        return str(path.parent) if self._file is not None and (path := self._path()) is not None else None

    def open(self) -> IO[bytes] | None:
        """The file, opened when it can be."""
        path = self._path()
        with self._lock, contextlib.suppress(OSError):
            if self._file is None and path is not None and path.parent.parent.is_dir():
                path.parent.mkdir(exist_ok=True)
                self._file = file = path.open("a+b", buffering=0)
                file.seek(0)
                if b'File "' not in file.read():  # what ranks that were killed have left, without a stack
                    file.truncate(0)
                self._before = file.seek(0, os.SEEK_END)
                file.write(f"{self._own} of {self._size}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
                self._header_end = self._explained = file.tell()
        return self._file

    def arm(self) -> None:
        """Starts the timer anew, in case no thread of this process gets to run, as when a C function keeps the
        interpreter's lock.

        Then the stacks are written, and no more: by the clock on the wall it may as well have been suspended, with the
        whole job. The other ranks, which get no heartbeat from it, end; it ends once the lock is free, or by its
        launcher.
        """
        if not math.isfinite(self._patience_s):
            return
        with self._lock, contextlib.suppress(OSError, ValueError, RuntimeError):  # of a stderr that is closed
            faulthandler.cancel_dump_traceback_later()
            if (file := self.open()) is not None:
                self._explain(file)
            if (to := file or sys.__stderr__) is not None:
                faulthandler.dump_traceback_later(self._patience_s + _BLIND_S, exit=False, file=to)

    def note_pause(self, seconds: float) -> None:
        """A round of the watch that took longer than the patience, whatever the timer has written."""
        if seconds >= self._patience_s and (file := self.open()) is not None:
            with contextlib.suppress(OSError):
                file.write(f"\nFor {seconds:.0f} s this had been suspended, or the lock kept.\n".encode())

    def dump(self, own: Heartbeat, idle_s: float) -> None:
        """Stacks of all threads, after a line on what this rank is at."""
        file = self.open()
        line = f"\n{own} {own.place}, for {idle_s:.0f} s; {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if file is not None:
                file.write(line.encode())
            faulthandler.dump_traceback(file=file or sys.__stderr__ or 2, all_threads=True)
            if file is not None:
                self._explained = file.tell()

    def close(self) -> None:
        """Stops the timer; a file without stacks of this start is as it was before."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        with contextlib.suppress(OSError), self._file as file:
            self._explain(file)
            if file.tell() == self._header_end:
                file.truncate(self._before)
                if self._before == 0 and (path := self._path()) is not None:
                    path.unlink()
                    path.parent.rmdir()

    def _path(self) -> Path | None:
        """Where the file is now: the run folder may have been renamed since it was opened."""
        run = self._run()
        return run / "stacks" / f"rank-{self._own.rank}.txt" if run is not None else None

    def _explain(self, file: IO[bytes]) -> None:
        """Behind stacks that the timer has written."""
        if file.tell() != self._explained:
            file.write(_WENT_ON)
            self._explained = file.tell()


def innermost_line(thread: int) -> str:
    """Where in the code a thread is."""
    frame = sys._current_frames().get(thread)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame is not None else ""
