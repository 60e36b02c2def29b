"""Which of several is best on some pictures, and how good whatever is chosen so is on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tlx.use.judged import Interval, drawn, with_interval

RESAMPLES = 1000


@dataclass(frozen=True)
class Judged:
    """What some candidates said of the same n pictures.

    Attributes:
        hits: bool [candidates, n].
        losses: float32 [candidates, n], cross-entropy.
        labels: int64 [n].
    """

    hits: Tensor
    losses: Tensor
    labels: Tensor

    @classmethod
    def of(cls, logits: Sequence[Tensor], labels: Tensor) -> Judged:
        """Of logits [n, classes] each; what is not finite is wrong."""
        hits = [(own.argmax(1) == labels) & own.isfinite().all(1) for own in logits]
        losses = [cross_entropy(own.float(), labels, reduction="none").nan_to_num(torch.inf) for own in logits]
        return cls(torch.stack(hits), torch.stack(losses), labels)

    def beside(self, other: Judged) -> Judged:
        """Candidates of both."""
        return Judged(torch.cat([self.hits, other.hits]), torch.cat([self.losses, other.losses]), self.labels)

    def best(self, pictures: Tensor | None = None) -> int:
        """The highest accuracy, of equal ones the lowest loss.

        Args:
            pictures: bool [n], those that choose; by default all.
        """
        hits, losses = self.hits, self.losses
        if pictures is not None:
            hits, losses = hits[:, pictures], losses[:, pictures]
        right, mean = hits.sum(1), losses.double().mean(1)
        return min(range(len(hits)), key=lambda one: (-int(right[one]), float(mean[one])))

    def crossed(self, seed: int) -> Tensor:
        """float64 [n]: of each picture, whether the candidate is right that is best on the other half of the pictures.

        Its mean is an estimate of what choosing gives on new pictures: the best of many, on the pictures that chose it,
        looks too good. Halves are drawn by the seed, of each class alike.
        """
        half = halves(self.labels, seed)
        found = torch.empty(len(self.labels), dtype=torch.float64)
        for own in (half, ~half):
            found[own] = self.hits[self.best(~own)][own].double()
        return found

    def accuracies(self, resamples: int) -> list[Interval]:
        """Of each candidate, with an interval over pictures."""
        return means(self.hits.double(), resamples)


def halves(labels: Tensor, seed: int) -> Tensor:
    """bool [n], true for one half of each class; of odd ones the larger parts alternate."""
    generator, half = torch.Generator().manual_seed(seed), torch.zeros(len(labels), dtype=torch.bool)
    odd = 0
    for label in labels.unique().tolist():  # type: ignore[no-untyped-call]
        own = (labels == label).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        half[own[: (len(own) + odd) // 2]] = True
        odd ^= len(own) % 2
    return half


def means(values: Tensor, resamples: int) -> list[Interval]:
    """Of each row of float64 [some, n], with the middle 95 % over resamples of its columns."""
    points = values.mean(1).tolist()
    if not resamples:
        return [Interval(point) for point in points]
    found, count = list[Tensor](), values.shape[1]
    for block in drawn(count, resamples):
        weights = torch.zeros(block.shape, dtype=torch.float64)
        weights.scatter_add_(1, block, torch.ones_like(weights))
        found.append(values @ weights.T / count)
    return [with_interval(point, own) for point, own in zip(points, torch.cat(found, 1), strict=True)]
