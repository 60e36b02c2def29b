"""Loss over the learning rate, a panel for each phase, a line for each seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlx.base.terminal import escaped
from tlx.report.figures import SWITCH, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RULES = {"valley": "#2ca02c", "steepest": "#e07b00", "minimum/10": "#7b3fa0"}
_LINE = "#3b6ea8"


def lr_picture(phases: Sequence[Mapping[str, Any]], rule: str) -> bytes:
    """A PNG.

    Args:
        phases: :meth:`tlx.train.lr_find.Found.data` of each.
        rule: whose suggestion is drawn thick.
    """

    def draw(figure: Figure) -> None:
        for phase, panel in zip(phases, figure.subplots(len(phases), 1, squeeze=False)[:, 0], strict=True):
            _panel(panel, phase, rule)
        figure.suptitle("Loss over the learning rate", fontweight="bold")

    return png(draw, width=9, height=3.4 * len(phases) + 0.5)


def _panel(panel: Axes, phase: Mapping[str, Any], rule: str) -> None:
    for number, curve in enumerate(phase["curves"].values()):
        panel.plot(curve["rates"], curve["losses"], color=_LINE, alpha=0.2, linewidth=0.8)
        label = "smoothed, each seed" if not number else None
        panel.plot(curve["rates"], curve["smoothed"], color=_LINE, label=label)
    for name, colour in RULES.items():
        rate = phase["suggestions"][name]["lr"]
        if rate is not None:
            thick = 2.5 if name == rule else 1.0
            panel.axvline(rate, color=colour, linewidth=thick, label=f"{name}: {rate:.2g}")
    panel.axvline(phase["lr"], color=SWITCH, linestyle="--", linewidth=1, label=f"now: {phase['lr']:.2g}")
    smoothed = [loss for curve in phase["curves"].values() for loss in curve["smoothed"]]
    if smoothed:  # where losses diverge they would hide the rest
        low, first = min(smoothed), max(curve["smoothed"][0] for curve in phase["curves"].values())
        panel.set_ylim(low - 0.1 * (first - low or 1), first + 0.6 * (first - low or 1))
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:.0e}")
    panel.set_title(escaped(phase["phase"]), fontsize=10)
    panel.set_xlabel("learning rate of the head; other layers by their factors")
    panel.set_ylabel("training loss")
    panel.legend(fontsize=8, loc="upper left")
