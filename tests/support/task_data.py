"""Tasks made as a configuration makes them, and evaluations of them on simulated ranks."""

from __future__ import annotations

import math

import torch
from simulated_ranks import on_ranks

from tlx.base import plug
from tlx.data.shards.targets import Target
from tlx.tasks import TargetSummary, TaskData
from tlx.tasks.objectives import cross_entropy

NAN = math.nan


def of_class(*classes, name="label"):
    return TargetSummary(Target(name, "class", classes), counts=(1,) * len(classes), known=len(classes))


def of_numbers(name, mean, std, known=10):
    known = (known,) * len(mean) if isinstance(known, int) else known
    return TargetSummary(Target(name, "number", width=len(mean)), known=known, mean=tuple(mean), std=tuple(std))


def make(kind, *summaries, **given):
    """The task, from arguments as YAML gives them."""
    part = plug.find("task", kind)
    data = TaskData({s.target.name: s for s in summaries}, samples=10, top_k=5, objective=cross_entropy)
    return part(data, **plug.arguments(part, given, label=f"task {kind}"))


def evaluated(task, output, target, ranks=1, ids=None):
    """The result of an evaluation that is dealt to ranks; all of them have the same."""
    ids = torch.arange(len(output)) * 3 % 1000 if ids is None else ids
    own = {next(iter(task.targets)): target}

    def evaluate(ranks, batches):
        meter = task.meter(torch.device("cpu"), ranks)
        for batch in batches:
            meter.update(output[batch], {name: values[batch] for name, values in own.items()}, ids[batch])
        return meter.result()

    first, *others = on_ranks(ranks, evaluate, len(output))
    assert all(repr(other) == repr(first) for other in others)
    return first
