"""Pictures of runs compared as PNG bytes: curves by group, bars after each phase, differences, value against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlx.base.metrics import Metric
from tlx.report import figures
from tlx.report.comparison import COSTS, MEASURES, Comparable
from tlx.report.figures import AFTER, BEFORE, SWITCH, clipped
from tlx.report.groups import Group
from tlx.report.statistics import Estimate
from tlx.runs.history import is_share, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURED = 8
"""Groups with a colour of their own, the best ones; further ones are grey."""

GREY = "#b5b5b5"
MOST_ROWS = 15
"""Groups, the best ones, or pairs of them, that there are bars of."""


def pictures(of: Comparable) -> dict[str, bytes]:
    """By the ending of the file's name; those that have something to show."""
    drawn = {"": curves(of), "-phases": phases(of), "-differences": differences(of), "-cost": cost(of)}
    return {name: png for name, png in drawn.items() if png is not None}


def curves(of: Comparable) -> bytes:
    """Validation of every run over epochs, a colour for each group; with the phase switches where all share them."""
    keys = list(dict.fromkeys([of.metric, "val/loss"]))
    seen = [key for key in keys if any(_points(run.history, key) for run in of.runs)] or keys[:1]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(seen), squeeze=False)[0]
        for panel, key in zip(panels, seen, strict=True):
            for place, group in reversed([*enumerate(of.groups)]):  # the best on top
                _lines(panel, group, key, _colour(place))
            _switches(panel, of)
            panel.set_title(f"validation {figures.in_words(key)}", fontsize=10)
            panel.set_xlabel("epoch")
            figures.in_percent(panel, key)
            if not is_share(key):
                figures.spread_out(panel, [v for run in of.runs for _, v in _points(run.history, key)])
            panel.margins(x=0.03)
            if not panel.lines:
                panel.text(0.5, 0.5, "no validation", transform=panel.transAxes, ha="center", color=GREY)
        _legend(figure, panels[0], of.groups)

    return figures.png(draw, width=11, height=4.2 + 0.24 * min(len(of.groups), COLOURED + 1))


def _points(history: Any, key: str) -> list[tuple[float, float]]:
    """Of the weights that are the run's best."""
    average = history.best is not None and history.best.weights == "ema"
    return (figures.points(history, "ema/" + key) if average else []) or figures.points(history, key)


def _lines(panel: Axes, group: Group, key: str, colour: str) -> None:
    for run in group.runs:
        values = _points(run.history, key)
        if any(math.isfinite(v) for _, v in values):
            style = "-" if run.history.done else ":"
            panel.plot(*zip(*values, strict=True), color=colour, linestyle=style, linewidth=1.3, alpha=0.75, marker=".")


def _switches(panel: Axes, of: Comparable) -> None:
    places = {tuple(run.history.epoch(p.start) for p in run.history.phases[1:]) for run in of.runs}
    if len(places) == 1:
        for at in places.pop():
            panel.axvline(at, color=SWITCH, linewidth=1.2, linestyle="--", zorder=1)


def _legend(figure: Figure, panel: Axes, groups: Sequence[Group]) -> None:
    from matplotlib.lines import Line2D

    named = groups[:COLOURED]
    lines = [Line2D([], [], color=_colour(i), marker=".") for i in range(len(named))]
    labels = [_entry(group) for group in named]
    if len(groups) > COLOURED:
        lines.append(Line2D([], [], color=GREY, marker="."))
        labels.append(f"{len(groups) - COLOURED} other groups")
    if any(not run.history.done for group in groups for run in group.runs):
        lines.append(Line2D([], [], color="black", linestyle=":"))
        labels.append("not done")
    if any(line.get_color() == SWITCH for line in panel.lines):
        lines.append(Line2D([], [], color=SWITCH, linestyle="--"))
        labels.append("phase switch")
    figure.legend(lines, labels, loc="outside lower left", ncols=1, frameon=False, fontsize=9)


def _entry(group: Group) -> str:
    count = f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""
    return f"{group.letter}  {clipped(group.label, 90)}{count}".rstrip()


def _colour(place: int) -> str:
    import matplotlib

    colours = matplotlib.color_sequences["tab10"]
    return matplotlib.colors.to_hex(colours[place + (place >= 7)]) if place < COLOURED else GREY  # its 8th is grey too


# --- bars


def phases(of: Comparable) -> bytes | None:
    """Level bars: after extraction and after tuning, the mean of each group with its interval and every run; of
    several backbones their names. None where no run is done."""
    groups = of.ranked[:MOST_ROWS]
    names = [m for m in ("extraction", "tuning", "test") if any(m in of.estimates[g.letter] for g in groups)]
    if not groups or not names:
        return None
    colours = {"extraction": BEFORE, "tuning": AFTER, "test": "#4a8f5c"}

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        thick = 0.8 / len(names)
        for row, group in enumerate(groups):
            for i, name in enumerate(names):
                at = row + (i - (len(names) - 1) / 2) * thick
                if name in of.estimates[group.letter]:
                    estimate = of.estimates[group.letter][name]
                    panel.barh([at], [estimate.value], height=0.9 * thick, color=colours[name], label=MEASURES[name])
                    _value(panel, of.metric, estimate, group.values(name), at=at)
        panel.set_yticks(range(len(groups)), [_lines_of(group) for group in groups])
        panel.set_ylim(len(groups) - 0.4, -0.6)
        figures.level(panel, of.metric)
        panel.set_xlabel(f"{figures.in_words(of.metric)}, best of the phase: mean and 95 % interval; a dot is a run")
        handles = {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)

    return figures.png(draw, width=9, height=1.3 + (0.25 + 0.27 * len(names)) * len(groups))


def _value(panel: Axes, metric: str, estimate: Estimate, values: Sequence[float], *, at: float) -> None:
    right = max([estimate.value, *values])
    if estimate.low is not None and estimate.high is not None:
        below, above = estimate.value - estimate.low, estimate.high - estimate.value
        panel.errorbar([estimate.value], [at], xerr=[[below], [above]], color="#222222", capsize=3, linewidth=1.2)
        right = max(right, estimate.high)
    if len(values) > 1:
        panel.plot(values, [at] * len(values), ".", color="#e07b00", markersize=5, zorder=4)
    panel.annotate(
        shown(metric, estimate.value), (right, at), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5
    )


def _lines_of(group: Group) -> str:
    import textwrap

    text = f"{group.letter}  {clipped(group.label, 100)}".rstrip()
    return "\n".join(textwrap.wrap(text, 38, break_long_words=True))


# --- differences


def differences(of: Comparable) -> bytes | None:
    """A line for each pair: the intervals over seeds and over pictures, and no difference. None without intervals."""
    shown_pairs = [d for d in of.differences if any(e and e.low is not None for e in (d.seeds, d.pictures))]
    pairs = shown_pairs[:MOST_ROWS]
    if not pairs:
        return None

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        for what, side, colour in (("seeds", -0.15, "#1f5a99"), ("pictures", 0.15, "#e07b00")):
            rows = [(i + side, e) for i, d in enumerate(pairs) if (e := getattr(d, what)) and e.low is not None]
            for at, estimate in rows:
                panel.errorbar(
                    [estimate.value], [at], fmt="o", color=colour, capsize=3, markersize=5, linewidth=1.5,
                    xerr=[[estimate.value - estimate.low], [estimate.high - estimate.value]],
                    label=f"over {what}" if at == rows[0][0] else None,
                )  # fmt: skip
        panel.axvline(0, color="#222222", linewidth=1)
        panel.set_yticks(range(len(pairs)), [f"{d.first.letter} against {d.second.letter}" for d in pairs])
        panel.set_ylim(len(pairs) - 0.5, -0.5)
        panel.grid(False, axis="y")
        if is_share(of.metric):
            from matplotlib.ticker import FuncFormatter

            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:+.3g}" if x else "0"))
        unit = " (percentage points)" if is_share(of.metric) else ""
        panel.set_xlabel(f"how much better the first is{unit}: difference and 95 % interval")
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)

    return figures.png(draw, width=8, height=1.5 + 0.5 * len(pairs))


# --- cost


def cost(of: Comparable) -> bytes | None:
    """The metric against each cost that differs between groups, and the front; None where none does."""
    names = list(of.fronts)
    if not names:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
        for panel, name in zip(panels, names, strict=True):
            _against(panel, of, name)
        panels[0].set_ylabel(f"validation {figures.in_words(of.metric)}")
        figures.in_percent(panels[0], of.metric)

    return figures.png(draw, width=4.6 * len(names) + 1, height=4.2)


def _against(panel: Axes, of: Comparable, name: str) -> None:
    points: dict[str, tuple[float, float]] = {}
    for place, group in enumerate(of.groups):
        x = group.cost(name)
        if group not in of.ranked or x is None:
            continue
        points[group.letter] = (x, of.estimates[group.letter]["best"].value)
        each = [
            (run.costs[name], run.values["best"]) for run in group.done if "best" in run.values and name in run.costs
        ]
        for own in each if len(each) > 1 else []:
            panel.plot(*own, ".", color=_colour(place), alpha=0.4, markersize=6)
        on_front = group.letter in of.fronts[name]
        marker, face = ("o", _colour(place)) if on_front else ("o", "white")
        panel.plot(*points[group.letter], marker, color=_colour(place), markerfacecolor=face, markersize=9, zorder=3)
        if place < 26:
            panel.annotate(group.letter, points[group.letter], xytext=(7, 5), textcoords="offset points", fontsize=10)
    front = sorted(points[letter] for letter in of.fronts[name])
    panel.step(*zip(*front, strict=True), where="post", color="#222222", linewidth=1, linestyle="--", zorder=2)
    costs = [x for x, _ in points.values()]
    if max(costs) > 5 * min(costs):
        panel.set_xscale("log")
    _numbers_below(panel, name, max(costs))
    panel.margins(0.12)
    if not Metric(of.metric).higher_is_better:
        panel.set_title("lower is better", fontsize=9)


def _numbers_below(panel: Axes, name: str, most: float) -> None:
    """Ticks in words, and what the axis is; times in the unit of the longest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    unit, scale = next(((u, s) for u, s in (("hours", 3600), ("minutes", 60)) if most >= 2 * s), ("seconds", 1))
    scale = scale if name == "time" else 1
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if panel.get_xscale() == "log" else MaxNLocator(5))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _rounded(x / scale)))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel(COSTS[name] + (f" ({unit})" if name == "time" else ""))


def _rounded(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
