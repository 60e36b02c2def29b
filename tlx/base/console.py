"""What a person sees of a training: a progress bar on a terminal, plain lines in a log. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tlx.base.launcher import environment
from tlx.base.terminal import BestEffort, clock, escaped
from tlx.base.terminal import keep_in as keep_all_in

QUIET_S = 5.0
"""In a log, rows of training come at most this often; evaluations always."""

_BAR_NAME, _BAR_NUMBERS = 20, 100
"""Columns of a phase's name before the bar, and of the terminal from which on numbers stand behind it."""


_ELSEWHERE = ("step", "epoch", "phase", "train/lr", "time/", "best/", "lr/", "update_ratio/", "train/grad_norm")
"""Values of a row that have a place of their own in a line, or none."""


class Console:
    """Shows plan, progress and notes of a run of `total_steps`; silent on ranks where `enabled` is false.

    It is a courtesy: a reader that has gone, a terminal that was closed or a log without room ends nothing.

    Args:
        file: by default standard output.
        instead: the file that keeps what `file` does not take; see :class:`tlx.base.terminal.BestEffort`.
        metrics: of evaluations, by name without ``ema/``, that a line shows; None for all.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool,
        *,
        file: IO[str] | None = None,
        instead: Path | None = None,
        metrics: Collection[str] | None = None,
    ) -> None:
        shown, self._metrics = file or sys.stdout, metrics
        self._total, self._enabled = total_steps, enabled and shown is not None  # the shell's `>&-`
        self._stream = BestEffort.over(shown) if self._enabled else None
        if instead is not None:
            self.keep_in(instead)
        self._out = Terminal(file=self._stream, highlight=False, soft_wrap=True, emoji=False)  # type: ignore[arg-type]
        self._log: Path | None = None
        self._unlogged: list[str] = []
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0
        self._speed: dict[str, float] = {}
        self._left_s = 0.0  # for each step

    def keep_in(self, file: Path) -> None:
        """From now on what cannot be shown is kept there, also what has waited in memory."""
        if self._stream is not None:
            self._stream.instead = file
            keep_all_in(file)

    def log_to(self, file: Path) -> None:
        """From now on every line is appended there, too, also what was said so far; never the bar."""
        self._log = file
        self._append()

    def _append(self) -> None:
        """A log that cannot be written is left alone."""
        if self._log is None:
            return
        lines, self._unlogged = self._unlogged, []
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError:
            self._log = None

    def plan(self, text: str) -> None:
        """The plan, on top of everything."""
        self.note(text)

    def note(self, text: str) -> None:
        """A line, or several, for people: text as it is, no markup, control characters escaped."""
        if not self._enabled:
            return
        self._out.print(escaped(text, lines=True), markup=False, soft_wrap=self._columns is None)
        self._unlogged.append(escaped(text, lines=True))
        self._append()
        if self._bar is not None and not self._live:  # once more, since no frame of the bar is kept
            self.close()
            self._out.print(escaped(text, lines=True), markup=False, soft_wrap=self._columns is None)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl``, with the speed of the last row that tells it."""
        if not self._enabled:
            return
        self._speed = {k: v for k, v in row.items() if k.startswith("time/")} or self._speed
        steps_left = self._total - row["step"]
        if "time/left_s" in row:
            self._left_s = row["time/left_s"] / steps_left if steps_left > 0 else 0.0
        elif "time/left_s" in self._speed:
            self._speed["time/left_s"] = self._left_s * max(steps_left, 0)
        if self._live:
            self._advance(row)
        else:
            self.close()
        evaluated = any(key.startswith(("val/", "ema/val/")) for key in row)
        if evaluated or (not self._live and time.monotonic() - self._said >= QUIET_S):
            self._said = time.monotonic()
            brief = headlines(row, self._metrics)
            self.note(_line({**brief, **self._speed}, self._total, columns=self._columns))

    def close(self) -> None:
        """Takes the bar away; what was printed stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _live(self) -> bool:
        """On a terminal that is still there."""
        return self._out.is_terminal and self._stream is not None and not self._stream.failed

    @property
    def _columns(self) -> int | None:
        """Of a terminal, or as COLUMNS says; None in a log, whose lines stay whole so that they can be searched."""
        return self._out.width if self._live or environment().get("COLUMNS") else None

    def _advance(self, row: Mapping[str, Any]) -> None:
        """Starts the bar at the first row, where a resumed run stands, so that the time left is not flattered."""
        name = escaped(row.get("phase", ""))
        name = name if len(name) <= _BAR_NAME else name[: _BAR_NAME - 1] + "…"
        numbers = "  ".join(_numbers(row, "train/")) if self._out.width >= _BAR_NUMBERS else ""
        about = {"completed": row["step"], "phase": name, "numbers": numbers}
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.fields[phase]}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}", markup=False),
                console=self._out, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=self._total, **about)
            self._bar.start()
        self._bar.update(self._task, **about)


def headlines(row: Mapping[str, Any], metrics: Collection[str] | None) -> dict[str, Any]:
    """A row without those metrics of evaluations that are not named here; None for all."""

    def shows(name: str) -> bool:
        return metrics is None or not name.startswith("val/") or name in metrics

    return {key: value for key, value in row.items() if shows(key.removeprefix("ema/"))}


def _line(row: Mapping[str, Any], total: int, *, columns: int | None) -> str:
    """A row as text, broken between its items where a terminal of so many columns would break it in a word."""
    step, epoch = f"step {row['step']:>{len(str(total))}}/{total}", f"epoch {row.get('epoch', 0):6.2f}"
    items = [step, epoch, escaped(row.get("phase", "")), *_numbers(row), *_speed(row)]
    lines = [""]
    for item in items:
        longer = f"{lines[-1]}  {item}" if lines[-1].strip() else f"{lines[-1]}{item}"
        if columns is not None and len(longer) > columns and lines[-1].strip():
            longer = f"    {item}"
            lines.append("")
        lines[-1] = longer
    return "\n".join(lines)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Scalars of a row as text; of the rates, one per layer, only the head's."""
    for key, value in row.items():
        if not isinstance(value, (int, float)) or not key.startswith(prefix):
            continue
        if key.startswith(_ELSEWHERE) or key.endswith("/samples"):
            continue
        yield f"{key.removeprefix('train/') if prefix else key} {value:.4g}"
    rates = [value for key, value in row.items() if key.startswith("train/lr") and isinstance(value, float)]
    if rates:
        yield f"lr {max(rates):.2g}"
    yield from (f"best {k.removeprefix('best/')} {v:.4g}" for k, v in row.items() if k.startswith("best/"))


def _speed(row: Mapping[str, Any]) -> Iterator[str]:
    shown = (("images_per_s", "{:.4g} images/s"), ("step_s", "{:.3g} s/step"))
    yield from (text.format(row[f"time/{name}"]) for name, text in shown if f"time/{name}" in row)
    if "time/left_s" in row:
        yield f"{clock(row['time/left_s'])} left"
