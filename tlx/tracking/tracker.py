"""What a tracker is, and the guard that keeps its failures away from training."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tlx.base.errors import TlxError, UserError
from tlx.base.terminal import say
from tlx.runs.run_files import test_values

if TYPE_CHECKING:
    from tlx.tracking.phase_end import PhaseEnd
    from tlx.tracking.trained import TrainedModel

BEGIN_S = 60.0
"""How long the start of a training waits for one tracker to begin; then its rows wait."""

FINISH_S = 45.0
"""How long the end of a training waits for one tracker."""

ABANDON_S = 5.0
"""How long anybody waits until a tracker that failed has let go."""

ASK_S = 5.0
"""How long the end of a training waits for a tracker's answer why."""

WAITING_ROWS = 10_000
"""So many rows wait for a tracker that does not come back; then it is left alone."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told about the run.

    Attributes:
        folder: the run folder; ``metrics.jsonl`` in it holds all rows before the one that is logged next.
        name: for people; run_id: the same for every start of one run.
        config: the complete configuration, to be compared key by key; see :func:`tlx.plan.comparable.comparable`.
        resumed: the run goes on from a checkpoint.
    """

    folder: Path
    name: str
    run_id: str
    config: Mapping[str, Any]
    resumed: bool = False


class Tracker(Protocol):
    """Receives every row of ``metrics.jsonl`` after it was written, on rank 0 only.

    It is made, and all is called, in a thread of the tracker's own, one call at a time. `result` is what result.json
    holds; where ``finished`` is false, ``fault`` names the exception that ended the training, and a training that was
    asked to stop has none; ``pruned`` says why one was ended by whoever chooses among trainings.

    It may have more methods, and is asked only for those that it has:

    * ``phase_ended(end: PhaseEnd)``, after the row of the phase's last step: tables, confusions, pictures with
      predictions. A start that goes on does not tell it again: :func:`tlx.tracking.phase_end.phase_ends` reads those of
      the run folder.
    * ``model_trained(model: TrainedModel)``, before ``finish`` of a training that is done, for the best weights and for
      the last, or once where they are the same.
    * ``pruned()``, from any thread, where a signal has ended the training: why its side wants no more, or None.
    * ``abandon()``, which lets go of what it holds: called, from any thread, when the tracker failed or hangs.

    What the first two raise is a warning, and the tracker goes on. An attribute ``finish_s`` says how many seconds the
    end of a training that is done may wait for it, where it uploads much.
    """

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None: ...


def of_test(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a result tells of data.test, by names such as ``test/top1``."""
    return {f"test/{name}": value for name, (value, _, _) in test_values(result).items() if value is not None}


class TrackingError(TlxError):
    """What a tracker could not do, and in `todo` the command that does it later."""

    def __init__(self, what: str, *, todo: str | None = None) -> None:
        self.todo = todo
        super().__init__(what)


def warn(text: str) -> None:
    say(f"warning: {text}", error=True)


def guarded(
    name: str, make: Callable[[], Tracker], *, begin_s: float = BEGIN_S, finish_s: float = FINISH_S
) -> GuardedTracker:
    """Makes a tracker that can neither stop training nor hold it up.

    Whatever it raises is said once on stderr, then it is left alone; the same when it takes no more rows, or has not
    come to its end `finish_s` seconds after the training has (more where it asks for more). A tracker that is not made
    within `begin_s` seconds is said to be slow, and gets its rows when it is there.

    Raises:
        UserError: from `make`, for what the user must mend (a tracker that lacks a method).
    """
    guard = GuardedTracker(name, finish_s)
    guard.begin(make, begin_s)
    return guard


class GuardedTracker:
    """A tracker behind its guard; every call returns at once but the last."""

    def __init__(self, name: str, finish_s: float) -> None:
        self.name, self.finish_s = name, finish_s
        self._tracker: Tracker | None = None
        self._calls: queue.Queue[_Call] = queue.Queue(WAITING_ROWS)
        self._thread: threading.Thread | None = None
        self._made = threading.Event()
        self._awaited = True
        self._wrong: UserError | None = None
        self._turn = threading.Lock()
        self._over = False

    def begin(self, make: Callable[[], Tracker], begin_s: float) -> None:
        self._thread = _thread(f"tracker {self.name}", lambda: self._work(make))
        self._made.wait(begin_s)
        with self._turn:
            self._awaited = False
        if self._wrong is not None:
            raise self._wrong
        if not self._made.is_set():
            warn(f'the tracker "{self.name}" has not begun within {begin_s:g} s; training goes on, its rows wait')

    def log(self, row: Mapping[str, Any]) -> None:
        self._put(_Call("log", dict(row)))

    def phase_ended(self, end: PhaseEnd) -> None:
        self._put(_Call("phase_ended", end))

    def model_trained(self, model: TrainedModel) -> None:
        self._put(_Call("model_trained", model))

    def _put(self, call: _Call) -> None:
        if self._over:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.give_up(TrackingError(f"{WAITING_ROWS} rows wait for it"))

    def pruned(self) -> str | None:
        """What the tracker answers in `ASK_S` seconds, asked whether its side has ended the training."""
        ask: Callable[[], str | None] | None = getattr(self._tracker, "pruned", None)
        if self._over or ask is None:
            return None
        said: list[str | None] = []

        def hear() -> None:
            with contextlib.suppress(Exception, SystemExit):
                said.append(ask())

        _thread(f"ask {self.name}", hear).join(ASK_S)
        return said[0] if said else None

    def finish(self, result: Mapping[str, Any]) -> None:
        if self._over or self._thread is None:
            return
        fault = sys.exc_info()[0]
        if fault is not None and not result.get("finished", True):  # called on its way out
            result = {**result, "fault": fault.__name__}
        with contextlib.suppress(queue.Full):  # it hangs, so that nothing more would be done anyway
            self._calls.put_nowait(_Call("finish", result))
        own_s = getattr(self._tracker, "finish_s", 0.0) if result.get("finished", True) else 0.0
        patience_s = max(self.finish_s, own_s)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self.give_up(TrackingError(f"it has not come to its end within {patience_s:g} s"))
        self._over = True

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
        except (Exception, SystemExit) as error:  # trackers raise anything: an old key, a full disk
            with self._turn:
                if isinstance(error, UserError) and self._awaited:
                    self._wrong, self._over = error, True
            self.give_up(error)
            return
        finally:
            self._made.set()
        with self._turn:
            self._tracker, late = tracker, self._over
        if late:
            _abandon(tracker)
            return
        while not self._over:
            call = self._calls.get()
            if self._over:
                return
            try:
                call.on(tracker)
            except (Exception, SystemExit) as error:  # a dead service gives ConnectionResetError
                if call.kind in ("log", "finish"):
                    self.give_up(error)
                else:
                    self._say_skipped(call, error)
            if call.kind == "finish":
                return

    def _say_skipped(self, call: _Call, error: BaseException) -> None:
        later = getattr(error, "todo", None)
        warn(
            f'the tracker "{self.name}" did not take {call.what} ({_why(error)}); it goes on'
            + (f"\n  -> {later}" if later else "")
        )

    def give_up(self, error: BaseException) -> None:
        """Says it, once, and lets go."""
        with self._turn:
            if self._over:
                return
            self._over, tracker = True, self._tracker
        later = getattr(error, "todo", None) or getattr(tracker, "todo", None)
        warn(
            f'the tracker "{self.name}" failed ({_why(error)}) and is left alone from here on; training goes on, and '
            "metrics.jsonl has everything" + (f"\n  -> {later}" if later else "")
        )
        if tracker is not None:
            _thread(f"abandon {self.name}", lambda: _abandon(tracker)).join(ABANDON_S)


@dataclass(frozen=True)
class _Call:
    """Of a method, which a tracker may lack but for log and finish."""

    kind: Literal["log", "phase_ended", "model_trained", "finish"]
    content: Any

    def on(self, tracker: Tracker) -> None:
        method = getattr(tracker, self.kind, None)
        if method is not None:
            method(self.content)

    @property
    def what(self) -> str:
        """For people."""
        if self.kind == "phase_ended":
            return f"what phase {self.content.name} came to"
        return f"the {' and '.join(self.content.aliases)} weights"


def _why(error: BaseException) -> str:
    why = str(error).splitlines()[0] if str(error) else ""
    return why if isinstance(error, TrackingError) else f"{type(error).__name__}: {why}"


def _abandon(tracker: Tracker) -> None:
    abandon = getattr(tracker, "abandon", None)
    if abandon is not None:
        with contextlib.suppress(Exception, SystemExit):  # of one that has failed already, perhaps the user's own
            abandon()


def _thread(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
