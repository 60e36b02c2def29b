"""A training on a terminal, as it stands: a frame of as many lines at every moment, none longer than the terminal.

A line is made of items; the last ones that do not fit are left out, so that no word is ever broken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tlx.base.terminal import clock, escaped

NARROW, WIDE = 40, 132
"""Columns that a frame takes at least, and from which on two lines stand side by side."""

_ROOMY, _NAME, _BAR = 56, 24, 100  # columns from which on a time has a word; of a phase's name and of a bar, at most

DOING = {
    "step": "training",
    "batch": "training",
    "evaluation": "evaluating",
    "trying memory": "trying how much fits into memory",
    "result": "writing the result",
}
"""What a stage of a training is for a person; other stages are what they are called."""

_WAITS_S = 3.0  # for a batch: then it is no step that lasts


class Span(Protocol):
    """A phase of the plan."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class Position:
    """Where a training stands.

    Attributes:
        step: that are done.
        phases: of the whole plan, in order.
        epoch_steps: steps of an epoch; None where that is not known.
        stage: what is being done, see :data:`DOING`; empty where that is not known.
        best: {metric, value, step, phase} of the best evaluation so far.
    """

    step: int
    phases: Sequence[Span]
    epoch_steps: int | None = None
    stage: str = ""
    best: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int:
        return self.phases[-1].stop

    @property
    def phase(self) -> int:
        """The index of the phase that is trained, or was the last."""
        return next((i for i, phase in enumerate(self.phases) if self.step < phase.stop), len(self.phases) - 1)


@dataclass
class Latest:
    """What the rows so far have said last, by name: of training, of evaluations, of speed."""

    train: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    rate: float | None = None
    step_s: float | None = None  # between two steps, with all that lies between
    epoch: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def take(self, row: Mapping[str, Any], *, steps: int) -> None:
        """A row of a training of so many steps."""
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not k.endswith("/samples")}
        self.epoch = row.get("epoch", self.epoch)
        train = {k.removeprefix("train/"): v for k, v in numbers.items() if k.startswith("train/")}
        if "train/lr_head" in numbers:
            self.rate = max(v for k, v in numbers.items() if k.startswith("train/lr"))
            self.train = {k: v for k, v in train.items() if not k.startswith("lr")}
        evaluated = {k: v for k, v in numbers.items() if k.startswith(("val/", "ema/val/"))}
        if evaluated:
            self.evaluated = {k.replace("val/", "", 1).replace("ema/", "ema "): v for k, v in evaluated.items()}
        speed = {k.removeprefix("time/"): v for k, v in numbers.items() if k.startswith("time/")}
        if speed:
            self.speed = speed
        left = steps - row["step"]
        if "left_s" in speed and left > 0:
            self.step_s = speed["left_s"] / left

    def left_s(self, steps: int) -> float | None:
        """How long so many steps take."""
        return None if self.step_s is None else self.step_s * max(steps, 0)


class Waiting:
    """Since when a stage has not changed."""

    def __init__(self) -> None:
        self._at, self._since = ("", -1), 0.0

    def words(self, position: Position) -> str:
        """What is being done; of a batch that is long in coming, that it is waited for."""
        at, now = (position.stage, position.step), time.monotonic()
        if at != self._at:
            self._at, self._since = at, now
        if position.stage == "batch" and now - self._since > _WAITS_S:
            return f"waiting for pictures, {now - self._since:.0f} s"
        return DOING.get(position.stage, position.stage)


def frame(position: Position, latest: Latest, doing: str, *, columns: int) -> Table:
    """What a person sees of a training: two bars, then lines of numbers; always as many lines at a width."""
    width = max(columns - 1, NARROW)  # a full last column makes some terminals begin a line
    lines = [
        ("step", list(_steps(position, latest, doing))),
        ("train", [*_numbers(latest.train), *([f"lr {latest.rate:.2g}"] if latest.rate is not None else [])]),
        ("val", list(_numbers(latest.evaluated)) or ["no evaluation yet"]),
        ("best", list(_best(position)) or ["-"]),
        ("speed", list(_speed(latest)) or ["-"]),
    ]
    whole = Table.grid()
    whole.add_column(no_wrap=True, overflow="crop")
    whole.add_row(_bars(position, latest, width))
    if columns < WIDE:
        for name, items in lines:
            whole.add_row(_line(name, items, width))
        return whole
    half = width // 2
    for left, right in ((lines[0], lines[4]), (lines[1], lines[2]), (lines[3], None)):
        text = _line(*left, width if right is None else half - 1)
        if right is not None:
            text.pad_right(half - text.cell_len)
            text.append_text(_line(*right, width - half))
        whole.add_row(text)
    return whole


def _bars(position: Position, latest: Latest, width: int) -> Table:
    """How much of this phase is done and how much of all, with the time left of each."""
    phase, count = position.phases[position.phase], len(position.phases)
    done, length = max(position.step - phase.start, 0), max(phase.stop - phase.start, 1)
    place = f"phase {position.phase + 1}/{count}"
    of_all = "1 phase" if count == 1 else f"{count} phases"
    ends = [latest.left_s(stop - position.step) for stop in (phase.stop, position.steps)]
    left = [("-:--:--" if end is None else clock(end)) + (" left" if width >= _ROOMY else "") for end in ends]
    longest = max(len(escaped(name)) for name in (of_all, *(phase.name for phase in position.phases)))
    columns = [len(place), min(longest, _NAME, width // 3), 4, max(map(len, left))]
    bar = max(min(width - sum(columns) - len(columns), _BAR), 1)
    table = Table.grid(padding=(0, 1, 0, 0))
    for size in (*columns[:2], bar, *columns[2:]):
        table.add_column(width=size, no_wrap=True, overflow="ellipsis")
    rows = ((place, phase.name, done, length, left[0]), ("all", of_all, position.step, position.steps, left[1]))
    for about, name, completed, total, time_left in rows:
        share = math.floor(100 * completed / max(total, 1))
        table.add_row(
            Text(about), Text(escaped(name), style="bold" if about == place else ""),
            ProgressBar(total=max(total, 1), completed=completed, width=bar), Text(f"{share:3d}%"), Text(time_left),
        )  # fmt: skip
    return table


def _line(name: str, items: Iterable[str], width: int) -> Text:
    """A line with as many of its items as fit."""
    text = Text.assemble((f"{name:<6}", "dim"), end="")
    for item in items:
        between = "" if text.cell_len == 6 else "  "
        if text.cell_len + len(between) + len(item) > width:
            break
        text.append(between + item)
    return text


def _steps(position: Position, latest: Latest, doing: str) -> Iterator[str]:
    yield f"{position.step:>{len(str(position.steps))}}/{position.steps}"
    if position.epoch_steps:
        epochs, all_epochs = position.step / position.epoch_steps, position.steps / position.epoch_steps
        yield f"epoch {epochs:.2f}/{all_epochs:g}" if all_epochs == round(all_epochs) else f"epoch {epochs:.2f}"
    elif latest.epoch:
        yield f"epoch {latest.epoch:.2f}"
    yield from [escaped(doing)] if doing else []


def _numbers(values: Mapping[str, float]) -> Iterator[str]:
    yield from (f"{escaped(name)} {value:<6.4g}" for name, value in values.items())


def _best(position: Position) -> Iterator[str]:
    best = position.best
    if best:
        yield f"{escaped(best['metric'])} {best['value']:.4g}"
        yield from [f"step {best['step']}", *([escaped(best["phase"])] if "phase" in best else [])]


def _speed(latest: Latest) -> Iterator[str]:
    said = latest.speed
    if "images_per_s" in said:
        rate = said["images_per_s"]
        yield f"{rate:,.0f} images/s" if rate >= 1000 else f"{rate:.4g} images/s"
    if "step_s" in said:
        yield f"{said['step_s']:.3g} s/step"
    if "data_wait" in said:
        yield f"data wait {100 * said['data_wait']:.0f}%"
    yield f"{clock(time.monotonic() - latest.began)} so far"
