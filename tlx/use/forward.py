"""A network in evaluation mode, and pictures as it is shown them: whatever it gives for each, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tlx.base.inputs import InputSpec
from tlx.data.pixels.decode import Channels
from tlx.data.pixels.normalise import Normalise
from tlx.data.pixels.transforms import View, eval_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList
from tlx.data.stream.loader import Loaded, Loader, Work, load
from tlx.data.stream.pictures import Pictures
from tlx.data.stream.reader import BadSample


@dataclass(frozen=True)
class Answers:
    """The network's outputs for a batch of pictures.

    Attributes:
        ids: int64 [n], places of the pictures in what they came from.
        outputs: float32 [n, outputs], on the CPU.
        bad: pictures that could not be read; they are in none of the two.
    """

    ids: Tensor
    outputs: Tensor
    bad: tuple[BadSample, ...] = ()


@dataclass(frozen=True)
class Forward:
    """Forward passes over pictures of shards, of files, or in memory.

    Attributes:
        module: float32 [N, channels, H, W], normalised, to float32 [N, width].
        input: how pictures are shown to it.
        batch: pictures that go through it at once.
        device: where it computes.
        upright: pictures are turned as the camera noted.
    """

    module: nn.Module
    input: InputSpec
    width: int
    batch: int
    device: torch.device
    upright: bool = True

    def answers(
        self,
        source: Manifest | FileList,
        *,
        batch: int | None = None,
        workers: int = 0,
        part: tuple[int, int] = (0, 1),
        batches: Iterable[int] | None = None,
        flip: bool = False,
    ) -> Generator[Answers, None, None]:
        """The outputs for pictures of shards or files, in the order of batches.

        Args:
            batch: pictures at once: full ones, cut by place alone: no picture's numbers depend on others.
            part: (i, n): only batches i, i + n, i + 2 n ...; n processes share the work, and get the same numbers.
            batches: these, by their numbers, in place of a part.
            flip: outputs are the mean of those of the picture and of its mirror image.
        """
        (first, of), batch = part, batch or self.batch
        own = range(first, -(-len(source) // batch), of) if batches is None else batches
        starts = (number * batch for number in own)
        places = (np.arange(at, min(at + batch, len(source)), dtype=np.int64) for at in starts)
        for loaded, images in self._shown(source, places, batch, workers):
            ids = torch.tensor(loaded.ids, dtype=torch.int64)
            outputs = self._forward(images, batch) if len(ids) else torch.zeros(0, self.width)
            if flip and len(ids):
                outputs = (outputs + self._forward(images.flip(-1), batch)) / 2
            yield Answers(ids, outputs, loaded.bad)
            del images

    def pixels(
        self, source: Manifest | FileList, places: Tensor, *, workers: int = 0, view: View | None = None
    ) -> tuple[Tensor, Tensor]:
        """Some pictures as the network is shown them, before they are normalised.

        Args:
            view: of training, drawn as in its first epoch; None: that of evaluations.

        Returns:
            int64 [n], the places of those that can be read; uint8 [n, channels, H, W].
        """
        batch = self.batch
        batches = (places[at : at + batch].numpy() for at in range(0, len(places), batch))
        read = [
            (torch.tensor(loaded.ids, dtype=torch.int64), images.clone())
            for loaded, images in self._shown(source, batches, batch, workers, view)
        ]
        none = torch.zeros(0, self.input.channels, *self.input.size, dtype=torch.uint8)
        return torch.cat([places[:0], *(ids for ids, _ in read)]), torch.cat([none, *(images for _, images in read)])

    def outputs(self, pixels: Tensor, *, batch: int | None = None) -> Tensor:
        """float32 [n, outputs] for uint8 [n, channels, H, W], a full batch at a time as everywhere."""
        batch = batch or self.batch
        return torch.cat([self._forward(pixels[at : at + batch], batch) for at in range(0, len(pixels), batch)])

    def normalised(self, pixels: Tensor) -> Tensor:
        """float32 on the device, as the network takes it, of uint8 [n, channels, H, W]."""
        return self._normalise(pixels.to(self.device), len(pixels)).float()

    def _shown(
        self,
        source: Manifest | FileList,
        places: Iterator[NDArray[np.int64]],
        batch: int,
        workers: int,
        view: View | None = None,
    ) -> Iterator[tuple[Loaded, Tensor]]:
        spec = self.input
        shown = eval_transform(spec) if view is None else view
        pictures = Pictures(source, shown, cast(Channels, spec.channels), upright=self.upright)
        works = (Work(None, ids, view=None if view is None else 0) for ids in places)
        return load(Loader(pictures, 0), works, largest=batch, workers=workers, pin=False)

    @functools.cached_property
    def _normalise(self) -> Normalise:
        return Normalise(self.input, self.device, channels_last=False)

    @torch.inference_mode()
    def _forward(self, images: Tensor, batch: int) -> Tensor:
        """Outputs of uint8 [n, channels, H, W], as the first of a full batch."""
        output = self.module(self._normalise(images.to(self.device), batch))
        output = output[0] if isinstance(output, tuple) else output
        return output[: len(images)].float().cpu()  # type: ignore[no-any-return]
