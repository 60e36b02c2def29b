"""Tasks of users that do what no task may; each is a regression in all else."""

from __future__ import annotations

from typing import Any

import numpy as np

from tlx.tasks import Ranks
from tlx.tasks.kinds import regression


class Odd:
    """Another task, but for what is said."""

    def __init__(self, task: Any, **own: Any) -> None:
        self.__dict__ |= own
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__dict__.get("without", ()):
            raise AttributeError(name)
        return getattr(self._task, name)


def _of_age(data, **own: Any) -> Odd:
    task = regression(data, target="age")
    return Odd(task, **{name: make(task) if callable(make) else make for name, make in own.items()})


def mean(data):
    return _of_age(data, loss=lambda task: lambda output, truth: task.loss(output, truth) / len(output))


def contradicting(data):
    """A metric whose name says that lower is better."""
    return _of_age(data, metrics={"loss": False, "mae": True, "rmse": False, "r2": True})


def without_loss(data):
    return _of_age(data, metrics={"mae": False})


def without_rows(data):
    return _of_age(data, without=("rows",))


def without_heads(data):
    return _of_age(data, without=("heads", "parts"))


def flat_weights(data):
    return _of_age(data, weights=lambda task: lambda values: np.ones(len(values["age"])))


def more_outputs(data):
    return _of_age(data, heads={"": 3})


def no_metric(data):
    """The one that chooses the best checkpoint is none."""
    return _of_age(data, metric="accuracy")


def other_target(data):
    return _of_age(data, targets=lambda task: {**task.targets, "agee": task.targets["age"]})


def flat_hits(data):
    return _of_age(data, hits=lambda task: lambda output, own: output.sum())


def one_row(data):
    return _of_age(data, rows=lambda task: lambda output, kept: {})


def lacking(data):
    """The meter gives no r2."""
    return _of_age(data, meter=lambda task: lambda device, ranks=Ranks(): Lacking(task.meter(device, ranks)))  # noqa: B008


class Lacking:
    def __init__(self, meter) -> None:
        self.update, self.meter = meter.update, meter

    def result(self):
        return {name: value for name, value in self.meter.result().items() if name != "r2"}


def raising(data):
    return _of_age(data, weights=lambda task: lambda values: 1 / 0)


def nothing(data):
    return None


for part in (
    mean,
    contradicting,
    without_loss,
    without_rows,
    without_heads,
    flat_weights,
    more_outputs,
    no_metric,
    other_target,
    flat_hits,
    one_row,
    lacking,
    raising,
    nothing,
):
    part.metric = "accuracy" if part is no_metric else "mae"
