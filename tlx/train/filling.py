"""Computes features of frozen layers once, by all ranks, each its part, and keeps them.

The pictures are read once for all phases of the plan that will train from features: where those of later phases are
reached on the way to this phase's, they are kept too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from tlx.base.errors import UserError
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.reader import BadSample
from tlx.features.cut import Cut, features_at
from tlx.features.store import Costs, FeatureStore
from tlx.plan.plan import Phase
from tlx.train.run import Run

_SAY_S = 10.0
_TIMED = 4  # parts, of which the first warms up

Part = tuple[int, int]
"""A view and the number of a part."""
Shown = Iterator[tuple[Sequence[int], Tensor, Sequence[BadSample]]]
"""Of each part: the pictures that could be read, by place, their pixels, and those that could not."""


class Stopped(Exception):
    """A stop was asked for while features were computed."""


class NotKept(Exception):
    """Features that cannot be stored, and why."""


@dataclass(frozen=True)
class Kept:
    """Features at a place of the network, and where they belong."""

    cut: Cut
    store: FeatureStore


@dataclass(frozen=True)
class Filling:
    """What a phase wants computed, of the training or of the validation pictures.

    Attributes:
        kept: of this phase, then of later ones that are on the way.
        shown: pictures of parts, in their order.
        what: "training" or "validation".
    """

    run: Run
    phase: Phase
    manifest: Manifest
    kept: Sequence[Kept]
    shown: Callable[[Sequence[Part]], Shown]
    what: str

    @property
    def store(self) -> FeatureStore:
        """This phase's."""
        return self.kept[0].store

    def done(self) -> str | None:
        """Computes what is missing; why it came to nothing, where it did: the same on every rank.

        Raises:
            Stopped: a stop was asked for, on all ranks.
        """
        run, world = self.run, self.run.world
        why, rooms = world.from_main(self._made() if world.main else (None, 0))
        if why is not None:
            return str(why)
        changed = self._changed() if world.main else None
        missing = world.from_main(self._missing(rooms) if world.main else None)
        if changed is not None:
            run.journal.note(changed)
        also = "".join(f"; and for later, {kept.cut}, in the same pass" for kept in self.kept[1:rooms])
        if missing:
            run.journal.note(f"cache: computing {self._about()}{also}")
        began = time.monotonic()
        why = world.from_main(self._too_slow(rooms, missing) if world.main else None)
        if why is not None:
            return str(why)
        if not missing:
            run.journal.note(f"cache: {self._about()}, found")
            return self._opened()
        why = self._by_all(rooms, world.from_main(self._missing(rooms) if world.main else None)) or self._opened()
        if why is None:
            run.journal.note(f"cache: computed in {time.monotonic() - began:.1f} s")
        return why

    def _about(self) -> str:
        cut, layout = self.kept[0].cut, self.store.layout
        size = f"{layout.bytes / 1e6:,.1f} MB in {self.store.folder}"
        count = f"{layout.views} x {layout.samples:,}"
        return f"{self.what} features of phase {self.phase.name}, {cut}, {count}: {size}"

    # Rank 0, before

    def _made(self) -> tuple[str | None, int]:
        """Why there is no place for this phase's; how many of `kept` have one."""
        config = self.run.config.cache
        for number, kept in enumerate(self.kept):
            about = {"phase": self.phase.name, "cut": str(kept.cut), "run": str(self.run.folder)}
            try:
                self._refuse_large(kept.store)
                kept.store.make(about, config.limit)
            except (UserError, OSError) as error:
                return (None, number) if number else (str(error), 0)
        return None, len(self.kept)

    def _refuse_large(self, store: FeatureStore) -> None:
        """
        Raises:
            UserError: nobody has asked for features, and they are larger than the pictures.
        """
        pictures = sum(shard.bytes for shard in self.run.stream.manifest.shards)
        if self.run.config.cache.mode == "auto" and store.layout.bytes > max(pictures, 1 << 20):
            what = f"features take {store.layout.bytes / 1e6:,.0f} MB, and pictures {pictures / 1e6:,.0f} MB"
            raise UserError(what, todo="cache: exact keeps them all the same")

    def _missing(self, rooms: int) -> list[Part]:
        own = self.store.missing(anew=True)
        if not own:  # what later phases lack they compute then
            return []
        later = [part for kept in self.kept[1:rooms] for part in kept.store.missing(anew=True)]
        return sorted({*own, *later})

    def _changed(self) -> str | None:
        """Computes a part of what is there once more: where that is something else by now (code of one's own was
        changed, pictures without hashes), all of it counts as missing; a line about it then."""
        store, run = self.store, self.run
        there = set(store.missing())
        first = next(((0, n) for n in range(store.layout.parts) if (0, n) not in there), None)
        if first is None:
            return None
        ids, images, _ = next(iter(self.shown([first])))
        if not len(ids):
            return None
        own = _features(run, self.kept[:1], images, store.layout.part)[0][: len(ids)].to("cpu", store.layout.dtype)
        kept = store.tensor(store.rows(0)[list(ids)]).float()
        scale = float(own.float().abs().max()) or 1.0
        if float((own.float() - kept).abs().max()) <= 2e-2 * scale:
            return None
        store.forget()
        return f"cache: features in {store.folder} are not what the network gives now, and are computed anew"

    def _too_slow(self, rooms: int, missing: Sequence[Part]) -> str | None:
        """Why features are not worth their reading, as measured with the first parts; what is found stays with them,
        so that a training that is begun again decides as before."""
        costs = self.store.costs
        if costs is None and len(missing) >= _TIMED:
            try:
                costs = self._measured(rooms, missing[:_TIMED])
                self.store.note(costs)
            except NotKept as error:
                return str(error)
        if costs is None or costs.read <= costs.computed:
            return None
        text = f"reading features takes {1e3 * costs.read:.2g} ms a picture, computing them {1e3 * costs.computed:.2g}"
        if self.run.config.cache.mode == "auto":
            return text
        self.run.journal.note(f"cache: phase {self.phase.name}: {text}; cache: off may be faster")
        return None

    def _measured(self, rooms: int, parts: Sequence[Part]) -> Costs:
        store, began = self.store, 0.0
        cold = store.layout.bytes > psutil.virtual_memory().available / 2
        for count, _ in enumerate(self._each(rooms, parts)):
            began = time.monotonic() if not count else began
        computed = time.monotonic() - began
        began = time.monotonic()
        for view, part in parts[1:]:
            store.read(view, part, cold=cold)
        read, pictures = time.monotonic() - began, sum(len(store.layout.places(part)) for _, part in parts[1:])
        return Costs(computed / pictures, read / pictures)

    # All ranks

    def _by_all(self, rooms: int, missing: Sequence[Part]) -> str | None:
        """
        Raises:
            Stopped: on all ranks.
        """
        world, run, said = self.run.world, self.run, time.monotonic()
        why, stopped = None, False
        own = missing[world.rank * len(missing) // world.size : (world.rank + 1) * len(missing) // world.size]
        try:
            for done in self._each(rooms, own):
                stopped = bool(run.stop.asked(look=True))
                if stopped:
                    break
                if world.main and time.monotonic() - said > _SAY_S:
                    said = time.monotonic()
                    run.journal.note(f"cache: {done:,} of {len(own):,} parts of {self.store.layout.part} pictures")
        except NotKept as error:
            why = str(error)
        ends: list[tuple[str | None, bool]] = world.gather((why, stopped))
        if any(stop for _, stop in ends):
            raise Stopped
        return next((text for text, _ in ends if text is not None), None)

    def _each(self, rooms: int, own: Sequence[Part]) -> Iterator[int]:
        """Computes and keeps each part; how many there are now.

        Raises:
            NotKept: this phase's; those of later phases stay away in silence, which will say so then.
        """
        self._ahead(own)
        kept = list(self.kept[:rooms])
        for done, (part, (ids, images, bad)) in enumerate(zip(own, self.shown(own), strict=True)):
            self.run.world.watch.beat("batch")
            features = _features(self.run, kept, images, self.store.layout.part) if len(ids) else []
            reasons = {one.id: one.reason for one in bad}
            for number, one in enumerate(list(kept)):
                try:
                    _write(one.store, part, ids, features[number] if len(ids) else None, reasons)
                except NotKept:
                    if one is self.kept[0]:
                        raise
                    kept.remove(one)
            yield done + 1

    def _ahead(self, own: Sequence[Part]) -> None:
        """Tells a manifest of remote shards what this rank will read."""
        if not self.manifest.remote or not own:
            return
        layout, ends = self.store.layout, self.manifest.samples_per_shard.cumsum()
        wanted: dict[int, None] = {}
        for _, part in own:
            places = layout.places(part)
            first, last = np.searchsorted(ends, (places.start, places.stop - 1), side="right").tolist()
            wanted |= dict.fromkeys(range(first, last + 1))
        self.manifest.ahead(list(wanted))

    def _opened(self) -> str | None:
        """Maps the features on every rank; why that cannot be, the same on all."""
        store, why = self.store, None
        try:
            store.hold()
            store.rows(0)
            _ = store.bad
            if store.missing():
                why = f"{store.folder} is not the same folder on all machines; cache: {{folder: ...}} on a shared disk"
        except (OSError, ValueError) as error:
            why = f"{store.folder}: {error}"
        found: list[str | None] = self.run.world.gather(why)
        return next((text for text in found if text is not None), None)


def _features(run: Run, kept: Sequence[Kept], images: Tensor, part: int) -> list[Tensor]:
    with run.world.autocast():
        cuts = [one.cut for one in kept]
        return features_at(run.net, cuts, run.normalise(images.to(run.world.device), part))


def _write(store: FeatureStore, part: Part, ids: Sequence[int], features: Tensor | None, bad: dict[int, str]) -> None:
    """
    Raises:
        NotKept: they are not finite in this dtype, or the disk.
    """
    layout, (view, number) = store.layout, part
    places = layout.places(number)
    rows = torch.zeros(len(places), *layout.shape, dtype=layout.dtype)
    if features is not None:
        rows[[place - places.start for place in ids]] = features[: len(ids)].to("cpu", layout.dtype)
        if not rows.isfinite().all():
            raise NotKept(f"features are not finite in {str(layout.dtype).removeprefix('torch.')}")
    try:
        store.write(view, number, rows, bad)
    except OSError as error:
        raise NotKept(f"{store.folder}: {error.strerror or error}") from error
