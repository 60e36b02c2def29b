"""Ranks that watch over each other and over themselves: one that dies or hangs is named, and ends all of them.

The main thread beats wherever it gets on; a thread looks once a second whether it still does, and whether the others'
signs of life still come. A collective that fails tells nobody's name, and over NCCL it waits for its own timeout: so
whoever sees first what has happened tells all others, and a rank whose main thread does not leave by itself is ended.

Time is counted in rounds of that thread, so that a job which was suspended as a whole is not taken for dead. Nothing
ends a process by the clock on the wall alone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import psutil
import torch.distributed as dist

from tlx.base import verdict as verdicts
from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import RESUMABLE, environment, launched, relaunched, verdict_file
from tlx.base.launcher import rank as launched_rank
from tlx.base.terminal import say
from tlx.base.verdict import Status
from tlx.ranks.heartbeat import BEAT_S, Sign, State, Verdict, Wire
from tlx.runs.processes import Early, early, is_gone, launcher_above
from tlx.runs.run_folder import RunFolder
from tlx.runs.stop import EarlySignals

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

LOST_S = 45.0
"""A rank on another machine without a sign for so long is taken for dead, unless this one gets on."""
_MISSED_S = 5.0  # without a sign for so long it is dead, where a collective has failed
_STUCK_S = 5.0  # left to the main thread to notice what happened by itself
_BLIND_S = 15.0  # after our own patience; then the threads of this process cannot run any more
_WISH_S = 120.0  # at most, for what must be on the disk before the process ends
_ORPHAN_S = 40.0  # for a step boundary and a last checkpoint, once the launcher is gone
_UNHEARD_S = 30.0  # then a rank that has given no sign since ranks met, or ended as it was starting, is not waited for
_CLOSING = ("leaving", "finishing")  # stages in which a rank ends by itself
_AGAIN = "the same command goes on from the last checkpoint"


class Watch:
    """Watches over one rank; does nothing before :meth:`start`.

    Args:
        folder: the run's; stacks of a rank that hangs go to FOLDER/stacks/rank-N.txt.
        patience_s: the main thread hangs when it has not beaten for so long.
        ends: a training that hangs ends this process; else that is only told, since the process is not its own.
        claimed: the run folder is this training's. Before that nothing is written there.
        early: what was seen and heard since this process was started.

    Attributes:
        asks_to_stop: called, from the watch's thread, where the training cannot go on and can still be saved.
        before_exit: called before the watch ends this process, in a thread of its own, and waited for as long as the
            patience lasts, at most two minutes: a checkpoint that is being written comes to its end.
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
        self.rank, self.size, self.serves = launched_rank(), 1, False
        self.before_exit: Callable[[], None] | None = None
        self._beat: tuple[int, str, int] = (0, "start", 0)
        self._stepped = False
        self._wire: Wire | None = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._verdict: Verdict | None = None
        self._state: State = "alive"
        self._why = ""
        self._given_up = False
        self._stacks: IO[bytes] | None = None
        self._arming = threading.RLock()  # the main thread arms once, in claim
        self._before = self._unused = self._written = 0
        self._peers: dict[int, _Peer] = {}
        self._launcher: psutil.Process | None = None
        self._early, self._meeting = early, False

    def begin(self, rank: int, size: int) -> None:
        """Begins to watch before ranks can hear of each other: the launcher above, and ranks beside this one."""
        self.rank, self.size, self._meeting = rank, size, True
        self._early = self._early or early()
        self._heard_before = verdicts.read() if relaunched() or _is_old(verdict_file()) else None
        self._run()

    def start(self, store: Store | None, rank: int, size: int, *, serves: bool = False) -> None:
        """Begins to watch.

        Args:
            store: of the rendezvous; None for a lone rank without one.
            serves: the store lives in this very process.
        """
        self.rank, self.size, self.serves = rank, size, serves
        if self._thread is None:
            self._run()
        if store is not None and size > 1:
            self._wire = Wire(store, self._own, size)
        self._met()

    def claim(self) -> None:
        """The run folder is this training's from here on: stacks go there, also those of a hang in the next moment."""
        self.claimed = True
        if self._thread is not None and self._thread.is_alive():
            self._arm()

    def _met(self) -> None:
        """Ranks hear of each other from here on, or there is nobody else."""
        self._meeting = False

    def hand_over_signals(self) -> EarlySignals | None:
        """What hears signals so far, for whoever takes over; None where nothing does."""
        around, self._early = self._early, None
        return around.signals if around is not None else None

    def _run(self) -> None:
        self._own = Sign(self.rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self._main = threading.get_ident()
        self._launcher = launcher_above() if self.ends else None
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="tlx-watch", daemon=True)
        self._thread.start()

    def beat(self, stage: str, step: int | None = None) -> None:
        """The main thread gets on: it begins a stage, at the step that is being made."""
        count, last, before = self._beat
        self._stepped = self._stepped or last == "step"
        self._beat = (count + 1, stage, before if step is None else step)

    @property
    def speaks(self) -> bool:
        """Whether this rank writes status.json: rank 0 does, or the first one that still can."""
        if self._verdict is None:
            return self.rank == 0
        if self._verdict.kind == "store":
            return True
        return self.rank == min(set(range(self.size)) - set(self._verdict.mute), default=0)

    def say(self, status: Status, message: str) -> None:
        """Says how this start ended, if this is the rank to do so: in status.json once the run folder is claimed."""
        if not self.speaks:
            if self._wire is None and not self.claimed:  # nobody else may know
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

        What tlx raises by itself it mostly raises on all ranks alike, which then end each in peace: the others are told
        of it, but are at fault of nothing and wait for nobody, unless a collective shows that they wait for this rank.
        """
        if self._wire is None or self._thread is None:
            self._tell("failed")  # after the watch: for the exit code alone
            return error
        self.beat("leaving")
        if not _from_others(error):
            if isinstance(error, TlxError):
                self._tell("refused" if isinstance(error, UserError) else "stopped", str(error)[:1000])
            else:
                self._tell("failed", f"{type(error).__name__}: {error}"[:1000])
            return error
        self._tell("leaving")
        until = time.monotonic() + 20
        while self._verdict is None and not self._given_up and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.05)
        if self._verdict is None:
            self._tell("failed", f"{type(error).__name__}: {error}"[:1000])
            return error
        self._tell("told")
        refused = self._verdict.kind == "refused"
        return UserError(self._verdict.message) if refused else TlxError(self._verdict.message)

    def close(self) -> None:
        """Ends the watch; its threads must not live on into the interpreter's end."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(10)
        self._thread = None
        self._met()
        signals = self.hand_over_signals()
        if signals is not None:
            signals.close()
        if self._wire is not None:
            self._linger(self._wire)
            self._tell("left" if self._state == "alive" else self._state)
            self._wire.close(timeout_s=3)
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            with contextlib.suppress(OSError), self._stacks as file:
                self._explain(file)
                if file.tell() == self._unused:  # no stacks of this time; those of an earlier one stay
                    file.truncate(self._before)
                    if self._before == 0:
                        path = Path(file.name)
                        path.unlink()
                        path.parent.rmdir()

    # In the thread

    def _watch(self) -> None:
        known, still, armed = self._beat, 0.0, 0.0
        last = time.monotonic()
        try:
            while not self._ended.wait(BEAT_S):
                now = time.monotonic()
                self._note_pause(now - last)
                passed, last = min(now - last, 2 * BEAT_S), now
                still = still + passed if self._beat == known else 0.0
                known = self._beat
                armed += passed
                if armed >= min(10.0, self.patience_s / 4) or self._stacks is None:
                    self._arm()
                    armed = 0.0
                self._look(passed, still)
        except Exception as error:  # a fault of the watch is none of the training's
            faulthandler.cancel_dump_traceback_later()
            wire, self._wire = self._wire, None
            if wire is not None:  # a sign that stands still would look like a death
                wire.own = replace(wire.own, state="left", count=wire.own.count + 1)
                wire.close(timeout_s=3)
            say(f"note: ranks are not watched any more: {type(error).__name__}: {error}", error=True)

    def _look(self, passed: float, still: float) -> None:
        self._look_above(passed)
        self._look_beside(passed)
        stuck = still >= self.patience_s and not self._meeting  # which has a limit of its own, and says who is missing
        if self._state == "stuck" and not stuck:  # it was only slow
            self._state, self._why = "alive", ""
        if stuck and self._state == "alive":
            self._state, self._why = "stuck", self._where()
            self._dump(still)
            if not self.ends:
                say(f"warning: {self._hanging([self._sign()])}", error=True)
        wire = self._wire
        if wire is None:
            if stuck and self.ends:
                self._end(Verdict("hangs", self._hanging([self._sign()])))
            return
        wire.own = self._sign()
        wire.hurry()
        self._follow(wire, passed)
        if self._verdict is None:
            self._verdict = wire.verdict or self._judge(wire, passed, still)
            self._since = 0.0
            if self._verdict is not None and self._verdict.kind == "hangs" and self._state == "alive":
                self._dump(still)
            return
        self._since += passed
        wire.whole = False
        if self._since < (BEAT_S if stuck else _STUCK_S):
            return
        # a large checkpoint and trackers take their time
        if stuck or self._beat[1] not in _CLOSING:
            self._end(self._verdict)

    def _look_above(self, passed: float) -> None:
        """A rank whose launcher is gone trains for nobody: there is none to pass a signal on, or to end it in time."""
        if self._launcher is None or not is_gone(self._launcher):
            return
        why = f"the launcher of rank {self.rank} (process {self._launcher.pid} on {self._own.host}) has died"
        if self._orphan_s == 0 and self.asks_to_stop is not None:
            self.asks_to_stop(f"{why}\n  -> {_AGAIN}")
        self._orphan_s += passed
        saves = self.asks_to_stop is not None and (self._orphan_s < _ORPHAN_S or self._beat[1] in _CLOSING)
        if not saves:
            self._end(Verdict("launcher", f"{why}, {self._own.place}\n  -> {_AGAIN}"))

    def _look_beside(self, passed: float) -> None:
        """Ranks that have not met hear of each other by nothing else: a process beside this one that has ended, the
        verdict of another rank or of the batch script, a signal of the launcher that ends all of them."""
        around = self._early
        if around is None or not self._meeting:
            return
        around.siblings.look()
        gone, said = around.siblings.gone(), verdicts.read()
        told = said if said != self._heard_before and said is not None else {}
        signalled = around.signals is not None and around.signals.came()
        nameless = around.siblings.nameless()
        self._nameless_s = self._nameless_s + passed if nameless else 0.0
        if self._nameless_s >= _UNHEARD_S:
            pids = ", ".join(map(str, nameless))
            message = f"not all ranks have come, and process {pids} on {self._own.host}, started with them, has ended"
            self._end(Verdict("died", f"{message}\n  -> look at its output; the same command begins"))
        self._alone_s = self._alone_s + passed if gone or told or signalled else 0.0
        if self._alone_s < 2 * BEAT_S:  # who goes first says why, which takes a moment
            return
        if told.get("status") in ("user-error", "fault"):
            refused = told["status"] == "user-error"
            message = str(told.get("message") or "another rank of this start has ended")
            self._end(Verdict("refused" if refused else "failed", message))
        elif gone:
            names = ", ".join(f"rank {rank} ({self._own.host}, pid {pid})" for rank, pid in sorted(gone.items()))
            hint = "its last output, or the system's log where memory ran out, says why"
            message = f"{names} ended while it was starting\n  -> {hint}; the same command begins"
            self._end(Verdict("died", message, tuple(gone)))
        elif signalled:
            message = "stopped by SIGTERM before ranks had met\n  -> the same command begins, or goes on"
            self._end(Verdict("asked", message))

    _heard_before: Mapping[str, Any] | None = None
    _orphan_s, _alone_s, _unheard_s, _nameless_s = 0.0, 0.0, 0.0, 0.0

    def _follow(self, wire: Wire, passed: float) -> None:
        """How long others have been silent, by what the store has answered."""
        for rank, sign in list(wire.seen.items()):
            peer = self._peers.setdefault(rank, _Peer(sign, self._own.host))
            peer.follow(sign, passed if wire.answered != self._answered else 0.0)
        unheard = {0, (self.rank + 1) % self.size} - {self.rank} - wire.seen.keys()
        if not unheard:
            self._unheard_s = 0.0
        elif wire.answered != self._answered:
            self._unheard_s += passed
        self._unanswered = 0.0 if wire.answered != self._answered else self._unanswered + passed
        self._answered = wire.answered

    _answered, _unanswered, _doubt, _read, _since = 0, 0.0, 0.0, 0.0, 0.0

    def _judge(self, wire: Wire, passed: float, still: float) -> Verdict | None:
        """The verdict of this rank, once it has looked at all others."""
        asked, stuck = self._state == "leaving", self._state == "stuck"
        waits = still >= (LOST_S if self._stepped else max(LOST_S, self.patience_s))  # nothing gets on
        away = [p for p in self._peers.values() if p.away]
        failed = [p for p in self._peers.values() if p.sign.state == "failed"]
        # a fault of this rank only where this rank waits for the one that raised it
        if asked or (still >= LOST_S and self._beat[1] not in _CLOSING):
            failed += [p for p in self._peers.values() if p.sign.state in ("refused", "stopped")]
        # a rank that gets on needs everybody: then it is only the signs that do not come
        patience = _MISSED_S if asked or away else LOST_S
        lost = [p for p in self._peers.values() if p.lost(patience) and (asked or away or waits)]
        lonely = wire.gone is not None and (asked or waits or (wire.refused and not agent_serves()))
        unheard = self._unheard_s >= _UNHEARD_S
        if not (asked or stuck or away or failed or lost or lonely or unheard):
            self._doubt, self._read, wire.whole = 0.0, 0.0, False
            return None
        self._doubt += passed
        wire.whole = wire.whole or self._doubt >= self._turn([*away, *failed, *lost])
        self._read += passed if wire.whole else 0.0
        verdict = None
        if failed and self._doubt >= BEAT_S:
            # of several the first: the others may have failed because of it
            first = failed[0].sign
            how = "failed" if first.state == "failed" else "stopped"
            said = f"{first} {how} at step {first.step}: {first.why}"
            verdict = Verdict("refused" if first.state == "refused" else "failed", said)
        elif (away and self._read >= 2 * BEAT_S) or (lost and self._read > _MISSED_S + BEAT_S):
            verdict = self._died(sorted([*away, *lost], key=lambda p: p.sign.rank))
        elif unheard and self._read >= 2 * BEAT_S:
            verdict = self._never()
        elif lonely and self._doubt >= _STUCK_S:  # an end in peace takes less
            verdict = self._storeless(wire.gone or "")
        elif stuck and self._read >= 4 * BEAT_S:
            verdict = self._hang(wire)
        elif asked and self._unanswered >= 10:
            verdict = self._storeless("it does not answer")
        elif asked and self._doubt >= 12:
            self._given_up = True
        if verdict is None or wire.gone is not None or self._unanswered >= 5:
            return verdict  # nobody can be told
        if wire.proposal is None:
            wire.proposal = verdict
            wire.hurry()
        return None

    def _turn(self, evidence: Iterable[_Peer]) -> float:
        """After how much doubt this rank reads all others.

        At once where it knows more than the others do, else eight ranks after the other: in a large world the first
        ones mostly have the verdict before the store has to answer everybody.
        """
        if any(p.sign.rank != 0 for p in evidence):  # rank 0 is read by all
            return 0.0
        return min(self.rank // 8, 8) * BEAT_S

    def _died(self, peers: Iterable[_Peer]) -> Verdict:
        signs = {p.sign.rank: p.sign for p in peers}
        lines = [f"{sign} died {sign.place}" for sign in signs.values()]
        hint = "its last output, or the system's log where memory ran out, says why"
        return Verdict("died", "\n  ".join(lines) + f"\n  -> {hint}; {_AGAIN}", tuple(signs))

    def _never(self) -> Verdict:
        """Of ranks that have met the others, and were not heard of since."""
        never = tuple(rank for rank in range(self.size) if rank != self.rank and rank not in self._peers)
        ranks = ", ".join(map(str, never))
        return Verdict("died", f"rank {ranks} has given no sign since ranks met: it died while it was starting", never)

    def _storeless(self, why: str) -> Verdict:
        first = self._peers.get(0)
        name = str(first.sign) if first else "rank 0"
        here = environment()
        where = f"{here.get('MASTER_ADDR', 'the first machine')}:{here.get('MASTER_PORT', '?')}"
        if agent_serves():
            what = f"the launcher's store at {where}, over which ranks find each other, is gone ({why}): "
            what += "that machine or its launcher died"
        else:
            what = f"{name}, over which ranks find each other ({where}), is gone ({why})"
            what += f"; its last sign was {first.sign.place}" if first else ""
        return Verdict("store", f"{what}\n  -> {_AGAIN}", (0,))

    def _hang(self, wire: Wire) -> Verdict:
        """Who is behind: those that give no sign, else those that have begun the fewest collectives.

        One of the latter may still beat, as when it has come late to where the others wait.
        """
        never = [r for r in range(self.size) if r != self.rank and r not in wire.seen and not self._unanswered]
        silent = [p for p in self._peers.values() if p.silent or (self._unanswered >= 5 and p.sign.rank == 0)]
        if never:
            ranks = ", ".join(map(str, never))
            return Verdict("hangs", f"rank {ranks} has never come\n  -> look at how it was started", tuple(never))
        if silent:
            lines = [f"{p.sign} does not answer, since it was {p.sign.place}{p.condition}" for p in silent]
            mute = tuple(p.sign.rank for p in silent)
            return Verdict("hangs", "\n  ".join(lines) + self._todo(), mute)
        signs = [self._sign(), *(p.sign for p in self._peers.values() if p.sign.state in ("stuck", "alive"))]
        fewest = min((s.collectives, s.step) for s in signs)
        return Verdict("hangs", self._hanging([s for s in signs if (s.collectives, s.step) == fewest]))

    def _hanging(self, signs: list[Sign]) -> str:
        signs.sort(key=lambda s: s.rank)
        late = ", and the others wait for it" if all(s.state == "alive" for s in signs) else ""
        lines = [
            f"{s} is {s.place}{late}"
            if s.state == "alive"
            else f"{s} hangs {s.place}" + (f" ({s.why})" if s.why else "")
            for s in signs[:8]
        ]
        if self.size > 1 and len(signs) == self.size:
            lines.append("all ranks are at the same place; their stacks may tell which one the others wait for")
        return "\n  ".join(lines) + self._todo()

    def _todo(self) -> str:
        stacks = f"stacks of all ranks are in {self.folder.path / 'stacks'}; " if self.folder and self._stacks else ""
        waited = f"nothing has happened for {self.patience_s:g} s (world.timeout_minutes: more, where it is only slow)"
        return f"\n  -> {stacks}{waited}; {_AGAIN}"

    def _sign(self) -> Sign:
        _, stage, step = self._beat
        collectives = 0
        if dist.is_initialized():
            # not of the public interface: without it, steps decide
            with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
                group: Any = dist.distributed_c10d._get_default_group()
                collectives = group._get_sequence_number_for_group()
        self._own = replace(
            self._own,
            count=self._own.count + 1,
            step=step,
            stage=stage,
            collectives=collectives,
            state=self._state,
            why=self._why,
        )
        return self._own

    def _tell(self, state: State, why: str = "") -> None:
        self._state, self._why = state, why or self._why
        wire = self._wire
        if wire is not None:
            count, step = wire.own.count + 1, self._beat[2]
            wire.own = replace(wire.own, state=state, why=self._why, count=count, step=step)
            wire.hurry()

    def _linger(self, wire: Wire) -> None:
        """The process that serves the store goes last, when there is a fault to be told."""
        wire.whole = self.serves and self._state != "alive"
        until = time.monotonic() + 3
        while self.serves and self._state != "alive" and wire.gone is None and time.monotonic() < until:
            others = [wire.seen.get(r) for r in range(self.size) if r != self.rank]
            if all(s is not None and s.state in ("left", "failed", "refused", "stopped", "told") for s in others):
                return
            wire.hurry()
            time.sleep(0.1)

    def _where(self) -> str:
        """The innermost line of the main thread."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        if frame is None:
            return ""
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"

    def _open(self) -> IO[bytes] | None:
        with self._arming, contextlib.suppress(OSError):
            if self._stacks is None and self.claimed and self.folder is not None and self.folder.path.is_dir():
                path = self.folder.path / "stacks" / f"rank-{self.rank}.txt"
                path.parent.mkdir(exist_ok=True)
                self._stacks = path.open("a+b", buffering=0)
                self._stacks.seek(0)
                if b'File "' not in self._stacks.read():  # what ranks that were killed have left, without a stack
                    self._stacks.truncate(0)
                self._before = self._unused = self._written = self._stacks.seek(0, os.SEEK_END)
                self._stacks.write(f"{self._own} of {self.size}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
                self._unused = self._written = self._stacks.tell()
        return self._stacks

    def _arm(self) -> None:
        """In case no thread of this process gets to run, as when a C function keeps the interpreter's lock.

        Then the stacks are written, and no more: by the clock on the wall it may as well have been suspended, with the
        whole job. The other ranks, which get no sign from it, end; it ends once the lock is free, or by its launcher.
        """
        if not math.isfinite(self.patience_s):
            return
        with self._arming, contextlib.suppress(OSError, ValueError, RuntimeError):  # of a stderr that is closed
            faulthandler.cancel_dump_traceback_later()
            file = self._open()
            if file is not None:
                self._explain(file)
            if file is not None or sys.__stderr__ is not None:
                limit = self.patience_s + _BLIND_S
                faulthandler.dump_traceback_later(limit, exit=False, file=file or sys.__stderr__ or 2)

    def _note_pause(self, seconds: float) -> None:
        """A round that took longer than the patience: this thread did not run, whatever the timer has written."""
        file = self._open() if seconds >= self.patience_s else None
        if file is not None:
            with contextlib.suppress(OSError):
                file.write(f"\nFor {seconds:.0f} s this had been suspended, or the lock kept.\n".encode())

    def _explain(self, file: IO[bytes]) -> None:
        """Behind stacks that were written by the clock alone."""
        if file.tell() != self._written:
            file.write(b"It went on after that: it had been suspended, or the interpreter's lock was kept.\n")
            self._written = file.tell()

    def _dump(self, still: float) -> None:
        """Stacks of all threads, after a line on what this rank is at."""
        file = self._open()
        lines = [f"\n{self._sign()} {self._own.place}, for {still:.0f} s; {time.strftime('%Y-%m-%d %H:%M:%S')}"]
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children():
                lines.append(
                    f"its process {child.pid}: {child.status()}, {sum(child.cpu_times()[:2]):.1f} s of CPU time"
                )
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if file is not None:
                file.write(("\n".join(lines) + "\n").encode())
            faulthandler.dump_traceback(file=file or sys.__stderr__ or 2, all_threads=True)
            if file is not None:
                self._written = file.tell()

    def _end(self, verdict: Verdict) -> None:
        """Ends the process, whatever its main thread is waiting for."""
        self._verdict = verdict
        refused, asked = verdict.kind == "refused", verdict.kind == "asked"
        wish, wish_s = self.before_exit, min(self.patience_s, _WISH_S)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # of a stderr that is closed
            # should the disk be what hangs
            faulthandler.dump_traceback_later(20 + (wish_s if wish else 0), exit=True, file=sys.__stderr__ or 2)
        say(f"{'note' if asked else 'error' if refused else 'fault'}: {verdict.message}", error=True)
        self.say("resumable" if asked else "user-error" if refused else "fault", verdict.message)
        self._tell("told")
        if wish is not None:
            last = threading.Thread(target=_grant, args=(wish,), name="tlx-last-wish", daemon=True)
            last.start()
            last.join(wish_s)
        if self._wire is not None:
            self._linger(self._wire)
            time.sleep(0.2)
        os._exit(1 if not (refused or asked) else 0 if launched() else 2 if refused else RESUMABLE)


def _grant(wish: Callable[[], None]) -> None:
    try:
        wish()
    except Exception as error:  # the fault that is told already comes first
        say(f"note: before the end: {type(error).__name__}: {error}", error=True)


class _Peer:
    """Another rank, as seen from here."""

    def __init__(self, sign: Sign, host: str) -> None:
        self.sign, self.quiet_s = sign, 0.0
        self._process: psutil.Process | None = None
        if sign.host == host:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(sign.pid)
                # containers may share a host's name and number their processes anew
                self._process = process if abs(process.create_time() - sign.born) < 1.5 else None

    def follow(self, sign: Sign, passed: float) -> None:
        self.quiet_s = 0.0 if sign.count != self.sign.count else self.quiet_s + passed
        self.sign = sign

    @property
    def expected(self) -> bool:
        return self.sign.state in ("alive", "stuck", "leaving")

    @property
    def away(self) -> bool:
        """Its process, on this machine, is no more."""
        return self._process is not None and self.expected and is_gone(self._process)

    @property
    def silent(self) -> bool:
        return self.expected and self.quiet_s > 2 * BEAT_S

    def lost(self, patience_s: float) -> bool:
        """It may live on another machine, and is not heard of."""
        return self._process is None and self.expected and self.quiet_s >= patience_s

    @property
    def condition(self) -> str:
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                if self._process.status() == psutil.STATUS_STOPPED:
                    return "; its process is stopped (SIGSTOP)"
        return ""


def agent_serves() -> bool:
    """Whether the store lives in the launcher and not in rank 0."""
    return environment().agent_serves


_OTHERS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "process group")


def _from_others(error: BaseException) -> bool:
    """Whether an error may come from another rank's end: that of a collective."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OTHERS)


def _is_old(verdict: Path | None) -> bool:
    """Whether a verdict is of a start before this one; a minute is for clocks that differ."""
    try:
        return verdict is not None and verdict.stat().st_mtime < psutil.Process().create_time() - 60
    except OSError:
        return False
