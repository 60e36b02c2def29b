"""Networks that were ranked, for people: a table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tlx.base.terminal import drawn, escaped, tables, width
from tlx.probe.costs import BATCH
from tlx.probe.grid_text import percent
from tlx.probe.ranking import Found, Ranked
from tlx.report.figures import clipped, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def text(found: Found) -> str:
    """A table, the best first."""
    rows = found.rows
    columns = {
        "linear, %": [percent(row.linear).replace(" %", "") for row in rows],
        "behind": [f"{100 * gap.value:.1f}" for gap in found.behind],
        "k-NN, %": [f"{100 * row.neighbours.value:.1f}" for row in rows],
        "LogME": [f"{row.logme:.3f}" for row in rows],
        "parameters": [f"{row.costs.parameters / 1e6:.1f} M" for row in rows],
        "pictures/s": [f"{row.costs.pictures_per_s:,.0f}" for row in rows],
        "memory": [f"{row.costs.peak / 1e6:,.0f} MB" for row in rows],
    }
    alone = len({row.asked.name for row in rows}) == len(rows)  # weights are told where they tell networks apart
    called = [escaped(row.asked.name if alone else row.asked) for row in rows]
    names = {
        "backbone": [f"{'*' if row in found.front else '-'} {name}" for row, name in zip(rows, called, strict=True)]
    }
    title = f"judged on {found.judged_on}"
    lines = [
        drawn(*tables(title, names, columns, width(), more=title)),
        "* none is as right and as fast. linear: logistic regression, C by cross-validation on training pictures,",
        "95 % by resampling pictures; k-NN: cosine, k by leave-one-out; LogME: You et al. 2021, higher is better.",
        f"pictures/s and memory: forward passes of {BATCH} pictures on {found.device}.",
    ]
    if len(rows) > 1:
        gap = found.behind[1]
        if gap.resamples:
            between = f"{100 * gap.value:.1f} points [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
            sure = (
                "that is more than these pictures leave open"
                if gap.low > 0
                else "these pictures do not tell them apart"
            )
            lines.append(f"The first is ahead of the second by {between}: {sure}.")
    lines += [f"left out: {escaped(name)}: {escaped(why)}" for name, why in found.failed.items()]
    return "\n".join(lines)


def picture(found: Found) -> bytes:
    """PNG: accuracy by pictures a second and by parameters, the Pareto front marked."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, found, "pictures a second (log)", lambda row: row.costs.pictures_per_s, front=True)
        _panel(right, found, "parameters, millions (log)", lambda row: row.costs.parameters / 1e6, front=False)
        left.set_ylabel("accuracy of a linear probe, %")
        figure.suptitle(clipped(f"judged on {found.judged_on}; {found.device}", 100), fontsize=11, fontweight="bold")

    return png(draw, width=11, height=4.8)


def _panel(panel: Axes, found: Found, label: str, of: Callable[[Ranked], float], *, front: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    for row in found.rows:
        value, ends = 100 * row.linear.value, None
        if row.linear.resamples:
            ends = [[max(value - 100 * row.linear.low, 0)], [max(100 * row.linear.high - value, 0)]]
        colour = "C0" if row in found.front else "0.6"
        panel.errorbar([of(row)], [value], yerr=ends, fmt="o", color=colour, capsize=3)
        panel.annotate(_name(row), (of(row), value), xytext=(6, 5), textcoords="offset points", fontsize=8)
    if front:
        own = found.front
        panel.plot([of(row) for row in own], [100 * row.linear.value for row in own], color="C0", lw=1, zorder=0)
    panel.set_xscale("log")
    plainly = FuncFormatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_major_formatter(plainly)
    panel.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    panel.xaxis.set_minor_formatter(plainly)
    panel.margins(x=0.25)
    panel.set_xlabel(label)


def _name(row: Ranked) -> str:
    return clipped(row.asked.name, 32).replace("$", r"\$")
