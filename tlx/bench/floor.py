"""The least that a picture can cost on this machine: bytes in memory, geometry known, and one decode and resize.

With the extension: the region decoded and resized. Without it, or for pictures that it does not read: the picture
decoded whole, and resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.crop_geometry import Draw, Frame, Framing, Rectangle, stored
from tlx.data.pixels.decode import Channels, decode
from tlx.data.pixels.fused_crop import show
from tlx.data.pixels.orientation import jpeg_orientation, upright_size

TODO = "install a C compiler and libjpeg-turbo's header (libjpeg-dev or libjpeg-turbo-devel), then install tlx again"
_KEPT = 2.0  # as in tlx.data.pixels.jpeg_region


@dataclass(frozen=True)
class Cut:
    """What the extension is asked for, of one picture."""

    data: bytes
    crop: Rectangle
    resized: tuple[int, int]
    window: Rectangle
    mirror: bool
    flip: bool


@dataclass(frozen=True)
class Whole:
    """A picture that is decoded whole, and what is shown of it."""

    data: bytes
    frame: Frame


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
    upright: bool
    least: float
    sizes: Sequence[tuple[int, int]]

    @property
    def what(self) -> str:
        """How the floor is measured, in words."""
        share = len(self.cuts) / len(self.sizes)
        return f"the C extension for {share:.0%} of the pictures, torchvision for the others, bytes in memory"

    @cached_property
    def _place(self) -> NDArray[np.uint8]:
        """Where all pixels go: fresh memory for every picture would cost more than the copy."""
        return np.empty(max(self._pixels_of(cut) for cut in self.cuts), np.uint8)

    def _pixels_of(self, cut: Cut) -> int:
        return cut.window[2] * cut.window[3] * min(self.channels, 3)

    def resize(self) -> None:
        if self.cuts:
            decoder, bicubic, least = regions._jpeg.Decoder(), self.framing.bicubic, self.least
            for cut in self.cuts:
                decoder.open(cut.data)
                out = self._place[: self._pixels_of(cut)]
                decoder.view(
                    out, cut.crop, cut.resized, cut.window,
                    bicubic=bicubic, mirror=cut.mirror, flip=cut.flip, least=least,
                )  # fmt: skip
        for whole in self.wholes:
            pixels = decode(whole.data, self.channels, upright=self.upright)
            show(pixels, whole.frame, bicubic=self.framing.bicubic)


def prepare(
    framing: Framing, pictures: Sequence[tuple[bytes, int]], channels: Channels, *, upright: bool, scaled: bool
) -> Floor:
    """Everything about the pictures that can be known before they are timed.

    Args:
        pictures: each one's bytes, and the key that its frame is drawn by.
    """
    cuts, wholes, sizes, least = [], [], [], _KEPT if scaled else 0.0
    for data, key in pictures:
        found = _cut(framing, data, key, channels, upright=upright, least=least)
        if found is not None:
            cuts.append(found[0])
            sizes.append(found[1])
            continue
        pixels = decode(data, channels, upright=upright)
        size = (pixels.shape[-1], pixels.shape[-2])
        wholes.append(Whole(data, framing(*size, Draw(key))))
        sizes.append(size)
    return Floor(cuts, wholes, framing, channels, upright, least, sizes)


def _cut(
    framing: Framing, data: bytes, key: int, channels: Channels, *, upright: bool, least: float
) -> tuple[Cut, tuple[int, int]] | None:
    """As `tlx.data.pixels.jpeg_region` asks; None for a picture that the extension does not read."""
    if regions._jpeg is None or channels == 4 or data[:2] != b"\xff\xd8":
        return None
    decoder: Any = regions._jpeg.Decoder()
    try:
        width, height, _ = decoder.open(data)
        orientation = jpeg_orientation(data) if upright else 1
        seen = upright_size(width, height, orientation)
        plan = stored(framing(*seen, Draw(key)), width, height, orientation)
        crop, resized, window, _ = plan.frame
        cut = Cut(data, crop, resized, window, plan.mirror, plan.flip)
        Floor([cut], [], framing, channels, upright, least, [seen]).resize()  # it may only notice now
    except ValueError:
        return None
    return cut, seen
