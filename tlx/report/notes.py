"""What a good colleague would say of a training: each note is a function of what is known, and None where it does not
hold. A note says what was seen, with its numbers, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tlx.base.metrics import Metric
from tlx.report.chance import Difference, wilson
from tlx.report.classes import ClassRow, never_told
from tlx.runs.history import History, shown
from tlx.runs.predictions import Part

RISE = 1.1
"""Validation loss that is so many times its lowest value has risen."""

FEW = 10
"""Pictures of a class below which its numbers say little."""

WIDE = 0.02
"""Half an interval of accuracy from which on differences that people look for are hidden."""


def overfitting(history: History) -> str | None:
    """Validation loss has risen for a third of its phase or longer, while training loss fell."""
    weights = "ema/" if history.best is not None and history.best.weights == "ema" else ""
    phase = history.phases[-1] if history.phases else None
    if phase is None:
        return None
    own = [row for row in history.rows if phase.start < row["step"] <= phase.stop]
    val = _finite(own, f"{weights}val/loss")
    train = [(step, loss) for step, loss in _finite(own, "train/loss") if step >= (val[0][0] if val else 0)]
    if len(val) < 4 or len(train) < 2:
        return None
    lowest_at, lowest = min(val, key=lambda point: point[1])
    end = sum(loss for _, loss in val[-2:]) / 2
    fell = [loss for step, loss in train if step >= lowest_at]
    if end < RISE * lowest or lowest_at > val[0][0] + 2 / 3 * (val[-1][0] - val[0][0]):
        return None
    if len(fell) < 2 or fell[-1] >= fell[0]:
        return None
    return (
        f"It overfits: since epoch {history.epoch(lowest_at):.3g} validation loss has risen from {lowest:.3g} to "
        f"{end:.3g}, while training loss fell from {fell[0]:.3g} to {fell[-1]:.3g}. Stronger transforms or mix, "
        f"fewer epochs of {phase.name} or lower rates may help; the best weights are kept in any case."
    )


def still_improving(history: History) -> str | None:
    """The last evaluation is the best, after better and better ones."""
    if not history.done or history.best is None or not history.phases:
        return None
    weights = "ema/" if history.best.weights == "ema" else ""
    phase, metric = history.phases[-1], Metric.of(history.metric)
    values = _finite((r for r in history.rows if phase.start < r["step"] <= phase.stop), weights + metric.name)
    if len(values) < 3 or history.best.step != values[-1][0]:
        return None
    third, last = values[-3][1], values[-1][1]
    if not metric.improves(last, third, by=0.002 if shown(metric.name, 1.0).endswith("%") else 0.005 * abs(third)):
        return None
    return (
        f"It was still improving when it ended ({metric.name} {shown(metric.name, third)} to "
        f"{shown(metric.name, last)} over the last three evaluations): a longer {phase.name} may bring more "
        f"(phases.{phase.name}.duration, and tlx train --extend goes on from here)."
    )


def tuning(before: str, after: str, found: Difference | None) -> str | None:
    """A later phase that is no better than an earlier one, over the same validation pictures."""
    if found is None or (found.low > 0 and found.value > 0):
        return None
    gain = f"{_signed(found.value, found.unit)} (95 %: {_signed(found.low, found.unit)} to " + (
        f"{_signed(found.high, found.unit)})"
    )
    if found.high < 0:
        return (
            f"{after} made it worse: {found.unit} {gain} against the best of {before}, on the same "
            f"{found.pictures:,} pictures. Lower rates, fewer layers (unfreeze) or norms held still (norm) in {after} "
            "may help."
        )
    return (
        f"Tuning did not help measurably: {after} against {before} gives {found.unit} {gain} on the same "
        f"{found.pictures:,} validation pictures, which may be chance."
    )


def never(rows: Sequence[ClassRow], task: str = "") -> str | None:
    """Classes that were told of no picture."""
    names = never_told(rows)
    if not names:
        return None
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    of = f" of {task}" if task else ""
    seen = sum(row.support for row in rows if row.name in names)
    one = len(names) == 1
    which = f"A class{of} was" if one else f"{len(names)} classes{of} were"
    return (
        f"{which} never predicted: {some} ({seen:,} validation picture{'s' if seen != 1 else ''}). "
        f"If {'it is' if one else 'they are'} rare in training: data.sampling, or class_weights of the objective."
    )


def too_few(part: Part) -> str | None:
    """Validation pictures that cannot show what people look for."""
    if part.kind not in ("class", "rank"):
        return None
    count, right = int(part.known.sum()), int(part.right.sum())
    low, high = wilson(right, count)
    half = (high - low) / 2  # of one run; of a difference between two on other pictures, the square root of 2 more
    if not count or half < WIDE:
        return None
    wanted = math.ceil(count * (half / WIDE) ** 2)
    return (
        f"There are few validation pictures ({count:,}): its accuracy lies between {100 * low:.1f} and "
        f"{100 * high:.1f} % (95 %), and a difference of less than about {100 * math.sqrt(2) * half:.0f} points "
        f"between two runs may be chance. About {_rounded(wanted):,} pictures would tell ± 2 points; comparing runs "
        "picture by picture (tlx report RUN RUN) needs fewer."
    )


def small_classes(rows: Sequence[ClassRow]) -> str | None:
    """Classes with so few pictures that their row of the table is mostly chance."""
    there = [row for row in rows if row.support]
    few = [row for row in there if row.support < FEW]
    if not few or len(few) == len(rows) == 1:
        return None
    which = "every class has" if len(few) == len(there) else f"{len(few)} of {len(there)} classes have"
    return f"Numbers by class say little where {which} fewer than {FEW} validation pictures."


def looked(count: int, data: str) -> str | None:
    """Test data that were looked at more than once."""
    if count < 2:
        return None
    return (
        f"The test data {data} were looked at {count} times in this run: what is chosen by looking at them makes their "
        "number too good. Choose by validation, look once."
    )


def miscalibrated(gap: float, ece: float) -> str | None:
    """A network that is much surer, or less sure, than it is right."""
    if ece < 0.05:
        return None
    word = "too high" if gap > 0 else "too low"
    return (
        f"Its probabilities are {word}: they differ from what is so by {100 * ece:.1f} points on average (ECE). "
        "Where probabilities matter, divide logits by the temperature that tlx evaluate fits."
    )


def _finite(rows: Iterable[object], key: str) -> list[tuple[float, float]]:
    return [
        (row["step"], row[key])  # type: ignore[index]
        for row in rows
        if key in row and math.isfinite(row[key])  # type: ignore[index, operator]
    ]


def _signed(value: float, unit: str) -> str:
    return f"{value:+.3g}" if "error" in unit else f"{100 * value:+.1f} points"


def _rounded(count: int) -> int:
    """Two digits."""
    digits = max(len(str(count)) - 2, 0)
    return round(count, -digits)
