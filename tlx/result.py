"""What a training has brought: result.json, and a few lines for a person."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.data.location import command_line
from tlx.data.regions import decoder
from tlx.run_folder import versions

if TYPE_CHECKING:
    from tlx.run import Run


_LISTED = 20


def result_of(run: Run, *, finished: bool) -> dict[str, Any]:
    """What a training has brought."""
    progress = run.progress
    return {
        "name": Path(run.config.run).name,
        "finished": finished,
        "step": progress.step,
        "best": progress.best,
        "last": progress.last,
        "phases": progress.phases,
        "classes": list(run.identity["classes"]),
        "samples_seen": progress.samples_seen,
        "replaced": progress.replaced,
        "unreadable": progress.bad,
        "unfinite": progress.unfinite,
        "overflows": progress.overflows,
        "wall_time_s": progress.wall_time_s,
        "extended": progress.extended,
        "world": run.world.size,
        "versions": versions(),
        "decoder": decoder(),
        "command": command_line(sys.argv),
    }


def summary(result: Mapping[str, Any]) -> str:
    """The best and the last evaluation of each phase, what was skipped, and how long it took."""
    lines = [f"run {result['name']}: {result['step']} steps, {result['samples_seen']:,} samples seen"]
    for name, phase in result["phases"].items():
        for which in ("best", "last"):
            if which in phase:
                lines.append(f"  {name:<20} {which} at step {phase[which]['step']:>6}: {_metrics(phase[which])}")
    if result["best"]:
        best = result["best"]
        lines.append(f"  best {best['metric']} {best['value']:.4f} at step {best['step']} ({best['weights']} weights)")
    if result["unreadable"]:
        bad = sorted(result["unreadable"].items())
        lines.append(f"  {len(bad)} unreadable sample{'s' * (len(bad) > 1)}, replaced {result['replaced']} times:")
        lines += [f"    {where}: {reason}" for where, reason in bad[:_LISTED]]
        lines += [f"    ... and {len(bad) - _LISTED} more, all in result.json"] if len(bad) > _LISTED else []
    lines.append(f"  {result['wall_time_s']:.1f} s on {result['world']} rank{'s' if result['world'] > 1 else ''}")
    return "\n".join(lines)


def _metrics(row: Mapping[str, Any]) -> str:
    shown = ((k, v) for k, v in row.items() if "val/" in k and isinstance(v, float))
    return "  ".join(f"{key} {value:.4f}" for key, value in shown)
