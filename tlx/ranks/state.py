"""What a rank knows of itself and of the other ranks; its threads share it under one lock.

The main thread reports progress and errors, the thread of the heartbeats what other ranks wrote, the watch which
failure was found. Values never change: a thread takes a :class:`Snapshot`, or replaces it by
:meth:`SharedState.change`.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import psutil

INTERVAL_S = 1.0
"""Between two heartbeats of a rank."""

State = Literal["alive", "stuck", "failed", "refused", "stopped", "leaving", "told", "left"]
Process = Literal["running", "suspended", "ended"]


@dataclass(frozen=True)
class Heartbeat:
    """What one rank tells the others of itself.

    Attributes:
        born: when its process was started, in seconds since the epoch; tells another process under the same number.
        count: heartbeats so far.
        step, stage: what its main thread is at.
        collectives: that it has begun; whoever hangs has begun the fewest.
        state: `stuck`: its main thread makes no progress; `failed`: by an error of its own; `refused`: by the user's
            mistake, `stopped`: by a fault that tlx noticed, mostly on all ranks alike; `leaving`: a collective failed,
            and it is not known why; `told`: that is known; `left`: it has no more to do.
        why: where in the code it is stuck, or how it failed.
    """

    rank: int
    host: str
    pid: int
    born: float
    count: int = 0
    step: int = 0
    stage: str = "start"
    collectives: int = 0
    state: State = "alive"
    why: str = ""

    @classmethod
    def of_this_process(cls, rank: int) -> Heartbeat:
        return cls(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        return f"at step {self.step}, in '{self.stage}'"

    @property
    def is_expected(self) -> bool:
        """Whether another heartbeat must come."""
        return self.state in ("alive", "stuck", "leaving")


@dataclass(frozen=True)
class Failure:
    """Why the training ends and which rank is at fault, the same on every rank that reads it.

    Attributes:
        mute: ranks that cannot write status.json any more.
    """

    kind: Literal["died", "failed", "refused", "hangs", "store", "launcher", "asked"]
    message: str
    mute: Sequence[int] = ()


class Progress(NamedTuple):
    """What the main thread has begun last, and whether it has finished a step."""

    stage: str
    step: int
    stepped: bool


@dataclass(frozen=True)
class Snapshot:
    """What a rank knows at one moment.

    Times are seconds of the watch: it counts a pause of its own, which may be that of a suspended job, as two seconds
    at most, so that none is taken for dead by the clock on the wall.

    Attributes:
        own: this rank's heartbeat; of `size` ranks.
        patience_s: for so long its main thread may make no progress.
        store_at, agent_serves: where the store of the rendezvous is, and whether the launcher serves it.
        stacks: the folder where stacks are written.
        now_s: the time of the watch.
        progress_s: when the main thread last made progress.
        stepped: whether it has finished a step, after which nothing is as slow as a start.
        heard, heard_s: the newest heartbeat of other ranks, and when it came (in `listened_s`), by rank.
        answered_s: when the store last answered.
        listened_s: seconds in which it did, since ranks joined. A clock of its own: what no rank could be heard in is
            no rank's silence.
        store_error: why the store cannot be asked any more, over a new connection neither; None while it can.
        store_refused: nobody listens there any more.
        processes: of ranks on this machine; those elsewhere are missing.
        suspected_s: since when something has looked wrong; None where nothing does.
        read_all_s: since when every rank's heartbeat is read, not only those of rank 0 and of the successor.
        proposal: the failure that this rank has found; of several ranks' the first one counts.
        failure: the one that counts.
    """

    own: Heartbeat
    size: int = 1
    patience_s: float = math.inf
    store_at: str = ""
    agent_serves: bool = False
    stacks: str | None = None
    now_s: float = 0.0
    progress_s: float = 0.0
    stepped: bool = False
    heard: Mapping[int, Heartbeat] = field(default_factory=dict)
    heard_s: Mapping[int, float] = field(default_factory=dict)
    answered_s: float = 0.0
    listened_s: float = 0.0
    store_error: str | None = None
    store_refused: bool = False
    processes: Mapping[int, Process] = field(default_factory=dict)
    suspected_s: float | None = None
    read_all_s: float | None = None
    proposal: Failure | None = None
    failure: Failure | None = None

    @property
    def soon_s(self) -> float:
        """The end of the second that is under way: nothing may look older than it is."""
        return self.now_s + INTERVAL_S

    @property
    def idle_s(self) -> float:
        """Since the main thread last made progress."""
        return self.now_s - self.progress_s

    @property
    def is_stalled(self) -> bool:
        return self.idle_s >= self.patience_s

    @property
    def unanswered_s(self) -> float:
        """Since the store last answered."""
        return self.now_s - self.answered_s

    def joined(self, patience_s: float) -> Snapshot:
        """All ranks have joined: from now on they must make progress, and send heartbeats."""
        return replace(self, patience_s=patience_s, progress_s=self.now_s, answered_s=self.now_s)

    def later(self, passed_s: float) -> Snapshot:
        """A round of the watch is over; others were listened to if the store answered in it."""
        listened_s = self.listened_s + (passed_s if self.answered_s == self.soon_s else 0.0)
        return replace(self, now_s=self.now_s + passed_s, listened_s=listened_s)

    def progressed(self, progress: Progress) -> Snapshot:
        """The main thread has begun a stage; its next heartbeat says so."""
        own = replace(self.own, stage=progress.stage, step=progress.step)
        return replace(self, own=own, progress_s=self.soon_s, stepped=progress.stepped)

    def told(self, state: State, why: str = "") -> Snapshot:
        """With a new heartbeat of another state."""
        return replace(self, own=replace(self.own, count=self.own.count + 1, state=state, why=why or self.own.why))

    def answered(self, heard: Mapping[int, Heartbeat], failure: Failure | None) -> Snapshot:
        """The store has answered: heartbeats, and on which failure ranks have agreed."""
        at_s = self.listened_s + INTERVAL_S
        new = {r: at_s for r, h in heard.items() if r not in self.heard or self.heard[r].count != h.count}
        known = replace(self, heard={**self.heard, **heard}, heard_s={**self.heard_s, **new}, answered_s=self.soon_s)
        return replace(known, failure=self.failure or failure)


class SharedState:
    """The newest snapshot, and the one lock of a rank's threads."""

    def __init__(self, first: Snapshot) -> None:
        self._newest, self._changed = first, threading.Condition()
        self._begun = self._seen = Progress(first.own.stage, first.own.step, first.stepped)

    def beat(self, stage: str, step: int | None) -> None:
        """The main thread begins a stage.

        It does so twice a step, and is to wait for no lock and build no snapshot, which takes twenty times as long: it
        replaces one reference, which no other thread does, and whoever looks at the snapshot puts it there.
        """
        last = self._begun
        self._begun = Progress(stage, last.step if step is None else step, last.stepped or last.stage == "step")

    @property
    def stage(self) -> str:
        """What the main thread has begun last; without the lock."""
        return self._begun.stage

    def read(self) -> Snapshot:
        with self._changed:
            return self._with_progress()

    def change(self, how: Callable[[Snapshot], Snapshot]) -> Snapshot:
        """Replaces the snapshot; threads that wait look at it now."""
        with self._changed:
            self._newest = how(self._with_progress())
            self._changed.notify_all()
            return self._newest

    def wait_for(self, is_there: Callable[[Snapshot], bool], timeout_s: float) -> Snapshot:
        """Waits until something holds, or for `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: is_there(self._with_progress()), timeout_s)
            return self._with_progress()

    def _with_progress(self) -> Snapshot:
        """The newest snapshot; under the lock."""
        begun = self._begun
        if begun is not self._seen:
            self._newest, self._seen = self._newest.progressed(begun), begun
        return self._newest
