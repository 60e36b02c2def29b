"""The pictures of a data set as training shows them, or as an evaluation does: what is measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from tlx.data.pixels.crop_geometry import Exactly, Framing, ResizedCrop
from tlx.data.pixels.decode import Channels
from tlx.data.pixels.fused_crop import Framed
from tlx.data.pixels.transforms import View
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.loader import Loader, Work, load
from tlx.data.stream.order import Ids, derive
from tlx.data.stream.pictures import Pictures
from tlx.data.stream.stream import ShardStream

_FOR_EVER = 1 << 40


@dataclass(frozen=True)
class MeasuredView:
    """A data set and a view.

    Attributes:
        scaled: JPEGs may be decoded smaller; in training only.
        window: how many shards mix.
        shown: the samples that an evaluation goes through, over and over.
        size: height and width of what is shown.
    """

    name: Literal["train", "eval"]
    manifest: Manifest
    transform: View
    size: tuple[int, int]
    shown: Ids
    channels: Channels = 3
    seed: int = 0
    scaled: bool = False
    upright: bool = True
    window: int | None = None

    @property
    def framing(self) -> Framing:
        """How the view begins; or, for a floor, the whole picture resized."""
        if isinstance(self.transform, Framed):
            return self.transform.framing
        return ResizedCrop(self.size, False, Exactly(*reversed(self.size)))

    def pictures(self) -> Pictures:
        return Pictures(self.manifest, self.transform, self.channels, upright=self.upright, scaled=self.scaled)

    def key(self, sample: int) -> int:
        """What the sample's view is drawn by, in the first epoch."""
        return derive(self.seed, "sample", 0, sample) if self.name == "train" else derive(0, "evaluation", sample)

    def batches(self, *, batch: int, workers: int, pin: bool = False) -> Iterator[Tensor]:
        """Pictures as a training or an evaluation takes them, without end: uint8 [batch, channels, height, width]."""
        if self.name == "train":
            return (b.images for b in self._stream(batch, workers, pin).batches(0, _FOR_EVER))
        return self._evaluated(batch, None, workers=workers, pin=pin)

    def again(self, *, batch: int, count: int) -> Iterator[Tensor]:
        """The first `count` batches over and over, made in this process."""
        if self.name == "train":
            return (b.images for b in self._stream(batch, 0, False).batches_of(itertools.cycle(range(count))))
        return self._evaluated(batch, count, workers=0, pin=False)

    def seconds_each(self) -> float:
        """About what a picture costs in this process: a few are made twice, and timed the second time."""
        few = min(8, len(self.shown))
        batches = self.again(batch=few, count=1)
        next(batches)
        began = time.perf_counter()
        next(batches)
        return (time.perf_counter() - began) / few

    def first(self, *, batch: int, count: int) -> Ids:
        """The samples of those batches, int64 [batch * count]."""
        if self.name == "eval":
            return self.shown[: batch * count]
        return np.concatenate([b.ids.numpy() for b in self._stream(batch, 0, False).batches(0, count)])

    def _stream(self, batch: int, workers: int, pin: bool) -> ShardStream:
        return ShardStream(
            self.manifest,
            batch=batch,
            seed=self.seed,
            transform=self.transform,
            channels=self.channels,
            window=self.window,
            workers=workers,
            skip_bad=True,
            upright=self.upright,
            scaled=self.scaled,
            drop_last=True,
            pin=pin,
        )

    def _evaluated(self, batch: int, count: int | None, *, workers: int, pin: bool) -> Iterator[Tensor]:
        most = len(self.shown) // batch if count is None else count
        works = (Work(None, self.shown[at * batch : (at + 1) * batch]) for at in itertools.cycle(range(most)))
        loader = Loader(self.pictures(), 0)
        return (images for _, images in load(loader, works, largest=batch, workers=workers, pin=pin))
