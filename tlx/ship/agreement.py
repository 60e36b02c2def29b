"""Whether an export says what the model says: by probabilities, on real pictures.

Tolerances are of probabilities (of numbers: of the network's outputs, in standard deviations). In fp32 another library
adds up in another order: 1e-7 to 3e-5 was seen. Pixels that are off by one grey level move more than 1e-3, so 1e-4 lies
between. fp16 has 11 bits: logits of about 10 are off by some 0.005. Decisions need no tolerance of their own: where all
probabilities agree, a label differs only where two of them are as close as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tlx.base.errors import UserError
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.tasks import Task
from tlx.tasks.classification import Classification
from tlx.tasks.hierarchical import Hierarchical
from tlx.tasks.multilabel import MultiLabel
from tlx.tasks.multitask import MultiTask
from tlx.tasks.semantic import Semantic
from tlx.use.model import Model

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2}

Run = Callable[[Tensor], Tensor]
"""An export as its library runs it: uint8 [n, channels, H, W] to float32 [n, outputs]."""


@dataclass(frozen=True)
class Shown:
    """Pictures as the network is shown them, and what the model says of them.

    Attributes:
        ids: int64 [n], their places in the source.
        pixels: uint8 [n, channels, H, W].
        outputs: float32 [n, outputs].
        labels: int64 [n], of a classification whose truth is known; None elsewhere.
    """

    source: Manifest | FileList
    ids: Tensor
    pixels: Tensor
    outputs: Tensor
    labels: Tensor | None = None

    def __getitem__(self, some: slice) -> Shown:
        labels = None if self.labels is None else self.labels[some]
        return Shown(self.source, self.ids[some], self.pixels[some], self.outputs[some], labels)


def batches(pixels: Tensor, most: int) -> Iterator[Tensor]:
    for at in range(0, len(pixels), most):
        yield pixels[at : at + most]


def heads_of(task: Task) -> dict[str, slice]:
    """Which columns of the network each head has; what the loss has learned beside them is no output."""
    found, start = dict[str, slice](), 0
    for name, width in task.heads.items():
        found[name] = slice(start, start + width)
        start += width
    return found


def compared(model: Model, shown: Shown, run: Run, tolerance: float) -> dict[str, Any]:
    """
    Raises:
        UserError: a probability differs by more than the tolerance, or is no number.
    """
    given = torch.cat([run(pixels) for pixels in (shown.pixels[:1], *batches(shown.pixels[1:], 32))])  # any number
    columns = sum(model.task.heads.values())
    if given.shape != (len(shown.ids), columns):
        what = f"the export gives {given.shape[1]} outputs for {len(given)} of {len(shown.ids)} pictures, not {columns}"
        raise UserError(what, todo="nothing was written; another format may do, and tlx predict does in any case")
    own, other = (_probabilities(model.task, outputs[:, :columns].double()) for outputs in (shown.outputs, given))
    apart = (own - other).abs().nan_to_num(nan=torch.inf)
    kept = model.description.kept
    decisions = zip(_decisions(model.task, shown.outputs, kept), _decisions(model.task, given, kept), strict=True)
    equal, count = sum(one == two for one, two in decisions), len(given)
    if not bool((apart <= tolerance).all()):
        first = int((apart > tolerance).any(1).nonzero()[0])
        column = int(apart[first].argmax())
        where, name = shown.source.describe(int(shown.ids[first])), model.task.outputs[column]
        raise UserError(
            f"the export does not say what the model says: of {count} pictures, {int((apart > tolerance).any(1).sum())}"
            f" differ by more than {tolerance:g}, and {count - equal} decisions; the first is {where}: {name} is "
            f"{other[first, column]:.6g}, and {own[first, column]:.6g} by the model",
            todo="nothing was written; another format may do, and tlx predict does in any case",
        )
    return {"pictures": count, "largest_difference": float(apart.max()), "equal_decisions": equal}


def _probabilities(task: Task, outputs: Tensor) -> Tensor:
    if isinstance(task, MultiTask):
        heads = heads_of(task)
        return torch.cat([_probabilities(one, outputs[:, heads[name]]) for name, one in task.tasks.items()], 1)
    if isinstance(task, Classification | Hierarchical | Semantic):
        return outputs.softmax(1)
    return outputs.sigmoid() if isinstance(task, MultiLabel) else outputs


def _decisions(task: Task, outputs: Tensor, kept: Mapping[str, Any]) -> Sequence[Any]:
    """What is told of each picture, without its numbers and without the classes behind the first."""
    return [{name: of for name, of in row.items() if _is_text(of)} for row in task.rows(outputs, kept)]


def _is_text(value: Any) -> bool:
    return all(isinstance(one, str) for one in (value if isinstance(value, list) else [value]))
