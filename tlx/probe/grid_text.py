"""What a grid has found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlx.base.terminal import drawn, tables, width
from tlx.probe.grid import Candidate, Found
from tlx.use.judged import Interval

SHOWN = 10


def text(found: Found, file: Path | None = None) -> str:
    """A table of the best, what choosing is worth, and where the winner is."""
    members = [one for one in found.candidates if one.member is not None]
    regressions = [one for one in found.candidates if one.member is None]
    title = (
        f"{len(members)} heads, {found.steps:,} steps each, trained on {found.trained_on}; judged on {found.judged_on}"
    )
    lines = [_table(title, members[:SHOWN])]
    if len(members) > SHOWN:
        lines.append(f"and {len(members) - SHOWN} more (--json tells all)")
    if regressions:
        lines.append(_table("beside them, of scaled features", regressions))
    best = members[0]
    lines += [
        f"The best of {len(members)} on the pictures that chose it is optimistic: {percent(best.accuracy)}.",
        f"Chosen on one half of them and judged on the other, both ways: {percent(found.chosen)}.",
    ]
    if found.regression is not None:
        lines.append(f"Logistic regression, C chosen likewise: {percent(found.regression)}.")
        if found.regression.value > found.chosen.value:
            lines.append("  A head begins as one with head: {name: linear, init: solved}.")
    lines.append("Intervals: 95 %, by resampling pictures; of seeds they say nothing.")
    spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found.seconds.items())
    lines.append(f"time: {spent}, features aside")
    if file is not None:
        lines.append(f"{file}: {best.name}\n  -> tlx train {file}")
    return "\n".join(lines)


def percent(found: Interval) -> str:
    """An accuracy as ``93.2 % [90.1, 96.0]``."""
    between = f" [{100 * found.low:.1f}, {100 * found.high:.1f}]" if found.resamples else ""
    return f"{100 * found.value:.1f} %{between}"


def _table(title: str, rows: Sequence[Candidate]) -> str:
    columns = {
        "accuracy, %": [percent(one.accuracy).replace(" %", "") for one in rows],
        "loss": [f"{one.loss:.3f}" for one in rows],
    }
    return drawn(*tables(title, {"head": [one.name for one in rows]}, columns, width(), more=title))
