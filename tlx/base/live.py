"""A training on a terminal, as it stands: a frame of as many lines at every moment, none longer than the terminal.

A line is made of items; the last ones that do not fit are left out, so that no word is ever broken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.text import Text

from tlx.base.terminal import clock, escaped

WIDE = 132
"""Columns from which on two lines stand side by side."""

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
        """The index of the phase that is trained, or was the last; at its end it is evaluated and saved."""
        step = self.step - 1 if self.stage in ("evaluation", "saving") else self.step
        return next((i for i, phase in enumerate(self.phases) if step < phase.stop), len(self.phases) - 1)


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


def frame(position: Position, latest: Latest, doing: str, *, columns: int, ascii_only: bool = False) -> Text:
    """What a person sees of a training: two bars, then lines of numbers; always as many lines at a width."""
    width = columns - 1  # a full last column makes some terminals begin a line
    step, train, val, best, speed = (
        ("step", list(_steps(position, latest, doing))),
        ("train", [*_numbers(latest.train), *([f"lr {latest.rate:.2g}"] if latest.rate is not None else [])]),
        ("val", list(_numbers(latest.evaluated)) or ["no evaluation yet"]),
        ("best", list(_best(position)) or ["-"]),
        ("speed", list(_speed(latest))),
    )
    lines = list(_bars(position, latest, width, ascii_only=ascii_only))
    if columns < WIDE:
        lines += [_line(*one, width) for one in (step, train, val, best, speed)]
    else:
        half = width // 2
        for left, right in ((step, speed), (train, val)):
            text = _line(*left, half - 1)
            text.pad_right(half - text.cell_len)
            lines.append(text.append_text(_line(*right, width - half)))
        lines.append(_line(*best, width))
    return Text("\n", no_wrap=True, end="").join(lines)


def _bars(position: Position, latest: Latest, width: int, *, ascii_only: bool) -> Iterator[Text]:
    """How much of this phase is done and how much of all, with the time left of each."""
    phase, count = position.phases[position.phase], len(position.phases)
    place, of_all = f"phase {position.phase + 1}/{count}", "1 phase" if count == 1 else f"{count} phases"
    longest = max(len(escaped(name)) for name in (of_all, *(phase.name for phase in position.phases)))
    name_columns = min(longest, _NAME, width // 3 if width >= _ROOMY else width // 5)
    ends = [latest.left_s(stop - position.step) for stop in (phase.stop, position.steps)]
    left = [("-:--:--" if end is None else clock(end)) + (" left" if width >= _ROOMY else "") for end in ends]
    bar = max(min(width - len(place) - name_columns - max(map(len, left)) - len("   100%  "), _BAR), 1)
    done, length = max(position.step - phase.start, 0), phase.stop - phase.start
    rows = ((place, escaped(phase.name), done, length), ("all", of_all, position.step, position.steps))
    for (about, name, completed, total), time_left in zip(rows, left, strict=True):
        share = min(completed / max(total, 1), 1.0)
        filled, (mark, rest) = math.floor(bar * share), ("#", "-") if ascii_only else ("━", "─")
        named = Text(name, style="bold" if about == place else "")
        named.truncate(name_columns, pad=True, overflow="crop" if ascii_only else "ellipsis")
        line = Text.assemble(
            f"{about:<{len(place)}} ", named, " ", (mark * filled, "green"), (rest * (bar - filled), "bright_black"),
            f" {math.floor(100 * share):3d}%  {time_left}",
        )  # fmt: skip
        line.truncate(width)
        yield line


def _line(name: str, items: Iterable[str], width: int) -> Text:
    """A line with as many of its items as fit."""
    text = Text.assemble((f"{name:<6}", "dim"))
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
    if "data_wait" in said:
        yield f"data wait {100 * said['data_wait']:.0f}%"
    yield f"{clock(time.monotonic() - latest.began)} so far"
    if "step_s" in said:
        yield f"{said['step_s']:.3g} s/step"
