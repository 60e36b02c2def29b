"""What `tlx lr-find` has found, for people and for programs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlx.base.files import json_text, write_whole
from tlx.base.terminal import drawn, escaped, tables, width
from tlx.report.lr_picture import lr_picture
from tlx.train.lr_curve import RULES
from tlx.train.lr_find import Found, overrides
from tlx.use.row_text import written


def data(found: Sequence[Found], rule: str) -> dict[str, Any]:
    """As JSON has it."""
    return {"rule": rule, "overrides": overrides(found, rule), "phases": [one.data() for one in found]}


def table(found: Sequence[Found], rule: str) -> str:
    """A row for each phase, how far seeds differ, and what to paste."""
    columns = {
        "phase": [escaped(one.phase) for one in found],
        "lr now": [f"{one.lr:.2g}" for one in found],
        **{name: [_rates(one, name) for one in found] for name in RULES},
        "ramp": [_ends(one) for one in found],
    }
    said = [drawn(*tables("", {}, columns, 10_000, more=""), columns=max(width(), 100))]
    for one in found:
        before = f", after {one.lead_in} steps of the phases before" if one.lead_in else ""
        said.append(f"{escaped(one.phase)}: from {one.input}{before}")
    lacking = [escaped(one.phase) for one in found if one.suggestion(rule).rate is None]
    if lacking:
        said.append(f"no {rule} in the curve of {', '.join(lacking)}: the loss does not fall, or the ramp is too short")
    if pasted := overrides(found, rule):
        said.append(f"by {rule}:  {shlex.join(pasted)}")
    return "\n".join(said)


def _rates(one: Found, rule: str) -> str:
    """A rate, and over several seeds the lowest and the highest."""
    suggestion = one.suggestion(rule)
    if suggestion.rate is None:
        return "-"
    if len(suggestion.rates) == 1:
        return f"{suggestion.rate:.2g}"
    known = suggestion.known
    lacking = len(suggestion.rates) - len(known)
    spread = f"{min(known):.1e} to {max(known):.1e}, {suggestion.factor:.1f} x"
    return f"{suggestion.rate:.2g} ({spread}{f'; {lacking} of {len(suggestion.rates)} have none' if lacking else ''})"


def _ends(one: Found) -> str:
    ends = [f"{curve.ended} at {curve.last:.1e}" if curve.last else curve.ended for curve in one.curves.values()]
    return "; ".join(dict.fromkeys(ends))


def write(out: Path, found: Sequence[Found], rule: str) -> None:
    """A new folder with the picture and the numbers.

    Raises:
        UserError: the disk.
    """
    said = data(found, rule)
    with written(out):
        out.mkdir()
        write_whole(out / "lr-find.json", json_text(said))
        write_whole(out / "lr-find.png", lr_picture(said["phases"], rule))
