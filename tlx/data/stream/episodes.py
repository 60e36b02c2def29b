"""Episodes: a few classes, a few pictures of each to learn from (supports), and others of them to judge (queries).

As Vinyals et al. 2016 and Snell et al. 2017 have it. Which classes and pictures an episode has follows from a seed and
its number alone, so that it is the same on any number of ranks, and after any stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError
from tlx.data.stream.order import Ids, derive, micro_batch_sizes, permutation

_NAMED = 8  # classes in a message


@dataclass(frozen=True)
class Episodes:
    """Of one kind, and how a training epoch consists of them.

    Attributes:
        ways: classes of an episode.
        shots, queries: pictures of each class that are learned from, and that judge.
        per_epoch, per_step: episodes; None until the data are known.
        left_out: classes that no episode has.
    """

    ways: int
    shots: int
    queries: int
    per_epoch: int | None = None
    per_step: int | None = None
    left_out: tuple[int, ...] = ()

    @property
    def each(self) -> int:
        """Pictures of a class."""
        return self.shots + self.queries

    @property
    def pictures(self) -> int:
        """Of an episode. A class follows another one, and its supports come before its queries."""
        return self.ways * self.each

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot, {self.queries} quer{'ies' if self.queries > 1 else 'y'} a class"

    def taking(self, counts: Ids) -> Ids:
        """Of pictures by class, those that episodes are drawn from; int64 [classes]."""
        taken = np.array(counts, dtype=np.int64)
        taken[list(self.left_out)] = 0
        return taken


def draw(rows: Mapping[int, Ids], ways: int, each: int, *, seed: int, number: int) -> tuple[list[int], Ids]:
    """The classes of an episode, and int64 [ways, each], pictures of them.

    Args:
        rows: pictures by class; at least `ways` classes, of at least `each` pictures.
        number: of the episode.
    """
    present = np.array(sorted(rows))
    classes = present[permutation(derive(seed, "episode", number), len(present))[:ways]].tolist()
    drawn = [rows[c][permutation(derive(seed, "episode", number, c), len(rows[c]))[:each]] for c in classes]
    return classes, np.stack(drawn)


def by_class(labels: NDArray[np.integer], left_out: Sequence[int] = ()) -> dict[int, Ids]:
    """Places of `labels` by class, ascending; without those of no class (-1), and of classes that are left out."""
    order = np.argsort(labels, kind="stable")
    present, firsts = np.unique(labels[order], return_index=True)
    rows = np.split(order, firsts[1:]) if len(present) else []
    return {c: own for c, own in zip(present.tolist(), rows, strict=True) if c not in (-1, *left_out)}


def too_few(names: Sequence[str], counts: Sequence[int] | Ids, each: int) -> str | None:
    """The classes that have pictures, and fewer than `each`, with their numbers: the smallest first."""
    few = sorted((int(count), name) for name, count in zip(names, counts, strict=True) if 0 < count < each)
    more = f", and {len(few) - _NAMED} more classes" if len(few) > _NAMED else ""
    return ", ".join(f"{name} {count}" for count, name in few[:_NAMED]) + more if few else None


def refuse_too_few(names: Sequence[str], counts: Ids, wanted: Episodes, *, where: str, words: str, of: str) -> None:
    """
    Args:
        counts: pictures by class that episodes are drawn from.
        words: the keys for ways, shots and queries end with these; `of`: whose pictures they are.

    Raises:
        UserError: classes of too few pictures, or fewer classes than ways.
    """
    present = int(np.count_nonzero(counts))
    few = too_few(names, counts, wanted.each)
    if few is not None:
        what = f"{of}: {wanted.shots} shots and {wanted.queries} queries take {wanted.each} pictures of a class: {few}"
        todo = f"fewer {words}shots or {words}queries, more pictures of these classes, or shards without them"
        raise UserError(what, where=where, todo=todo)
    if present < wanted.ways:
        what = f"{of}: an episode of {wanted.ways} ways, and {present} class{'es' if present != 1 else ''} to draw from"
        raise UserError(what, where=where, todo=f"fewer {words}ways, or more classes")


def refuse_split(episodes: Episodes, batch: int, *, world: int, micro_batch: int | None) -> None:
    """
    Raises:
        UserError: ranks, or micro-batches of a rank, would get parts of an episode: its prototypes need all of it.
    """
    own, rest = divmod(batch, episodes.pictures)
    size = (
        f"{episodes.pictures} pictures ({episodes.ways} ways x ({episodes.shots} shots + {episodes.queries} queries))"
    )
    if rest:
        whole = episodes.pictures * max(own, 1)
        what = f"{batch} pictures are no whole number of episodes of {size}"
        todo = f"data.batch={whole}" + (f" or {whole + episodes.pictures}" if own else "")
        raise UserError(what, where="data.batch", todo=todo)
    if own % world:
        what = f"a step's {own} episode{'s' if own > 1 else ''} cannot be dealt to {world} ranks, each whole"
        more = episodes.pictures * world * -(-own // world)
        raise UserError(what, where="data.batch", todo=f"data.batch={more}, or as many ranks as divide {own}")
    least, most = micro_batch_sizes(batch, world, micro_batch)
    if least != most or most % episodes.pictures:
        fits = [n for n in range(1, own // world + 1) if not own // world % n]
        what = f"micro-batches of {least if least == most else f'{least} and {most}'} pictures split episodes of {size}"
        sizes = ", ".join(str(n * episodes.pictures) for n in fits)
        raise UserError(what, where="loop.micro_batch", todo=f"one of {sizes}, or leave it out")


class EpisodeOrder:
    """The order of one epoch of episodes; see :class:`tlx.data.stream.order.EpochOrder`.

    Any position costs the same: what the draw of its episode does.

    Args:
        rows: pictures by class, of those classes that episodes may have.
        seed: of the training.
        stops: of each shard, the picture after its last one.
    """

    def __init__(self, rows: Mapping[int, Ids], episodes: Episodes, seed: int, epoch: int, stops: Ids) -> None:
        assert episodes.per_epoch is not None
        self.epoch, self._rows, self._episodes, self._stops = epoch, rows, episodes, stops
        # another one than that by which evaluations are drawn
        self._seed, self._count = derive(seed, "training episodes"), episodes.per_epoch
        self._drawn: dict[int, Ids] = {}

    def __len__(self) -> int:
        return self._count * self._episodes.pictures

    def ids(self, start: int, stop: int) -> Ids:
        """The pictures at positions start..stop-1 of this epoch, int64."""
        first, last = start // self._episodes.pictures, -(-stop // self._episodes.pictures)
        # kept for the next micro-batch, or call, that asks for a part of the same step
        self._drawn = {n: self._drawn[n] if n in self._drawn else self._episode(n) for n in range(first, last)}
        whole = np.concatenate([np.zeros(0, np.int64), *self._drawn.values()])
        begin = first * self._episodes.pictures
        return whole[start - begin : stop - begin]

    def turns(self, start: int, stop: int) -> Ids:
        """Which episode of the epoch each position is of, int64: a picture that comes in several of them is shown
        anew in each."""
        return np.arange(start, stop, dtype=np.int64) // self._episodes.pictures

    def shards_for(self, start: int, stop: int, slots: range | None = None) -> list[int]:
        """The shards that positions start..stop-1 need, in the order in which they are first needed: those of the
        first episodes exactly, then all others, of which each is soon needed by some episode. Whatever the slots."""
        near = self.ids(start, min(stop, start + _NEAR * self._episodes.pictures))
        first = np.searchsorted(self._stops, near, side="right").tolist()
        return list(dict.fromkeys((*first, *range(len(self._stops)))))

    def _episode(self, number: int) -> Ids:
        wanted = self._episodes
        number += self.epoch * self._count
        return draw(self._rows, wanted.ways, wanted.each, seed=self._seed, number=number)[1].ravel()


_NEAR = 20  # episodes whose shards are looked up
