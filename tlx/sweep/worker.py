"""A worker: takes trials of a sweep one after the other, until there are none left, or it is asked to stop."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import environment
from tlx.base.parsing import from_json
from tlx.base.terminal import say
from tlx.runs.run_files import mapping
from tlx.sweep.ended import Ended, ended
from tlx.sweep.progress import after, begun
from tlx.sweep.spec import LOGS, Spec
from tlx.sweep.study import Study, Taken

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MOST_FAILURES = 3
"""So many trials in a row that fail without a training end the worker: the next one would, too."""

_WAIT = timedelta(days=7)
_LOOK_S = 0.2


@dataclass
class Stopping:
    """Requests to this worker to stop: signals, handed on to the process that trains; a time limit.

    Attributes:
        reason: in words; None while nobody has asked.
        until: seconds since the epoch; None for no limit.
    """

    until: float | None = None
    reason: str | None = None
    child: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, signals are requests."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        former = {number: signal.signal(number, self._notice) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to begin no further trial."""
        if self.reason is None and self.until is not None and time.time() >= self.until:
            self.reason = "--time, the limit"
        return self.reason is not None

    def _notice(self, number: int, _frame: FrameType | None) -> None:
        again, self.reason = self.reason is not None, signal.Signals(number).name
        if self.child is not None:
            with contextlib.suppress(OSError):
                self.child.send_signal(signal.SIGKILL if again and number == signal.SIGINT else signal.SIGTERM)


def work_alone(spec: Spec, trials: int, stopping: Stopping) -> bool:
    """Trains trials, each in a process of its own; whether the worker came to the end of what there was to begin.

    Raises:
        TlxError: one trial after the other fails before it trains.
    """
    with stopping.heard():
        return _work(Study(spec), trials, stopping, lambda taken: _in_a_process(spec, taken, stopping))


@dataclass(frozen=True)
class Meeting:
    """The ranks of a launcher, which rank 0 tells what to do by the store where they have met.

    Attributes:
        size: how many ranks there are.
    """

    store: Store
    rank: int
    size: int

    @classmethod
    def join(cls) -> Meeting:
        """
        Raises:
            UserError, TlxError: a rank did not join.
        """
        from tlx.ranks.rendezvous import rendezvous_store

        return cls(*rendezvous_store(timedelta(minutes=10)))

    def tell(self, key: str, **said: Any) -> None:
        """Of rank 0."""
        self.store.set(key, json.dumps(said))

    def hear(self, key: str) -> dict[str, Any]:
        """What rank 0 tells under a key, once it does.

        Raises:
            UserError: that it cannot go on.
        """
        self.store.wait([key], _WAIT)
        said: dict[str, Any] = json.loads(self.store.get(key))
        if "error" in said:
            raise UserError(said["error"])
        return said

    def leave(self) -> None:
        """Rank 0 may serve the store: it leaves last."""
        if self.rank:
            self.store.set(f"left/{self.rank}", "")
        elif self.size > 1:
            with contextlib.suppress(RuntimeError):  # one has died, which is told elsewhere
                self.store.wait([f"left/{other}" for other in range(1, self.size)], timedelta(seconds=60))


def work_ranked(spec: Spec, trials: int, stopping: Stopping, meeting: Meeting) -> bool:
    """The same on all ranks of a launcher together, in their own processes: rank 0 asks for trials, and tells them.

    Raises:
        TlxError: one trial after the other fails before it trains.
    """
    from tlx.ranks.rendezvous import leave_ranks
    from tlx.sweep.trial import log_of, shown_in, train_trial

    keys = (f"trial/{turn}" for turn in itertools.count())

    def train(number: int) -> Ended:
        with shown_in(log_of(spec, number)):
            try:
                return train_trial(spec, number, until=stopping.until)
            finally:
                leave_ranks()

    def hand_out(taken: Taken) -> Ended:
        meeting.tell(next(keys), trial=taken.number)
        return train(taken.number)

    if meeting.rank == 0:
        try:
            return _work(Study(spec), trials, stopping, hand_out)
        finally:
            meeting.tell(next(keys), over=stopping.reason is None)
    while "trial" in (said := meeting.hear(next(keys))):
        train(said["trial"])
    return bool(said["over"])


def _work(study: Study, trials: int, stopping: Stopping, train: Callable[[Taken], Ended]) -> bool:
    failures = 0
    while not stopping.asked():
        taken = study.take(trials)
        if taken is None:
            return True
        say(begun(study.spec, taken))
        start = time.monotonic()
        end = train(taken)
        while end.state == "killed" and not stopping.asked() and (again := study.again(taken)) is not None:
            say(f"  trial {taken.number}: {end.why}; it goes on from its last checkpoint", error=True)
            taken, end = again, train(again)
        study.tell(taken, end, time.monotonic() - start)
        say(after(study, taken, end, trials))
        if end.state == "stopped":
            stopping.reason = stopping.reason or end.why or "a request to the trial"
        failures = failures + 1 if end.state == "failed" else 0
        if failures >= MOST_FAILURES:
            raise TlxError(
                f"{failures} trials in a row have failed, the last one: {end.why}\n  (in {study.spec.folder / LOGS})"
            )
    return False


def _in_a_process(spec: Spec, taken: Taken, stopping: Stopping) -> Ended:
    """Trains a trial in a process of its own, which holds the trial's lock, too: where this worker is killed alone, the
    training goes on to its end, and nobody else begins it meanwhile."""
    from tlx.sweep.trial import log_of

    verdict = spec.folder / LOGS / f"{taken.number:04d}.verdict"
    verdict.unlink(missing_ok=True)
    words = [sys.executable, "-m", "tlx", "sweep-trial", str(spec.folder), str(taken.number)]
    words += [f"--until={stopping.until:.0f}"] if stopping.until is not None else []
    env = {**environment().variables, "TLX_VERDICT": str(verdict.absolute())}
    with log_of(spec, taken.number).open("ab") as log:
        child = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[taken.lock.handle]
        )
        stopping.child = child
        if stopping.reason is not None:  # while the process was being made
            child.send_signal(signal.SIGTERM)
        try:
            code = child.wait()
        finally:
            stopping.child = None
    try:
        said = mapping(from_json(verdict.read_bytes()))
    except (OSError, ValueError):
        said = {}
    status, message = said.get("status"), str(said.get("message", ""))
    if status == "running" or (status is None and code < 0):
        status = None
    elif status is None:
        status, message = "fault", f"it ended with code {code}; see {log_of(spec, taken.number)}"
    end = ended(spec.run_of(taken.number), status, message)
    if end.state == "killed" and code < 0:
        end = replace(end, why=f"its process was killed by {signal.Signals(-code).name}")
    if end.state == "killed" and stopping.reason is not None:
        return replace(end, state="stopped", why=stopping.reason)
    return end
