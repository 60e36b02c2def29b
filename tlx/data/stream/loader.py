"""What the workers do: pictures of a micro-batch, written to a slot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import TlxError
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList, InMemory
from tlx.data.stream.order import Ids, derive, permuted
from tlx.data.stream.randomness import own_randomness
from tlx.data.stream.reader import BadSample
from tlx.data.stream.slots import Slots
from tlx.data.stream.workers import Made, WorkerDied, in_slots

_TRIES = 100  # replacements that are tried for an unreadable sample
_SPARE = 4  # batches that whoever asks may hold at a time before they are copied


@dataclass(frozen=True)
class Work:
    """Samples to be shown.

    Attributes:
        epoch: of training; None for an evaluation, where unreadable ones are left out and nothing is drawn anew.
        view: in place of an epoch: as the epoch of this number shows samples, unreadable ones left out.
        ids: int64, in the order of the batch.
        turns: int64, how often each came before in this epoch, or of which of its episodes it is; None where none comes
            twice.
        places: their positions in the epoch.
        own: how many, from the start, are this rank's own samples; the rest are mixed into them (guests).
        first_only: only the first one that is readable is shown: a stand-in.
    """

    epoch: int | None
    ids: Ids
    turns: Ids | None = None
    places: tuple[int, ...] = ()
    own: int = 0
    first_only: bool = False
    view: int | None = None


class Shows(Protocol):
    """Where a loader has pictures from; see :class:`tlx.data.stream.pictures.Pictures`."""

    @property
    def manifest(self) -> Manifest | FileList | InMemory: ...
    @property
    def random(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def show(self, sample: int, key: int, seed: Callable[[int], None], out: NDArray[Any]) -> BadSample | None: ...


@dataclass(frozen=True)
class Loaded:
    """What became of a Work.

    Attributes:
        count: pictures.
        ids: the samples that they show, guests included.
        bad: unreadable samples, without those that a guest stands for: another rank reports them.
    """

    count: int
    ids: tuple[int, ...]
    bad: tuple[BadSample, ...]


@dataclass(frozen=True)
class Loader:
    """Shows samples of one data set; small enough to be sent to a process.

    Args:
        seed: of everything that is drawn.
        among: the samples that may replace an unreadable one; None is all.
    """

    pictures: Shows
    seed: int
    among: Ids | None = None

    def __call__(self, work: Work, slots: Slots, slot: int) -> Loaded:
        """Writes uint8 [count, height, width, channels] to the slot."""
        return self.fill(work, slots.array(slot, (1 if work.first_only else len(work.ids), *self.pictures.shape)))

    def fill(self, work: Work, room: NDArray[Any]) -> Loaded:
        """Writes what samples show to `room`, a row for each."""
        if not self.pictures.random:
            return self._load(work, room, _nothing)
        with own_randomness() as seed:
            return self._load(work, room, seed)

    def _load(self, work: Work, room: NDArray[Any], seed: Callable[[int], None]) -> Loaded:
        if work.epoch is None:
            return self._evaluate(work, room, seed)
        if work.first_only:
            return self._stand_in(work, room, seed)
        shown = [self._show(work, at, seed, room[at]) for at in range(len(work.ids))]
        bad = tuple(s.bad for s in shown[: work.own] if s.bad)
        return Loaded(len(shown), tuple(s.id for s in shown), bad)

    def _show(self, work: Work, at: int, seed: Callable[[int], None], out: NDArray[Any]) -> _Shown:
        """The picture of a sample, or that of a replacement, drawn under the sample's key in either case; or black."""
        assert work.epoch is not None
        wanted = int(work.ids[at])
        key = training_key(self.seed, work.epoch, wanted, 0 if work.turns is None else int(work.turns[at]))
        bad = self.pictures.show(wanted, key, seed, out)
        if bad is None:
            return _Shown(wanted)
        others = self._of_class_of(wanted)
        drawn = derive(self.seed, "replacement", work.epoch, work.places[at])
        for other in others[permuted(drawn, len(others), np.arange(min(len(others), _TRIES)))].tolist():
            if other != wanted and self.pictures.show(other, key, seed, out) is None:
                return _Shown(other, replace(bad, replaced_by=other))
        out[:] = 0
        return _Shown(wanted, bad)

    def _of_class_of(self, sample: int) -> Ids:
        manifest = self.pictures.manifest
        assert isinstance(manifest, Manifest)  # files are not trained on
        labels = manifest.labels
        if self.among is None:
            return np.flatnonzero(labels == labels[sample])
        left: Ids = self.among[labels[self.among] == labels[sample]]
        return left

    def _stand_in(self, work: Work, room: NDArray[Any], seed: Callable[[int], None]) -> Loaded:
        """One picture; what is bad about the samples is reported by the ranks they belong to."""
        tried = (self._show(work, at, seed, room[0]) for at in range(len(work.ids)))
        found = next((s for s in tried if s.bad is None or s.bad.replaced_by is not None), None)
        return Loaded(1, (found.id if found else int(work.ids[0]),), ())

    def _evaluate(self, work: Work, room: NDArray[Any], seed: Callable[[int], None]) -> Loaded:
        ids: list[int] = []
        bad: list[BadSample] = []
        for sample in work.ids.tolist():
            view = work.view
            key = evaluation_key(sample) if view is None else training_key(self.seed, view, sample)
            found = self.pictures.show(sample, key, seed, room[len(ids)])
            ids.append(sample) if found is None else bad.append(found)
        return Loaded(len(ids), tuple(ids), tuple(bad))


def training_key(seed: int, epoch: int, sample: int, turn: int = 0) -> int:
    """What everything that is drawn for a sample depends on.

    Args:
        turn: how often the sample came before in this epoch.
    """
    return derive(seed, "sample", epoch, sample, *((turn,) if turn else ()))


def evaluation_key(sample: int) -> int:
    """The same in evaluations."""
    return derive(0, "evaluation", sample)


@dataclass(frozen=True)
class _Shown:
    """The sample that is shown, and what was wrong with the one that should have been."""

    id: int
    bad: BadSample | None = None


def _nothing(key: int) -> None:
    """Nothing draws from the global states, so nothing is seeded."""


def load(
    loader: Loader, tasks: Iterator[Work], *, largest: int, workers: int, pin: bool
) -> Iterator[tuple[Loaded, Tensor]]:
    """What becomes of each Work, and its pictures: uint8 [count, channels, height, width], channels last in memory.

    Args:
        largest: the most pictures of a Work.
        pin: the memory is page-locked, for copies to a GPU.

    Raises:
        TlxError: a worker died, or the transforms fail.
    """
    height, width, channels = loader.pictures.shape  # of pictures, three
    slots = Slots(slot_count(workers), largest * height * width * channels, notes=max(workers, 1))
    if pin:
        slots.pin()
    try:
        for made in in_slots(loader, tasks, slots, workers=workers, prefetch=_AHEAD):
            images = _lent(slots, made, (height, width, channels))
            yield made.result, images
            del images  # or the slot would be held while the next one is waited for
    except WorkerDied as error:
        if error.sample is None:
            raise
        where = loader.pictures.manifest.describe(error.sample)
        raise TlxError(f"{error}\n  -> it was at {where}") from error


_AHEAD = 2


def slot_count(workers: int) -> int:
    """Batches for which `load` keeps memory."""
    return max(workers, 1) * (_AHEAD if workers else 1) + _SPARE


def _lent(slots: Slots, made: Made[Loaded], shape: tuple[int, int, int]) -> Tensor:
    images = slots.lend(made.slot, (made.result.count, *shape))
    if not slots.free:  # somebody keeps batches: a copy is theirs, and the slot comes back
        images = images.clone()
    return images.permute(0, 3, 1, 2)
