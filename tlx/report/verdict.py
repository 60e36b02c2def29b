"""What has come of a training, in two sentences."""

from __future__ import annotations

from tlx.base.metrics import ACCURACY
from tlx.report.chance import Difference, wilson
from tlx.runs.history import History, is_share, shown
from tlx.runs.predictions import Part, Predictions
from tlx.runs.run_files import mapping, test_values


def verdict(
    history: History, best: Predictions | None, gain: tuple[str, str, Difference] | None, *, backbone: str
) -> str:
    """
    Args:
        best: of the best weights.
        gain: an earlier and a later phase, and what the later one brought.
    """
    return f"{_how_good(history, best, backbone)} {_and_then(history, gain)}"


def _how_good(history: History, best: Predictions | None, backbone: str) -> str:
    start = "from random weights" if history.scratch else "from pretrained weights"
    if history.best is None:
        return f"{backbone}, trained {start}, has no validation result."
    metric, value = history.metric, history.best.value(history.metric)
    what, part = _task(best)
    pictures = f" on {len(best.ids):,} validation pictures" if best is not None else " on the validation pictures"
    if metric == ACCURACY and value is not None:
        found = f"{what} right in {shown(metric, value)} of cases{pictures}{_interval(part)}"
    else:
        found = f"{what} with {metric.removeprefix('val/')} {shown(metric, value)}{pictures}"
    at = f", by the weights of epoch {history.epoch(history.best.step):.3g}" if history.steps_per_epoch else ""
    average = " (their moving average)" if history.best.weights == "ema" else ""
    return f"{backbone}, trained {start}, {found}{at}{average}."


def _task(best: Predictions | None) -> tuple[str, Part | None]:
    if best is None:
        return "validates", None
    if len(best.parts) > 1:
        return f"does {len(best.parts)} tasks", None
    [part] = best.parts
    count = len(part.names)
    said = {
        "class": f"tells {count} classes apart,",
        "rank": f"grades {count} ranks,",
        "labels": f"finds which of {count} labels apply,",
        "number": f"measures {', '.join(part.names[:3])}{' ...' if count > 3 else ''},",
    }
    return said[part.kind], part


def _interval(part: Part | None) -> str:
    if part is None or part.kind not in ("class", "rank"):
        return ""
    low, high = wilson(int(part.right.sum()), int(part.known.sum()))
    return f" (95 %: {100 * low:.1f} to {100 * high:.1f} %)"


def _and_then(history: History, gain: tuple[str, str, Difference] | None) -> str:
    if not history.done:
        return f"The run is not done ({history.state}): this is how far it is."
    test = _test(history)
    if gain is not None:
        return _gain(*gain) + (f"; {test}." if test else ".")
    if test:
        return f"{test[0].upper()}{test[1:]}."
    found = [(a.label, a.best, a.last) for a in history.accuracies if a.best is not None]
    if len(found) > 1:
        said = ", ".join(f"{label} {shown(history.shown, best)}" for label, best, _ in found[-3:])
        return f"The best of each phase: {said}."
    if found and found[0][2] is not None:
        _, best, last = found[0]
        return f"Its last evaluation gave {shown(history.shown, last)}, its best {shown(history.shown, best)}."
    return f"It ended after {history.step:,} steps."


def _gain(before: str, after: str, found: Difference) -> str:
    def said(value: float) -> str:
        return f"{value:+.3g}" if "error" in found.unit else f"{100 * value:+.1f}"

    unit = "" if "error" in found.unit else " points"
    interval = f"95 %: {said(found.low)} to {said(found.high)}"
    value = f"{said(found.value)}{unit} of {found.unit} ({interval})"
    if found.is_chance:
        return f"{after} did not measurably change it: {value} against the best of {before}"
    word = "gained" if found.value > 0 else "lost"
    return f"{after} {word} {value.lstrip('+-')} against the best of {before}, more than chance"


def _test(history: History) -> str:
    test, values = mapping(history.details.get("test")), test_values(history.details)
    name = next((n for n in (history.metric.removeprefix("val/"), "top1") if n in values), None)
    if name is None:
        return ""
    value, low, high = values[name]
    said = f"{shown(name, value)} ({shown(name, low)} to {shown(name, high)})" if is_share(name) else shown(name, value)
    samples = test.get("samples")
    return f"on {samples:,} test pictures {name} is {said}" if isinstance(samples, int) else f"test {name} is {said}"
