"""Batches of stored features in place of pictures: the same samples in the same order, and the same others for those
that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.data.shards.manifest import Manifest
from tlx.data.stream.loader import Loaded, Loader, Work
from tlx.data.stream.order import Ids, derive, permuted
from tlx.data.stream.reader import BadSample
from tlx.features.store import FeatureStore


@dataclass(frozen=True)
class ViewOfEpoch:
    """Which of `views` views an epoch shows: the first ones in order, then all again in an order of the seed."""

    views: int
    seed: int

    def __call__(self, epoch: int | None) -> int:
        if epoch is None or self.views == 1:
            return 0
        cycle, place = divmod(epoch, self.views)
        if not cycle:
            return place
        drawn = derive(self.seed, "views", cycle)
        return int(permuted(drawn, self.views, np.array([place]))[0])


@dataclass(frozen=True)
class FeaturesOfView:
    """What a loader takes for pictures: features of one view."""

    store: FeatureStore
    manifest: Manifest
    view: int
    random = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.layout.shape

    def show(self, sample: int, key: int, seed: Callable[[int], None], out: NDArray[Any]) -> BadSample | None:
        why = self.store.bad.get((self.view, sample))
        if why is not None:
            return BadSample(sample, self.manifest.describe(sample), why)
        out[:] = self.store.rows(self.view)[sample]
        return None


@dataclass(frozen=True)
class StoredFeatures:
    """Features of all samples of some shards.

    Attributes:
        view_of: an epoch's view.
        dtype: as the network has them, whatever they are stored as.
        held: [views, samples, ...], where they are kept on a device.
    """

    store: FeatureStore
    manifest: Manifest
    view_of: ViewOfEpoch
    dtype: torch.dtype
    held: Tensor | None = None

    def held_on(self, device: torch.device) -> StoredFeatures:
        """In a GPU's memory, where they take at most a quarter of what is free there; all pictures can be read then."""
        if device.type != "cuda" or self.store.bad:
            return self
        free, _ = torch.cuda.mem_get_info(device)
        return self.held_in(device) if self.store.layout.bytes <= free / 4 else self

    def held_in(self, device: torch.device) -> StoredFeatures:
        """In the memory of a device, as they are stored."""
        layout = self.store.layout
        held = torch.empty(layout.views, layout.samples, *layout.shape, dtype=layout.dtype, device=device)
        for view in range(layout.views):
            rows = self.store.rows(view)
            for part in range(layout.parts):
                places = layout.places(part)
                here = slice(places.start, places.stop)
                held[view, here] = self.store.tensor(np.array(rows[here])).to(device)
        return replace(self, held=held)

    def load(self, loader: Loader, tasks: Iterator[Work]) -> Iterator[tuple[Loaded, Tensor]]:
        """What becomes of each Work, and its features [count, *shape].

        Args:
            loader: of the pictures: its seed, and which samples may replace others.
        """
        for work in tasks:
            of_view = FeaturesOfView(self.store, self.manifest, self.view_of(work.epoch))
            if self.store.bad:
                room = np.empty((1 if work.first_only else len(work.ids), *of_view.shape), of_view.store.rows(0).dtype)
                loaded = replace(loader, pictures=of_view).fill(work, room)
                yield loaded, self._tensor(room[: loaded.count])
            else:
                ids: Ids = work.ids[:1] if work.first_only else work.ids
                yield Loaded(len(ids), tuple(ids.tolist()), ()), self._gathered(of_view.view, ids)

    def _gathered(self, view: int, ids: Ids) -> Tensor:
        if self.held is None:
            return self._tensor(self.store.rows(view)[ids])
        index = torch.from_numpy(ids)
        if self.held.device.type == "cuda":  # nothing waits for its copy
            index = index.pin_memory().to(self.held.device, non_blocking=True)
        return self.held[view].index_select(0, index).to(self.dtype)

    def _tensor(self, rows: NDArray[Any]) -> Tensor:
        return self.store.tensor(rows).to(self.dtype)


def unchanged(images: Tensor, full: int | None = None) -> Tensor:
    """Features enter a network as they are; see :class:`tlx.data.pixels.normalise.Normalise`."""
    if full is None or full == len(images):
        return images
    return torch.cat([images, images.new_zeros(full - len(images), *images.shape[1:])])
