"""Batches for training and evaluation, as arithmetic over the index.

A training step's global batch is fixed by (manifest, seed, step); ranks and micro-batches only cut it into pieces.
Workers make pictures; everything else in a Batch is computed from the index in the process that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tlx.data.decode import Channels
from tlx.data.manifest import Manifest
from tlx.data.mix import Draws, Mix, MixSpec, draw, guests, mix_of, plain, weight_of
from tlx.data.order import EpochOrder, Ids, derive, micro_batches, share
from tlx.data.pictures import Pictures
from tlx.data.randomness import own_randomness
from tlx.data.reader import BadSample
from tlx.data.workers import in_order
from tlx.errors import UserError

__all__ = ["BadSample", "Batch", "ShardStream", "evaluation_batches"]

_TRIES = 10  # replacements that are tried for an unreadable sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        step: the global step (evaluation: the number of this batch on this rank).
        micro, micros: which of how many micro-batches of this step; the same number on all ranks.
        images: uint8 [m + g, channels, height, width], contiguous; the last g are guests, for mixing only.
        labels: int64 [m].
        ids: int64 [m], the samples that are shown (a replacement's own id).
        total: what a sum of losses over the global batch is divided by: its number of samples, or of class weights.
        idle: this rank has no sample here; the one picture is a stand-in and counts for nothing.
        mix: how the pictures are mixed, where mixing is on.
        bad: unreadable samples among this rank's own, each reported by one rank only.
    """

    step: int
    micro: int
    micros: int
    images: Tensor
    labels: Tensor
    ids: Tensor
    total: float
    idle: bool = False
    mix: Mix | None = None
    bad: tuple[BadSample, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device, without waiting where the memory is page-locked."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        images, labels, ids = move(self.images), move(self.labels), move(self.ids)
        return replace(self, images=images, labels=labels, ids=ids, mix=self.mix and self.mix.map(move))


@dataclass(frozen=True)
class _Deal:
    """One global batch: the samples in its slots, before anybody reads one."""

    step: int
    epoch: int
    first: int
    ids: Ids
    micros: int


@dataclass(frozen=True)
class _Loaded:
    images: Tensor
    ids: tuple[int, ...]
    bad: tuple[BadSample, ...]

    def pin_memory(self) -> _Loaded:
        """A copy in page-locked memory, for the loader."""
        return replace(self, images=self.images.pin_memory())


class ShardStream:
    """Training batches of one rank.

    Every sample of the manifest once an epoch, in the order of `EpochOrder`; the same global batches and the same
    pixels for every number of ranks, micro-batches and workers.

    Args:
        batch: samples of the global batch, over all ranks.
        transform: uint8 [channels, height, width] to uint8 [channels, size]; may draw from torch, numpy and random.
        channels: pictures are read as grey (1), RGB (3) or RGBA (4).
        drop_last: leave out the last global batch of an epoch where it is short.
        window: how many shards mix (see EpochOrder).
        micro_batch: the most samples of one micro-batch; None is one micro-batch per step.
        workers: processes that make pictures; 0 is this one.
        class_weights: one per class, for `Batch.total`.
        skip_bad: unreadable samples are replaced by others of their class and reported in `Batch.bad`, for the caller
            to judge (over all ranks); without it the first one is an error here.
        pin: batches in page-locked memory, where workers make them, so that copies to a GPU do not wait.

    Raises:
        UserError: sizes that do not fit together.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        batch: int,
        seed: int,
        transform: Callable[[Tensor], Tensor],
        channels: Channels = 3,
        drop_last: bool = False,
        window: int | None = None,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        workers: int = 0,
        class_weights: Sequence[float] | None = None,
        mix: MixSpec | None = None,
        skip_bad: bool = False,
        pin: bool = False,
    ) -> None:
        self.manifest, self.batch, self.seed, self.transform = manifest, batch, seed, transform
        self.drop_last, self.window, self.rank, self.world = drop_last, window, rank, world
        self.micro_batch, self.workers, self.mix, self.skip_bad = micro_batch, workers, mix, skip_bad
        self.pin = pin
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self._pictures = Pictures(manifest, transform, channels)
        self._order: EpochOrder | None = None
        self._dealt: _Deal | None = None
        self._check()

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        whole, rest = divmod(len(self.manifest), self.batch)
        return whole + (rest > 0 and not self.drop_last)

    def samples_before(self, step: int) -> int:
        """How many samples the steps before `step` hold, over all ranks and epochs."""
        epochs, within = divmod(step, self.steps_per_epoch)
        per_epoch = min(self.steps_per_epoch * self.batch, len(self.manifest))
        return epochs * per_epoch + within * self.batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The micro-batches of global steps start..stop-1, over borders of epochs, for this rank.

        Nothing of what comes before `start` is read. The global random states are left alone.

        Raises:
            UserError: an unreadable sample, without skip_bad.
            TlxError: a worker that died, or transforms that fail.
        """
        results = in_order(self._load, self._tasks(start, stop), workers=self.workers, pin=self.pin)
        for (step, micro), loaded in zip(self._tasks(start, stop), results, strict=True):
            if loaded.bad and not self.skip_bad:
                raise _bad_samples(loaded.bad)
            yield self._assemble(step, micro, loaded)

    def _check(self) -> None:
        samples, classes = len(self.manifest), len(self.manifest.classes)
        where = str(self.manifest.path)
        if not samples:
            raise UserError("there are no samples", where=where)
        if self.batch < 1 or self.workers < 0 or (self.micro_batch is not None and self.micro_batch < 1):
            raise UserError("batch and micro_batch are at least 1, workers at least 0")
        if not 0 <= self.rank < self.world:
            raise UserError(f"there is no rank {self.rank} of {self.world}")
        if self.world > self.batch:
            raise UserError(
                f"{self.world} ranks cannot share a global batch of {self.batch}", todo="a larger batch or fewer ranks"
            )
        if not self.steps_per_epoch:
            raise UserError(
                f"drop_last leaves nothing of {samples} samples in batches of {self.batch}",
                where=where,
                todo="a smaller batch, or drop_last: false",
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(f"{len(self.class_weights)} class weights for {classes} classes", where=where)
        EpochOrder([], seed=0, epoch=0, window=self.window)

    # What a step holds: arithmetic, in the asking process and in the workers alike

    def _tasks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in range(start, stop) for micro in range(self._micros(step)))

    def _count(self, step: int) -> int:
        first = step % self.steps_per_epoch * self.batch
        return min(self.batch, len(self.manifest) - first)

    def _micros(self, step: int) -> int:
        return micro_batches(self._count(step), self.world, self.micro_batch)

    def _deal(self, step: int) -> _Deal:
        if self._dealt is None or self._dealt.step != step:
            epoch, within = divmod(step, self.steps_per_epoch)
            if self._order is None or self._order.epoch != epoch:
                sizes = self.manifest.samples_per_shard
                self._order = EpochOrder(sizes, seed=self.seed, epoch=epoch, window=self.window)
            first, count = within * self.batch, self._count(step)
            ids = self._order.ids(first, first + count)
            self._dealt = _Deal(step, epoch, first, ids, self._micros(step))
        return self._dealt

    def _slots(self, deal: _Deal, micro: int) -> range:
        own = share(len(deal.ids), self.world, self.rank)
        part = share(len(own), deal.micros, micro)
        return range(own.start + part.start, own.start + part.stop)

    def _draws(self, deal: _Deal, size: tuple[int, int]) -> Draws | None:
        if self.mix is None:
            return None
        return draw(self.mix, seed=self.seed, epoch=deal.epoch, first=deal.first, count=len(deal.ids), size=size)

    # In the workers: pictures

    def _load(self, task: tuple[int, int]) -> _Loaded:
        deal = self._deal(task[0])
        slots = self._slots(deal, task[1])
        draws = self._draws(deal, (1, 1))  # whom a slot mixes with does not depend on the pictures' size
        with own_randomness() as seed:
            show = partial(self._show, deal, seed)
            if not slots:
                return self._stand_in(deal, show)
            own = [show(slot) for slot in slots]
            visiting = [show(slot) for slot in guests(draws, slots)] if draws else []
        images = self._pictures.stack([s.image for s in own + visiting])
        return _Loaded(images, tuple(s.id for s in own), tuple(s.bad for s in own if s.bad))

    def _show(self, deal: _Deal, seed: Callable[[int], None], slot: int) -> _Shown:
        """The picture of a slot, or that of a replacement; drawn under the slot's own sample in either case."""
        wanted = int(deal.ids[slot])
        key = derive(self.seed, "sample", deal.epoch, wanted)
        seed(key)
        image = self._pictures.view(wanted)
        if isinstance(image, Tensor):
            return _Shown(image, wanted)
        labels = self.manifest.labels
        others = np.flatnonzero(labels == labels[wanted])
        for attempt in range(_TRIES):
            choice = derive(self.seed, "replacement", deal.epoch, deal.first + slot, attempt)
            other = int(others[choice % len(others)])
            seed(key)
            if other != wanted and isinstance(found := self._pictures.view(other), Tensor):
                return _Shown(found, other, replace(image, replaced_by=other))
        return _Shown(None, wanted, image)

    def _stand_in(self, deal: _Deal, show: Callable[[int], _Shown]) -> _Loaded:
        """One picture for a rank without a sample; what is bad about it is reported by the rank it belongs to."""
        shown = next((s for slot in range(len(deal.ids)) if (s := show(slot)).image is not None), show(0))
        return _Loaded(self._pictures.stack([shown.image]), (shown.id,), ())

    # In the asking process: the rest

    def _assemble(self, step: int, micro: int, loaded: _Loaded) -> Batch:
        deal = self._deal(step)
        slots = self._slots(deal, micro)
        draws = self._draws(deal, (loaded.images.shape[-2], loaded.images.shape[-1]))
        labels = self.manifest.labels[deal.ids].astype(np.int64)
        ids = np.array(loaded.ids, dtype=np.int64)
        own = self.manifest.labels[ids].astype(np.int64)
        mix = None
        if draws:
            mix = mix_of(draws, slots, labels) if slots else plain(own)
        return Batch(
            step=step,
            micro=micro,
            micros=deal.micros,
            images=loaded.images,
            labels=torch.from_numpy(own),
            ids=torch.from_numpy(ids),
            total=self._total(labels, draws),
            idle=not slots,
            mix=mix,
            bad=loaded.bad,
        )

    def _total(self, labels: Ids, draws: Draws | None) -> float:
        if self.class_weights is None:
            return float(len(labels))
        if draws:
            return weight_of(draws, labels, self.class_weights)
        return float(np.sum(np.asarray(self.class_weights, dtype=np.float64)[labels]))


def evaluation_batches(
    manifest: Manifest,
    *,
    batch: int,
    transform: Callable[[Tensor], Tensor],
    channels: Channels = 3,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    skip_bad: bool = False,
    pin: bool = False,
) -> Iterator[Batch]:
    """This rank's share of a data set, in the order of its index: every sample once over all ranks.

    Unreadable samples are left out of their batch, and of its `total`, the number of its samples. A batch that has only
    such ones comes without a picture and with `idle` set, to report them. A rank may get no batch at all, and ranks may
    get different numbers of them.

    Args:
        batch: samples per batch on one rank.
        channels: pictures are read as grey (1), RGB (3) or RGBA (4).

    Raises:
        UserError: an unreadable sample, without skip_bad.
    """
    own = share(len(manifest), world, rank)
    tasks = [range(at, min(at + batch, own.stop)) for at in range(own.start, own.stop, batch)]
    load = partial(_load_for_evaluation, Pictures(manifest, transform, channels))
    for step, loaded in enumerate(in_order(load, tasks, workers=workers, pin=pin)):
        if loaded.bad and not skip_bad:
            raise _bad_samples(loaded.bad)
        ids = np.array(loaded.ids, dtype=np.int64)
        labels = torch.from_numpy(manifest.labels[ids].astype(np.int64))
        count = len(loaded.ids)
        yield Batch(
            step, 0, 1, loaded.images, labels, torch.from_numpy(ids), float(count), idle=not count, bad=loaded.bad
        )


def _load_for_evaluation(pictures: Pictures, ids: range) -> _Loaded:
    with own_randomness() as seed:
        views = {}
        for sample in ids:
            seed(derive(0, "evaluation", sample))
            views[sample] = pictures.view(sample)
    good = {i: view for i, view in views.items() if isinstance(view, Tensor)}
    bad = tuple(view for view in views.values() if isinstance(view, BadSample))
    images = pictures.stack(list(good.values()) or [None])[: len(good)]
    return _Loaded(images, tuple(good), bad)


@dataclass(frozen=True)
class _Shown:
    image: Tensor | None
    id: int
    bad: BadSample | None = None


def _bad_samples(bad: Sequence[BadSample]) -> UserError:
    listed = "\n".join(f"  {b}" for b in bad[:20])
    return UserError(
        f"{len(bad)} unreadable sample{'s' if len(bad) > 1 else ''}:\n{listed}",
        todo="tlx shards check names all of them; data.bad_samples: 10 (or 1%) goes on without them",
    )
