"""What a person sees of a training: a live view on a terminal and in a notebook, plain lines in a log. Rank 0 only."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

from tlx.base.launcher import environment
from tlx.base.live import Latest, Position, Waiting, frame
from tlx.base.notebook import Display, in_notebook
from tlx.base.terminal import BestEffort, clock, escaped, is_quiet
from tlx.base.terminal import keep_in as keep_all_in

QUIET_S = 5.0
"""In a log, rows of training come at most this often; evaluations always."""

REFRESHES = 2
"""Of the live view, in a second."""

_ELSEWHERE = (
    "step", "epoch", "phase", "train/lr", "time/", "memory/", "best/", "lr/", "update_ratio/", "train/grad_norm"
)  # fmt: skip
"""Values of a row that have a place of their own in a line, or none."""

_WARNING = "warning"
_LOUD = (_WARNING, "stopped")
"""How a note begins that is shown with --quiet, too."""


@dataclass(frozen=True)
class _Whole:
    """A training whose phases nobody has told, as one."""

    name: str
    stop: int
    start: int = 0


class Console:
    """Shows plan, progress and notes of a run of `total_steps`; silent on ranks where `enabled` is false.

    It is a courtesy: a reader that has gone, a terminal that was closed or a log without room ends nothing.

    Args:
        file: by default standard output.
        instead: the file that keeps what `file` does not take; see :class:`tlx.base.terminal.BestEffort`.
        metrics: of evaluations, by name without ``ema/``, that a line shows; None for all.

    Attributes:
        position: tells at any moment, in another thread, where the training stands; by default where the last row was.
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
        self._is_stdout = shown is sys.stdout
        self._enabled = enabled and shown is not None  # the shell's `>&-`
        self._stream = BestEffort.over(shown) if self._enabled else None
        if instead is not None:
            self.keep_in(instead)
        self._out = Terminal(file=self._stream, highlight=False, soft_wrap=True, emoji=False, force_jupyter=False)  # type: ignore[arg-type]
        self.position: Callable[[], Position] = lambda: self._at
        self._at = Position(0, [_Whole("", total_steps)])
        self._latest, self._waiting = Latest(), Waiting()
        self._live: Live | None = None
        self._cell = Display() if self._enabled and file is None and not is_quiet() and in_notebook() else None
        self._log: Path | None = None
        self._is_displaced: Callable[[], bool] = lambda: False
        self._unlogged: deque[str] = deque(maxlen=1000)
        self._said = 0.0

    def keep_in(self, file: Path) -> None:
        """From now on what cannot be shown is kept there, also what has waited in memory."""
        if self._stream is not None:
            self._stream.instead = file
            keep_all_in(file)

    def log_to(self, file: Path, is_displaced: Callable[[], bool] = lambda: False) -> None:
        """From now on every line is appended there, too, also what was said so far; never the bar.

        Args:
            file: made by the first line.
            is_displaced: whether the folder at its path is another one by now, which gets no line of ours.
        """
        self._log, self._is_displaced = file, is_displaced
        self._append()

    def _append(self) -> None:
        """A log that cannot be written is left alone."""
        if self._log is None or self._is_displaced():
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in self._unlogged)
        except OSError:
            self._log = None
        self._unlogged.clear()

    def plan(self, text: str) -> None:
        """The plan, on top of everything."""
        self.note(text)

    def begin(self) -> None:
        """Training begins: from here on a terminal shows how it stands."""
        if self._is_live and self._live is None:
            self._live = Live(
                console=self._out, get_renderable=self._frame, refresh_per_second=REFRESHES, transient=True,
                redirect_stdout=self._is_stdout, redirect_stderr=_is_terminal(sys.stderr),
            )  # fmt: skip
            self._live.start(refresh=True)
            self._out.show_cursor(True)  # a process that is killed leaves the terminal as it was
        self._show_cell()

    def note(self, text: str) -> None:
        """A line, or several, for people: text as it is, no markup, control characters escaped."""
        if not self._enabled:
            return
        self._unlogged.append(escaped(text, lines=True))
        self._append()
        if is_quiet() and not text.lower().startswith(_LOUD):
            return
        shown, style = escaped(text, lines=True), "yellow" if text.lower().startswith(_WARNING) else None
        self._out.print(shown, style=style, markup=False, soft_wrap=self._columns is None)
        if self._live is not None and not self._is_live:  # once more, since no frame of the live view is kept
            self.close()
            self._out.print(shown, markup=False, soft_wrap=self._columns is None)

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl``, with the speed of the last row that tells it."""
        if not self._enabled:
            return
        brief = headlines(row, self._metrics)
        self._remember(row, brief)
        if self._is_live:
            self.begin()
        else:
            self.close()
            self._show_cell()
        evaluated = any(key.startswith(("val/", "ema/val/")) for key in row)
        is_shown = self._live is not None or self._cell is not None
        if evaluated or (not is_shown and time.monotonic() - self._said >= QUIET_S):
            self._said = time.monotonic()
            steps = self.position().steps
            speed = {f"time/{name}": value for name, value in self._latest.speed.items() if not is_shown}
            if speed and (left := self._latest.left_s(steps - row["step"])) is not None:
                speed["time/left_s"] = left
            self.note(_line({**brief, **speed}, steps, columns=self._columns))
            if self._live is not None:
                self._live.refresh()

    def close(self) -> None:
        """Takes the live view away; what was printed stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._show_cell(at_once=True)

    @property
    def _is_live(self) -> bool:
        """On a terminal that can be drawn on and is still there."""
        if self._stream is None or self._stream.failed or is_quiet():
            return False
        return _is_terminal(self._stream) and self._out.is_terminal and not self._out.is_dumb_terminal

    @property
    def _columns(self) -> int | None:
        """Of a terminal, or as COLUMNS says; None in a log, whose lines stay whole so that they can be searched."""
        return self._out.width if self._is_live or environment().get("COLUMNS") else None

    def _remember(self, row: Mapping[str, Any], brief: Mapping[str, Any]) -> None:
        best = self._at.best
        for name, value in ((k.removeprefix("best/"), v) for k, v in row.items() if k.startswith("best/")):
            if best is None or best["value"] != value:
                best = {"metric": name, "value": value, "step": row["step"]}
        self._at = Position(row["step"], [_Whole(row.get("phase", ""), self._at.steps)], best=best)
        self._latest.take(brief, steps=self.position().steps)

    def _frame(self) -> RenderableType:
        try:
            position = self.position()
            doing, ascii_only = self._waiting.words(position), not self._out.encoding.lower().startswith("utf")
            return frame(position, self._latest, doing, columns=self._out.width, ascii_only=ascii_only)
        except Exception as error:  # whatever a row may hold: what is shown must not end what it shows
            return Text(escaped(f"{type(error).__name__}: {error}")[: self._out.width - 1])

    def _show_cell(self, *, at_once: bool = False) -> None:
        if self._cell is not None and not is_quiet():
            position = self.position()
            doing = self._waiting.words(position)
            self._cell.show(lambda columns: frame(position, self._latest, doing, columns=columns), at_once=at_once)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _leave_the_view() -> None:
    """In a fork, such as a data worker: it must not draw, nor wait for a lock that the view's thread held."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, stream.rich_proxied_file)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_view)


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
