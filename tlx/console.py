"""What a person sees of a training: a progress bar on a terminal, plain lines in a log. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_S = 5.0
"""In a log, rows of training come at most this often; evaluations always."""


class Console:
    """Shows plan, progress and notes of a run of `total_steps`; silent on ranks where `enabled` is false."""

    def __init__(self, total_steps: int, enabled: bool, *, file: IO[str] | None = None) -> None:
        self._total, self._enabled = total_steps, enabled
        self._out = Terminal(file=file, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0

    def plan(self, text: str) -> None:
        """The plan, on top of everything."""
        self.note(text)

    def note(self, text: str) -> None:
        """A line, or several, for people: text as it is, no markup."""
        if self._enabled:
            self._out.print(text, markup=False)
            self._out.file.flush()

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl``."""
        if not self._enabled:
            return
        if self._out.is_terminal:
            self._advance(row)
        evaluated = any(key.startswith(("val/", "ema/val/")) for key in row)
        if evaluated or (not self._out.is_terminal and time.monotonic() - self._said >= QUIET_S):
            self._said = time.monotonic()
            self.note(_line(row, self._total))

    def close(self) -> None:
        """Takes the bar away; what was printed stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _advance(self, row: Mapping[str, Any]) -> None:
        """Starts the bar at the first row, where a resumed run stands, so that the time left is not flattered."""
        about = {"completed": row["step"], "phase": row.get("phase", ""), "numbers": _numbers(row, "train/")}
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.fields[phase]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"), console=self._out, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=self._total, **about)
            self._bar.start()
        self._bar.update(self._task, **about)


def _line(row: Mapping[str, Any], total: int) -> str:
    head = f"step {row['step']:>{len(str(total))}}/{total}  epoch {row.get('epoch', 0):6.2f}  {row.get('phase', '')}"
    return f"{head}  {_numbers(row)}"


def _numbers(row: Mapping[str, Any], prefix: str = "") -> str:
    """Scalars of a row as text; of the rates, one per layer, only the head's."""
    shown = []
    for key, value in row.items():
        rate = key.startswith("train/lr")
        if key in ("step", "epoch", "phase") or not isinstance(value, (int, float)) or not key.startswith(prefix):
            continue
        if not rate:
            shown.append(f"{key.removeprefix('train/') if prefix else key} {value:.4g}")
    rates = [value for key, value in row.items() if key.startswith("train/lr") and isinstance(value, float)]
    return "  ".join([*shown, *([f"lr {max(rates):.2g}"] if rates else [])])
