"""Nearest neighbours by cosine; how many is chosen on the training pictures, each judged by the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

KS = (1, 3, 5, 10, 20)
_AT_ONCE = 1 << 24  # similarities


@dataclass(frozen=True)
class Table:
    """Features of pictures that have a class and can be read.

    Attributes:
        rows: float32 [n, width].
        labels: int64 [n].
        pictures: int64 [n], places in the index: views of one picture have the same.
    """

    rows: Tensor
    labels: Tensor
    pictures: Tensor

    def of(self, wanted: Tensor) -> Table:
        """Some of them: bool [n], or places."""
        return Table(self.rows[wanted], self.labels[wanted], self.pictures[wanted])


def chosen_k(table: Table, classes: int, ks: Sequence[int] = KS) -> int:
    """The number of neighbours with the highest accuracy when each picture is judged by all others; of equal ones the
    smallest. Views of one picture do not judge each other."""
    hits = dict.fromkeys(ks, 0)
    for block, votes in _votes(table, table, classes, ks, others=True):
        for k, of in votes.items():
            hits[k] += int((of.argmax(1) == table.labels[block]).sum())
    return max(ks, key=lambda k: (hits[k], -k))


def votes(table: Table, judged: Table, classes: int, k: int) -> Tensor:
    """float32 [n, classes]: how many of the k nearest training pictures are of each class; their mean similarity, less
    than one vote, decides between equal ones."""
    return torch.cat([of[k] for _, of in _votes(table, judged, classes, [k], others=False)])


def votes_of_others(table: Table, classes: int, k: int) -> Tensor:
    """The same for each picture of the table, by the others."""
    return torch.cat([of[k] for _, of in _votes(table, table, classes, [k], others=True)])


def _votes(
    table: Table, judged: Table, classes: int, ks: Sequence[int], *, others: bool
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Places of some pictures that are judged, and their votes [some, classes] by the number of neighbours.

    Args:
        others: pictures do not judge themselves.
    """
    keys, most = normalize(table.rows, dim=1), min(max(ks), len(table.labels))
    at_once = max(_AT_ONCE // len(table.labels), 1)
    for block in torch.arange(len(judged.labels)).split(at_once):  # type: ignore[no-untyped-call]
        near = normalize(judged.rows[block], dim=1) @ keys.T
        if others:
            near.masked_fill_(judged.pictures[block, None] == table.pictures[None], -torch.inf)
        similar, which = near.topk(most, 1)
        of_class = one_hot(table.labels[which], classes).float()
        found = {}
        for k in ks:
            weight = 1 + similar[:, :k].clamp(-1, 1) / (4 * k)
            found[k] = (of_class[:, :k] * weight[..., None].nan_to_num()).sum(1)
        yield block, found
