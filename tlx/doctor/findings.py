"""What a check found, and how checks of many ranks become one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tlx.base.errors import UserError

Verdict = Literal["ok", "warning", "fault"]
_ORDER: Sequence[Verdict] = ("ok", "warning", "fault")

PATIENCE_S = 20.0
"""Of one check: a file system or a server that hangs must not hold up the others."""

_SHOWN = 8  # groups of ranks that differ
_FINE = 2  # the same where none of them has anything to mend


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, the verdict, what was found, and for warnings and faults the remedy."""

    name: str
    verdict: Verdict
    said: str
    todo: str | None = None


@dataclass(frozen=True)
class Section:
    """Findings that belong together."""

    title: str
    findings: tuple[Finding, ...]


def ok(name: str, said: str) -> Finding:
    return Finding(name, "ok", said)


def warning(name: str, said: str, todo: str) -> Finding:
    return Finding(name, "warning", said, todo)


def fault(name: str, said: str, todo: str) -> Finding:
    return Finding(name, "fault", said, todo)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=_ORDER.index, default="ok")


def guarded(name: str, check: Callable[[], Iterable[Finding]], *, limit_s: float = PATIENCE_S) -> list[Finding]:
    """The findings of a check; one that breaks or hangs is a warning, and what it found before stays."""
    found: list[Finding] = []
    broken: list[Exception] = []

    def work() -> None:
        try:
            for finding in check():
                found.append(finding)
        except Exception as error:  # whatever a check meets on a machine nobody has seen
            broken.append(error)

    thread = threading.Thread(target=work, name=f"tlx-doctor-{name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        said = f"could not be checked: no answer within {limit_s:.0f} s"
        return [*found, warning(name, said, "a file system or a server that hangs? Look at it by hand")]
    if broken:
        return [*found, unchecked(name, broken[0])]
    return found


def of_error(name: str, error: UserError, todo: str) -> Finding:
    """A user's mistake as a fault; `todo` where it names no remedy itself."""
    return fault(name, f"{error.where}: {error.what}" if error.where else error.what, error.todo or todo)


def unchecked(name: str, error: Exception) -> Finding:
    text = next(iter(str(error).strip().splitlines()), "")[:300]
    said = f"could not be checked: {type(error).__name__}" + (f": {text}" if text else "")
    return warning(name, said, "look at it by hand")


def merged(by_rank: Mapping[int, Sequence[Finding]], hosts: Mapping[int, str]) -> list[Finding]:
    """The findings of several ranks as one list, in the order in which they first come.

    What all ranks say alike is said once; where they differ, ranks and hosts are named. A check that only some ranks
    made (one a node, or rank 0) counts as made by those.

    Args:
        hosts: of every rank.
    """
    order: dict[str, None] = {}
    for rank in sorted(by_rank):
        # names of findings that one rank has and others lack keep their place
        order |= dict.fromkeys(finding.name for finding in by_rank[rank])
    found = []
    for name in order:
        said: dict[tuple[Finding, ...], list[int]] = {}
        for rank in sorted(by_rank):
            own = tuple(f for f in by_rank[rank] if f.name == name)
            if own:
                said.setdefault(own, []).append(rank)
        found += _of_one_name(said, hosts)
    return found


def _of_one_name(said: Mapping[tuple[Finding, ...], Sequence[int]], hosts: Mapping[int, str]) -> list[Finding]:
    groups = sorted(said.items(), key=lambda one: _ORDER.index(worst(f.verdict for f in one[0])), reverse=True)
    fine = all(f.verdict == "ok" for findings, _ in groups for f in findings)
    most = _FINE if fine else _SHOWN
    found = []
    for findings, ranks in groups[:most]:
        who = whose(ranks, hosts, alone=len(said) == 1)
        found += [Finding(f.name, f.verdict, f"{who}{f.said}", f.todo) for f in findings]
    rest = groups[most:]
    if rest:
        verdict = worst(f.verdict for findings, _ in rest for f in findings)
        first, ranks = rest[0][0][0], [rank for _, own in rest for rank in own]
        who = f"{'rank' if len(ranks) == 1 else 'ranks'} {numbers(ranks)}"
        found.append(Finding(first.name, verdict, f"the like on {who}: {first.said}", first.todo))
    return found


def whose(ranks: Sequence[int], hosts: Mapping[int, str], *, alone: bool) -> str:
    """Words before what `ranks` have found; nothing where only rank 0 looks.

    Args:
        alone: no other rank has found anything else.
    """
    if alone and list(ranks) == [0]:
        return ""
    if alone and len(ranks) == len(hosts):
        return f"all {len(ranks)} ranks: " if len(ranks) > 1 else ""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    if alone and len(by_host) == len(set(hosts.values())) == len(ranks):
        return f"all {len(ranks)} nodes: "
    parts = [f"{'rank' if len(r) == 1 else 'ranks'} {numbers(r)} ({host})" for host, r in by_host.items()]
    return ", ".join(parts[:_SHOWN]) + (" ..." if len(parts) > _SHOWN else "") + ": "


def numbers(ranks: Sequence[int]) -> str:
    """``0-3, 7``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in spans)
