"""What came of a sweep: a table of its trials, the best configuration as a file to train, what mattered."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence

from tlx.base.errors import UserError
from tlx.base.files import write_whole
from tlx.base.metrics import Metric
from tlx.base.parsing import to_yaml
from tlx.base.terminal import clock, drawn, escaped, say, tables, width
from tlx.plan import config as configs
from tlx.runs.run_files import mapping
from tlx.sweep.progress import WORDS, best_of, short
from tlx.sweep.spec import BASE, Spec
from tlx.sweep.study import Study, Trial

TABLE, BEST, PAGE = "trials.csv", "best.yaml", "comparison.html"

COMPARED = 8
"""Trials on the page that compares runs: the best ones."""

_SHOWN = 40


def report(study: Study) -> str:
    """Writes trials.csv, best.yaml and the comparison into the sweep's folder; a text for people.

    Raises:
        UserError: a file cannot be written.
    """
    spec, trials = study.spec, study.trials()
    ranked, best = _ranked(spec, trials), best_of(spec, trials)
    importance = study.importance()
    lines = [_table(spec, ranked)]
    try:
        write_whole(spec.folder / TABLE, table_csv(spec, trials))
        lines += _best(spec, trials, best)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(spec.folder)) from error
    if importance:
        share = ", ".join(f"{escaped(key)} {part:.0%}" for key, part in importance.items())
        lines.append(f"what the differences come from (PED-ANOVA): {share}")
    lines += _comparison(spec, ranked)
    return "\n".join(lines)


def _ranked(spec: Spec, trials: Sequence[Trial]) -> list[Trial]:
    """The best first; what is not done after what is."""
    sign = -1 if Metric.of(spec.metric).higher_is_better else 1
    return sorted(
        trials, key=lambda t: (t.state != "done", sign * t.value if math.isfinite(t.value) else math.inf, t.number)
    )


def _table(spec: Spec, ranked: Sequence[Trial]) -> str:
    shown = ranked[:_SHOWN]
    points = [[word.partition("=")[2] for word in short(spec.space, t.point)] for t in shown]
    about = {"trial": [f"{t.number}" for t in shown]}
    columns = {
        spec.metric: [f"{t.value:.4f}" if math.isfinite(t.value) else "-" for t in shown],
        "state": [WORDS.get(t.state, t.state) for t in shown],
        "time": [clock(t.seconds) if math.isfinite(t.seconds) else "-" for t in shown],
        **{escaped(d.key): [escaped(p[i]) for p in points] for i, d in enumerate(spec.space)},
    }
    more = [f"... and {len(ranked) - _SHOWN} more, all in {spec.folder / TABLE}"] if len(ranked) > _SHOWN else []
    return "\n".join([drawn(*tables("", about, columns, width(), more="")), *more])


def table_csv(spec: Spec, trials: Sequence[Trial]) -> str:
    """All trials, by number, with their whole values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", spec.metric, "seconds", *(d.key for d in spec.space), "run", "why"])
    for t in trials:
        numbers = ["" if math.isnan(x) else x for x in (t.value, t.seconds)]
        point = [word.partition("=")[2] for word in t.point]
        writer.writerow([t.number, t.state, *numbers, *point, spec.run_of(t.number), t.why])
    return text.getvalue()


def _best(spec: Spec, trials: Sequence[Trial], best: Trial | None) -> list[str]:
    """Writes best.yaml; what to say of it."""
    if best is None:
        return ["no trial has come to a value"]
    judged = sum(math.isfinite(t.value) for t in trials)
    value = f"{spec.metric} {best.value:.4f}"
    caution = (
        f"It is the best of {judged} trials on the validation data that chose it: on new data expect less."
        if judged > 1
        else "It is the only trial with a value: nothing was compared."
    )
    raw = best_config(spec, best)
    has_test = mapping(raw.get("data")).get("test") is not None
    says = "data.test, which no trial has seen, judges it at the end." if has_test else "Judge it on test data."
    run = raw["run"]
    file = shlex.quote(str(spec.folder / BEST))
    head = [f"# The best of the sweep {spec.name}: trial {best.number}, {value}. {caution}"]
    head += [f"# {', '.join(short(spec.space, best.point))}", f"# {says} Command: tlx train {file}"]
    write_whole(spec.folder / BEST, "".join(f"{escaped(line)}\n" for line in head) + to_yaml(raw))
    weights = shlex.quote(str(spec.run_of(best.number)))
    return [
        f"best: trial {best.number}, {value}, {escaped(', '.join(short(spec.space, best.point)))}",
        f"  {caution}",
        f"  its weights: {escaped(weights)}; tlx evaluate {escaped(weights)} --data TEST judges them",
        f"  to train it anew, as {escaped(str(run))}: tlx train {escaped(file)}"
        + (" (which looks at data.test)" if has_test else ""),
    ]


def best_config(spec: Spec, trial: Trial) -> dict[str, object]:
    """The configuration of a trial as one to train by itself: with a folder of its own, and data.test as they were."""
    raw = configs.read(spec.folder / BASE, [*spec.fixed, *trial.point])
    return {**raw, "run": f"{spec.run}-best"}


def _comparison(spec: Spec, ranked: Sequence[Trial]) -> list[str]:
    """The page of the best trials. It is a courtesy: what fails here is told, and nothing else."""
    from tlx.report.compare import compare

    folders = [spec.run_of(t.number) for t in ranked if math.isfinite(t.value)][:COMPARED]
    if not folders:
        return []
    try:
        compare(folders, out=spec.folder)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: trials were not compared ({why})\n  -> tlx report {spec.folder}/trials/*", error=True)
        return []
    return [f"the best {len(folders)} compared: {spec.folder / PAGE}; all trials: {spec.folder / TABLE}"]
