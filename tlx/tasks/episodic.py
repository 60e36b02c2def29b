"""Prototypical networks. See :func:`tlx.tasks.few_shot.episodic`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from tlx.data.shards.targets import Target
from tlx.data.stream.episodes import Episodes, by_class, draw, refuse_too_few
from tlx.tasks import Ranks, TargetSummary, Truth
from tlx.tasks.gathered import Gathered, Scores

_SEED = 0  # of episodes that judge: runs of any seed are compared on the same ones


@dataclass(frozen=True)
class Episodic:
    """Outputs are an embedding; a batch is whole episodes, in the order of :class:`Episodes`, whatever its labels say.

    Attributes:
        about: the target.
        episodes, judged: those of a step, and of an evaluation.
        novel: positions of the classes that evaluations are about; None for all.
        aux_weight: of auxiliary outputs.
    """

    about: Target
    width: int
    episodes: Episodes
    judged: Episodes
    novel: tuple[int, ...] | None
    aux_weight: float
    metric: str = "accuracy"
    shown: str | None = "accuracy"
    parts: int = 1
    constants: tuple[str, ...] = ()
    own_interval: bool = True

    @property
    def targets(self) -> Mapping[str, Target]:
        return {self.about.name: self.about}

    @property
    def heads(self) -> Mapping[str, int]:
        return {"": self.width}

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"feature {n}" for n in range(self.width))

    @property
    def metrics(self) -> Mapping[str, bool]:
        return {"loss": False, "accuracy": True, "margin_of_error": False}

    @property
    def lists(self) -> Mapping[str, Sequence[str]]:
        return {}

    @property
    def judged_by(self) -> str:
        """In words, for the plan."""
        novel = "" if self.novel is None else f", of {len(self.novel)} novel classes"
        return f"judged by {self.judged.per_epoch} episodes: {self.judged}{novel}"

    def weights(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """1 for a query and 0 for a support: a step's loss is the mean over queries."""
        place = np.arange(len(values[self.about.name])) % self.episodes.each
        return (place >= self.episodes.shots).astype(np.float64)[:, None]

    def loss(self, output: Any, truth: Truth) -> Tensor:
        main, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss = self._summed(main)
        for given in auxiliary:
            if given is not None:
                loss = loss + self.aux_weight * self._summed(given)
        return loss

    def _summed(self, output: Tensor) -> Tensor:
        logits, labels, share = self._answers(output)
        return share * cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def hits(self, output: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        logits, labels, _ = self._answers(output)
        right = (logits.argmax(2) == labels) & logits.isfinite().all(2)
        return torch.stack([right.sum(), right.new_full((), labels.numel(), dtype=torch.int64)])

    def _answers(self, output: Tensor) -> tuple[Tensor, Tensor, float]:
        """Logits [episodes, queries, ways] and labels [episodes, queries] of a batch, and what a query counts for: 1.

        Batches of a training are whole episodes. Whoever tries the task, or its memory, with fewer made-up pictures
        gets them shown again until they fill an episode, and that counts for as many as they are.
        """
        wanted, samples = self.episodes, len(output)
        episodes = -(-samples // wanted.pictures)
        whole = episodes * wanted.pictures
        if whole != samples:
            output = output[torch.arange(whole, device=output.device) % samples]
        pictures = output.float().reshape(episodes, wanted.ways, wanted.each, -1)
        logits = distances(pictures[:, :, : wanted.shots], pictures[:, :, wanted.shots :])
        labels = torch.arange(wanted.ways, device=output.device).repeat_interleave(wanted.queries)
        return logits, labels.expand(episodes, -1), samples / whole

    def refuse_held_out(self, summary: TargetSummary, where: str) -> None:
        """
        Raises:
            UserError: no episode can be drawn from samples that are to judge.
        """
        counts = np.array(summary.counts, dtype=np.int64)
        if self.novel is not None:
            counts[[c for c in range(len(counts)) if c not in self.novel]] = 0
        of = "novel classes" if self.novel is not None else "classes"
        refuse_too_few(self.about.classes, counts, self.judged, where=where, words="task.val_", of=of)

    def meter(self, device: torch.device, ranks: Ranks = Ranks()) -> EpisodicMeter:  # noqa: B008 - it is frozen
        return EpisodicMeter(self, ranks)

    def rows(self, output: Tensor, kept: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [dict(zip(self.outputs, row, strict=True)) for row in output.float().tolist()]


def distances(support: Tensor, queries: Tensor) -> Tensor:
    """Logits [episodes, ways x queries, ways], minus squared distances to the means of supports.

    Args:
        support: [episodes, ways, shots, width]; `queries`: [episodes, ways, queries, width].
    """
    prototypes = support.mean(2)
    # differences, and no product of matrices: near ones would lose their digits
    return -(queries.flatten(1, 2)[:, :, None] - prototypes[:, None]).square().sum(3)


class _Judged(NamedTuple):
    """Of one episode: the share of right queries, and the mean of their losses."""

    accuracy: float
    loss: float


class EpisodicMeter:
    """Accuracy over episodes of the pictures of all ranks, drawn by their order in the index."""

    def __init__(self, task: Episodic, ranks: Ranks) -> None:
        self._task, self._gathered = task, Gathered(ranks)

    def update(self, output: Tensor, own: Mapping[str, Tensor], ids: Tensor) -> None:
        name = self._task.about.name
        self._gathered.add(output, {name: own[name]}, ids)

    def result(self) -> dict[str, Any]:
        """See :class:`tlx.tasks.Meter`. Queries whose distances are not finite are wrong. Classes of which too few
        pictures could be read are left out; NaN where too few classes are left, or no picture has finite outputs."""
        scores = self._gathered.all()
        if not len(scores.ids):
            return {"samples": 0}
        judged = self._judged(scores)
        each = torch.tensor([one.accuracy for one in judged], dtype=torch.float64)
        nonfinite = int((~scores.finite()).sum())
        return {
            "loss": math.fsum(one.loss for one in judged) / len(judged) if judged else math.nan,
            "accuracy": float(each.mean()),
            "margin_of_error": 1.96 * float(each.std()) / math.sqrt(len(each)) if judged else math.nan,
            "samples": len(scores.ids),
            **({"nonfinite": nonfinite} if nonfinite else {}),
        }

    def _judged(self, scores: Scores) -> list[_Judged]:
        task, wanted = self._task, self._task.judged
        rows = by_class(scores.own[task.about.name].numpy())
        known = {c: own for c, own in rows.items() if task.novel is None or c in task.novel}
        enough = {c: own for c, own in known.items() if len(own) >= wanted.each}
        if len(enough) < wanted.ways or not bool(scores.finite().any()):
            return []
        drawn = (draw(enough, wanted.ways, wanted.each, seed=_SEED, number=n)[1] for n in range(wanted.per_epoch or 0))
        return [self._of(scores.output[torch.from_numpy(one)], wanted) for one in drawn]

    def _of(self, pictures: Tensor, wanted: Episodes) -> _Judged:
        """Of outputs [ways, each, width]."""
        logits = distances(pictures[None, :, : wanted.shots], pictures[None, :, wanted.shots :])[0]
        labels = torch.arange(wanted.ways).repeat_interleave(wanted.queries)
        right = (logits.argmax(1) == labels) & logits.isfinite().all(1)
        return _Judged(float(right.double().mean()), float(cross_entropy(logits.double(), labels)))
