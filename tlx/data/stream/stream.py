"""Batches for training and evaluation, as arithmetic over the index.

A training step's global batch is fixed by (manifest, seed, step); ranks and micro-batches only cut it into pieces.
Workers make pictures; everything else in a Batch is computed from the index in the process that asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import UserError
from tlx.data.pixels.decode import Channels
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import LABEL
from tlx.data.stream import sampling as samplings
from tlx.data.stream.batch_targets import Weigh, as_tensors, by_class, normalisers, refuse_unknown, values_of
from tlx.data.stream.episodes import EpisodeOrder, refuse_split
from tlx.data.stream.episodes import by_class as pictures_by_class
from tlx.data.stream.loader import Loaded, Loader, Work, evaluation_key, load, training_key
from tlx.data.stream.mix import Draws, Mix, MixSpec, draw, guests, mix_of, moved_targets, plain
from tlx.data.stream.order import EpochOrder, Ids, Shuffle, micro_batches, share
from tlx.data.stream.pictures import Pictures
from tlx.data.stream.reader import BadSample
from tlx.data.stream.sampling import Sampling, distinct, entries, refuse_weightless, samples_per_epoch
from tlx.data.stream.views import Views, drawn_of

__all__ = ["BadSample", "Batch", "ShardStream", "evaluation_batches"]

EVERY_SAMPLE = Sampling()


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        step: the global step (evaluation: the number of this batch on this rank).
        micro, micros: which of how many micro-batches of this step; the same number on all ranks.
        images: uint8 [m + g, channels, height, width], channels last in memory; the last g are guests, for mixing only.
            Or [m, ...] features of them, where these are stored.
        labels: int64 [m]; -1 where the index has no class.
        ids: int64 [m], the samples that are shown (a replacement's own id).
        total: what a sum of losses over the global batch is divided by: its number of samples, or the sum of what they
            weigh; 0 where all of them weigh 0. Where a sample was replaced, what the index says of it counts.
        idle: this rank has no sample here; the one picture is a stand-in and counts for nothing.
        mix: how the pictures are mixed, where mixing is on.
        bad: unreadable samples among this rank's own, each reported by one rank only.
        targets: those that were asked for, by name, of the samples that are shown: int64 [m] of a class, int8
            [m, classes] of labels, float32 [m, width] of numbers; missing ones as in the index (-1, NaN).
        scales: float32 [parts], where the loss has several parts: samples of the global batch by the sum of what they
            weigh for each; 0 where that is 0. `total` is the number of samples then.
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
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Tensor | None = None

    @property
    def counts(self) -> bool:
        """Whether the loss of this micro-batch counts: not of a stand-in, nor where the global batch weighs nothing."""
        return not self.idle and self.total > 0

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device. (`tlx.data.stream.transfer.on_device` does it while the device computes.)"""
        return self.map(lambda t: t.to(device))

    def map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        images, labels, ids = move(self.images), move(self.labels), move(self.ids)
        return replace(
            self,
            images=images,
            labels=labels,
            ids=ids,
            mix=self.mix and self.mix.map(move),
            targets=moved_targets(self.targets, self.labels, labels, move),
            scales=None if self.scales is None else move(self.scales),
        )


@dataclass(frozen=True)
class _Deal:
    """One global batch: the samples in its slots, before anybody reads one."""

    step: int
    epoch: int
    first: int
    ids: Ids
    turns: Ids | None
    micros: int


@dataclass(frozen=True)
class _Dealt:
    """The loss normaliser of a global batch."""

    deal: _Deal
    total: float
    scales: Tensor | None


class Stored(Protocol):
    """What takes the place of pictures; see :class:`tlx.features.stored.StoredFeatures`."""

    def load(self, loader: Loader, tasks: Iterator[Work]) -> Iterator[tuple[Loaded, Tensor]]: ...


class ShardStream:
    """Training batches of one rank.

    Every sample of the manifest once an epoch, in the order of `EpochOrder`; the same global batches and the same
    pixels for every number of ranks, micro-batches and workers.

    Args:
        batch: samples of the global batch, over all ranks.
        transform: uint8 [channels, height, width] to uint8 [channels, size]; may draw from torch, numpy and random.
        channels: pictures are read as grey (1), RGB (3) or RGBA (4).
        drop_last: leave out the last global batch of an epoch where it is short.
        window: how many shards mix (see Shuffle).
        parts: into how many parts of the data set the slots of a batch are dealt, so that a node needs few shards (see
            Shuffle).
        sampling: which samples make an epoch, and how often (see Sampling).
        micro_batch: the most samples of one micro-batch; None is one micro-batch per step.
        workers: processes that make pictures; 0 is this one.
        class_weights: one per class, for `Batch.total`.
        targets: of the index, for `Batch.targets`.
        weigh: what samples weigh in the loss, in place of class_weights: from the values of the n samples of a global
            batch, by target, float64 [n, parts], for `Batch.total` and `Batch.scales`; or None where each weighs 1.
        views: as which `transform` (a :class:`tlx.data.stream.views.Shown`) shows samples: what is drawn for them goes
            into `Batch.targets`, too.
        skip_bad: unreadable samples are replaced by others of their class and reported in `Batch.bad`, for the caller
            to judge (over all ranks); without it the first one is an error here.
        upright: pictures are turned as the camera noted (EXIF).
        scaled: JPEGs may be decoded smaller where more than twice as many pixels are left as are shown.
        pin: batches in page-locked memory, for `transfer.on_device`. It is used again as soon as a batch is
            forgotten: who copies with non_blocking must keep the batch until the copy is done.

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
        parts: int = 1,
        sampling: Sampling = EVERY_SAMPLE,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        workers: int = 0,
        class_weights: Sequence[float] | None = None,
        targets: Sequence[str] = (LABEL,),
        weigh: Weigh | None = None,
        mix: MixSpec | None = None,
        views: Views | None = None,
        skip_bad: bool = False,
        upright: bool = True,
        scaled: bool = False,
        pin: bool = False,
    ) -> None:
        self.manifest, self.batch, self.seed, self.transform = manifest, batch, seed, transform
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.shuffle = Shuffle(seed, window, parts, batch)
        self.sampling, self.samples_per_epoch = sampling, epoch_length(manifest, sampling)
        self.micro_batch, self.workers, self.mix, self.skip_bad = micro_batch, workers, mix, skip_bad
        self.pin, self.views = pin, views
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.targets, self.weigh = tuple(targets), weigh
        if weigh is None and self.class_weights is not None:
            self.weigh = partial(by_class, self.class_weights)
        self._pictures = Pictures(manifest, transform, channels, upright=upright, scaled=scaled)
        self._order: EpochOrder | EpisodeOrder | None = None
        self._dealt: _Dealt | None = None
        self._stored: Stored | None = None
        self._check()

    def of(self, stored: Stored) -> ShardStream:
        """The same batches with stored features in place of pictures."""
        other = copy(self)
        other._stored = stored
        return other

    @property
    def stored(self) -> Stored | None:
        """What takes the place of pictures."""
        return self._stored

    @property
    def loader(self) -> Loader:
        """Of pictures."""
        return Loader(self._pictures, self.seed, self._few)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        whole, rest = divmod(self.samples_per_epoch, self.batch)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def distinct_samples(self) -> int:
        """Different samples that training shows, over all epochs."""
        if self.sampling == EVERY_SAMPLE:
            return len(self.manifest)
        return distinct(self.sampling, self.manifest.counts())

    def samples_before(self, step: int) -> int:
        """How many samples the steps before `step` hold, over all ranks and epochs."""
        epochs, within = divmod(step, self.steps_per_epoch)
        per_epoch = min(self.steps_per_epoch * self.batch, self.samples_per_epoch)
        return epochs * per_epoch + within * self.batch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The micro-batches of global steps start..stop-1, over borders of epochs, for this rank.

        Nothing of what comes before `start` is read. The global random states are left alone.

        Raises:
            UserError: an unreadable sample, without skip_bad.
            TlxError: a worker that died, or transforms that fail.
        """
        yield from self.batches_of(range(start, stop))

    def batches_of(self, steps: Iterable[int]) -> Iterator[Batch]:
        """The same for these global steps in this order, which may come again: for measurements."""
        dealt: deque[tuple[_Deal, int]] = deque()
        largest = -(-self.batch // self.world)
        largest = min(largest, self.micro_batch or largest) + (2 if self.mix else 0)  # a guest at each end
        tasks = self._tasks(steps, dealt)
        made = (
            load(self.loader, tasks, largest=largest, workers=self.workers, pin=self.pin)
            if self._stored is None
            else self._stored.load(self.loader, tasks)
        )
        for loaded, images in made:
            if loaded.bad and not self.skip_bad:
                raise _bad_samples(loaded.bad)
            yield self._assemble(*dealt.popleft(), loaded, images)
            del images

    @cached_property
    def _few(self) -> Ids | None:
        """The samples that a limit per class and classes left out leave, the same in every epoch; what is left out
        replaces nothing."""
        manifest, only = self.manifest, Sampling(limit=self.sampling.limit, without=self.sampling.without)
        return entries(only, manifest.labels, len(manifest.classes), self.shuffle.seed, 0)

    def _tasks(self, steps: Iterable[int], dealt: deque[tuple[_Deal, int]]) -> Iterator[Work]:
        for count, step in enumerate(steps):
            deal = self._deal(step)
            if self._stored is None and (not count or not step % self.steps_per_epoch):
                self._fetch_ahead(deal)
            for micro in range(deal.micros):
                dealt.append((deal, micro))
                yield self._work(deal, micro)

    def _fetch_ahead(self, deal: _Deal) -> None:
        """Tells a manifest of remote shards what this rank will want in the rest of the epoch, in this order."""
        if self.manifest.remote:
            order = self._order_of(deal.epoch)
            own = share(self.batch, self.world, self.rank)
            if self.mix is not None:  # the other slot of a pair
                own = range(own.start & ~1, min(-(-own.stop // 2) * 2, self.batch))
            self.manifest.ahead(order.shards_for(deal.first, len(order), own))

    def _check(self) -> None:
        samples, classes = self.samples_per_epoch, len(self.manifest.classes)
        where = self.manifest.location
        refuse_unknown(self.manifest, self.targets)
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
        if self.sampling.episodes is not None:
            refuse_split(self.sampling.episodes, self.batch, world=self.world, micro_batch=self.micro_batch)
        if not self.steps_per_epoch:
            raise UserError(
                f"drop_last leaves nothing of {samples} samples in batches of {self.batch}",
                where=where,
                todo="a smaller batch, or drop_last: false",
            )
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(f"{len(self.class_weights)} class weights for {classes} classes", where=where)
        if self.class_weights is not None:
            shown = epoch_counts(self.manifest, self.sampling).tolist()
            refuse_weightless(self.manifest.classes, shown, self.class_weights)

    # What a step holds: arithmetic

    def _count(self, step: int) -> int:
        first = step % self.steps_per_epoch * self.batch
        return min(self.batch, self.samples_per_epoch - first)

    def _micros(self, step: int) -> int:
        return micro_batches(self._count(step), self.world, self.micro_batch)

    def _deal(self, step: int) -> _Deal:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order_of(epoch)
        first, count = within * self.batch, self._count(step)
        ids, turns = order.ids(first, first + count), None
        if self.sampling.repeats:
            turns = order.turns(first, first + count)
        return _Deal(step, epoch, first, ids, turns, self._micros(step))

    @cached_property
    def _drawn_from(self) -> dict[int, Ids]:
        """Pictures by class, of the classes that episodes may have."""
        assert self.sampling.episodes is not None
        return pictures_by_class(self.manifest.labels, self.sampling.episodes.left_out)

    def _order_of(self, epoch: int) -> EpochOrder | EpisodeOrder:
        if self._order is None or self._order.epoch != epoch:
            manifest, episodes = self.manifest, self.sampling.episodes
            if episodes is not None:
                stops = manifest.samples_per_shard.cumsum()
                self._order = EpisodeOrder(self._drawn_from, episodes, self.seed, epoch, stops)
                return self._order
            own = entries(self.sampling, manifest.labels, len(manifest.classes), self.shuffle.seed, epoch)
            self._order = EpochOrder(manifest.samples_per_shard, self.shuffle, epoch, entries=own)
        return self._order

    def _slots(self, deal: _Deal, micro: int) -> range:
        own = share(len(deal.ids), self.world, self.rank)
        part = share(len(own), deal.micros, micro)
        return range(own.start + part.start, own.start + part.stop)

    def _draws(self, deal: _Deal, size: tuple[int, int]) -> Draws | None:
        if self.mix is None:
            return None
        return draw(self.mix, seed=self.seed, epoch=deal.epoch, first=deal.first, count=len(deal.ids), size=size)

    def _work(self, deal: _Deal, micro: int) -> Work:
        slots = self._slots(deal, micro)
        draws = self._draws(deal, (1, 1))  # whom a slot mixes with does not depend on the pictures' size
        shown = [*slots, *(guests(draws, slots) if draws else ())] or list(range(len(deal.ids)))
        return Work(
            epoch=deal.epoch,
            ids=deal.ids[shown],
            turns=None if deal.turns is None else deal.turns[shown],
            places=tuple(deal.first + slot for slot in shown),
            own=len(slots),
            first_only=not slots,
        )

    # In the asking process: the rest

    def _assemble(self, deal: _Deal, micro: int, loaded: Loaded, images: Tensor) -> Batch:
        slots = self._slots(deal, micro)
        draws = self._draws(deal, (images.shape[-2], images.shape[-1]))
        ids = np.array(loaded.ids, dtype=np.int64)
        shown, whole = self._values(ids), self._of_deal(deal, draws)
        asked, mix = {name: shown[name] for name in self.targets}, None
        if draws and slots:  # of what is mixed in, which an unreadable sample's replacement may be
            mix = mix_of(draws, slots, shown[LABEL], asked)
        elif draws:
            mix = plain(shown[LABEL], asked)
        own = len(slots) or 1  # or a stand-in; guests come after them
        drawn = drawn_of(self.views, self._keys(deal, slots)) if self.views is not None else {}
        labels = torch.from_numpy(shown[LABEL][:own])
        targets = as_tensors({n: v[:own] for n, v in asked.items()} | drawn)
        return Batch(
            step=deal.step,
            micro=micro,
            micros=deal.micros,
            images=images,
            labels=targets.get(LABEL, labels),
            ids=torch.from_numpy(ids[:own]),
            total=whole.total,
            idle=not slots,
            mix=mix,
            bad=loaded.bad,
            targets=targets,
            scales=whole.scales,
        )

    def _keys(self, deal: _Deal, slots: Sequence[int]) -> list[int]:
        """Of the samples in these slots, whatever replaces them; of a stand-in any."""
        turns = deal.turns if deal.turns is not None else np.zeros(len(deal.ids), np.int64)
        places = slots or (0,)
        return [training_key(self.shuffle.seed, deal.epoch, int(deal.ids[at]), int(turns[at])) for at in places]

    def _values(self, ids: Ids) -> dict[str, NDArray[Any]]:
        """Of the targets that are asked for, and of the class."""
        return values_of(self.manifest, dict.fromkeys((LABEL, *self.targets)), ids)

    def _of_deal(self, deal: _Deal, draws: Draws | None) -> _Dealt:
        """The same for all micro-batches of a step."""
        if self._dealt is None or self._dealt.deal is not deal:
            weights = self.weigh(self._values(deal.ids)) if self.weigh else None
            self._dealt = _Dealt(deal, *normalisers(weights, draws, len(deal.ids)))
        return self._dealt


def epoch_counts(manifest: Manifest, sampling: Sampling) -> Ids:
    """How often each class comes in an epoch, repeated samples counted again, int64 [classes]; of an index without
    classes nothing."""
    return samplings.targets(sampling, manifest.counts())


def epoch_length(manifest: Manifest, sampling: Sampling) -> int:
    """How many samples an epoch shows, repeated ones counted again.

    Raises:
        UserError: samples are to be chosen by their class, and the index has none.
    """
    if sampling == EVERY_SAMPLE:
        return len(manifest)
    if not manifest.classes:
        raise UserError(
            "samples cannot be chosen by class: these shards have no class",
            where=manifest.location,
            todo="leave data.sampling out",
        )
    return samples_per_epoch(sampling, manifest.counts())


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
    upright: bool = True,
    pin: bool = False,
    targets: Sequence[str] = (LABEL,),
    stored: Stored | None = None,
    numbers: Sequence[int] | None = None,
    views: Views | None = None,
) -> Iterator[Batch]:
    """This rank's share of a data set, in the order of its index: every sample once over all ranks. Batches are cut by
    place in the index, whatever the number of ranks; each rank gets some that follow each other.

    Unreadable samples are left out of their batch, and of its `total`, the number of its samples. A batch that has only
    such ones comes without a picture and with `idle` set, to report them. A rank may get no batch at all, and ranks may
    get different numbers of them.

    Args:
        batch: samples of a batch; the index's last one may have fewer.
        channels: pictures are read as grey (1), RGB (3) or RGBA (4).
        targets: of the index, for `Batch.targets`.
        stored: features, in place of pictures.
        numbers: the batches of these numbers, in place of this rank's share.
        views: see :class:`ShardStream`.

    Raises:
        UserError: an unreadable sample, without skip_bad; a target that the index lacks.
    """
    refuse_unknown(manifest, targets)
    of_rank = share(-(-len(manifest) // batch), world, rank)
    own = range(of_rank.start * batch, min(of_rank.stop * batch, len(manifest)))
    if numbers is None and not own:
        return
    tasks = (
        Work(None, np.arange(n * batch, min((n + 1) * batch, len(manifest)), dtype=np.int64))
        for n in (of_rank if numbers is None else numbers)
    )
    if manifest.remote and stored is None and numbers is None:
        ends = manifest.samples_per_shard.cumsum()
        first, last = np.searchsorted(ends, (own.start, own.stop - 1), side="right").tolist()
        manifest.ahead(range(first, last + 1))
    loader = Loader(Pictures(manifest, transform, channels, upright=upright), 0)
    results = (
        load(loader, tasks, largest=min(batch, len(manifest)), workers=workers, pin=pin)
        if stored is None
        else stored.load(loader, tasks)
    )
    for step, (loaded, images) in enumerate(results):
        if loaded.bad and not skip_bad:
            raise _bad_samples(loaded.bad)
        ids = np.array(loaded.ids, dtype=np.int64)
        values = as_tensors(values_of(manifest, dict.fromkeys((LABEL, *targets)), ids))
        drawn = drawn_of(views, [evaluation_key(one) for one in ids.tolist()]) if views is not None else {}
        count = loaded.count
        yield Batch(
            step,
            0,
            1,
            images,
            values[LABEL],
            torch.from_numpy(ids),
            float(count),
            idle=not count,
            bad=loaded.bad,
            targets={name: values[name] for name in targets} | as_tensors(drawn),
        )
        del images


def _bad_samples(bad: Sequence[BadSample]) -> UserError:
    listed = "\n".join(f"  {b}" for b in bad[:20])
    return UserError(
        f"{len(bad)} unreadable sample{'s' if len(bad) > 1 else ''}:\n{listed}",
        todo="tlx shards check names all of them; data.bad_samples: 10 (or 1%) goes on without them",
    )
