"""The thread of a rank that asks once a second whether a rank has failed, and ends this one if so.

A collective that fails does not identify the failing rank, and over NCCL it waits for its own timeout: so whoever sees
first what has happened tells all others, and a rank whose main thread does not leave by itself is ended. The rules for
what counts as a failure are in :mod:`tlx.ranks.failure_detector`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch.distributed as dist

from tlx.base import verdict as verdicts
from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import RESUMABLE, environment, launched, relaunched, verdict_file
from tlx.base.launcher import rank as launched_rank
from tlx.base.terminal import say
from tlx.base.verdict import Status
from tlx.ranks import failure_detector as detector
from tlx.ranks.heartbeat import HeartbeatChannel
from tlx.ranks.stacks import Stacks, innermost_line
from tlx.ranks.state import INTERVAL_S, Failure, Heartbeat, Process, SharedState, Snapshot, State
from tlx.runs.processes import Early, early, is_gone, launcher_above
from tlx.runs.run_folder import RunFolder
from tlx.runs.stop import EarlySignals

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_EXPLAINED_S = 15.0  # for all ranks to find out whose fault a failed collective is
_BEFORE_EXIT_S = 120.0  # at most, for what must be on the disk before the process ends


class Watch:
    """Watches over one rank; does nothing before :meth:`start`.

    Args:
        folder: the run's; stacks of a rank that hangs go to FOLDER/stacks/rank-N.txt.
        patience_s: the main thread hangs when it has made no progress for so long.
        ends: a training that hangs ends this process; else that is only told, since the process is not its own.
        claimed: the run folder is this training's. Before that nothing is written there.
        early: what was seen and heard since this process was started.

    Attributes:
        asks_to_stop: called, from the watch's thread, where the training cannot go on and can still be saved.
        before_exit: called before the watch ends this process, in a thread of its own, and waited for as long as the
            patience lasts, at most two minutes: a checkpoint that is being written is finished.
    """

    def __init__(
        self,
        folder: RunFolder | None = None,
        *,
        patience_s: float = math.inf,
        ends: bool = True,
        claimed: bool = True,
        early: Early | None = None,
    ) -> None:
        self.folder, self.patience_s, self.ends, self.claimed = folder, patience_s, ends, claimed
        self.asks_to_stop: Callable[[str], None] | None = None
        self.before_exit: Callable[[], None] | None = None
        self.state = SharedState(Snapshot(Heartbeat.of_this_process(launched_rank())))
        self._early, self._joining, self._serves = early, False, False
        self._channel: HeartbeatChannel | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def begin(self, rank: int, size: int) -> None:
        """Begins to watch before ranks can hear of each other: the launcher above, and ranks beside this one."""
        self._joining = True
        self._early = self._early or early()
        self._run(rank, size)

    def start(self, store: Store | None, rank: int, size: int, *, serves: bool = False) -> None:
        """Begins to watch.

        Args:
            store: of the rendezvous; None for a lone rank without one.
            serves: the store lives in this very process.
        """
        self._joining, self._serves = False, serves
        if self._thread is None:
            self._run(rank, size)
        self.state.change(lambda now: now.joined(self.patience_s))
        if store is not None and size > 1:
            self._channel = HeartbeatChannel(store, self.state, size)

    def claim(self) -> None:
        """The run folder is this training's from here on: stacks go there, also those of a hang in the next moment."""
        self.claimed = True
        if self._thread is not None and self._thread.is_alive():
            self.stacks.arm()

    def hand_over_signals(self) -> EarlySignals | None:
        """What hears signals so far, for whoever takes over; None where nothing does."""
        around, self._early = self._early, None
        return around.signals if around is not None else None

    def beat(self, stage: str, step: int | None = None) -> None:
        """The main thread makes progress: it begins a stage, at the step that is being made."""
        self.state.beat(stage, step)

    @property
    def speaks(self) -> bool:
        """Whether this rank writes status.json: rank 0 does, or the first one that still can."""
        known = self.state.read()
        if known.failure is None:
            return known.own.rank == 0
        if known.failure.kind == "store":
            return True
        return known.own.rank == min(set(range(known.size)) - set(known.failure.mute), default=0)

    def say(self, status: Status, message: str) -> None:
        """Says how this start ended, if this is the rank to do so: in status.json once the run folder is claimed."""
        if not self.speaks:
            if self._channel is None and not self.claimed:  # nobody else may know
                verdicts.give_if_none(status, message=message[:2000])
            return
        # without the folder's lock, which a stopped rank 0 still holds; what a rank has said before counts
        said = self.folder.status if self.claimed and self.folder is not None else None
        if self.folder is not None and said == "running":
            with contextlib.suppress(OSError):
                self.folder.say(status, message=message[:2000])
        elif said is None:
            verdicts.give(status, message=message[:2000])

    def explained(self, error: BaseException) -> BaseException:
        """What an error of the main thread comes from: a :class:`TlxError` that names the rank at fault, or itself.

        Takes up to some 15 s where a collective has failed and it is not known whose fault that is.

        What tlx raises by itself it mostly raises on all ranks alike, which then each shut down cleanly: the others are
        told of it, but are at fault of nothing and wait for nobody, unless a collective shows that they wait for this
        rank.
        """
        if self._channel is None or self._thread is None or not self._thread.is_alive():
            self._tell("failed")  # after the watch: for the exit code alone
            return error
        self.beat("leaving")
        failure = None
        if is_foreign := _is_of_a_collective(error):
            self._tell("leaving")
            failure = self.state.wait_for(lambda now: now.failure is not None, _EXPLAINED_S).failure
        if failure is not None:
            self._tell("told")
            return UserError(failure.message) if failure.kind == "refused" else TlxError(failure.message)
        if isinstance(error, TlxError) and not is_foreign:
            self._tell("refused" if isinstance(error, UserError) else "stopped", str(error)[:1000])
        else:
            self._tell("failed", f"{type(error).__name__}: {error}"[:1000])
        return error

    def close(self) -> None:
        """Ends the watch; its threads must be joined before the interpreter shuts down."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join(10)
        self._thread, self._joining = None, False
        signals = self.hand_over_signals()
        if signals is not None:
            signals.close()
        if self._channel is not None:
            self._linger()
            state = self.state.read().own.state
            self._tell("left" if state == "alive" else state)
            self._channel.close(timeout_s=3)
        self.stacks.close()

    def _run(self, rank: int, size: int) -> None:
        own, here = replace(self.state.read().own, rank=rank), environment()
        at = f"{here.get('MASTER_ADDR', '?')}:{here.get('MASTER_PORT', '?')}"
        self.state = SharedState(Snapshot(own, size, store_at=at, agent_serves=here.agent_serves))
        self._main = threading.get_ident()
        self._former_verdict = verdicts.read() if relaunched() or _is_old(verdict_file()) else None
        self._since: dict[str, float] = {}
        self._processes: dict[int, psutil.Process] = {}
        self._launcher = launcher_above() if self.ends else None
        self.stacks = Stacks(self._claimed_folder, own, size, self.patience_s)
        self.stacks.arm()
        self._thread = threading.Thread(target=self._watch, name="tlx-watch", daemon=True)
        self._thread.start()

    def _claimed_folder(self) -> Path | None:
        return self.folder.path if self.claimed and self.folder is not None else None

    def _tell(self, state: State, why: str = "") -> None:
        self.state.change(lambda known: known.told(state, why))

    # In the thread

    def _watch(self) -> None:
        last = time.monotonic()
        try:
            while not self._closing.wait(INTERVAL_S):
                paused_s, last = time.monotonic() - last, time.monotonic()
                self.stacks.note_pause(paused_s)
                self.stacks.arm()
                self._round(min(paused_s, 2 * INTERVAL_S))
        except Exception as error:  # a fault of the watch is none of the training's
            faulthandler.cancel_dump_traceback_later()
            self._tell("left")  # a heartbeat that stands still would look like a death
            if self._channel is not None:
                self._channel.close(timeout_s=3)
                self._channel = None  # nothing more is heard over it
            say(f"note: ranks are no longer watched: {type(error).__name__}: {error}", error=True)

    def _round(self, passed_s: float) -> None:
        known = self._renew(passed_s)
        self._check_launcher(known)
        self._check_start(known)
        if known.failure is not None:
            self._leave_for(known.failure, known)
        elif (found := detector.judge(known)) is not None and (self.ends or known.size > 1):
            now_own = found if detector.is_cut_off(known) else None
            self.state.change(lambda now: replace(now, proposal=now.proposal or found, failure=now.failure or now_own))

    def _leave_for(self, failure: Failure, known: Snapshot) -> None:
        """Ends the process if its main thread does not leave by itself."""
        failed_s = self._for_s("failed")
        if failed_s == 0 and failure.kind == "hangs" and known.own.state == "alive":
            self.stacks.dump(known.own, known.idle_s)
        late = failed_s >= (INTERVAL_S if known.is_stalled else detector.STUCK_S)
        # a large checkpoint and trackers take their time
        if late and (known.is_stalled or known.own.stage not in detector.CLOSING):
            self._end(failure)

    def _renew(self, passed_s: float) -> Snapshot:
        """The next round's snapshot, with a new heartbeat."""
        before = self.state.read()
        is_idle = before.idle_s + passed_s >= before.patience_s
        where, begun = innermost_line(self._main) if is_idle else "", _collectives()
        processes, stacks = self._running(before), self.stacks.folder

        def renewed(now: Snapshot) -> Snapshot:
            now = replace(now.later(passed_s), processes=processes, stacks=stacks)
            own = replace(now.own, count=now.own.count + 1, collectives=begun)
            if now.is_stalled and own.state == "alive":
                own = replace(own, state="stuck", why=where)
            elif own.state == "stuck" and not now.is_stalled:  # it was only slow
                own = replace(own, state="alive", why="")
            return detector.suspect(replace(now, own=own))

        known = self.state.change(renewed)
        if known.own.state == "stuck" and before.own.state != "stuck":
            self.stacks.dump(known.own, known.idle_s)
            if not self.ends and (found := detector.judge(known)) is not None:
                say(f"warning: {found.message}", error=True)
        return known

    def _for_s(self, what: str, holds: object = True) -> float:
        """For how long something has held without a break."""
        now_s = self.state.read().now_s
        since_s = self._since.setdefault(what, now_s)
        if not holds:
            del self._since[what]
        return now_s - since_s

    def _check_launcher(self, known: Snapshot) -> None:
        if self._launcher is None or not is_gone(self._launcher):
            return
        failure = detector.launcher_died(known.own, self._launcher.pid)
        orphaned_s = self._for_s("orphaned")
        if orphaned_s == 0 and self.asks_to_stop is not None:
            self.asks_to_stop(failure.message)
        if self.asks_to_stop is None or not detector.may_still_save(known.own, orphaned_s):
            self._end(failure)

    def _check_start(self, known: Snapshot) -> None:
        """Ranks that have not joined hear of each other by nothing else: a process beside this one that has exited, the
        verdict of another rank or of the batch script, a signal of the launcher that ends all of them."""
        around = self._early
        if around is None or not self._joining:
            return
        around.siblings.look()
        ended, unknown, said = around.siblings.gone(), around.siblings.nameless(), verdicts.read()
        verdict = said if said is not None and said != self._former_verdict else {}
        terminated = around.signals is not None and around.signals.came()
        failure = detector.judge_start(
            known.own.host,
            ended,
            unknown,
            verdict,
            terminated=terminated,
            noticed_s=self._for_s("noticed", ended or verdict or terminated),
            unknown_s=self._for_s("unknown", unknown),
        )
        if failure is not None:
            self._end(failure)

    def _running(self, known: Snapshot) -> Mapping[int, Process]:
        """Processes of other ranks on this machine."""
        for rank in [r for r, h in known.heard.items() if h.host == known.own.host and r not in self._processes]:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(known.heard[rank].pid)
                # containers may share a host's name and number their processes anew
                if abs(process.create_time() - known.heard[rank].born) < 1.5:
                    self._processes[rank] = process
        return {rank: _condition(process) for rank, process in self._processes.items()}

    def _linger(self) -> None:
        """The process that serves the store goes last, when there is a fault to be told."""
        until, known = time.monotonic() + 3, self.state.read()
        if not self._serves or known.own.state == "alive":
            return
        self.state.change(lambda now: replace(now, read_all_s=now.now_s))
        while known.store_error is None and time.monotonic() < until:
            others = [known.heard.get(r) for r in range(known.size) if r != known.own.rank]
            if all(h is not None and not h.is_expected for h in others):
                return
            self._tell(known.own.state)
            time.sleep(0.1)
            known = self.state.read()

    def _end(self, failure: Failure) -> None:
        """Ends the process, whatever its main thread is waiting for."""
        refused, asked = failure.kind == "refused", failure.kind == "asked"
        self.state.change(lambda known: replace(known, failure=failure))
        wait_s = min(self.patience_s, _BEFORE_EXIT_S) if self.before_exit is not None else 0.0
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # of a stderr that is closed
            # should the disk be what hangs
            faulthandler.dump_traceback_later(20 + wait_s, exit=True, file=sys.__stderr__ or 2)
        say(f"{'note' if asked else 'error' if refused else 'fault'}: {failure.message}", error=True)
        self.say("resumable" if asked else "user-error" if refused else "fault", failure.message)
        self._tell("told")
        if self.before_exit is not None:
            last = threading.Thread(target=_call, args=(self.before_exit,), name="tlx-before-exit", daemon=True)
            last.start()
            last.join(wait_s)
        if self._channel is not None:
            self._linger()
            time.sleep(0.2)
        os._exit(1 if not (refused or asked) else 0 if launched() else 2 if refused else RESUMABLE)


def _call(before_exit: Callable[[], None]) -> None:
    try:
        before_exit()
    except Exception as error:  # the fault that is told already comes first
        say(f"note: before_exit: {type(error).__name__}: {error}", error=True)


def _collectives() -> int:
    """How many this rank has begun; 0 where torch does not tell."""
    # not of the public interface: without it, steps decide
    with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
        if dist.is_initialized():
            group: Any = dist.distributed_c10d._get_default_group()
            return int(group._get_sequence_number_for_group())
    return 0


def _condition(process: psutil.Process) -> Process:
    if is_gone(process):
        return "ended"
    with contextlib.suppress(psutil.Error):
        return "suspended" if process.status() == psutil.STATUS_STOPPED else "running"
    return "running"


_COLLECTIVE = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "process group")


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether an error may come from another rank's end."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _COLLECTIVE)


def _is_old(verdict: Path | None) -> bool:
    """Whether a verdict is of a start before this one; a minute is for clocks that differ."""
    try:
        return verdict is not None and verdict.stat().st_mtime < psutil.Process().create_time() - 60
    except OSError:
        return False
