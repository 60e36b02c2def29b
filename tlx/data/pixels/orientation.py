"""How the camera was held: the one reader of that note, and what makes a picture upright.

The note is EXIF's orientation (tag 0x0112), or ``tiff:Orientation`` in XMP where EXIF has none, read by Pillow's rules:
the EXIF segment may come after XMP; of several values the first counts, in whatever integer type and byte order; what
follows "Exif" must be two zero bytes. A broken note, and a number beyond 1 to 8, is as good as none.

TIFF is the exception: there the tag is part of the picture, and Pillow applies it while it decodes.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from tlx.data.pixels.markers import segments

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_APP1 = 0xE1
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_TAG = 0x0112
_ORDERS = {b"II": "<", b"MM": ">"}
_INTEGERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of TIFF's types, in bytes
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def jpeg_orientation(data: bytes) -> int:
    """The orientation that a JPEG notes before its first scan: 1 (upright, or no note) to 8."""
    exif, xmp = b"", b""
    for marker, start, stop in segments(data):
        if marker == _APP1:
            content = data[start + 4 : stop]
            if content.startswith(_EXIF):  # a long note goes on in further segments
                exif += content[6:]
            elif content.startswith(_XMP):
                xmp = content[len(_XMP) :]
    return orientation(exif, xmp)


def info_orientation(info: dict[str | tuple[int, int], Any]) -> int:
    """The orientation in what Pillow has found beside the pixels (`Image.info`) of a PNG, WebP or AVIF."""
    exif = info.get("exif")
    if not isinstance(exif, bytes):  # a text that somebody has called so
        exif = None
    if exif is None and "Raw profile type exif" in info:  # of ImageMagick, in a PNG
        try:
            exif = bytes.fromhex("".join(str(info["Raw profile type exif"]).split("\n")[3:]))
        except ValueError:
            exif = b""
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    xmp = xmp.encode(errors="replace") if isinstance(xmp, str) else xmp
    return orientation(exif or b"", xmp if isinstance(xmp, bytes) else b"")


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation in an EXIF block, with or without its "Exif\\0\\0", or else in XMP."""
    while exif.startswith(_EXIF):
        exif = exif[6:]
    value = _in_exif(exif)
    if value is None:
        found = _IN_XMP.search(xmp)
        value = int(found[1]) if found else 1
    return value if 1 <= value <= 8 else 1


def _in_exif(tiff: bytes) -> int | None:
    """The value of the tag in the first directory; None where there is none."""
    order = _ORDERS.get(tiff[:2])
    if order is None or tiff[2:4] not in (b"\0*", b"*\0") or len(tiff) < 10:
        return None
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return None
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    for place in range(at + 2, min(at + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, place)
        if tag != _TAG or kind not in _SIZES or not count:
            continue
        size, value = count * _SIZES[kind], place + 8
        if size > 4:  # it does not fit here: this is its place
            (value,) = struct.unpack_from(order + "I", tiff, value)
        if value + size > len(tiff):
            continue
        return int(struct.unpack_from(order + _INTEGERS[kind], tiff, value)[0]) if kind in _INTEGERS else 0
    return None


def steps(orientation: int) -> tuple[bool, bool, bool]:
    """What makes a stored picture upright: its columns are reversed, its rows are reversed, then both are exchanged."""
    return orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7), orientation >= 5


def inverse(orientation: int) -> int:
    """The orientation that turns an upright picture into the one that this orientation makes upright."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height as the picture is seen."""
    return (height, width) if steps(orientation)[2] else (width, height)


def stored_view(upright: NDArray[Any], orientation: int) -> NDArray[Any]:
    """A view of an array [height, width, ...] that is laid out as the stored picture: what is written there comes out
    upright in the array."""
    mirror, flip, transposed = steps(orientation)
    view = upright.swapaxes(0, 1) if transposed else upright
    view = view[::-1] if flip else view
    return view[:, ::-1] if mirror else view


def upright_copy(stored: NDArray[Any], orientation: int) -> NDArray[Any]:
    """A stored picture [height, width, ...] upright, in memory of its own."""
    width, height = upright_size(stored.shape[1], stored.shape[0], orientation)
    upright = np.empty((height, width, *stored.shape[2:]), stored.dtype)
    stored_view(upright, orientation)[:] = stored
    return upright


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """A stored picture [channels, height, width], upright; at most one copy."""
    mirror, flip, transposed = steps(orientation)
    axes = [axis for axis, reverse in ((-2, flip), (-1, mirror)) if reverse]
    pixels = pixels.flip(axes) if axes else pixels
    return pixels.transpose(-1, -2) if transposed else pixels
