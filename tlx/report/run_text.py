"""The report of one or several trainings as one HTML file that needs no other: pictures are inside."""

from __future__ import annotations

from typing import Any

from tlx.base.terminal import clock, escaped
from tlx.runs.history import History, shown
from tlx.runs.run_files import whole, within

COLUMNS = ("run", "best", "each phase", "best step", "weights", "samples seen", "time")


HEADINGS = {
    "per_class": "accuracy of each class",
    "ap_per_class": "average precision of each label",
    "f1_per_class": "F1 of each label",
    "thresholds": "threshold of each label",
    "mae_by_column": "mean absolute error of each column",
    "r2_by_column": "R2 of each column",
}
"""Of lists in an evaluation's result, in words; other tasks' names are shown as they are."""


def heading(key: str) -> str:
    """Of a list in an evaluation's result."""
    task, _, name = key.rpartition("/")
    said = HEADINGS.get(name, name.replace("_", " "))
    return f"{task}: {said}" if task else said[0].upper() + said[1:]


def cells(history: History, name: str) -> tuple[str, ...]:
    """A run in the table of runs, one text per `COLUMNS`; several phases are several lines."""
    best = history.best
    phases = [
        f"{escaped(a.label)}\n  best {shown(a.metric, a.best)}, last {shown(a.metric, a.last)}"
        + ("" if a.over else " so far")
        for a in history.accuracies
    ]
    seen = history.number("samples_seen")
    return (
        name if history.done else f"{name}\n({history.state})",
        f"{history.metric} {shown(history.metric, best.value(history.metric))}" if best else "-",
        "\n".join(phases) or "-",
        f"{best.step}\n{best_place(history)}".strip() if best else "-",
        best.weights if best else "-",
        f"{seen:,.0f}" if seen is not None else "-",
        clock(history.number("wall_time_s")),
    )


def best_place(history: History) -> str:
    """The epoch of the best evaluation, where the length of an epoch is known."""
    if history.best is None or not history.steps_per_epoch:
        return ""
    return f"epoch {history.epoch(history.best.step):.4g}"


def plan_rows(history: History) -> list[dict[str, Any]]:
    """What each planned phase trains, and at which rates."""
    rows = []
    for phase in within(history.plan, "phases"):
        layers = list(phase.get("layers", {}).values()) if isinstance(phase.get("layers"), dict) else []
        trained = [y for y in layers if isinstance(y, dict) and whole(y.get("trained"))]
        rates = [y["lr"] for y in trained if isinstance(y.get("lr"), (int, float)) and y["lr"] > 0]
        settings = phase.get("settings")
        rows.append(
            {
                "name": phase.get("name"),
                "steps": f"{phase.get('start')} to {phase.get('stop')}",
                "epochs": phase.get("epochs"),
                "warmup": phase.get("warmup"),
                "rate": " to ".join(f"{r:.3g}" for r in sorted({min(rates), max(rates)})) if rates else "-",
                "layers": f"{len(trained)} of {len(layers)}",
                "parameters": f"{sum(whole(y.get('trained')) or 0 for y in trained):,}",
                "settings": settings if isinstance(settings, dict) else {},
            }
        )
    return rows


def warnings(history: History) -> list[str]:
    """Of the plan, and of updates that the training had to leave out."""
    said = history.plan.get("warnings")
    nonfinite = history.number("nonfinite") or history.number("unfinite") or 0  # the latter in 0.1 and 0.2
    left_out = [f"{nonfinite:.0f} updates were left out: loss or gradient was not finite."] if nonfinite else []
    return [str(warning) for warning in (said if isinstance(said, list) else [])] + left_out
