"""The plan as a picture: layers by time, the colour their learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.errors import UserError
from tlx.base.files import write_whole
from tlx.base.layers import Layer
from tlx.plan.plan import Phase, Plan
from tlx.report.figures import HEAD, LOWEST, NAMED_PHASES, SWITCH, clipped, png
from tlx.report.written_plan import WrittenPhase, WrittenPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FROZEN, EMPTY, COLOURS = "#d9d9d9", "#ffffff", "viridis"
HATCHES = {"norms": "////", "biases": "...."}
"""Of layers that train in these parameters alone."""

COLUMNS = 900
"""Points in time at which rates are asked for: about as many as the picture has dots."""

NAMED_LAYERS = 60
"""Of more layers than these only every so many is named: the names would touch."""

WIDTH, HEAT_WIDTH, CURVES_HEIGHT, AROUND = 11.0, 8.0, 1.5, 2.1
"""Inches: of the picture, of the heat map (about), of the panel above it, of titles and legend."""

NOTHING = 1e-30
"""Stands for a rate of 0 where a layer trains, which a log scale cannot show."""


@dataclass(frozen=True)
class Column:
    """A stretch of steps that is drawn as one.

    Attributes:
        rates: of every layer in its middle; NaN where nothing of a layer trains.
    """

    phase: Phase | WrittenPhase
    start: int
    stop: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Drawing:
    """A plan sampled in time.

    Attributes:
        unit: steps between two whole numbers of the axis: an epoch, or 1 where the plan is shorter than one.
        low, high: rates at the ends of the colours.
    """

    plan: Plan | WrittenPlan
    columns: tuple[Column, ...]
    unit: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return step / self.unit

    def inches(self, phase: Phase | WrittenPhase) -> float:
        """About how wide a phase is."""
        return HEAT_WIDTH * (phase.stop - phase.start) / self.plan.steps


def picture(plan: Plan | WrittenPlan, *, title: str) -> bytes:
    """A heat map as PNG: layers from the input (bottom) to the head (top), time to the right, rates on a log scale.

    Frozen layers are grey; those that train in their norms or biases alone are hatched. Above it the rates of the
    head and of the lowest layer that trains, as lines.

    Args:
        title: what is trained, one or more lines.
    """
    drawing = _sampled(plan)
    height = min(max(0.165 * len(plan.layers), 2.0), 11.5)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[CURVES_HEIGHT, height])
        _curves(above, drawing)
        mesh = _heat(below, drawing)
        _switches(above, below, drawing)
        _numbers(below, drawing)
        _bar(figure, mesh, drawing, inches=height + CURVES_HEIGHT)
        said = f"{plan.samples:,} samples, global batch {plan.batch}, {plan.steps_per_epoch} steps per epoch"
        lines = [clipped(line, 100) for line in [*title.splitlines(), said]]
        figure.suptitle("\n".join(lines), fontsize=11, fontweight="bold")
        figure.legend(handles=_legend(above, drawing), loc="outside lower center", ncols=4, frameon=False, fontsize=9)

    return png(draw, width=WIDTH, height=height + CURVES_HEIGHT + AROUND)


def save(plan: Plan, path: Path, *, title: str) -> None:
    """Writes the :func:`picture`, over an older one.

    Raises:
        UserError: the file cannot be written.
    """
    content = picture(plan, title=title)
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


# --- rates over time


def _sampled(plan: Plan | WrittenPlan) -> Drawing:
    columns = tuple(column for phase in plan.phases for column in _columns(phase, plan))
    rates = [rate for column in columns for rate in column.rates if not math.isnan(rate)]
    tops = [p.lr * p.factors[y.name] for p in plan.phases for y in plan.layers if p.trained(y)]
    high = max(*rates, *tops)
    low = min(_usual_lowest([c for c in columns if c.phase is phase]) for phase in plan.phases)
    unit = plan.steps_per_epoch if plan.epochs >= 1 else 1
    return Drawing(plan, columns, unit, low=min(low, high / 10), high=high)


def _columns(phase: Phase | WrittenPhase, plan: Plan | WrittenPlan) -> Iterator[Column]:
    """Parts of about equal length, in every plan's phases the same; single steps where those are few."""
    for start, stop in phase.parts(max(2, round(COLUMNS * (phase.stop - phase.start) / plan.steps))):
        found = phase.rates((start + stop - 1) // 2)
        rates = (max(found[y.name], NOTHING) if phase.trained(y) else math.nan for y in phase.layers)
        yield Column(phase, start, stop, tuple(rates))


def _usual_lowest(columns: Sequence[Column]) -> float:
    """The lowest rate of a phase, its lowest tenth of the time aside: most curves end at 0, which takes all colours."""
    lowest = sorted(min((r for r in c.rates if r > NOTHING), default=math.inf) for c in columns)
    return lowest[len(lowest) // 10]


# --- the two panels


def _heat(panel: Axes, drawing: Drawing) -> Any:
    import numpy as np
    from matplotlib.colors import LogNorm

    layers, end = list(drawing.plan.layers), drawing.x(drawing.plan.steps)
    rates = np.ma.masked_invalid([c.rates for c in drawing.columns]).T
    edges = [drawing.x(c.start) for c in drawing.columns] + [end]
    rows = np.arange(len(layers) + 1) - 0.5
    panel.set_facecolor(FROZEN)
    mesh = panel.pcolormesh(edges, rows, rates, cmap=COLOURS, norm=LogNorm(drawing.low, drawing.high * 1.001))
    for first, last in _stretches([not y.parameters for y in layers]):
        panel.axhspan(first - 0.5, last + 0.5, facecolor=EMPTY, edgecolor="none", zorder=1.5)
    for phase in drawing.plan.phases:
        _hatch(panel, phase, drawing)
    if len(layers) <= NAMED_LAYERS:
        panel.hlines(rows[1:-1], 0, end, colors="white", linewidth=0.4, zorder=1.6)
    panel.grid(False)
    panel.set_xlim(0, end)
    panel.set_xlabel("step" if drawing.unit == 1 else "epoch")
    panel.set_ylabel("layer, input at the bottom")
    named = _named(len(layers))
    panel.set_yticks(named, [_label(layers[i]) for i in named], fontsize=7.5)
    panel.tick_params(axis="y", length=2)
    return mesh


def _bar(figure: Figure, mesh: Any, drawing: Drawing, *, inches: float) -> None:
    """The colours and their rates, as high as both panels."""
    darker = min(rate for column in drawing.columns for rate in column.rates if not math.isnan(rate)) < drawing.low
    bar = figure.colorbar(
        mesh, ax=figure.axes, pad=0.01, fraction=0.03, aspect=inches / 0.2, label="learning rate",
        extend="min" if darker else "neither", extendfrac=0.15 / inches,
    )  # fmt: skip
    _ticks(bar.ax, drawing)


def _ticks(panel: Axes, drawing: Drawing) -> None:
    """Of an axis of rates: powers of ten, and three times those where there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    few = drawing.high < 1000 * drawing.low
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0,)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def _hatch(panel: Axes, phase: Phase | WrittenPhase, drawing: Drawing) -> None:
    from matplotlib.patches import Rectangle

    start, stop = drawing.x(phase.start), drawing.x(phase.stop)
    for kind, hatch in HATCHES.items():
        for first, last in _stretches([_trains_only(phase, y) == kind for y in phase.layers]):
            panel.add_patch(
                Rectangle(
                    (start, first - 0.5), stop - start, last - first + 1,
                    facecolor="none", edgecolor="white", hatch=hatch, linewidth=0, zorder=1.7,
                )
            )  # fmt: skip


def _curves(panel: Axes, drawing: Drawing) -> None:
    """Lines break where a phase begins."""
    layers = list(drawing.plan.layers)
    trained = [i for i, _ in enumerate(layers) if any(not math.isnan(c.rates[i]) for c in drawing.columns)]
    lines = [(trained[-1], HEAD, "-", "rate of the head" if trained[-1] == len(layers) - 1 else "rate")]
    if trained[0] != trained[-1]:
        lines.append((trained[0], LOWEST, "--", "rate of the lowest layer that trains"))
    for place, colour, style, said in lines:
        x: list[float] = []
        y: list[float] = []
        for _, same in groupby(drawing.columns, key=lambda c: c.phase.start):
            part = list(same)
            x += [drawing.x(c.start) for c in part] + [drawing.x(part[-1].stop)] * 2
            y += [c.rates[place] for c in part] + [part[-1].rates[place], math.nan]
        label = f"{said}: {clipped(layers[place].name, 30)}"
        panel.plot(x, y, color=colour, linestyle=style, label=label, drawstyle="steps-post")
    panel.set_yscale("log")
    panel.set_ylim(drawing.low, drawing.high * 1.5)
    _ticks(panel, drawing)
    panel.set_ylabel("learning rate")


def _switches(above: Axes, below: Axes, drawing: Drawing) -> None:
    """A line where a phase begins; the names of the phases, level where each fits over its phase, else upright."""
    phases: Sequence[Phase | WrittenPhase] = drawing.plan.phases
    many = len(phases) > NAMED_PHASES
    for phase in phases[1:]:
        for panel in (above, below):
            panel.axvline(
                drawing.x(phase.start), color=SWITCH, linewidth=0.4 if many else 1.2, linestyle="--", zorder=3
            )
    if many:
        return
    names = [clipped(p.name, 40) + (", at most" if p.plateau else "") for p in phases]
    level = all(0.085 * len(name) < drawing.inches(phases[i]) for i, name in enumerate(names))
    for i, name in enumerate(names):
        phase = phases[i]
        above.text(
            drawing.x((phase.start + phase.stop) / 2), 1.03, name, transform=above.get_xaxis_transform(),
            ha="center", va="bottom", rotation=0 if level else 90, fontsize=9 if level else 8, color=SWITCH,
        )  # fmt: skip


def _numbers(panel: Axes, drawing: Drawing) -> None:
    """Where the rate of a phase is highest: of the head (or what trains next to it) and of the lowest layer."""
    for phase in drawing.plan.phases:
        columns = [c for c in drawing.columns if c.phase is phase]
        trained = [i for i, rate in enumerate(columns[0].rates) if not math.isnan(rate)]
        for place in {trained[0], trained[-1]}:
            top = max(columns, key=lambda c: c.rates[place])
            text = f"{top.rates[place]:.2g}"
            half = 0.04 * len(text) * (phase.stop - phase.start) / drawing.inches(phase)
            if phase.start + half > phase.stop - half:
                continue
            at = min(max((top.start + top.stop) / 2, phase.start + half), phase.stop - half)
            panel.text(
                drawing.x(at), place, text, ha="center", va="center", fontsize=7.5, zorder=4,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip


def _legend(curves: Axes, drawing: Drawing) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    plan = drawing.plan
    parts = {_trains_only(p, y) for p in plan.phases for y in plan.layers}
    found: list[Any] = curves.get_legend_handles_labels()[0]
    if len(plan.phases) > 1:
        found.append(Line2D([], [], color=SWITCH, linewidth=1.2, linestyle="--", label="phase switch"))
    if any(y.parameters and not p.trained(y) for p in plan.phases for y in plan.layers):
        found.append(Patch(facecolor=FROZEN, label="frozen"))
    if any(not y.parameters for y in plan.layers):
        found.append(Patch(facecolor=EMPTY, edgecolor=LOWEST, linewidth=0.5, label="no parameters"))
    found += [
        Patch(facecolor=LOWEST, edgecolor="white", hatch=hatch, label=f"only {kind} train")
        for kind, hatch in HATCHES.items()
        if kind in parts
    ]
    return found


# --- layers


def _trains_only(phase: Phase | WrittenPhase, layer: Layer) -> str | None:
    """What trains of a layer, where that is its norms or its biases and it has more that could."""
    trained = phase.trained(layer)
    if not trained or len(trained) == sum(not p.idle for p in layer.parameters):
        return None
    if all(p.is_bias for p in trained):
        return "biases"
    return "norms" if all(p.kind == "norm" for p in trained) else None


def _stretches(marks: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First and last place of every unbroken row of true marks."""
    for marked, same in groupby(range(len(marks)), key=marks.__getitem__):
        places = list(same)
        if marked:
            yield places[0], places[-1]


def _named(count: int) -> list[int]:
    """Places of the layers that are named, the first and the last among them."""
    every = math.ceil(count / NAMED_LAYERS)
    return [*range(0, count - every, every), count - 1]


def _label(layer: Layer) -> str:
    own = layer.role in ("backbone", layer.name)
    return clipped(layer.name, 30) + ("" if own else f" ({layer.role})")
