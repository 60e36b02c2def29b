"""The least that a picture can cost on this machine: bytes in memory, geometry known, and one decode and resize.

It is done in steps that can be timed apart. With the extension: the header; the region decoded at its own size; the
region decoded and resized, which is the floor. Without it, or for pictures that it does not read: the picture decoded
whole; and resized.
"""

# torchvision has no types
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.crop_geometry import Draw, Frame, Framing, Rectangle, stored
from tlx.data.pixels.decode import Channels, decode
from tlx.data.pixels.fused_crop import show
from tlx.data.pixels.orientation import jpeg_orientation, turned, upright_size

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # a later torchvision; decode() is what is left then
    decode_jpeg = None

TODO = "install a C compiler and libjpeg-turbo's header (libjpeg-dev or libjpeg-turbo-devel), then install tlx again"
_KEPT = 2.0  # as in tlx.data.pixels.jpeg_region


@dataclass(frozen=True)
class Cut:
    """What the extension is asked for, of one picture.

    Attributes:
        region: what the window needs of the crop.
        coarse: the region's own width and height, at the scale that it is decoded at.
    """

    data: bytes
    crop: Rectangle
    resized: tuple[int, int]
    window: Rectangle
    mirror: bool
    flip: bool
    region: Rectangle
    coarse: tuple[int, int]
    colours: int

    def pixels(self, size: tuple[int, int]) -> int:
        """Bytes of a picture of a width and height."""
        return size[0] * size[1] * self.colours


@dataclass(frozen=True)
class Whole:
    """A picture that is decoded whole, turned by a JPEG's orientation, and what is shown of it."""

    data: bytes
    encoded: torch.Tensor
    frame: Frame
    orientation: int


@dataclass(frozen=True)
class Floor:
    """Prepared pictures of one view.

    Attributes:
        width, height: of each picture, upright.
    """

    cuts: Sequence[Cut]
    wholes: Sequence[Whole]
    framing: Framing
    channels: Channels
    least: float
    sizes: Sequence[tuple[int, int]]

    @property
    def what(self) -> str:
        """How the floor is measured, in words."""
        if not self.wholes:
            return "header and view of the C extension, bytes in memory"
        if not self.cuts:
            return "torchvision's decode_jpeg and an antialiased uint8 resize, bytes in memory"
        share = len(self.cuts) / (len(self.cuts) + len(self.wholes))
        return f"the C extension for {share:.0%} of the pictures, torchvision for the others, bytes in memory"

    def stages(self) -> dict[str, Callable[[], None]]:
        """Each does what the one before does, and more."""
        if not self.cuts:
            return {"decode": self.decode, "resize": self.resize}
        return {"header": self.header, "decode": self.decode, "resize": self.resize}

    @cached_property
    def _place(self) -> NDArray[np.uint8]:
        """Where all pixels go: fresh memory for every picture would cost more than the copy."""
        return np.empty(max(max(c.pixels(c.coarse), c.pixels(c.window[2:])) for c in self.cuts), np.uint8)

    def header(self) -> None:
        decoder = regions._jpeg.Decoder()
        for cut in self.cuts:
            decoder.open(cut.data)

    def decode(self) -> None:
        if self.cuts:
            decoder, bicubic, least = regions._jpeg.Decoder(), self.framing.bicubic, 1.0 if self.least else 0.0
            for cut in self.cuts:
                decoder.open(cut.data)
                out, all_of_it = self._place[: cut.pixels(cut.coarse)], (0, 0, *cut.coarse)
                decoder.view(out, cut.region, cut.coarse, all_of_it, bicubic=bicubic, least=least)
        for whole in self.wholes:
            self._pixels(whole)

    def write(self) -> None:
        """What `decode` writes, and `resize` does not: the region at its own size."""
        for cut in self.cuts:
            self._place[: cut.pixels(cut.coarse)].fill(0)

    def resize(self) -> None:
        if self.cuts:
            decoder, bicubic, least = regions._jpeg.Decoder(), self.framing.bicubic, self.least
            for cut in self.cuts:
                decoder.open(cut.data)
                out = self._place[: cut.pixels(cut.window[2:])]
                decoder.view(
                    out, cut.crop, cut.resized, cut.window,
                    bicubic=bicubic, mirror=cut.mirror, flip=cut.flip, least=least,
                )  # fmt: skip
        for whole in self.wholes:
            show(self._pixels(whole), whole.frame, bicubic=self.framing.bicubic)

    def _pixels(self, whole: Whole) -> torch.Tensor:
        if decode_jpeg is None or whole.data[:2] != b"\xff\xd8" or self.channels == 4:
            return decode(whole.data, self.channels)
        mode = ImageReadMode.GRAY if self.channels == 1 else ImageReadMode.RGB
        return turned(decode_jpeg(whole.encoded, mode=mode), whole.orientation)


def prepare(
    framing: Framing, pictures: Sequence[tuple[bytes, int]], channels: Channels, *, upright: bool, scaled: bool
) -> Floor:
    """Everything about the pictures that can be known before they are timed.

    Args:
        pictures: each one's bytes, and the key that its frame is drawn by.
    """
    colours, least = min(channels, 3), _KEPT if scaled else 0.0
    cuts, wholes, sizes = [], [], []
    for data, key in pictures:
        found = _cut(framing, data, key, colours, upright=upright, least=least) if channels != 4 else None
        if found is not None:
            cuts.append(found[0])
            sizes.append(found[1])
            continue
        pixels = decode(data, channels, upright=upright)
        size = (pixels.shape[-1], pixels.shape[-2])
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        orientation = jpeg_orientation(data) if upright and data[:2] == b"\xff\xd8" else 1
        wholes.append(Whole(data, encoded, framing(*size, Draw(key)), orientation))
        sizes.append(size)
    return Floor(cuts, wholes, framing, channels, least, sizes)


def _cut(
    framing: Framing, data: bytes, key: int, colours: int, *, upright: bool, least: float
) -> tuple[Cut, tuple[int, int]] | None:
    """As `tlx.data.pixels.jpeg_region` asks; None for a picture that the extension does not read."""
    if regions._jpeg is None or data[:2] != b"\xff\xd8":
        return None
    decoder: Any = regions._jpeg.Decoder()
    try:
        width, height, _ = decoder.open(data)
        orientation = jpeg_orientation(data) if upright else 1
        seen = upright_size(width, height, orientation)
        plan = stored(framing(*seen, Draw(key)), width, height, orientation)
        crop, resized, window, _ = plan.frame
        place = np.empty((window[3], window[2], colours), np.uint8)
        scale = decoder.view(place, crop, resized, window, bicubic=framing.bicubic, least=least)
    except ValueError:
        return None
    (left, across), (top, down) = (
        _needed(crop[i], crop[i + 2], resized[i], window[i], window[i + 2], scale) for i in (0, 1)
    )
    region, coarse = (left, top, across, down), (across // scale, down // scale)
    return Cut(data, crop, resized, window, plan.mirror, plan.flip, region, coarse, colours), seen


def _needed(start: int, length: int, resized: int, window: int, count: int, scale: int) -> tuple[int, int]:
    """Where the pixels begin that a window is made of, and how many there are, along one side of the crop; in whole
    steps of the scale that the picture is decoded at, so that nothing has to be resampled."""
    ratio = length / resized
    reach = max(ratio, 1.0)  # of the triangle filter
    first = start + max(math.floor(window * ratio - reach), 0)
    last = start + min(math.ceil((window + count) * ratio + reach), length)
    first -= first % scale
    return first, max((last - first) // scale, 1) * scale
