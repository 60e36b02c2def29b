"""The tasks that a configuration can name. Nothing here imports torch before a task is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from tlx.base.durations import Ratio
from tlx.base.errors import UserError, below, did_you_mean
from tlx.data.shards.targets import LABEL, Kind
from tlx.data.stream.sampling import refuse_weightless
from tlx.tasks import TargetSummary, Task, TaskData, nested

__all__ = ["classification", "multitask"]


def classification(
    data: TaskData,
    *,
    target: str = LABEL,
    objective: Annotated[Any, AfterValidator(nested.part("objective"))] | None = None,
) -> Task:
    """One class per image.

    Args:
        target: a target of kind `class`.
        objective: what is minimised; left out, the configuration's `objective`.

    Raises:
        UserError: no such target.
    """
    from tlx.tasks.classification import Classification

    own = chosen(data, target, "class", task="classification")
    counts = list(own.counts)
    made = data.objective(counts) if objective is None else nested.made("objective", objective, counts)
    partial = target != LABEL
    if partial and not callable(getattr(made, "each", None)):
        raise UserError(
            f"samples may lack {target}, and the objective gives no losses of single samples",
            todo="a method `each(logits, labels)` -> [N]; or one of tlx's own objectives",
        )
    if made.class_weights is not None:
        refuse_weightless(own.target.classes, own.counts, made.class_weights)
    return Classification(own.target, data.top_k, made, partial)


classification.metric = "top1"  # type: ignore[attr-defined]


def multitask(
    data: TaskData,
    *,
    tasks: Annotated[dict[str, Any], AfterValidator(nested.parts("task"))],
    weighting: Literal["equal", "uncertainty"] | dict[str, Annotated[Ratio, Field(ge=0)]] = "equal",
    score: dict[str, float] | None = None,
) -> Task:
    """Several tasks: a head for each on a shared backbone, their losses summed. Samples may lack targets of some.

    Each task's loss is the mean over those samples of a global batch that have its target, so that a target which few
    samples have weighs as much as one that all have.

    Args:
        tasks: by name: a task each, ``{species: classification, colour: {name: classification, target: colour}}``.
        weighting: of losses: all 1 (`equal`); by hand, ``{species: 1, colour: 0.3}``; or `uncertainty`, a learned
            variance for each task (Kendall, Gal and Cipolla 2018, arXiv:1705.07115: exp(-s) loss + s), which is a
            parameter of the head.
        score: metrics as ``TASK/METRIC`` and their weights in the sum ``val/score``, which chooses the best checkpoint
            unless `evaluate.metric` names another; left out, the mean of every task's own, those of which lower is
            better with a minus.

    Raises:
        UserError: fewer than two tasks, weights for others.
    """
    from tlx.tasks.multitask import MultiTask

    if len(tasks) < 2:
        raise UserError(f"{len(tasks)} task{'s' * (len(tasks) != 1)}: several are two or more", where="task.tasks")
    odd = next((name for name in tasks if not name.isidentifier()), None)
    if odd is not None:
        raise UserError(f'the name "{odd}" is none for a head', where="task.tasks", todo="letters, digits and _")
    made: dict[str, Task] = {}
    for name, part in tasks.items():
        try:
            made[name] = nested.made("task", part, data)
        except UserError as error:
            raise below(error, f"task.tasks.{name}")[0] from error
        if made[name].parts > 1:
            raise UserError("a task of several tasks is made of single ones", where=f"task.tasks.{name}")
    shares = dict.fromkeys(made, 1.0)
    if isinstance(weighting, dict):
        strange = next((name for name in weighting if name not in made), None)
        if strange is not None:
            what = f'there is no task "{strange}"{did_you_mean(strange, made)}'
            raise UserError(what, where="task.weighting")
        shares |= {name: float(share) for name, share in weighting.items()}
        if not any(shares.values()):
            raise UserError("every task weighs 0: there is nothing to learn from", where="task.weighting")
    task = MultiTask(made, shares, weighting == "uncertainty", score or _mean_of(made))
    for metric in task.score:
        if metric not in task.metrics or metric == "score":
            near = did_you_mean(metric, [name for name in task.metrics if "/" in name])
            raise UserError(f'there is no metric "{metric}"{near}', where="task.score")
    return task


multitask.metric = "score"  # type: ignore[attr-defined]


def _mean_of(tasks: Mapping[str, Task]) -> dict[str, float]:
    sign = {name: 1.0 if task.metrics[task.metric] else -1.0 for name, task in tasks.items()}
    return {f"{name}/{task.metric}": sign[name] / len(tasks) for name, task in tasks.items()}


def chosen(data: TaskData, target: str | None, kind: Kind, *, task: str) -> TargetSummary:
    """The target that a task is for.

    Args:
        target: its name; None takes the only one of its kind.

    Raises:
        UserError: there is none of that name and kind, or several and none is named.
    """
    fitting = [name for name, summary in data.targets.items() if summary.target.kind == kind]
    if target is None and len(fitting) == 1:
        return data.targets[fitting[0]]
    if target in fitting:
        return data.targets[target]
    there = ", ".join(f"{name} ({summary.target.kind})" for name, summary in data.targets.items()) or "none"
    hint = did_you_mean(target, fitting) if target is not None and fitting else ""
    what = f'there is no target "{target}" of kind {kind}{hint}' if target is not None else f"which target of {kind}?"
    raise UserError(
        f"{what}; the shards have: {there}",
        where="task.target",
        todo=f"task: {{name: {task}, target: NAME}}; tlx shards build --target adds some, tlx shards show lists them",
    )
