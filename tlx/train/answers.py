"""What a network told of validation pictures: kept for reports and trackers where it is the best of a phase, and at its
end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.metrics import Weights, metrics_of
from tlx.data.shards.manifest import Manifest
from tlx.runs.predictions import Part, Predictions, write
from tlx.tasks import Task
from tlx.tasks.told import Told

if TYPE_CHECKING:
    from tlx.plan.plan import Phase
    from tlx.train.run import Run


class Answers:
    """Of one evaluation, this rank's pictures: on the device they stay, until somebody wants them.

    Args:
        shards: how many pictures all ranks have together, and which.
    """

    def __init__(self, task: Task, shards: Manifest) -> None:
        self.shards = shards
        self._tell = getattr(task, "told", None)
        self._ids: list[Tensor] = []
        self._batches: list[list[Told]] = []

    def add(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        """Takes a batch, as :meth:`tlx.tasks.Meter.update` gets it."""
        if self._tell is not None:
            self._ids.append(ids)
            self._batches.append(self._tell(output.detach(), own, len(self.shards)))

    def told(self) -> tuple[NDArray[np.int64], list[Told]]:
        """Ids, and what was told of each target as arrays of the host; of no pictures nothing."""
        if not self._ids:
            return np.zeros(0, np.int64), []
        parts = []
        for of_batches in zip(*self._batches, strict=True):
            arrays = {
                name: torch.cat([told.arrays[name] for told in of_batches]).cpu().numpy()
                for name in of_batches[0].arrays
            }
            parts.append(Told(of_batches[0].about, arrays))
        return torch.cat(self._ids).cpu().numpy(), parts


def keep_answers(
    run: Run, phase: Phase, row: Mapping[str, Any], answers: Mapping[Weights, Answers], *, last: bool
) -> None:
    """Writes what was told in this evaluation, where it is the best of its phase, or the phase ends with it: every rank
    calls it, with the same row.

    What cannot be written is told, and no more.
    """
    progress = run.progress
    best = progress.phases[phase.name].get("best", {})
    wanted: dict[str, Weights] = {"best": best["weights"]} if best.get("step") == progress.step else {}
    if last:
        wanted |= {"last": "raw", "last.ema": "ema"}
    for which, weights in wanted.items():
        if weights not in answers:
            continue
        of_ranks = [given for given in run.world.gather(answers[weights].told()) if given[1]]
        if not run.world.main or not of_ranks:
            continue
        (ids, parts), shards = _in_order(of_ranks), answers[weights].shards
        about = (phase.name, which, progress.step, weights, shards.digest, shards.content, len(shards))
        try:
            write(run.saver.place().parent, Predictions(*about, metrics_of(row, weights), ids, parts))
        except OSError as error:
            run.journal.note(f"WARNING: at step {progress.step} predictions could not be written: {error}")


def _in_order(of_ranks: list[tuple[NDArray[np.int64], list[Told]]]) -> tuple[NDArray[np.int64], tuple[Part, ...]]:
    """Those of all ranks by ascending id."""
    ids = np.concatenate([ids for ids, _ in of_ranks])
    order = np.argsort(ids, kind="stable")
    parts = []
    for told in zip(*(parts for _, parts in of_ranks), strict=True):
        arrays = {name: np.concatenate([of.arrays[name] for of in told])[order] for name in told[0].arrays}
        parts.append(Part(told[0].about, arrays))
    return ids[order], tuple(parts)
