"""One stored picture looked at: whether it can be read, what it is, what its pixels are like.

``examine(data, measured=False) -> Examined``
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlx.data.pixels.decode import MAX_PIXELS, DecodeError, decode_array, library, open_picture, reading
from tlx.data.pixels.extension import extension
from tlx.data.pixels.markers import Coding, coding, scans_are_plain, without_notes
from tlx.data.pixels.one_picture import at_picture, reserve
from tlx.data.pixels.orientation import jpeg_orientation, upright_copy, upright_size

_jpeg = extension
_ROWS = 64


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
    pixels = None
    if coded in ("baseline", "progressive") and scans_are_plain(data):
        if measured:
            pixels = _whole_by_extension(data)
        elif (size := _coarse(data, coded)) is not None:
            return Examined(*size, format_of(data, "jpeg"), content_digest(data), None)
    format = "jpeg" if coded is not None else (open_picture(data).format or "").lower()
    if pixels is None:  # whatever went wrong there, only this decides
        pixels = decode_array(data)
    moments = _moments(pixels) if measured else None
    return Examined(pixels.shape[2], pixels.shape[1], format_of(data, format), content_digest(data), moments)


def _coarse(data: bytes, coded: Coding) -> tuple[int, int] | None:
    """Reads a JPEG at an eighth of its size: its width and height upright; None if that fails, or is not enough to
    know whether `decode` could."""
    size = _coarse_by_extension(data, coded) if _jpeg is not None else _coarse_by_pillow(data, coded)
    return None if size is None else upright_size(*size, jpeg_orientation(data))


def _coarse_by_extension(data: bytes, coded: Coding) -> tuple[int, int] | None:
    decoder = _jpeg.Decoder()  # a used one still has the last picture's tables, and would lend them to this
    try:
        width, height, components = decoder.open(data)
        if components > 3 or width * height > MAX_PIXELS:
            return None
        if coded == "progressive":  # libjpeg keeps all coefficients
            reserve(3 * width * height)
        small = max(width // 8, 1), max(height // 8, 1)
        out = np.empty(small[0] * small[1], np.uint8)  # luma
        decoder.view(out, (0, 0, width, height), small, (0, 0, *small), least=1.0)
    except ValueError:
        return None
    return width, height


def _whole_by_extension(data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of `decode_array`, without torch; None where the extension is missing, or does not read this. Bytes
    between the last pixel and the end mark, of which libjpeg warns, are not looked at."""
    if _jpeg is None:
        return None
    decoder = _jpeg.Decoder()
    try:
        width, height, components = decoder.open(data)
        if components > 3 or width * height > MAX_PIXELS:
            return None
        with at_picture():
            reserve(3 * width * height)
            stored = np.empty((height, width, 3), np.uint8)
            decoder.view(stored, (0, 0, width, height), (width, height), (0, 0, width, height))
            orientation = jpeg_orientation(data)
            upright: NDArray[np.uint8] = stored if orientation == 1 else upright_copy(stored, orientation)
            pixels: NDArray[np.uint8] = upright.transpose(2, 0, 1)
            return pixels
    except ValueError:
        return None


def _coarse_by_pillow(data: bytes, coded: Coding) -> tuple[int, int] | None:
    try:
        image = open_picture(data)
        size = image.size
        if image.mode not in ("L", "RGB") or size[0] * size[1] > MAX_PIXELS:
            return None
        if coded == "progressive":
            reserve(3 * size[0] * size[1])
        with reading(data), library():
            image.draft("L", (1, 1))
            image.load()
    except DecodeError:
        return None
    return size


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


def _moments(pixels: NDArray[np.uint8]) -> tuple[float, ...]:
    """From exact integers, so that they are the same in every process and on every machine; some 64 rows, evenly
    spaced, are enough."""
    pixels = pixels[:, :: max(pixels.shape[1] // _ROWS, 1)]
    values = np.arange(256, dtype=np.int64)
    counts = [np.bincount(channel.ravel(), minlength=256) for channel in pixels]
    total = pixels.shape[1] * pixels.shape[2]
    means = [int(c @ values) / (255 * total) for c in counts]
    squares = [int(c @ values**2) / (255**2 * total) for c in counts]
    return (*means, *squares)
