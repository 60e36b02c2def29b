"""Pictures of samples as the transforms show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tlx.data.decode import Channels, DecodeError, decode
from tlx.data.manifest import Manifest
from tlx.data.randomness import own_randomness
from tlx.data.reader import BadSample, ReadError, ShardReader
from tlx.errors import TlxError


class Pictures:
    """Views of samples, read with so many channels, and tensors of them."""

    def __init__(self, manifest: Manifest, transform: Callable[[Tensor], Tensor], channels: Channels = 3) -> None:
        self.manifest, self.transform, self.channels = manifest, transform, channels
        self.reader = ShardReader(manifest)

    def view(self, sample: int) -> Tensor | BadSample:
        """The transformed picture, or why there is none."""
        try:
            image = decode(self.reader.read(sample), self.channels)
        except (ReadError, DecodeError) as error:
            return BadSample(sample, self.manifest.describe(sample), str(error))
        try:
            return self.transform(image)
        except Exception as error:
            raise TlxError(
                f"{self.manifest.describe(sample)}: the transforms fail on this picture of "
                f"{image.shape[-2]} x {image.shape[-1]} pixels: {error}"
            ) from error

    def stack(self, images: Sequence[Tensor | None]) -> Tensor:
        """uint8 [n, channels, height, width], zero where there is none; in a worker in the memory it is sent in."""
        found = next((i for i in images if i is not None), None)
        black = torch.zeros_like(found) if found is not None else self._black()
        whole = [black if i is None else i for i in images]
        if any(i.shape != black.shape for i in whole):
            shapes = sorted({tuple(i.shape) for i in whole})
            raise TlxError(f"the transforms give pictures of different shapes: {shapes}; end them with center_crop")
        shape = (len(whole), *black.shape)
        if get_worker_info() is None:
            return torch.stack(whole)
        # torch's own default_collate does the same
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
        return torch.stack(whole, out=torch.empty(0, dtype=torch.uint8).set_(storage).view(shape))  # type: ignore[call-overload]

    def _black(self) -> Tensor:
        with own_randomness() as seed:
            seed(0)
            return torch.zeros_like(self.transform(torch.zeros(self.channels, 256, 256, dtype=torch.uint8)))
