"""What a tracker is, and the guard that keeps its failures away from training."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tlx.errors import TlxError, UserError

FINISH_S = 45.0
"""How long the end of a training waits for one tracker."""

WAITING_ROWS = 10_000
"""So many rows wait for a tracker that does not come back; then it is left alone."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told about the run.

    Attributes:
        folder: the run folder; ``metrics.jsonl`` in it holds all rows before the one that is logged next.
        name: for people; run_id: the same for every start of one run.
        config: the complete configuration.
        resumed: the run goes on from a checkpoint.
    """

    folder: Path
    name: str
    run_id: str
    config: Mapping[str, Any]
    resumed: bool = False


class Tracker(Protocol):
    """Receives every row of ``metrics.jsonl`` after it was written, on rank 0 only.

    Both are called from a thread of the tracker's own, one call at a time. A tracker may also have ``abandon()``, which
    lets go of what it holds without waiting: it is called, from any thread, when the tracker failed or hangs.
    """

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None: ...


class TrackingError(TlxError):
    """What a tracker could not do, and in `todo` the command that does it later."""

    def __init__(self, what: str, *, todo: str | None = None) -> None:
        self.todo = todo
        super().__init__(what)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def guarded(name: str, make: Callable[[], Tracker], *, finish_s: float = FINISH_S) -> Tracker:
    """Makes a tracker that can neither stop training nor hold it up.

    Whatever it raises is said once on stderr, then it is left alone; the same when it takes no more rows, or has not
    come to its end `finish_s` seconds after the training has.

    Raises:
        UserError: from `make`, for what the user must mend (a package that is not installed).
    """
    guard = _Guarded(name, finish_s)
    try:
        guard.begin(make())
    except UserError:
        raise
    except Exception as error:  # trackers raise anything: an old key, a full disk
        guard.give_up(error)
    return guard


class _Guarded:
    def __init__(self, name: str, finish_s: float) -> None:
        self.name, self.finish_s = name, finish_s
        self.tracker: Tracker | None = None
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING_ROWS)
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self._gave_up = False

    def begin(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._thread = threading.Thread(target=self._work, args=(tracker,), name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        if self.tracker is None:
            return
        row = dict(row)
        try:
            self._calls.put_nowait(lambda tracker: tracker.log(row))
        except queue.Full:
            self.give_up(TrackingError(f"{WAITING_ROWS} rows wait for it"))

    def finish(self, result: Mapping[str, Any]) -> None:
        if self.tracker is None or self._thread is None:
            return
        with contextlib.suppress(queue.Full):  # it hangs, so that nothing more would be done anyway
            self._calls.put_nowait(lambda tracker: tracker.finish(result))
            self._calls.put_nowait(None)
        self._thread.join(self.finish_s)
        if self._thread.is_alive():
            self.give_up(TrackingError(f"it has not come to its end within {self.finish_s:g} s"))
        self.tracker = None

    def _work(self, tracker: Tracker) -> None:
        while (call := self._calls.get()) is not None and not self._gave_up:
            try:
                call(tracker)
            except (Exception, SystemExit) as error:  # a dead service gives ConnectionResetError
                self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """Says it, once, and lets go."""
        with self._turn:
            if self._gave_up:
                return
            self._gave_up, tracker, self.tracker = True, self.tracker, None
        why = str(error).splitlines()[0] if str(error) else ""
        kind = "" if isinstance(error, TrackingError) else f"{type(error).__name__}: "
        later = getattr(error, "todo", None) or getattr(tracker, "todo", None)
        warn(
            f'the tracker "{self.name}" failed ({kind}{why}) and is left alone from here on; training goes on, and '
            "metrics.jsonl has everything" + (f"\n  -> {later}" if later else "")
        )
        abandon = getattr(tracker, "abandon", None)
        if abandon is not None:
            with contextlib.suppress(Exception):
                abandon()
