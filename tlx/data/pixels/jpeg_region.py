"""JPEGs decoded only where they are shown, by tlx's C extension; without it everything is decoded whole, elsewhere.

Both ways give the same part of the picture at the same size, and pixels that differ by rounding. What the extension
does not read (no JPEG, CMYK, rare codings) or finds damaged is left to the other way, which says what is wrong. Damage
outside of the region that is shown goes unnoticed here; ``tlx shards check`` decodes everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlx.data.pixels.crop_geometry import Draw, Framing, stored
from tlx.data.pixels.decode import check_pixels
from tlx.data.pixels.extension import extension
from tlx.data.pixels.markers import coding
from tlx.data.pixels.one_picture import LARGE, reserve
from tlx.data.pixels.orientation import jpeg_orientation, upright_size

_jpeg = extension
_KEPT = 2.0
"""Scaled decoding leaves at least so many pixels for each that is shown; with 2 nothing is visible (53 dB)."""


def decoder() -> str:
    """What decodes JPEGs here, in words."""
    return f"tlx's own ({_jpeg.about()})" if _jpeg is not None else "torchvision's (the whole picture)"


class Regions:
    """Pictures of one data set, in one process.

    Args:
        upright: pictures are turned as the camera noted (EXIF).
        scaled: JPEGs may be decoded at a half, a quarter or an eighth, where that leaves pixels enough.
    """

    def __init__(self, framing: Framing, *, upright: bool = True, scaled: bool = False) -> None:
        self.framing, self.upright, self.least = framing, upright, _KEPT if scaled else 0.0
        self._decoder = _jpeg.Decoder() if _jpeg is not None else None

    def __reduce__(self) -> Any:
        return _remade, (self.framing, self.upright, bool(self.least))

    def show(self, data: bytes, key: int, out: NDArray[np.uint8]) -> bool:
        """Writes what is shown of a picture to `out`, uint8 [height, width, 1 or 3]; whether that was possible.

        Raises:
            DecodeError: a decompression bomb.
        """
        if self._decoder is None or data[:2] != b"\xff\xd8":
            return False
        try:
            header = self._decoder.open(data)
        except ValueError:
            return False
        width, height, components = header
        check_pixels(width, height)
        if components > 3:
            return False
        if 3 * width * height > LARGE and coding(data) == "progressive":  # libjpeg keeps all coefficients
            reserve(3 * width * height)
        orientation = jpeg_orientation(data) if self.upright else 1
        frame = self.framing(*upright_size(width, height, orientation), Draw(key))
        (crop, resized, window, _), mirror, flip, transposed = stored(frame, width, height, orientation)
        try:
            place = np.empty((window[3], window[2], out.shape[2]), np.uint8) if transposed else out
            self._decoder.view(
                place, crop, resized, window, bicubic=self.framing.bicubic, mirror=mirror, flip=flip, least=self.least
            )
        except ValueError:
            return False
        if transposed:
            out[:] = place.transpose(1, 0, 2)
        return True


def _remade(framing: Framing, upright: bool, scaled: bool) -> Regions:
    return Regions(framing, upright=upright, scaled=scaled)
