"""How a trial's training ended, by its folder and by what it said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlx.runs.run_files import RunFiles, mapping, number, whole

State = Literal["done", "pruned", "diverged", "failed", "stopped", "killed"]

NOT_FINITE = "not finite"
"""What a training says that has diverged; :func:`tlx.train.nonfinite.report_on`."""


@dataclass(frozen=True)
class Ended:
    """
    Attributes:
        value: of the metric that chooses, of the best evaluation; NaN without one.
        why: in words, where it is not done.
    """

    state: State
    value: float = math.nan
    why: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether there is more to train."""
        return self.state in ("stopped", "killed")


def ended(run: Path, status: str | None, message: str = "") -> Ended:
    """
    Args:
        status: of this start, as its verdict says it; None where it has not come to say anything.
    """
    files = RunFiles(run)
    if status == "done":
        value = number(mapping(files.result.get("best")).get("value"))
        if math.isfinite(value):
            return Ended("done", value)
        return Ended("diverged", why="no evaluation gave a finite value")
    if status == "pruned":
        return Ended("pruned", why=str(files.status.get("why", message)))
    if status == "resumable":
        return Ended("stopped", why=message or str(files.status.get("why", "")))
    if status in ("user-error", "fault"):
        lines = [line for line in message.strip().splitlines() if line.strip()]
        state: State = "diverged" if status == "fault" and NOT_FINITE in message else "failed"
        return Ended(state, why=" ".join(" ".join(lines[:3]).split())[:300])
    return Ended("killed", why="its process was killed")


def step_of(run: Path) -> int:
    """Of the newest checkpoint, 0 without one."""
    return whole(RunFiles(run).checkpoint.get("step")) or 0
