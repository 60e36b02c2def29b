"""What a run folder tells about a training, whether it is done, under way or was killed. Reads, never writes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlx.base.errors import UserError, did_you_mean
from tlx.base.metrics import ACCURACY as ACCURACY
from tlx.base.metrics import WEIGHTS, Metric
from tlx.base.terminal import escaped
from tlx.runs.run_files import RunFiles, items, mapping, number, whole, within

SIGNS = ("plan.json", "metrics.jsonl", "result.json", "status.json")
"""A folder with one of these is a run's."""

MOST_ROWS = 4000
"""Of training alone: more than a picture has columns of pixels for."""

_SHARES = re.compile(r"(^|_)(top\d+|map|ap|f1|per_class|thresholds)(_|$)|acc")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation with one kind of weights.

    Attributes:
        weights: raw | ema.
        metrics: by name such as ``val/top1``, without ``ema/``; NaN where not finite.
        lists: values by class, by name such as ``per_class``, accuracy of every class; None for a class that no sample
            tells about. Empty where not known.
    """

    step: int
    weights: str
    metrics: Mapping[str, float]
    lists: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """A metric that is there and finite."""
        found = self.metrics.get(name, math.nan)
        return found if math.isfinite(found) else None


@dataclass(frozen=True)
class BestRule:
    """What decides which evaluation is the best: a metric, and the weights that the run's best has."""

    metric: Metric
    weights: str = "raw"


@dataclass(frozen=True)
class Stretch:
    """One phase, as far as it has come.

    Attributes:
        stop: the step after its last one; where it is not over, the planned one.
        over: whether the phase has come to its end.
        extracts: whether it is feature extraction: the backbone's own layers are all frozen.
        last: at its end, or so far; with the weights that are the run's best.
    """

    name: str
    start: int
    stop: int
    over: bool
    extracts: bool
    best: Evaluation | None
    last: Evaluation | None


@dataclass(frozen=True)
class History:
    """One training, from the files of its run folder; what is not known is None or empty.

    Attributes:
        name: of the folder, escaped; `named` makes it differ between runs.
        rows: of metrics.jsonl, those with a step, of training alone about `MOST_ROWS`; values that are no finite
            numbers are NaN.
        step: updates done. `steps`: planned.
        phases: those that have begun.
        best: by `metric`.
        details: result.json or, before the end, what the last checkpoint knows.
        plan: plan.json as it is.
        config: config.yaml as text.
        scratch: whether the backbone began with random weights.
    """

    path: Path
    name: str
    status: str
    rows: tuple[Row, ...] = field(repr=False)
    step: int
    steps: int | None
    steps_per_epoch: int | None
    metric: str
    phases: tuple[Stretch, ...]
    best: Evaluation | None
    details: Mapping[str, Any] = field(repr=False)
    plan: Mapping[str, Any] = field(repr=False)
    config: str = field(repr=False)
    scratch: bool = False

    @property
    def accuracies(self) -> tuple[PhaseAccuracy, ...]:
        """Of the phases that have begun."""
        return accuracies(self.phases, scratch=self.scratch, metric=self.shown)

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def state(self) -> str:
        """Its status and how far it is."""
        return f"{self.status}, step {self.step}" + (f" of {self.steps}" if self.steps else "")

    @property
    def shown(self) -> str:
        """The metric that pictures and tables show: accuracy, where evaluations give it."""
        return shown_metric(self.phases, self.metric)

    @property
    def lists(self) -> dict[str, list[tuple[str, float | None]]]:
        """By name: class and value in the best evaluation; the worst first, classes without samples last."""
        names_of = {str(k): items(v) for k, v in mapping(self.details.get("lists")).items()}
        names_of.setdefault("per_class", items(self.details.get("classes")))
        found: dict[str, list[tuple[str, float | None]]] = {}
        for key, values in (self.best.lists if self.best else {}).items():
            names = [str(name) for name in names_of.get(key, ())]
            names += [f"class {i}" for i in range(len(names), len(values))]
            pairs = list(zip(names, values, strict=False))
            sign = -1 if falls(key) else 1
            found[key] = sorted(pairs, key=lambda pair: math.inf if pair[1] is None else sign * pair[1])
        return found

    @property
    def of_tasks(self) -> list[str]:
        """The metric of each of several tasks, once the run has a result."""
        return [str(name) for name in items(self.details.get("headline")) if "/" in str(name).removeprefix("val/")]

    def epoch(self, step: float) -> float:
        """A step in epochs; the step itself where the length of an epoch is not known."""
        return step / (self.steps_per_epoch or 1)

    def number(self, name: str) -> float | None:
        """A finite number of `details`."""
        found = number(self.details.get(name))
        return found if math.isfinite(found) else None


def read_history(path: Path) -> History:
    """Reads a run folder, finished or not.

    Raises:
        UserError: it is not a run folder.
    """
    _check(path)
    files = RunFiles(path)
    rows = tuple(map(_row, files.rows(most=MOST_ROWS)))
    plan, written, config = files.plan, files.result, files.config
    result = {} if written.get("finished") is False else written  # one that is not tells of unreadable samples alone
    details = written or _of_checkpoint(files.checkpoint)
    metric = Metric.of(str(mapping(config.get("evaluate")).get("metric", ACCURACY)))
    best = _with_classes(_best_of_result(result) or _best(rows, BestRule(metric)), details)
    step = max([int(r["step"]) for r in rows] + [whole(details.get("step")) or 0])
    rule = BestRule(metric, best.weights if best else "raw")
    return History(
        path=path,
        name=escaped(path.resolve().name),
        status="done" if result else str(files.status.get("status", "unknown")),
        rows=rows,
        step=step,
        steps=whole(plan.get("steps")) if not result else step,
        steps_per_epoch=_epoch_length(plan, rows),
        metric=str(mapping(result.get("best")).get("metric", metric.name)),
        phases=_phases(rows, plan, result, rule=rule),
        best=best,
        details=details,
        plan=plan,
        config=files.config_text,
        scratch=mapping(config.get("backbone")).get("weights") == "none",
    )


def named(histories: Sequence[History]) -> list[str]:
    """A name for each run, as short as may be: folders of the same name get those above them in front."""
    parts = [h.path.resolve().parts for h in histories]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = [escaped("/".join(p[-length:])) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def shown(metric: str, value: float | None) -> str:
    """A value for people: accuracies in percent."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.2f} %" if is_share(metric) else f"{value:#.4g}"


def falls(key: str) -> bool:
    """Whether values of a list are better when they are lower."""
    return not Metric(f"val/{key.removesuffix('_by_column')}").higher_is_better


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is read in percent: accuracies, precision, F1."""
    return _SHARES.search(metric.rpartition("/")[2]) is not None


@dataclass(frozen=True)
class PhaseAccuracy:
    """Validation accuracy of one phase, or what a task has in its place: what charts, tables, summaries and trackers
    show of it.

    Attributes:
        kind: feature extraction | fine-tuning | from scratch.
        best: in the phase's best evaluation, by the run's metric. last: at its end, or so far, with the weights (raw or
            averaged) that are the run's best. Best is to be compared with best, last with last.
    """

    phase: str
    kind: str
    best: float | None
    last: float | None
    over: bool
    metric: str = ACCURACY

    @property
    def label(self) -> str:
        """The phase's name, and what it is where the name does not tell."""
        tells = self.kind == "fine-tuning" or self.phase == self.kind.replace(" ", "_")
        return self.phase if tells else f"{self.phase} ({self.kind})"


def shown_metric(phases: Iterable[Stretch], chooses: str) -> str:
    """Accuracy, where evaluations give it; else the metric that chooses the best."""
    evaluations = [e for p in phases for e in (p.best, p.last) if e is not None]
    return ACCURACY if not evaluations or any(ACCURACY in e.metrics for e in evaluations) else chooses


def accuracies(
    phases: Iterable[Stretch], *, scratch: bool = False, metric: str = ACCURACY
) -> tuple[PhaseAccuracy, ...]:
    """Best and last validation accuracy of each phase that has one.

    Args:
        scratch: the backbone began with random weights, so that nothing is extracted or tuned.
    """
    found = (
        PhaseAccuracy(
            phase=p.name,
            kind="from scratch" if scratch else "feature extraction" if p.extracts else "fine-tuning",
            best=p.best.value(metric) if p.best else None,
            last=p.last.value(metric) if p.last else None,
            over=p.over,
            metric=metric,
        )
        for p in phases
    )
    return tuple(a for a in found if (a.best, a.last) != (None, None))


def article_reading(found: Sequence[PhaseAccuracy]) -> tuple[float, float] | None:
    """The two numbers that the Flowers-102 article sets side by side: the last of feature extraction and the best of
    the phases after it. Not like with like, and shown only beside `accuracies`; None where a run has not both."""
    told = [a for a in found if a.metric == ACCURACY]
    before = [a.last for a in told if a.kind == "feature extraction" and a.last is not None]
    after = [a.best for a in told if a.kind == "fine-tuning" and a.best is not None]
    return (before[-1], max(after)) if before and after else None


def phases_of(result: Mapping[str, Any]) -> tuple[Stretch, ...]:
    """The phases that result.json tells of."""
    best = mapping(result.get("best"))
    rule = BestRule(Metric.of(str(best.get("metric", ACCURACY))), str(best.get("weights", "raw")))
    return _phases((), {}, result, rule=rule)


def _check(path: Path) -> None:
    if _is_run(path):
        return
    if not path.is_dir():
        what, below = "there is no such folder" if not path.exists() else "this is a file, not a run folder", []
    else:
        what, below = f"this is not a run folder: it has none of {', '.join(SIGNS)}", _runs_in(path)
    if below:
        todo = "give the runs in it: " + " ".join(str(path / name) for name in below[:20])
    else:
        beside = _runs_in(path.resolve().parent)
        hint = did_you_mean(path.resolve().name, beside).removeprefix("; ")
        todo = f"give the folder that run: names in the configuration{'; ' + hint if hint else ''}"
    raise UserError(what, where=str(path), todo=todo)


def _is_run(path: Path) -> bool:
    return any((path / sign).is_file() for sign in SIGNS)


def _runs_in(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and _is_run(p))
    except OSError:
        return []


def _of_checkpoint(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the newest checkpoint knows, in the words of result.json."""
    progress = mapping(state.get("progress"))
    if not progress:
        return {}
    classes = items(mapping(state.get("identity")).get("classes"))
    return {**progress, "classes": classes, "lists": state.get("lists"), "unreadable": progress.get("bad")}


def _phases(
    rows: Sequence[Row], plan: Mapping[str, Any], result: Mapping[str, Any], *, rule: BestRule
) -> tuple[Stretch, ...]:
    """The phases that have begun. Where one ended before its time, the rows and the result know, the plan does not."""
    results = {str(k): mapping(v) for k, v in mapping(result.get("phases")).items()}
    planned = {str(p.get("name")): p for p in within(plan, "phases")}
    by_name: dict[str, list[Row]] = {name: [] for name in results}
    for row in rows:
        by_name.setdefault(str(row.get("phase", "")), []).append(row)
    phases: list[Stretch] = []
    for at, (name, own) in enumerate(by_name.items()):
        about = planned.get(name, {}) | {k: v for k, v in results.get(name, {}).items() if k in ("start", "stop")}
        reached = max([int(r["step"]) for r in own], default=0)
        after = at + 1 < len(by_name) or bool(result)
        stop = reached if after and own else max(whole(about.get("stop")) or 0, reached)
        phases.append(
            Stretch(
                name=name,
                start=phases[-1].stop if phases else whole(about.get("start")) or 0,
                stop=stop,
                over=after or reached >= stop,
                extracts=_extracts(about, plan, first=at == 0 and len(by_name) > 1),
                best=_of_result(results.get(name, {}).get("best")) or _best(own, rule),
                last=_of_result(results.get(name, {}).get("last"), weights=rule.weights) or _last(own, rule.weights),
            )
        )
    return tuple(phases)


def _extracts(phase: Mapping[str, Any], plan: Mapping[str, Any], *, first: bool) -> bool:
    """Without a plan to tell, the first of several phases counts as feature extraction."""
    own = {str(y.get("name")) for y in within(plan, "layers") if y.get("role") == "backbone"}
    layers = mapping(phase.get("layers"))
    if not own or not layers:
        return first
    return all(mapping(layers.get(name)).get("trains") == "frozen" for name in own)


def _best(rows: Iterable[Row], rule: BestRule) -> Evaluation | None:
    """The best evaluation, by the rule of training."""
    found: Evaluation | None = None
    for row in rows:
        for weights in WEIGHTS:
            now = _evaluation(row, weights)
            score = rule.metric.score(now.metrics)
            than = rule.metric.score(found.metrics) if found else None
            if score is not None and rule.metric.better(score, than):
                found = now
    return found


def _last(rows: Sequence[Row], weights: str) -> Evaluation | None:
    for row in reversed(rows):
        for kind in dict.fromkeys((weights, "raw", "ema")):
            found = _evaluation(row, kind)
            if found.metrics:
                return found
    return None


def _evaluation(row: Mapping[str, Any], weights: str) -> Evaluation:
    prefix = "ema/val/" if weights == "ema" else "val/"
    own = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
    metrics = {f"val/{k}": number(v) for k, v in own.items() if not isinstance(v, list)}
    lists = {
        k: tuple(s if math.isfinite(number(s)) else None for s in v) for k, v in own.items() if isinstance(v, list)
    }
    return Evaluation(whole(row.get("step")) or 0, weights, metrics, lists)


def _of_result(found: Any, *, weights: str | None = None) -> Evaluation | None:
    """A phase's ``best``, which says its weights and has no ``ema/``, or its ``last``, which has both."""
    row = mapping(found)
    if weights is None:
        made = _evaluation(row, "raw")
        made = Evaluation(made.step, str(row.get("weights", "raw")), made.metrics, made.lists)
        return made if made.metrics else None
    return next((e for e in (_evaluation(row, w) for w in (weights, "raw")) if e.metrics), None)


def _best_of_result(result: Mapping[str, Any]) -> Evaluation | None:
    best = mapping(result.get("best"))
    if not best:
        return None
    metrics = {str(best.get("metric")): number(best.get("value"))}
    return Evaluation(whole(best.get("step")) or 0, str(best.get("weights", "raw")), metrics)


def _with_classes(best: Evaluation | None, details: Mapping[str, Any]) -> Evaluation | None:
    """Adds the other metrics and the accuracy of the classes, which only the phases' bests hold."""
    for phase in mapping(details.get("phases")).values():
        own = _of_result(mapping(phase).get("best"))
        if best and own and (own.step, own.weights) == (best.step, best.weights):
            return Evaluation(best.step, best.weights, {**own.metrics, **best.metrics}, own.lists)
    return best


def _epoch_length(plan: Mapping[str, Any], rows: Sequence[Row]) -> int | None:
    ratios = [r["step"] / r["epoch"] for r in rows if isinstance(r.get("epoch"), float) and r["epoch"] > 0]
    found = ratios[-1] if ratios and math.isfinite(ratios[-1]) else 0
    return whole(plan.get("steps_per_epoch")) or round(found) or None


def _row(row: Mapping[str, Any]) -> Row:
    return {k: str(v) if k == "phase" else number(v) for k, v in row.items()}
