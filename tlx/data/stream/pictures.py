"""Pictures of samples as the transforms show them, written to where a batch wants them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlx.base.errors import TlxError
from tlx.data.pixels.crop_geometry import Draw
from tlx.data.pixels.decode import Channels, DecodeError, decode
from tlx.data.pixels.fused_crop import Framed, show
from tlx.data.pixels.jpeg_region import Regions
from tlx.data.pixels.one_picture import at_picture, no_memory
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.file_list import FileList, InMemory
from tlx.data.stream.randomness import own_randomness
from tlx.data.stream.reader import BadSample, ReadError, ShardReader
from tlx.data.stream.workers import at_work_on

_TRIED = 20  # unreadable samples before the shape of a view is found with a black one


class Pictures:
    """Views of samples.

    Args:
        manifest: where the pictures are: shards, files by themselves, or memory.
        channels: pictures are read as grey (1), RGB (3) or RGBA (4).
        upright: pictures are turned as the camera noted (EXIF).
        scaled: JPEGs may be decoded smaller, where the view begins with a framing that leaves pixels enough.
    """

    def __init__(
        self,
        manifest: Manifest | FileList | InMemory,
        transform: Callable[[Tensor], Tensor],
        channels: Channels = 3,
        *,
        upright: bool = True,
        scaled: bool = False,
    ) -> None:
        self.manifest, self.transform, self.channels, self.upright = manifest, transform, channels, upright
        self.reader = ShardReader(manifest) if isinstance(manifest, Manifest) else manifest
        self._framed = transform if isinstance(transform, Framed) else None
        self._regions = Regions(self._framed.framing, upright=upright, scaled=scaled) if self._framed else None
        self._rest = self._framed.rest if self._framed else transform

    @property
    def random(self) -> bool:
        """Whether views may draw from the global random states, which `show` seeds."""
        return self._rest is not None

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of every view."""
        if self._framed is not None and self._rest is None:
            return (*self._framed.framing.size, self.channels)
        with own_randomness() as seed:
            seed(0)
            image = self._black() if self._framed else self._first_readable()
            try:
                view = self.transform(image)
                channels, height, width = view.shape
            except MemoryError:
                raise
            except Exception as error:  # whatever the user's transforms raise
                raise _failed(self.manifest.location, image, error) from error
            if view.dtype != torch.uint8:
                raise _no_bytes(self.manifest.location, view)
        return height, width, channels

    def _first_readable(self) -> Tensor:
        for sample in range(min(len(self.manifest), _TRIED)):
            with suppress(ReadError, DecodeError), at_picture(partial(self.manifest.describe, sample)):
                return decode(self.reader.read(sample), self.channels, upright=self.upright)
        return self._black()

    def _black(self) -> Tensor:
        return torch.zeros(self.channels, 256, 256, dtype=torch.uint8)

    def show(self, sample: int, key: int, seed: Callable[[int], None], out: NDArray[np.uint8]) -> BadSample | None:
        """Writes a view to `out`, uint8 [height, width, channels]; or says why there is none.

        Args:
            key: what the view draws depends on this alone.
            seed: for what draws from the global states.
        """
        at_work_on(sample)
        try:
            with at_picture(partial(self.manifest.describe, sample)):
                return self._show(sample, key, seed, out)
        except MemoryError as error:
            raise no_memory(self.manifest.describe(sample), "fewer data.workers") from error

    def _show(self, sample: int, key: int, seed: Callable[[int], None], out: NDArray[np.uint8]) -> BadSample | None:
        try:
            data = self.reader.read(sample)
            if self._framed is None or self._regions is None:
                image = decode(data, self.channels, upright=self.upright)
            elif self._rest is None and self.channels != 4:
                if not self._regions.show(data, key, out):
                    _write(self._frame(data, key), out)
                return None
            else:
                image = self._frame_here(data, key)
        except (ReadError, DecodeError) as error:
            return BadSample(sample, self.manifest.describe(sample), str(error))
        if self._rest is not None:
            seed(key)
            image = self._transformed(sample, image)
            if image.dtype != torch.uint8:
                raise _no_bytes(self.manifest.describe(sample), image)
        if image.shape[-2:] != out.shape[:2] or image.shape[0] != out.shape[2]:
            raise TlxError(
                f"{self.manifest.describe(sample)}: the transforms give pictures of different shapes: "
                f"{tuple(image.shape)} here, {(out.shape[2], *out.shape[:2])} otherwise; end them with center_crop"
            )
        _write(image, out)
        return None

    def _frame_here(self, data: bytes, key: int) -> Tensor:
        """The framed picture in memory of this process."""
        assert self._framed is not None
        assert self._regions is not None
        colours = min(self.channels, 3)
        if self._scratch.shape[2] != colours:
            self._scratch = np.empty((*self._framed.framing.size, colours), np.uint8)
        if not self._regions.show(data, key, self._scratch):
            return self._frame(data, key)
        image = torch.from_numpy(self._scratch).permute(2, 0, 1)
        return image if self.channels != 4 else torch.cat([image, torch.full_like(image[:1], 255)])

    _scratch: NDArray[np.uint8] = np.empty((0, 0, 0), np.uint8)

    def _frame(self, data: bytes, key: int) -> Tensor:
        """The framed picture, decoded whole."""
        assert self._framed is not None
        image, framing = decode(data, self.channels, upright=self.upright), self._framed.framing
        return show(image, framing(image.shape[-1], image.shape[-2], Draw(key)), bicubic=framing.bicubic)

    def _transformed(self, sample: int, image: Tensor) -> Tensor:
        assert self._rest is not None
        try:
            return self._rest(image)
        except MemoryError:
            raise
        except Exception as error:  # whatever the user's transforms raise
            raise _failed(self.manifest.describe(sample), image, error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_scratch"}


def _no_bytes(where: str, view: Tensor) -> TlxError:
    return TlxError(f"{where}: the transforms give {view.dtype}; they must give torch.uint8 (normalise on the device)")


def _failed(where: str, image: Tensor, error: Exception) -> TlxError:
    size = f"{image.shape[-2]} x {image.shape[-1]} pixels"
    return TlxError(f"{where}: the transforms fail on a picture of {size}: {error}")


def _write(image: Tensor, out: NDArray[np.uint8]) -> None:
    torch.from_numpy(out).copy_(image.permute(1, 2, 0))
