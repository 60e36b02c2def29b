"""Where a training stands: plain data that a checkpoint keeps, fed by what ranks exchange in each step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tlx.base.metrics import Metric

MEMORY = 50


@dataclass
class Mean:
    """Training loss, and what else a task counts, over a stretch of steps.

    Attributes:
        correct: what is counted, over the `told` samples that tell of it.
        shown: its name; None for nothing.
    """

    loss: float = 0.0
    total: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    told: float = 0.0
    shown: str | None = "top1"

    def add(self, reading: Mapping[str, float]) -> None:
        for name in ("loss", "total", "correct", "seen", "told"):
            setattr(self, name, getattr(self, name) + reading[name])

    def take(self) -> dict[str, float]:
        """The means so far, without a loss where no sample weighed anything; starts again."""
        means = {"train/loss": self.loss / self.total} if self.total else {}
        means |= {f"train/{self.shown}": self.correct / self.told} if self.told and self.shown else {}
        self.loss = self.total = self.correct = self.seen = self.told = 0.0
        return means


@dataclass
class Patience:
    """Evaluations without progress, of one metric in one phase. Progress is of the metric itself: a tie is none."""

    phase: str = ""
    best: float | None = None
    stale: int = 0

    def watch(self, phase: str, value: float, *, metric: Metric, min_delta: float = 0.0) -> int:
        """Counts an evaluation; how many in a row have brought nothing."""
        if phase != self.phase:
            self.phase, self.best, self.stale = phase, None, 0
        if self.best is None or metric.improves(value, self.best, by=min_delta):
            self.best, self.stale = value, 0
        else:
            self.stale += 1
        return self.stale


@dataclass
class Trend:
    """The usual training loss of a phase and its spread, as moving averages over about `MEMORY` steps."""

    phase: str = ""
    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    quiet_until: int = 0

    def spike(self, phase: str, step: int, loss: float) -> bool:
        """Takes in a step's loss; whether it stands out: six deviations and half of the mean above it. Said at most
        once in `MEMORY` steps."""
        if phase != self.phase:
            self.phase, self.steps, self.mean, self.variance = phase, 0, 0.0, 0.0
        usual = self.mean + max(6 * math.sqrt(self.variance), 0.5 * self.mean)
        high = self.steps >= MEMORY // 2 and loss > usual
        taken = min(loss, usual) if high else loss  # one spike must not hide the next
        self.steps += 1
        share = max(1 / self.steps, 2 / (MEMORY + 1))
        ahead = taken - self.mean
        self.mean += share * ahead
        self.variance = (1 - share) * (self.variance + share * ahead * ahead)
        if not high or step < self.quiet_until:
            return False
        self.quiet_until = step + MEMORY
        return True


@dataclass
class Progress:
    """All that a run remembers beside tensors.

    Attributes:
        step: updates done, or suppressed as not finite.
        ends: phases that ended before their time, by name: the step.
        best: {metric, value, loss, step, phase, weights: raw | ema}; `loss` is val/loss, for ties.
        phases: by name: {start, stop, best, last}, metrics of evaluations.
        leaders: the best evaluations whose checkpoints stay, best first: {step, value, loss}.
        trend: of the training loss, against which a step's is a spike.
        bad: unreadable samples of any rank, by place: the reason.
        nonfinite: steps that updated nothing, but for fp16's overflows, which its scaler mends.
        extended: how often the plan was made a longer one: {step, steps: [before, now], rest, time}.
    """

    step: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    leaders: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    plateau: Patience = field(default_factory=Patience)
    logged: Mean = field(default_factory=Mean)
    evaluated: Mean = field(default_factory=Mean)
    trend: Trend = field(default_factory=Trend)
    bad: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    samples_seen: int = 0
    nonfinite: int = 0
    overflows: int = 0
    overflows_in_a_row: int = 0
    wall_time_s: float = 0.0
    extended: list[dict[str, Any]] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Progress:
        fields = dict(data)
        if "unfinite" in fields:  # its name in 0.1 and 0.2
            fields["nonfinite"] = fields.pop("unfinite")
        kinds = {"patience": Patience, "plateau": Patience, "logged": Mean, "evaluated": Mean, "trend": Trend}
        for name in ("logged", "evaluated"):  # without `told` where every sample told
            fields[name] = {"told": fields[name]["seen"], **fields[name]}
        for name, kind in kinds.items():
            fields[name] = kind(**fields[name])
        return cls(**fields)

    def best_so_far(self) -> dict[str, float]:
        """For a row, such as ``{"best/val/top1": 0.93}``; nothing before the first evaluation."""
        return {f"best/{self.best['metric']}": self.best["value"]} if self.best is not None else {}

    def absorb(self, reading: Mapping[str, float], *, scaled: bool = False) -> None:
        """Counts one step's exchange; an overflow is a `scaled` gradient that is not finite, of a loss that is."""
        self.samples_seen += int(reading["seen"])
        self.replaced += int(reading["bad"])
        if reading["nonfinite"] and scaled and math.isfinite(reading["loss"]):
            self.overflows += 1
            self.overflows_in_a_row += 1
            return
        if reading["nonfinite"]:
            self.nonfinite += 1
            return
        self.overflows_in_a_row = 0
        self.logged.add(reading)
        self.evaluated.add(reading)
