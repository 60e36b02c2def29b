"""A line for each trial as it begins and ends: what it is, what came of it, how far the sweep is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tlx.base.metrics import Metric
from tlx.base.terminal import clock, escaped
from tlx.sweep.ended import Ended, step_of
from tlx.sweep.grammar import Dimension, Range
from tlx.sweep.spec import Spec
from tlx.sweep.study import Study, Taken, Trial

WORDS = {
    "done": "done",
    "pruned": "pruned",
    "diverged": "diverged",
    "failed": "FAILED",
    "stopped": "stopped and saved",
    "killed": "killed",
    "running": "running",
}


def begun(spec: Spec, taken: Taken) -> str:
    """Of a trial that this worker begins, or goes on with."""
    step = step_of(spec.run_of(taken.number))
    goes_on = f", which goes on from step {step}" if step else ", which begins anew" if taken.goes_on else ""
    return escaped(f"trial {taken.number}{goes_on}: {', '.join(short(spec.space, taken.point))}")


def after(study: Study, taken: Taken, end: Ended, trials: int) -> str:
    """Of a trial that has ended."""
    spec, known = study.spec, study.trials()
    own = next((t for t in known if t.number == taken.number), None)
    value = end.value if math.isfinite(end.value) else own.value if own is not None else math.nan
    parts = [f"  {WORDS[end.state]}"]
    parts += [f"{spec.metric} {value:.4f}"] if math.isfinite(value) else []
    parts += [clock(own.seconds)] if own is not None and math.isfinite(own.seconds) else []
    parts += [end.why] if end.why and end.state != "done" else []
    best, over = best_of(spec, known), [t for t in known if t.state != "running"]
    if best is not None:
        parts.append(f"best {best.value:.4f} (trial {best.number})")
    parts.append(f"{len(over)} of {trials}")
    left = left_s(known, trials)
    parts += [f"about {clock(left)} to go"] if left else []
    return escaped("; ".join(parts))


def left_s(known: Sequence[Trial], trials: int) -> float | None:
    """About how long the rest takes with the workers that are at it."""
    took = [t.seconds for t in known if t.state != "running" and math.isfinite(t.seconds)]
    left, busy = trials - sum(t.state != "running" for t in known), sum(t.state == "running" for t in known)
    return left * sum(took) / len(took) / max(busy, 1) if took and left > 0 else None


def best_of(spec: Spec, trials: Sequence[Trial]) -> Trial | None:
    """The best of those that are done; of equal ones the first."""
    best: Trial | None = None
    for trial in trials:
        if trial.state == "done" and (best is None or Metric.of(spec.metric).improves(trial.value, best.value)):
            best = trial
    return best


def short(space: Sequence[Dimension], point: Sequence[str]) -> list[str]:
    """The words of a point with four digits, for people."""
    return [_short(dimension, word) for dimension, word in zip(space, point, strict=True)]


def _short(dimension: Dimension, word: str) -> str:
    key, _, value = word.partition("=")
    if not isinstance(dimension, Range) or dimension.whole:
        return word
    return f"{key}={float(value.removesuffix(dimension.unit)):.4g}{dimension.unit}"
