"""The page of one run, or of one look at data: a file that needs no other, and the same in short as Markdown."""

from __future__ import annotations

from typing import Any

from tlx.base.terminal import escaped
from tlx.report.rendering import render
from tlx.report.run_report import RunReport
from tlx.report.run_text import heading, plan_rows, warnings
from tlx.report.samples import Gallery
from tlx.runs.history import article_reading


def html(run: RunReport) -> str:
    """Everything that comes from files is escaped."""
    lists = _lists(run)
    return render(
        "run.html",
        title=title(run),
        run=run,
        contents=_contents(run),
        plan=plan_rows(run.history),
        warnings=warnings(run.history),
        reading=article_reading(run.history.accuracies),
        lists=lists,
        headings={key: heading(key) for key in lists},
    )


def title(run: RunReport) -> str:
    return run.name if run.look else f"Run {run.name}"


def _lists(run: RunReport) -> dict[str, list[tuple[str, float | None]]]:
    """Values by class of an evaluation without predictions; with them, what their tables do not show."""
    if run.look:
        return {}
    shown_already = ("per_class", "ap_per_class", "f1_per_class", "mae_by_column") if run.targets else ()
    return {k: v for k, v in run.history.lists.items() if k.rpartition("/")[2] not in shown_already}


def _contents(run: RunReport) -> list[tuple[str, str]]:
    found = [("what", "what was judged" if run.look else "what was trained on what")]
    found += [] if run.look else [("training", "how it was trained")]
    found += [("numbers", "how good it is")] if run.metrics or run.test else []
    found += [(f"classes{target.key}", target.heading.lower()) for target in run.targets]
    found += [("inside", "inside the network")] if run.maps or "embedding" in run.figures else []
    found += [("missing", "what is left out")] if run.left_out else []
    return [*found, ("reproduce", "to reproduce it")]


# Markdown


def markdown(run: RunReport) -> str:
    """With the PNGs of ``figures/`` beside it."""
    lines = [f"# {_md(title(run))}", "", _md(run.verdict), ""]
    lines += [f"- {_md(note)}" for note in run.notes] + [""] * bool(run.notes)
    lines += _table(("", ""), run.about)
    if not run.look:
        lines += ["## How it was trained", "", *_figures(run, "curves", "tasks", "plan", "phases")]
        lines += _table(run.phase_columns, run.phases) if run.phases else []
        lines += [line for said in run.differences for line in (_md(said), "")]
        lines += _table(run.speed_columns, run.speed) if run.speed else []
    if run.metrics or run.test:
        lines += ["## How good it is", ""]
        lines += _table(run.metric_columns, run.metrics) if run.metrics else []
        lines += ["### Test", "", *_table(("", "value, and 95 % of resamples"), run.test)] if run.test else []
    for target in run.targets:
        lines += [f"## {_md(target.heading)}", "", _md(target.said), "", *_table(target.columns, target.worst)]
        lines += _figures(run, *(f"{name}{target.key}" for name in ("numbers", "confusion")))
        if target.confusions:
            lines += ["### Largest confusions", "", *_table(("is", "told as", "pictures", "of"), target.confusions)]
        lines += [_md(target.calibration), ""] if target.calibration else []
        lines += _figures(run, f"reliability{target.key}")
        for gallery in target.galleries:
            lines += _listed(gallery)
    lines += _figures(run, "embedding")
    lines += ["## What is left out", "", *(f"- {_md(line)}" for line in run.left_out), ""] if run.left_out else []
    lines += ["## To reproduce it", "", "```", run.command.replace("```", "` ` `"), "```", ""] if run.command else []
    if run.changed:
        lines += ["What differs from the defaults:", "", *(f"- {_md(line)}" for line in run.changed), ""]
    return "\n".join(lines)


def _figures(run: RunReport, *names: str) -> list[str]:
    return [
        line
        for name in names
        if name in run.figures
        for line in (f"![{_md(run.figures[name].caption)}](figures/{name}.png)", "")
    ]


def _listed(gallery: Gallery) -> list[str]:
    if not gallery.pictures:
        return [f"### {_md(gallery.title)}", "", _md(gallery.about), ""]
    rows = [("; ".join(picture.lines), picture.where or f"sample {picture.id}") for picture in gallery.pictures]
    return [f"### {_md(gallery.title)}", "", _md(gallery.about), "", *_table(("", "picture"), rows)]


def _table(columns: Any, rows: Any) -> list[str]:
    head = [f"| {' | '.join(_md(c) or ' ' for c in columns)} |", "|" + "---|" * len(columns)]
    return [*head, *(f"| {' | '.join(_md(str(cell)) for cell in row)} |" for row in rows), ""]


def _md(text: str) -> str:
    """Of one line; nothing in it is markup."""
    said = escaped(text).replace("\\", "\\\\")
    for mark in "`*_<>[]|#!~$":
        said = said.replace(mark, f"\\{mark}")
    return " ".join(said.split())
