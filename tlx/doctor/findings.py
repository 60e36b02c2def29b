"""What a check found, and how checks of many ranks become one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from tlx.base.errors import UserError

Verdict = Literal["ok", "warning", "fault"]
_ORDER: Sequence[Verdict] = ("ok", "warning", "fault")

PATIENCE_S = 20.0
"""Of one check: a file system or a server that hangs must not hold up the others."""


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
    return warning(name, f"could not be checked: {type(error).__name__}: {first_line(error)}", "look at it by hand")


def first_line(error: Exception) -> str:
    """Of its message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def merged(by_rank: Mapping[int, Sequence[Finding]], hosts: Mapping[int, str]) -> list[Finding]:
    """The findings of several ranks as one list: by name in the order in which they first come, the worst first.

    A warning or a fault is one line for all ranks that have it, and so is what is fine, by its first rank's words.

    Args:
        hosts: of every rank.
    """
    groups: dict[Hashable, dict[int, Finding]] = {}
    for rank in sorted(by_rank):
        seen: Counter[str] = Counter()
        for finding in by_rank[rank]:
            seen[finding.name] += 1
            key = (finding.name, seen[finding.name]) if finding.verdict == "ok" else finding
            groups.setdefault(key, {})[rank] = finding
    found = []
    for group in groups.values():
        first, *others = group.values()
        like = "" if all(other == first for other in others) else ", and the like"
        found.append(replace(first, said=f"{whose(list(group), hosts)}{first.said}{like}"))
    names = list(dict.fromkeys(finding.name for finding in found))
    return sorted(found, key=lambda f: (names.index(f.name), -_ORDER.index(f.verdict)))


def whose(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """Words before what `ranks` have found; none where there is one rank only."""
    if len(ranks) == len(hosts):
        return f"all {len(hosts)} ranks: " if len(hosts) > 1 else ""
    there = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{named(ranks)} ({', '.join(there[:8])}{' ...' if len(there) > 8 else ''}): "


def named(ranks: Sequence[int]) -> str:
    """``ranks 0-3, 7``."""
    spans = [[r for _, r in span] for _, span in groupby(enumerate(sorted(ranks)), lambda one: one[1] - one[0])]
    shown = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
