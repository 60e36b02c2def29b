"""Several tasks at once: a shared backbone, a head for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.data.shards.targets import Target
from tlx.tasks import Meter, Ranks, Task, Truth, scale_of
from tlx.tasks.told import Told


@dataclass(frozen=True)
class MultiTask:
    """See :func:`tlx.tasks.kinds.multitask`.

    Attributes:
        tasks: by name; each has one head.
        shares: of each task's loss in the sum.
        learned: the sum weighs losses by learned uncertainty.
        score: metrics of an evaluation -> their weights in `score`.
    """

    tasks: Mapping[str, Task]
    shares: Mapping[str, float]
    learned: bool
    score: Mapping[str, float]
    metric: str = "score"
    shown: str | None = None

    @property
    def targets(self) -> Mapping[str, Target]:
        return {name: target for task in self.tasks.values() for name, target in task.targets.items()}

    @property
    def heads(self) -> Mapping[str, int]:
        return {name: sum(task.heads.values()) for name, task in self.tasks.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{name}/{output}" for name, task in self.tasks.items() for output in task.outputs)

    @property
    def constants(self) -> tuple[str, ...]:
        return tuple(self.tasks) if self.learned else ()

    @property
    def metrics(self) -> Mapping[str, bool]:
        own = {f"{name}/{key}": up for name, task in self.tasks.items() for key, up in task.metrics.items()}
        return {"loss": False, "score": True, **own}

    @property
    def headline(self) -> Sequence[str]:
        """The metric of each task that would choose the best checkpoint of it alone."""
        return ("loss", "score", *(f"{name}/{task.metric}" for name, task in self.tasks.items()))

    @property
    def scale(self) -> Mapping[str, Any]:
        return {name: scale for name, task in self.tasks.items() if (scale := scale_of(task))}

    @property
    def parts(self) -> int:
        return len(self.tasks)

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {f"{name}/{key}": of for name, task in self.tasks.items() for key, of in task.lists.items()}

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64] | None:
        count = len(next(iter(values.values())))
        columns = [task.weights(values) for task in self.tasks.values()]
        return np.hstack([np.ones((count, 1)) if column is None else column for column in columns])

    def loss(self, output: Any, truth: Truth) -> Tensor:
        """The sum over tasks of share * the mean over samples that have its target, times the samples of the batch.

        Where it is learned: exp(-s) times that, plus s, for a task's learned logarithm s of its variance. A task that
        no sample of the global batch has a target for adds nothing.
        """
        main, *auxiliary = output if isinstance(output, tuple) else (output,)
        plain = replace(truth, scales=None)
        total: Tensor = main.new_zeros((), dtype=torch.float32)
        variances = main[:, -len(self.tasks) :].float() if self.learned else None
        for place, (name, task, columns) in enumerate(self._columns()):
            own = tuple(o if o is None else o[:, columns] for o in (main, *auxiliary))
            scale = truth.scales[place] if truth.scales is not None else 1.0
            part = scale * task.loss(own if auxiliary else own[0], plain)
            if variances is not None:
                told = scale > 0 if isinstance(scale, Tensor) else 1.0
                log_variance = variances[:, place]
                part = torch.exp(-log_variance[0]) * part + told * log_variance.sum()
            total = total + self.shares[name] * part
        return total

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return output.new_zeros(2)

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> MultiTaskMeter:  # noqa: B008  # frozen
        return MultiTaskMeter(self, {name: task.meter(device, ranks) for name, task in self.tasks.items()})

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`; of those tasks that have it."""
        return [
            Told(about.of(name), arrays)
            for name, task, columns in self._columns()
            if (tell := getattr(task, "told", None)) is not None
            for about, arrays in tell(output[:, columns], own, samples)
        ]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        by_task = {name: task.rows(output[:, columns], _below(kept, name)) for name, task, columns in self._columns()}
        return [
            {f"{name}/{key}": value for name, rows in by_task.items() for key, value in rows[i].items()}
            for i in range(len(output))
        ]

    def _columns(self) -> Iterator[tuple[str, Task, slice]]:
        """Every task's name, itself, and which outputs are its own."""
        start = 0
        for name, task in self.tasks.items():
            stop = start + self.heads[name]
            yield name, task, slice(start, stop)
            start = stop


@dataclass(frozen=True)
class MultiTaskMeter:
    """The metrics of every task, and those of all together."""

    task: MultiTask
    meters: Mapping[str, Meter]

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        """See :meth:`tlx.tasks.Meter.update`."""
        for name, _, columns in self.task._columns():
            self.meters[name].update(output[:, columns], own, ids)

    def result(self) -> dict[str, Any]:
        """Every metric as ``TASK/METRIC``; `loss`, the sum of the tasks' by their shares, without
        those of share 0, which may be no numbers; `score`."""
        results = {name: meter.result() for name, meter in self.meters.items()}
        samples = max(result["samples"] for result in results.values())
        if not samples:
            return {"samples": 0}
        shares = self.task.shares
        loss = sum(shares[name] * result["loss"] for name, result in results.items() if shares[name])
        nonfinite = max(result.get("nonfinite", 0) for result in results.values())
        own = {
            f"{name}/{key}": value
            for name, result in results.items()
            for key, value in result.items()
            if key not in ("samples", "nonfinite")
        }
        return {
            "loss": loss,
            "score": sum(weight * own.get(key, math.nan) for key, weight in self.task.score.items()),
            "samples": samples,
            **({"nonfinite": nonfinite} if nonfinite else {}),
            **own,
        }


def _below(kept: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}/"): value for key, value in kept.items() if key.startswith(f"{name}/")}
