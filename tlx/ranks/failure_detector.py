"""Why a rank is declared dead, hung or lost: the rules. No process, no thread and no clock of their own.

The watch shows once a second what a rank knows (:class:`tlx.ranks.state.Snapshot`); :func:`judge` says which rank is at
fault, or that all is well.

| what a rank sees | what it says |
|---|---|
| a process on this machine has ended | died |
| no heartbeat from another machine for LOST_S, and no progress here | died |
| no heartbeat at all from a rank that had joined, for UNHEARD_S | died while starting |
| another rank reports an error of its own | failed |
| no progress here for the patience | hangs: ranks without heartbeats, else those that began the fewest collectives |
| the store is gone | rank 0, or the launcher that served it, died |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tlx.ranks.state import INTERVAL_S, Failure, Heartbeat, Snapshot

LOST_S = 45.0
"""A rank on another machine without a heartbeat for so long is taken for dead, unless this one makes progress."""
MISSED_S = 5.0
"""The same where a collective has failed."""
UNHEARD_S = 30.0
"""Then a rank that never sent a heartbeat, or exited during start-up, is not waited for."""
STUCK_S = 5.0
"""Left to the main thread to notice what happened by itself; a store that is gone may mean a clean shutdown."""
ORPHAN_S = 40.0
"""Left for a step boundary and a last checkpoint, once the launcher is gone."""
CLOSING = ("leaving", "finishing")
"""Stages in which a rank ends by itself."""

_RESUME = "the same command goes on from the last checkpoint"
_LOOK = "its last output, or the system's log where memory ran out, says why"


def suspect(known: Snapshot) -> Snapshot:
    """With since when something has looked wrong, and whether to read every rank's heartbeat."""
    if known.failure is not None or not _is_suspicious(known):
        return replace(known, suspected_s=None, read_all_s=None)
    known = replace(known, suspected_s=known.now_s if known.suspected_s is None else known.suspected_s)
    if known.read_all_s is None and _for_s(known, known.suspected_s) >= _turn(known):
        known = replace(known, read_all_s=known.now_s)
    return known


def judge(known: Snapshot) -> Failure | None:
    """The failure that this rank finds; None where all is well, or it is too early to tell."""
    doubted_s, read_s = _for_s(known, known.suspected_s), _for_s(known, known.read_all_s)
    ended, failed, lost, state = _ended(known), _failed(known), _lost(known), known.own.state
    failure = None
    if failed and doubted_s >= INTERVAL_S:
        failure = _of_error(failed[0])  # the first: the others may have failed because of it
    elif (ended and read_s >= 2 * INTERVAL_S) or (lost and read_s > MISSED_S + INTERVAL_S):
        failure = _died({h.rank: h for h in (*ended, *lost)})
    elif _is_unheard(known) and read_s >= 2 * INTERVAL_S:
        never = _never_heard(known)
        message = f"rank {_listed(never)} sent no heartbeat after joining: it died during start-up"
        failure = Failure("died", message, tuple(never))
    elif _is_store_lost(known) and doubted_s >= STUCK_S:
        failure = _store_lost(known, known.store_error or "")
    elif state == "stuck" and (read_s >= 4 * INTERVAL_S or known.size == 1):
        failure = _hung(known)
    elif state == "leaving" and known.unanswered_s >= 10:
        failure = _store_lost(known, "it does not answer")
    return failure


def is_cut_off(known: Snapshot) -> bool:
    """Whether the others cannot be told what this rank has found, if there are any."""
    return known.size == 1 or known.store_error is not None or known.unanswered_s >= 5


# What looks wrong


def _for_s(known: Snapshot, since_s: float | None) -> float:
    return known.now_s - since_s + INTERVAL_S if since_s is not None else 0.0


def _is_suspicious(known: Snapshot) -> bool:
    own_trouble = known.own.state in ("leaving", "stuck") or _is_unheard(known) or _is_store_lost(known)
    return own_trouble or any((_ended(known), _failed(known), _lost(known)))


def _waits(known: Snapshot) -> bool:
    """Whether this rank makes no progress; else all others take part, and only their heartbeats are late."""
    return known.idle_s >= (LOST_S if known.stepped else max(LOST_S, known.patience_s))


def _ended(known: Snapshot) -> list[Heartbeat]:
    return [h for h in known.heard.values() if h.is_expected and known.processes.get(h.rank) == "ended"]


def _failed(known: Snapshot) -> list[Heartbeat]:
    # what tlx raises it mostly raises on all ranks alike: at fault is one only if this rank waits for it
    waits = known.own.state == "leaving" or (known.idle_s >= LOST_S and known.own.stage not in CLOSING)
    states = ("failed", "refused", "stopped") if waits else ("failed",)
    return sorted((h for h in known.heard.values() if h.state in states), key=lambda h: h.state != "failed")


def _lost(known: Snapshot) -> list[Heartbeat]:
    hurry = known.own.state == "leaving" or bool(_ended(known))
    if not (hurry or _waits(known)):
        return []
    return [h for h in _silent(known, MISSED_S if hurry else LOST_S) if h.rank not in known.processes]


def _silent(known: Snapshot, for_s: float) -> list[Heartbeat]:
    """Ranks whose next heartbeat has not come for longer than that, while the store answered."""
    return [h for h in known.heard.values() if h.is_expected and known.listened_s - known.heard_s[h.rank] > for_s]


def _is_unheard(known: Snapshot) -> bool:
    missing = {0, (known.own.rank + 1) % known.size} - {known.own.rank, *known.heard}
    return bool(missing) and known.listened_s >= UNHEARD_S


def _never_heard(known: Snapshot) -> list[int]:
    return [rank for rank in range(known.size) if rank not in (known.own.rank, *known.heard)]


def _is_store_lost(known: Snapshot) -> bool:
    counts = known.own.state == "leaving" or _waits(known) or (known.store_refused and not known.agent_serves)
    return known.store_error is not None and counts


def _turn(known: Snapshot) -> float:
    """After how many seconds of doubt this rank reads all others.

    At once where it knows more than the others do, else eight ranks after the other: in a large world the first ones
    mostly have the verdict before the store has to answer everybody.
    """
    if any(h.rank != 0 for h in (*_ended(known), *_failed(known), *_lost(known))):  # rank 0 is read by all
        return 0.0
    return min(known.own.rank // 8, 8) * INTERVAL_S


# What is said of it


def _of_error(first: Heartbeat) -> Failure:
    how = "failed" if first.state == "failed" else "stopped"
    message = f"{first} {how} at step {first.step}: {first.why}"
    return Failure("refused" if first.state == "refused" else "failed", message)


def _died(ranks: Mapping[int, Heartbeat]) -> Failure:
    lines = [f"{ranks[rank]} died {ranks[rank].place}" for rank in sorted(ranks)]
    return Failure("died", "\n  ".join(lines) + f"\n  -> {_LOOK}; {_RESUME}", tuple(sorted(ranks)))


def _store_lost(known: Snapshot, why: str) -> Failure:
    first = known.heard.get(0)
    if known.agent_serves:
        what = f"the launcher's store at {known.store_at}, through which ranks find each other, is gone ({why}): "
        what += "that machine or its launcher died"
    else:
        what = f"{first or 'rank 0'}, which serves the store of all ranks ({known.store_at}), is gone ({why})"
        what += f"; its last heartbeat was {first.place}" if first else ""
    return Failure("store", f"{what}\n  -> {_RESUME}", (0,))


def _hung(known: Snapshot) -> Failure:
    """Who is behind: ranks whose heartbeats do not come, else those that have begun the fewest collectives.

    One of the latter may still make progress, as when it has come late to where the others wait.
    """
    if known.unanswered_s < INTERVAL_S and (never := _never_heard(known)):
        message = f"rank {_listed(never)} sent no heartbeat after joining"
        return Failure("hangs", message + _todo(known), tuple(never))
    silent = {h.rank: h for h in _silent(known, 2 * INTERVAL_S)}
    if known.unanswered_s >= 5 and 0 in known.heard:
        silent[0] = known.heard[0]
    if silent:
        stopped = {
            rank: "; its process is stopped (SIGSTOP)" for rank, p in known.processes.items() if p == "suspended"
        }
        lines = [f"{h} does not answer since it was {h.place}{stopped.get(rank, '')}" for rank, h in silent.items()]
        return Failure("hangs", "\n  ".join(lines) + _todo(known), tuple(silent))
    ranks = [known.own, *(h for h in known.heard.values() if h.state in ("stuck", "alive"))]
    fewest = min((h.collectives, h.step) for h in ranks)
    behind = sorted((h for h in ranks if (h.collectives, h.step) == fewest), key=lambda h: h.rank)
    late = ", and the others wait for it" if all(h.state == "alive" for h in behind) else ""
    lines = [
        f"{h} is {h.place}{late}" if h.state == "alive" else f"{h} hangs {h.place}" + (f" ({h.why})" if h.why else "")
        for h in behind[:8]
    ]
    if 1 < known.size == len(behind):
        lines.append("all ranks are at the same point; their stacks may show which one the others wait for")
    return Failure("hangs", "\n  ".join(lines) + _todo(known))


def _todo(known: Snapshot) -> str:
    stacks = f"stacks of all ranks are in {known.stacks}; " if known.stacks else ""
    waited = f"no progress for {known.patience_s:g} s (raise world.timeout_minutes where it is only slow)"
    return f"\n  -> {stacks}{waited}; {_RESUME}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# Before ranks can hear of each other, and above them


def judge_start(
    host: str,
    ended: Mapping[int, int],
    unknown: Sequence[int],
    verdict: Mapping[str, Any],
    *,
    terminated: bool,
    noticed_s: float,
    unknown_s: float,
) -> Failure | None:
    """Why it is of no use to wait for the other ranks; None where it is.

    Args:
        ended: processes of ranks beside this one that have exited: rank -> process id.
        unknown: processes that exited before it could be told which ranks they were.
        verdict: what another rank, or the batch script, has said of this start; see :mod:`tlx.base.verdict`.
        terminated: the launcher has sent SIGTERM.
        noticed_s, unknown_s: for how long any of that was seen, and unknown processes.
    """
    told, failure = verdict.get("status"), None
    if unknown_s >= UNHEARD_S:
        message = f"not all ranks joined, and process {_listed(unknown)} on {host}, started with them, has exited"
        failure = Failure("died", f"{message}\n  -> look at its output; the same command begins")
    elif noticed_s < 2 * INTERVAL_S:
        failure = None  # who goes first says why, which takes a moment
    elif told in ("user-error", "fault"):
        message = str(verdict.get("message") or "another rank of this start has ended")
        failure = Failure("refused" if told == "user-error" else "failed", message)
    elif ended:
        names = ", ".join(f"rank {rank} ({host}, pid {pid})" for rank, pid in sorted(ended.items()))
        message = f"{names} died during start-up\n  -> {_LOOK}; the same command begins"
        failure = Failure("died", message, tuple(ended))
    elif terminated:
        message = "stopped by SIGTERM before all ranks had joined\n  -> the same command begins, or goes on"
        failure = Failure("asked", message)
    return failure


def launcher_died(own: Heartbeat, pid: int) -> Failure:
    """A rank whose launcher is gone trains for nobody: there is none to pass a signal on, or to end it in time."""
    what = f"the launcher of rank {own.rank} (process {pid} on {own.host}) has died, {own.place}"
    return Failure("launcher", f"{what}\n  -> {_RESUME}")


def may_still_save(own: Heartbeat, orphaned_s: float) -> bool:
    """Whether a rank without a launcher, which was asked to stop, has time left for its checkpoint."""
    return orphaned_s < ORPHAN_S or own.stage in CLOSING
