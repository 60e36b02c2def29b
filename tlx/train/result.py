"""What a training has brought: result.json, and a few lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlx.base.console import headlines
from tlx.base.invocation import command, reproducing
from tlx.base.terminal import escaped
from tlx.data.pixels.jpeg_region import decoder
from tlx.runs.history import Evaluation, phases_of
from tlx.runs.run_files import test_values
from tlx.runs.run_folder import threads, versions

if TYPE_CHECKING:
    from tlx.plan.config import Config
    from tlx.tasks import Task
    from tlx.train.run import Run


_LISTED = 20


def headline_of(config: Config, task: Task) -> list[str] | None:
    """Metrics of an evaluation that lines for people show; None for all."""
    names = getattr(task, "headline", None)
    return None if names is None else list(dict.fromkeys((*(f"val/{name}" for name in names), config.evaluate.chooses)))


def result_of(run: Run, *, finished: bool, pruned: str | None = None) -> dict[str, Any]:
    """What a training has brought; `pruned`: why whoever chooses among trainings has ended it."""
    progress = run.progress
    return {
        "name": Path(run.config.run).name,
        "finished": finished,
        **({"pruned": pruned} if pruned is not None else {}),
        "step": progress.step,
        "best": progress.best,
        "last": progress.last,
        "test": run.tested,
        "phases": progress.phases,
        "classes": list(run.identity["classes"]),
        "headline": headline_of(run.config, run.task),
        "lists": {
            name: list(of)
            for name, of in run.task.lists.items()
            if name != "per_class" or list(of) != run.identity["classes"]
        },
        "samples_seen": progress.samples_seen,
        "replaced": progress.replaced,
        "unreadable": progress.bad,
        "nonfinite": progress.nonfinite,
        "overflows": progress.overflows,
        "wall_time_s": progress.wall_time_s,
        "extended": progress.extended,
        "world": run.world.size,
        "threads": threads(),
        "pretrained": run.config.backbone.weights != "none",
        "versions": versions(),
        "decoder": decoder(),
        "command": command(Path(run.config.run)),
        "reproduce": reproducing(Path(run.config.run), threads()) if progress.extended else None,
    }


def summary(result: Mapping[str, Any]) -> str:
    """The best and the last evaluation of each phase, what was skipped, and how long it took."""
    lines = [f"run {escaped(result['name'])}: {result['step']} steps, {result['samples_seen']:,} samples seen"]
    if result.get("pruned"):
        lines[0] += f"; pruned: {escaped(result['pruned'])}"
    if not result.get("pretrained", True):
        lines[0] += "; from scratch: the backbone began with random weights"
    for phase in phases_of(result):
        for which, found in (("best", phase.best), ("last", phase.last)):
            if found is not None:
                metrics = _metrics(found, result.get("headline"))
                lines.append(f"  {escaped(phase.name):<20} {which} at step {found.step:>6}: {metrics}")
    if result["best"]:
        best = result["best"]
        lines.append(f"  best {best['metric']} {best['value']:.4f} at step {best['step']} ({best['weights']} weights)")
    if result.get("test"):
        lines += _of_test(result)
    if result["unreadable"]:
        bad = sorted(result["unreadable"].items())
        lines.append(f"  {len(bad)} unreadable sample{'s' * (len(bad) > 1)}, replaced {result['replaced']} times:")
        lines += [f"    {escaped(where)}: {escaped(reason)}" for where, reason in bad[:_LISTED]]
        lines += [f"    ... and {len(bad) - _LISTED} more, all in result.json"] if len(bad) > _LISTED else []
    lines.append(f"  {result['wall_time_s']:.1f} s on {result['world']} rank{'s' if result['world'] > 1 else ''}")
    return "\n".join(lines)


def _of_test(result: Mapping[str, Any]) -> Iterator[str]:
    """The look at data.test, by the metrics that evaluations of the training have, with their intervals."""
    test = result["test"]
    values = test_values(result)
    texts = ((name, *("-" if of is None else f"{of:.4f}" for of in values[name])) for name in test["headline"])
    said = (f"{name} {value} ({low} to {high})" for name, value, low, high in texts)
    times = "" if test["look"] == 1 else f", look {test['look']} at these data"
    yield f"  test, {test['samples']:,} samples of {escaped(test['data'])}{times}: " + "  ".join(said)


def _metrics(found: Evaluation, headline: Sequence[str] | None) -> str:
    own = headlines(found.metrics, headline)
    shown = (f"{key} {value:.4f}" for key, value in own.items() if key != "val/samples")
    return "  ".join([*shown, *(["(EMA weights)"] if found.weights == "ema" else [])])
