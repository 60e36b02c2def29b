"""Pictures with the same content, within a split and across splits.

``find_duplicates(records) -> groups``; ``Duplicates`` says what they mean and names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Copy:
    """One of several pictures with the same content."""

    split: str
    label: str
    name: str

    def __str__(self) -> str:
        return f"{self.split}: {self.name}"


@dataclass(frozen=True)
class Duplicates:
    """Groups of pictures with the same content (see `tlx.data.shards.examine.content_digest`)."""

    groups: tuple[tuple[Copy, ...], ...] = ()

    @property
    def across(self) -> tuple[tuple[Copy, ...], ...]:
        """Groups with copies in several splits: what is trained on is also measured on."""
        return tuple(g for g in self.groups if len({c.split for c in g}) > 1)

    @property
    def contradicting(self) -> tuple[tuple[Copy, ...], ...]:
        """Groups whose copies have different labels."""
        return tuple(g for g in self.groups if len({c.label for c in g}) > 1)

    def plain(self) -> list[list[dict[str, str]]]:
        """As JSON can say it."""
        return [[asdict(copy) for copy in group] for group in self.groups]

    @staticmethod
    def read(said: Iterable[Iterable[Mapping[str, str]]]) -> Duplicates:
        """From `plain`."""
        return Duplicates(tuple(tuple(Copy(**copy) for copy in group) for group in said))

    def within(self, split: str) -> tuple[tuple[Copy, ...], ...]:
        """The copies that one split holds more than once."""
        own = (tuple(c for c in g if c.split == split) for g in self.groups)
        return tuple(g for g in own if len(g) > 1)


def find_duplicates(records: Mapping[str, NDArray[np.void]]) -> list[list[tuple[str, int]]]:
    """Groups of (split, row) whose digests are equal, in the order of their first members.

    Args:
        records: split -> `tlx.data.shards.statistics.FACT`.
    """
    splits = list(records)
    digests = np.concatenate([r["digest"].reshape(-1, 2) for r in records.values()])
    owner = np.repeat(np.arange(len(splits)), [len(r) for r in records.values()])
    row = np.concatenate([np.arange(len(r)) for r in records.values()])
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    starts = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)) == 1)
    stops = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)) == -1) + 1
    groups = [order[a:b] for a, b in zip(starts, stops, strict=True)]
    return [[(splits[owner[i]], int(row[i])) for i in g] for g in sorted(groups, key=lambda g: int(g[0]))]
