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
    """

    store: FeatureStore
    manifest: Manifest
    view_of: ViewOfEpoch
    dtype: torch.dtype

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
                rows = self.store.rows(of_view.view)[ids]
                yield Loaded(len(ids), tuple(ids.tolist()), ()), self._tensor(rows)

    def _tensor(self, rows: NDArray[Any]) -> Tensor:
        return self.store.tensor(rows).to(self.dtype)


def unchanged(images: Tensor, full: int | None = None) -> Tensor:
    """Features enter a network as they are; see :class:`tlx.data.pixels.normalise.Normalise`."""
    if full is None or full == len(images):
        return images
    return torch.cat([images, images.new_zeros(full - len(images), *images.shape[1:])])
