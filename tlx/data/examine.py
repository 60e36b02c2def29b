"""One stored picture looked at: whether it can be read, what it is, what its pixels are like.

``examine(data, measured=False) -> Examined``
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags
from torch import Tensor

from tlx.data.decode import MAX_PIXELS, decode, open_picture
from tlx.data.markers import coding, scans_are_plain, without_notes

_jpeg: Any
try:
    from tlx.data import _jpeg
except ImportError:  # built where there is a compiler and libjpeg's header
    _jpeg = None

_ROWS = 64
_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Examined:
    """A readable picture.

    Attributes:
        width, height: as it is seen, the camera's orientation applied.
        format: Pillow's name in small letters; a JPEG is "jpeg" or "jpeg progressive".
        digest: 16 bytes of a SHA-256 over its content (see `content_digest`).
        moments: where it was measured: the means of R, G, B in [0, 1], then the means of their squares.
    """

    width: int
    height: int
    format: str
    digest: bytes
    moments: tuple[float, ...] | None


def examine(data: bytes, *, measured: bool = False) -> Examined:
    """Looks at a picture; one that `decode` refuses is refused.

    Nearly all JPEGs are only read at an eighth of their size: all of their coded data pass the entropy decoder, which
    is where damage shows, and most other work is saved.

    Args:
        measured: decode it and compute its moments.

    Raises:
        DecodeError: with the reason.
    """
    coded = coding(data)
    if coded in ("baseline", "progressive") and not measured:
        size = _coarse(data)
        if size is not None and scans_are_plain(data):
            return Examined(*size, format_of(data, "jpeg"), content_digest(data), None)
    # whatever went wrong there, only this decides
    pixels = decode(data)
    format = "jpeg"
    if coded is None:
        with suppress(Exception), open_picture(data) as image:
            format = (image.format or "").lower()
    moments = _moments(pixels) if measured else None
    return Examined(pixels.shape[2], pixels.shape[1], format_of(data, format), content_digest(data), moments)


def _coarse(data: bytes) -> tuple[int, int] | None:
    """Reads a JPEG at an eighth of its size: its width and height upright; None if that fails, or is not enough to
    know whether `decode` could."""
    with suppress(Exception):
        if _jpeg is not None:
            decoder = _jpeg.Decoder()  # a used one still has the last picture's tables, and would lend them to this
            width, height, components, orientation = decoder.open(data)
            if components > 3 or width * height > MAX_PIXELS:
                return None
            small = max(width // 8, 1), max(height // 8, 1)
            out = np.empty(small[0] * small[1], np.uint8)  # luma
            decoder.view(out, (0, 0, width, height), small, (0, 0, *small), least=1.0)
        else:
            with open_picture(data) as image:
                (width, height), orientation = image.size, 1
                if image.mode not in ("L", "RGB") or width * height > MAX_PIXELS:
                    return None
                with suppress(Exception):  # a broken note of the camera
                    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                image.draft("L", (1, 1))
                image.load()
        return (height, width) if orientation in _ON_ITS_SIDE else (width, height)
    return None


def format_of(data: bytes, format: str) -> str:
    """A format's name, with how a JPEG is coded."""
    if format not in ("jpeg", "mpo"):
        return format or "unknown"
    return "jpeg progressive" if coding(data) == "progressive" else "jpeg"


def content_digest(data: bytes) -> bytes:
    """16 bytes of the SHA-256 of a file; of a JPEG without its notes (EXIF, comments ...), so that copies which differ
    in nothing else are found."""
    found = hashlib.sha256()
    for piece in without_notes(data):
        found.update(piece)
    return found.digest()[:16]


def _moments(pixels: Tensor) -> tuple[float, ...]:
    """From exact integers, so that they are the same in every process and on every machine; some 64 rows, evenly
    spaced, are enough."""
    pixels = pixels[:, :: max(pixels.shape[1] // _ROWS, 1)]
    values = np.arange(256, dtype=np.int64)
    counts = [torch.bincount(channel.flatten(), minlength=256).numpy() for channel in pixels]
    total = pixels.shape[1] * pixels.shape[2]
    means = [int(c @ values) / (255 * total) for c in counts]
    squares = [int(c @ values**2) / (255**2 * total) for c in counts]
    return (*means, *squares)
