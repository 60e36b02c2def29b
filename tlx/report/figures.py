"""Pictures of a training as PNG bytes: curves with the phase switch, bars of accuracy."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlx.base.errors import UserError
from tlx.base.metrics import ACCURACY, Metric
from tlx.base.terminal import escaped
from tlx.runs.history import History, PhaseAccuracy, Stretch, article_reading, is_share, shown
from tlx.runs.run_files import mapping, whole, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

TRAIN, VALIDATION, AVERAGE = "#3b6ea8", "#e07b00", "#7b3fa0"
SWITCH, BEST, HEAD, LOWEST = "#d62728", "#111111", "#222222", "#8a8a8a"
BEFORE, AFTER = "#a9bcd3", "#1f5a99"
STYLE = {
    "text.parse_math": False,  # names of runs and phases may hold a $
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
}
ROW, BAR = 0.52, 0.21
"""Inches of the bars' picture: for a phase, for one of its two bars."""

BEST_OF, LAST_OF = "best of the phase", "end of the phase (last)"

NAMED_PHASES = 24
"""More phases than these are not named in a figure: the names would touch."""


def curves(history: History) -> bytes | None:
    """Loss, accuracy and learning rate over epochs; None before the first row."""
    if not history.rows:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 2])
        _losses(panels[0], history)
        _accuracy(panels[1], history)
        _rates(panels[2], history)
        panels[2].set_xlabel("epoch" if history.steps_per_epoch else "step")
        last = history.epoch(history.step) or 1.0
        panels[2].set_xlim(0, last * 1.02)
        for panel in panels:
            _switches(panel, history)
        _phase_names(panels[0], history, last=last)
        figure.suptitle(_title(history), fontsize=12, fontweight="bold")
        _legend(figure, panels, columns=3)

    return png(draw, width=9, height=9.5)


def tasks(history: History) -> bytes | None:
    """The metric of each of several tasks over epochs; None of a single task, and before the run's result."""
    names = history.of_tasks
    if len(names) < 2:
        return None

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(math.ceil(len(names) / 2), 2, sharex=True, squeeze=False).flat)
        for panel, name in zip(panels, names, strict=False):
            _measured(panel, history, name.removeprefix("val/"))
            in_percent(panel, name)
            panel.set_title(escaped(name), fontsize=10)
            _switches(panel, history)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        for panel in panels[len(names) - 2 : len(names)]:  # the lowest of each column
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("epoch" if history.steps_per_epoch else "step")
        _legend(figure, panels, columns=3)

    return png(draw, width=9, height=1 + 2.6 * math.ceil(len(names) / 2))


def phases(history: History) -> bytes | None:
    """Bars of validation accuracy of each phase, best and last; None where there is none."""
    if not history.accuracies:
        return None

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        _bars(panel, history)
        panel.set_title(f"Validation {in_words(history.shown)} of each phase", fontsize=12, fontweight="bold")
        _legend(figure, [panel], columns=3)

    return png(draw, width=8.5, height=1.9 + ROW * len(history.accuracies))


def png(draw: Callable[[Figure], None], *, width: float, height: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font lacks, with the names as they are
        # a figure of its own instead of pyplot: no display is asked for, nothing stays behind
        figure = Figure(figsize=(width, min(height, 60)), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        file = io.BytesIO()
        try:
            figure.savefig(file, format="png", dpi=130, facecolor="white")
        except (TypeError, ValueError, OverflowError) as error:  # of numbers beyond what a picture can hold
            raise UserError(f"the numbers of this run cannot be drawn ({type(error).__name__})") from error
    return file.getvalue()


def _legend(figure: FigureBase, panels: Sequence[Axes], *, columns: int) -> None:
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    from matplotlib.container import BarContainer

    names = sorted(entries, key=lambda name: not isinstance(entries[name], BarContainer))  # matplotlib has lines first
    if names:
        figure.legend(
            [entries[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False,
            fontsize=9,
        )  # fmt: skip


def _title(history: History) -> str:
    words = [history.name]
    if history.best:
        best = shown(history.metric, history.best.value(history.metric))
        weights = " (EMA weights)" if history.best.weights == "ema" else ""
        words.append(f"best {escaped(history.metric)}{weights} {best} at epoch {history.epoch(history.best.step):.4g}")
    if not history.done:
        of = f" of {history.steps}" if history.steps else ""
        words.append(f"{escaped(history.status)}, step {history.step}{of}")
    return clipped(words[0], 70) + "\n" + "  ·  ".join(words[1:])


# --- curves over epochs


def _losses(panel: Axes, history: History) -> None:
    _measured(panel, history, "loss")
    panel.set_ylabel("loss")
    spread_out(panel, [v for key in ("train/loss", "val/loss") for _, v in points(history, key)])


def spread_out(panel: Axes, losses: Sequence[float]) -> None:
    """A logarithmic axis where the highest loss would flatten the others."""
    finite = [v for v in losses if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) > 50 * min(finite):
        _logarithmic(panel)


def in_percent(panel: Axes, metric: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if is_share(metric):
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))


def _accuracy(panel: Axes, history: History) -> None:
    metric = history.shown
    _measured(panel, history, metric.removeprefix("val/"))
    panel.set_ylabel(in_words(metric))
    in_percent(panel, metric)
    if not any(points(history, metric) or points(history, "ema/" + metric)):
        panel.text(0.99, 0.04, "no validation", transform=panel.transAxes, ha="right", va="bottom", color=VALIDATION)


def _measured(panel: Axes, history: History, name: str) -> None:
    """Training as logged (thin) and as the mean between evaluations, validation, and the best evaluation."""
    fine, means = points(history, f"train/{name}", logged=True), points(history, f"train/{name}", logged=False)
    _line(panel, fine, color=TRAIN, alpha=0.35, linewidth=1.0, label="train, as logged")
    _line(panel, means, color=TRAIN, marker="o", markersize=3.5, label="train, mean since the last evaluation")
    val, average = points(history, f"val/{name}"), points(history, f"ema/val/{name}")
    _line(panel, val, color=VALIDATION, marker="o", markersize=4, label="validation")
    _line(panel, average, color=AVERAGE, marker="s", markersize=3.5, label="validation, EMA weights")
    value = history.best.value(f"val/{name}") if history.best else None
    if history.best is None or value is None:
        return
    at = (history.epoch(history.best.step), value)
    panel.plot(
        [at[0]], [at[1]], color=BEST, label=f"best {history.metric}", marker="*", markersize=15, linestyle="none",
        zorder=5, markeredgecolor="white",
    )  # fmt: skip
    below = Metric(f"val/{name}").higher_is_better
    place = at[0] / (history.epoch(history.step) or 1.0)
    side = "right" if place > 0.95 else "left" if place < 0.05 else "center"
    panel.annotate(
        shown(f"val/{name}", value), at, xytext=(0, -20 if below else 12), textcoords="offset points",
        ha=side, fontsize=9, fontweight="bold", zorder=6,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )  # fmt: skip


def _rates(panel: Axes, history: History) -> None:
    """Rates of the head and of the lowest layer that trains, as planned; as logged where the plan does not tell."""
    panel.set_ylabel("learning rate")
    lines = _planned_rates(history)
    dots = "" if lines else "."
    if not lines:
        lines = {key: points(history, f"train/lr_{key}", by_phase=True) for key in ("head", "lowest")}
    top = 0.0
    for key, colour, style in (("head", HEAD, "-"), ("lowest", LOWEST, "--")):
        values = [(x, v) if v > 0 else (x, math.nan) for x, v in lines[key]]
        marker = dots if len(values) <= 24 else ""  # a phase with one row would not be seen
        label = f"learning rate: {'head' if key == 'head' else 'lowest layer that trains'}"
        _line(panel, values, color=colour, linestyle=style, marker=marker, label=label)
        top = max([top, *(v for _, v in values if math.isfinite(v))])
    if top:
        _logarithmic(panel)
        panel.set_ylim(bottom=max(panel.get_ylim()[0], top * 1e-6))


def _planned_rates(history: History) -> dict[str, list[tuple[float, float]]]:
    """(epoch, rate) of `head` and `lowest` from the curves in plan.json, broken between phases; nothing where a phase
    that has begun has none there: the plan is of an earlier tlx, or torn."""
    planned = {str(p.get("name")): mapping(p.get("curve")) for p in within(history.plan, "phases")}
    found: dict[str, list[tuple[float, float]]] = {"head": [], "lowest": []}
    for phase in history.phases:
        curve = planned.get(phase.name, {})
        for key, line in found.items():
            points = _until(curve.get("steps"), curve.get(key), phase)
            if not points:
                return {}
            line += [(history.epoch(step), rate) for step, rate in points]
            line.append((history.epoch(points[-1][0]), math.nan))
    return found


def _until(steps: Any, rates: Any, phase: Stretch) -> list[tuple[int, float]]:
    """(step, rate) of a phase, as far as it lasted."""
    if not isinstance(steps, list) or not isinstance(rates, list):
        return []
    known = [(phase.start + s, r) for s, r in zip(steps, rates, strict=False) if None not in (whole(s), whole(r))]
    return [(step, rate) for step, rate in known if step < phase.stop]


def _logarithmic(panel: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if high > 10 * low:
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:  # no power of ten may be in sight
        panel.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def points(
    history: History, key: str, *, logged: bool | None = None, by_phase: bool = False
) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have a key; NaN, which breaks a line, where a value is not finite.

    Args:
        logged: rows of training only (True), of evaluations only (False).
        by_phase: breaks the line between phases too.
    """
    found: list[tuple[float, float]] = []
    phase = None
    for row in history.rows:
        is_logged = any(k.startswith("train/lr") for k in row)
        if key not in row or (logged is not None and logged != is_logged):
            continue
        x = history.epoch(row["step"])
        if by_phase and phase not in (None, row.get("phase")):
            found.append((x, math.nan))
        phase = row.get("phase")
        found.append((x, row[key]))
    return found


def _line(panel: Axes, values: Sequence[tuple[float, float]], *, label: str, **style: Any) -> None:
    if not any(math.isfinite(v) for _, v in values):
        return
    if sum(math.isfinite(v) for _, v in values) == 1 and "marker" not in style:
        style |= {"marker": ".", "markersize": 6}  # a line of one point would not be seen
    panel.plot([x for x, _ in values], [v for _, v in values], label=label, **style)


def _switches(panel: Axes, history: History) -> None:
    for phase in history.phases[1:]:
        at = history.epoch(phase.start)
        panel.axvline(at, color=SWITCH, linewidth=1.4, linestyle="--", label="phase switch", zorder=1)


def _phase_names(panel: Axes, history: History, *, last: float) -> None:
    """Above the panel: level where each fits over its phase, else upright."""
    if len(history.phases) > NAMED_PHASES:
        return
    spans = [(history.epoch(p.start), min(history.epoch(p.stop), last)) for p in history.phases]
    inches_of_a_letter, width = 0.085, 8.0
    level = all(
        len(p.name) * inches_of_a_letter < width * (b - a) / last
        for p, (a, b) in zip(history.phases, spans, strict=True)
    )
    for phase, (start, stop) in zip(history.phases, spans, strict=True):
        panel.text(
            (start + stop) / 2, 1.02, clipped(phase.name, 40 if level else 24), transform=panel.get_xaxis_transform(),
            ha="center", va="bottom", rotation=0 if level else 90, fontsize=9, color=SWITCH,
        )  # fmt: skip


# --- bars


_WORDS = {"map": "mAP", "mae": "MAE", "rmse": "RMSE", "r2": "R2", "top1": "accuracy"}


def in_words(metric: str) -> str:
    if metric == ACCURACY:
        return "accuracy"
    *task, name = metric.removeprefix("val/").split("/")
    return " ".join([*task, _WORDS.get(name, name.replace("_", " "))])


def _bars(panel: Axes, history: History) -> None:
    """Level bars, so that long names can be read; the phases in order, best above last."""
    places = [(i + 0.5) * ROW for i in range(len(history.accuracies))]
    for found, at in zip(history.accuracies, places, strict=True):
        _pair(panel, found, at=at)
    _mark_reading(panel, history.accuracies, first=ROW / 2)
    panel.set_yticks(places, [clipped(found.label, 44) for found in history.accuracies])
    panel.set_ylim(ROW * len(places), 0)
    level(panel, history.shown)
    panel.set_xlabel(f"validation {in_words(history.shown)}")


def level(panel: Axes, metric: str) -> None:
    """The axes of level bars of a metric, with room for their values."""
    from matplotlib.ticker import PercentFormatter

    panel.tick_params(axis="y", length=0)
    if is_share(metric):
        panel.set_xlim(0, 1.15)
        panel.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        panel.margins(x=0.15)
    panel.grid(False, axis="y")
    panel.set_axisbelow(True)


def _pair(panel: Axes, found: PhaseAccuracy, *, at: float) -> None:
    for value, colour, label, side in ((found.best, AFTER, BEST_OF, -1), (found.last, BEFORE, LAST_OF, 1)):
        if value is not None:
            drawn = panel.barh([at + side * BAR / 2], [value], height=0.92 * BAR, color=colour, label=label)
            text = shown(found.metric, value) + ("" if found.over else "  so far")
            panel.bar_label(drawn, [text], padding=9, fontsize=8.5)


def _mark_reading(panel: Axes, found: Sequence[PhaseAccuracy], *, first: float) -> None:
    """The two bars that the article compares."""
    reading = article_reading(found)
    if reading is None:
        return
    before, after = reading
    rows = [
        max(i for i, a in enumerate(found) if a.kind == "feature extraction" and a.last == before),
        next(i for i, a in enumerate(found) if a.kind == "fine-tuning" and a.best == after),
    ]
    places = [first + ROW * rows[0] + BAR / 2, first + ROW * rows[1] - BAR / 2]
    panel.plot(
        reading, places, color=SWITCH, marker="D", markersize=5, linestyle="none", clip_on=False, zorder=4,
        label="some articles compare these two: last before, best after",
    )  # fmt: skip


def clipped(text: str, most: int) -> str:
    """At most so many letters, escaped, the end of a name being what tells it from others."""
    text = escaped(text)
    return text if len(text) <= most else "…" + text[-(most - 1) :]
