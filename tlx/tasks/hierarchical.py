"""Classes that form a tree. See :func:`tlx.tasks.kinds.hierarchical`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.data.shards.targets import Target
from tlx.tasks import Ranks, Truth
from tlx.tasks.constants import Constant
from tlx.tasks.gathered import Gathered, mean
from tlx.tasks.mixing import summed
from tlx.tasks.told import About, Told, of_classes
from tlx.tasks.tree import Tree


@dataclass(frozen=True)
class Hierarchical:
    """One softmax over the leaves of a tree; a node has the probability of the leaves below it.

    Attributes:
        about: the target.
        tree: of its classes.
        alpha: how much less a level weighs than the one above it.
        aux_weight: of auxiliary outputs.
    """

    about: Target
    tree: Tree
    alpha: float
    aux_weight: float
    metric: str = "top1"
    shown: str | None = "top1"
    parts: int = 1
    constants: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        return self.about.name

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.target: self.about}

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": len(self.tree.leaves)}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(self.tree.names[i] for i in self.tree.leaves)

    @property
    def metrics(self) -> Mapping[str, bool]:
        levels = {f"level{depth}_top1": True for depth in range(1, self.tree.depth + 1)}
        return {"loss": False, "top1": True, **levels, "distance": False}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {"per_class": self.outputs}

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """1 for a sample that has a class, of whatever level."""
        return (values[self.target] >= 0).astype(np.float64)[:, None]

    def loss(self, output: Any, truth: Truth) -> Tensor:
        return summed(self.each, output, truth, self.target, self.aux_weight)

    def each(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample, float32 [m]; 0 without a class."""
        known = target >= 0
        log_leaves = torch.where(known[:, None], output.float(), 0.0).log_softmax(1)
        loss, above = torch.zeros_like(log_leaves[:, 0]), torch.zeros_like(log_leaves[:, 0])
        for depth in range(1, self.tree.depth + 1):
            here = self.log_probability(log_leaves, target, depth)
            loss = loss - math.exp(-self.alpha * (depth - 1)) * (here - above)
            above = here
        return torch.where(known, loss, 0.0)

    def log_probability(self, log_leaves: Tensor, target: Tensor, depth: int) -> Tensor:
        """Of the target's ancestor at a depth, or of the target itself where it is not as deep; [m].

        Args:
            log_leaves: [m, leaves].
        """
        lines, depths = self._class_lines.on(target.device), self._class_depths.on(target.device)
        level = depths[target].clamp(max=depth)
        below = self._leaf_lines.on(target.device)[level] == lines[level, target][:, None]
        return torch.where(below, log_leaves, -math.inf).logsumexp(1)

    @cached_property
    def _class_lines(self) -> Constant:
        """int64 [depth + 1, classes + 1]: the nodes on the way to each class; to "no class" (-1) there is only the
        root."""
        return Constant(torch.tensor([*map(self.tree.line, [*self.tree.classes, ()])]).T.contiguous())

    @cached_property
    def _class_depths(self) -> Constant:
        return Constant(torch.tensor([*map(len, self.tree.classes), 0]))

    @cached_property
    def _leaf_lines(self) -> Constant:
        """int64 [depth + 1, leaves]."""
        return Constant(self._class_lines.on(torch.device("cpu"))[:, list(self.tree.leaves)].contiguous())

    @cached_property
    def _leaf_of(self) -> Constant:
        """int64 [classes + 1]: a class's place among the leaves, -1 for other classes, and for none."""
        place = {i: leaf for leaf, i in enumerate(self.tree.leaves)}
        return Constant(torch.tensor([*(place.get(i, -1) for i in range(len(self.tree.classes))), -1]))

    @cached_property
    def _heights(self) -> Constant:
        return Constant(torch.tensor(self.tree.heights))

    def nodes(self, probabilities: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The likeliest node of a depth, as the tree counts them, and its probability; both [m].

        Args:
            probabilities: of leaves, [m, leaves], on the CPU, where sums have one order.
        """
        at_depth = [node for node, path in enumerate(self.tree.nodes) if len(path) == depth]
        first = at_depth[0]  # they follow each other
        line = self._leaf_lines.on(probabilities.device)[depth]
        deep = (line >= first) & (line < first + len(at_depth))
        sums = probabilities.new_zeros(len(probabilities), len(at_depth))
        sums.index_add_(1, line[deep] - first, probabilities[:, deep])
        likely = sums.max(1)
        return likely.indices + first, likely.values

    def places(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of targets [m]: the place among the leaves, or -1; the nodes on the way there, [depth + 1, m]; the depth."""
        tensors = (c.on(target.device) for c in (self._leaf_of, self._class_lines, self._class_depths))
        leaf_of, lines, depths = tensors
        return leaf_of[target], lines[:, target], depths[target]

    def right(self, leaf: Tensor, target: Tensor) -> Tensor:
        """Whether predicted leaves [m] are the target, or below it; bool [m]."""
        depth = self._class_depths.on(target.device)[target]
        lines = self._leaf_lines.on(target.device), self._class_lines.on(target.device)
        return (lines[0][depth, leaf] == lines[1][depth, target]) & (target >= 0)

    def distance(self, leaf: Tensor, target: Tensor) -> Tensor:
        """The height of the lowest common ancestor of predicted leaves [m] and the target, 0 for one below it."""
        lines = self._leaf_lines.on(target.device)[:, leaf], self._class_lines.on(target.device)[:, target]
        last = (lines[0] == lines[1]).sum(0) - 1  # they part once
        common = lines[1].gather(0, last[None])[0]
        return torch.where(self.right(leaf, target), 0, self._heights.on(target.device)[common])

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Samples whose predicted leaf is the target, or below it."""
        finite = output.isfinite().all(1)
        nodes = own[self.target]
        return torch.stack([(self.right(output.argmax(1), nodes) & finite).sum(), (nodes >= 0).sum()])

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> HierarchicalMeter:  # noqa: B008 - it is frozen
        return HierarchicalMeter(self, ranks)

    def told(self, output: Tensor, own: Mapping[str, Tensor], samples: int) -> list[Told]:
        """See :class:`tlx.tasks.Task`; of leaves: pictures whose class is no leaf have no truth."""
        about, truth = About("class", self.outputs, self.target), self.places(own[self.target])[0]
        return [of_classes(about, output.float().softmax(1), output.argmax(1), truth, samples)]

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        probabilities = output.detach().cpu().double().softmax(1)
        likely = probabilities.max(1)
        rows: list[dict[str, Any]] = [
            {"label": self.outputs[leaf], "probability": probability}
            for leaf, probability in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        ]
        for depth in range(1, self.tree.depth + 1):
            nodes, sums = self.nodes(probabilities, depth)
            for row, node, probability in zip(rows, nodes.tolist(), sums.tolist(), strict=True):
                row |= {f"level{depth}": self.tree.name(node), f"level{depth}_probability": probability}
        return rows


class HierarchicalMeter:
    """Metrics of one evaluation; see :func:`tlx.tasks.kinds.hierarchical`. What is gathered of a sample does not grow
    with the number of leaves."""

    def __init__(self, task: Hierarchical, ranks: Ranks) -> None:
        self._task = task
        self._gathered = Gathered(ranks)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        task, target = self._task, own[self._task.target].cpu()
        logits = output.detach().cpu().double()
        probabilities = logits.softmax(1)
        judged = {
            "class": target,
            "leaf": logits.argmax(1),
            "nodes": torch.stack([task.nodes(probabilities, d)[0] for d in range(1, task.tree.depth + 1)], 1),
            "loss": -task.log_probability(logits.log_softmax(1), target, task.tree.depth),
        }
        finite = logits.isfinite().all(1, keepdim=True)
        self._gathered.add(torch.where(finite, 0.0, math.nan), judged, ids)

    def result(self) -> dict[str, Any]:
        """See :class:`tlx.tasks.Meter`. Outputs that are not finite count as wrong, at the distance of the root."""
        scores, task = self._gathered.all(), self._task
        if not len(scores.ids):
            return {"samples": 0}
        target, finite = scores.own["class"], scores.finite()
        known = (target >= 0) & finite.any()  # an evaluation without any answer is no evaluation
        distance = torch.where(finite, task.distance(scores.own["leaf"], target), task.tree.heights[0])
        nonfinite = int((~finite).sum())
        return {
            "loss": mean(torch.where(finite, scores.own["loss"], math.nan), known),
            **self._accuracies(target[known], scores.own["leaf"][known], scores.own["nodes"][known], finite[known]),
            "distance": mean(distance, known),
            "samples": len(target),
            **({"nonfinite": nonfinite} if nonfinite else {}),
        }

    def _accuracies(self, target: Tensor, leaf: Tensor, nodes: Tensor, finite: Tensor) -> dict[str, Any]:
        true_leaf, lines, depths = self._task.places(target)
        of_leaf = true_leaf >= 0
        right = (leaf == true_leaf) & finite
        count = len(self._task.tree.leaves)
        totals, hits = (true_leaf[chosen].bincount(minlength=count).tolist() for chosen in (of_leaf, right))
        levels = {
            f"level{depth}_top1": mean((nodes[:, depth - 1] == lines[depth]) & finite, depths >= depth)
            for depth in range(1, self._task.tree.depth + 1)
        }
        shares = [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]
        return {"top1": mean(right, of_leaf), **levels, "per_class": shares}
