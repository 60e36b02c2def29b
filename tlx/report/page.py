"""The report of one or several trainings as one HTML file that needs no other: pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlx.base.terminal import clock, escaped
from tlx.runs.history import ACCURACY, History, article_reading, falls, is_share, shown
from tlx.runs.run_files import test_values, whole, within

COLUMNS = ("run", "best", "each phase", "best step", "weights", "samples seen", "time")


@dataclass(frozen=True)
class Section:
    """What the page shows of one run: its history, a name that tells it from others, PNG pictures by caption."""

    history: History
    name: str
    pictures: Mapping[str, bytes]


def page(sections: Sequence[Section], *, title: str, pictures: Mapping[str, bytes] | None = None) -> str:
    """The page; everything that comes from files is escaped.

    Args:
        pictures: PNGs about all runs together, by caption.
    """
    import jinja2

    # what a file does not hold is shown as nothing: a run may be of another version, or its files torn
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_printable)
    environment.filters["png"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment.filters["percent"] = lambda share: shown(ACCURACY, share)
    environment.filters["of_list"] = lambda value, key: shown(key, value)
    environment.filters["falls"] = falls
    environment.filters["is_share"] = is_share
    return environment.from_string(TEMPLATE).render(
        title=title,
        columns=COLUMNS,
        table=[cells(s.history, s.name) for s in sections],
        pictures=pictures or {},
        sections=[
            {
                "about": s,
                "history": s.history,
                "plan": plan_rows(s.history),
                "reading": article_reading(s.history.accuracies),
                "warnings": warnings(s.history),
                "metrics": best_metrics(s.history),
                "test": test_metrics(s.history),
                "headings": {key: heading(key) for key in s.history.lists},
            }
            for s in sections
        ],
    )


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


def best_metrics(history: History) -> list[tuple[str, str]]:
    """Every metric of the best evaluation, where there are more than pictures and tables show."""
    found = history.best.metrics if history.best is not None else {}
    names = [name for name in found if name.rpartition("/")[2] not in ("samples", "nonfinite")]
    return [(name, shown(name, found[name])) for name in names] if len(names) > _FEW else []


_FEW = 3


def test_metrics(history: History) -> list[tuple[str, str]]:
    """Those of the look at data.test, with their intervals."""
    texts = {name: [shown(name, of) for of in values] for name, values in test_values(history.details).items()}
    return [(name, f"{value} ({low} to {high})") for name, (value, low, high) in texts.items()]


def _printable(value: Any) -> Any:
    return escaped(value, lines=True) if type(value) is str else value


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


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem; }
table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; color: #555; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e5e5e5; }
td { white-space: pre-line; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
img { max-width: 100%; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
pre, code { font: 13px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .classes { columns: 18rem; padding: 0; list-style: none; }
.classes li { display: flex; gap: .5rem; break-inside: avoid; } .classes span { flex: 1; overflow-wrap: anywhere; }
meter { width: 5rem; } .note { background: #fff6e0; padding: .5rem .8rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<div class="wide"><table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for caption, png in pictures.items() %}
<figure><img src="{{ png | png }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% for section in sections %}
{% set history = section.history %}
{% set details = history.details %}
<h2>{{ section.about.name }}</h2>
{% if not history.done %}
<p class="note">This run is not done ({{ history.state }}): the numbers are those so far; samples, time and classes are
those of its last checkpoint.</p>
{% endif %}
{% for caption, png in section.about.pictures.items() %}
<figure><img src="{{ png | png }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if section.reading %}
<p>Best is compared with best, last with last. The Flowers-102 article sets the last of feature extraction against the
best of fine-tuning: here {{ section.reading[0] | percent }} and {{ section.reading[1] | percent }}.</p>
{% endif %}

<h3>Plan</h3>
{% if section.plan %}
<p>{{ history.plan.samples }} training samples, batches of {{ history.plan.batch }},
{{ history.plan.steps_per_epoch }} steps per epoch, {{ history.plan.steps }} steps planned.</p>
<div class="wide"><table>
<tr><th>phase</th><th>steps</th><th>epochs</th><th>warm-up steps</th><th>learning rate, by layer</th>
<th>layers that train</th><th>parameters that train</th></tr>
{% for phase in section.plan %}
<tr><td>{{ phase.name }}</td><td>{{ phase.steps }}</td><td>{{ phase.epochs }}</td><td>{{ phase.warmup }}</td>
<td>{{ phase.rate }}</td><td>{{ phase.layers }}</td><td>{{ phase.parameters }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p>There is no readable plan.json.</p>
{% endif %}
{% for warning in section.warnings %}
<p class="note">{{ warning }}</p>
{% endfor %}

{% if section.metrics %}
<h3>Metrics of the best evaluation</h3>
<ul class="classes">
{% for name, value in section.metrics %}
<li><span>{{ name }}</span>{{ value }}</li>
{% endfor %}
</ul>
{% endif %}

{% if section.test %}
<h3>Test</h3>
<p>The chosen weights on {{ details.test.samples }} samples of {{ details.test.data }}, look {{ details.test.look }} at
these data: value, and 95 % of resamples.</p>
<ul class="classes">
{% for name, value in section.test %}
<li><span>{{ name }}</span>{{ value }}</li>
{% endfor %}
</ul>
{% endif %}

{% for key, values in history.lists.items() %}
<h3>{{ section.headings[key] }} in the best evaluation</h3>
<p>The {{ "highest" if key | falls else "lowest" }} first.</p>
<ul class="classes">
{% for name, value in values %}
<li><span>{{ name }}</span>
{% if value is none %}no samples{% else %}{% if key | is_share %}<meter value="{{ value }}"></meter>{% endif %}
{{ value | of_list(key) }}{% endif %}</li>
{% endfor %}
</ul>
{% endfor %}
{% if not history.best or (not history.lists and history.shown == "val/top1") %}
<h3>Accuracy of each class in the best evaluation</h3>
<p>Not known: the run has no validation, or has not come to a checkpoint with its best evaluation.</p>
{% endif %}

<h3>Samples that could not be read</h3>
{% if details.unreadable is mapping and details.unreadable %}
<p>{{ details.unreadable | length }} samples; in training, others of their class took their place
{{ details.replaced }} times.</p>
<table><tr><th>sample</th><th>reason</th></tr>
{% for where, reason in details.unreadable.items() %}
<tr><td>{{ where }}</td><td>{{ reason }}</td></tr>
{% endfor %}
</table>
{% else %}
<p>{{ "None." if details else "Not known yet." }}</p>
{% endif %}

<h3>To reproduce it</h3>
{% if details.reproduce or details.command %}<pre>{{ details.reproduce or details.command }}</pre>{% endif %}
{% if details.versions is mapping %}
<p>{% for package, version in details.versions.items() %}{{ package }} {{ version }}{{ ", " if not loop.last }}
{%- endfor %}; {{ details.world }} rank{{ "s" if details.world != 1 }}</p>
{% else %}
<p>Command and versions come with the end of the run.</p>
{% endif %}
{% if history.config %}<details><summary>config.yaml</summary><pre>{{ history.config }}</pre></details>{% endif %}
{% endfor %}
</body>
</html>
"""
