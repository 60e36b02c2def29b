"""Bytes to pixels.

JPEGs go through torchvision's decoder; PNG, WebP, AVIF, GIF, BMP, TIFF and PPM through Pillow, which is asked for no
other kind: for EPS, whatever a file is called, it would start Ghostscript, and so run what a stranger wrote. Not PNGs
through torchvision: version 0.29's decoder ended the process with a segmentation fault on 288 of 300 in which six bytes
had been changed, and is no faster; its JPEG decoder survived 12,000 damaged files, that for WebP 6,000. Large WebPs go
there, too: Pillow's decoder of animations takes 5.4 times the decoded picture of memory, torchvision's 1.2 times.

The camera's orientation is applied unless told otherwise; transparency is dropped, not blended, where it is not asked
for as a fourth channel; of an animation the first frame counts; 16 bits become 8. Pixels without a known range (floats,
32-bit or signed integers) are refused. A JPEG that ends too early is refused, one that libjpeg repairs by itself is
taken, as Pillow and torchvision do; what libjpeg says of it is told with the picture's name.

A picture takes at most three times its decoded size of memory while it is decoded (`one_picture`), except
AVIFs (3.6 times), HEICs (for which 4 times are kept free) and large animated WebPs (6 times).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tlx.base.errors import TlxError
from tlx.data.pixels import heif
from tlx.data.pixels.decoder_messages import listening, written
from tlx.data.pixels.one_picture import LARGE, PEAK, at_picture, reserve
from tlx.data.pixels.orientation import info_orientation, inverse, jpeg_orientation, stored_view, turned, upright_size
from tlx.data.pixels.png_rows import rows_are_missing
from tlx.data.stream.workers import use_one_thread

if TYPE_CHECKING:
    from torch import Tensor

# it would come once in a process, where torchvision's decoder is called elsewhere
warnings.filterwarnings("ignore", message="The image decoding and encoding capab", category=DeprecationWarning)

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""A picture that claims more pixels (179 million) is refused before memory is taken for it: a decompression bomb."""


FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", heif.FORMAT)
"""What Pillow calls the kinds of pictures that are read; MPO comes with JPEG, HEIF with a package (see `heif`)."""

Channels = Literal[1, 3, 4]
_MODES: dict[Channels, str] = {1: "L", 3: "RGB", 4: "RGBA"}
_BETWEEN = {"La": "LA", "RGBa": "RGBA"}  # modes that Pillow converts in two steps
_PEAKS = {"WEBP": 6, "AVIF": 4, heif.FORMAT: 4}  # decoded sizes that Pillow takes, where they are more than PEAK
_LONGEST = 1 << 25  # pixels of a side: with 64 bits each, Pillow takes a longer row for a lack of memory
_STRIP = 4 << 20  # bytes of pixels that are converted at a time
_BITS, _PHOTOMETRIC, _ORIENTATION, _PLANAR, _SAMPLE_FORMAT = 258, 262, 274, 284, 339  # TIFF's tags
_SIGNED = 2  # a sample format
_TO_8_BITS = "convert the picture to 8 bits"
_NO_MEMORY = ("out of memory", "allocate memory", "insufficient memory")  # Pillow, libtiff; torch; libjpeg
_PLACE = re.compile(r"^\w+, \S+:\d+, ")  # in torchvision's source
_MOST_SAID = 2  # lines of what libtiff says of a picture that it cannot read


class DecodeError(TlxError):
    """These bytes are no picture, or a damaged one."""


class _Failed(Exception):
    """What Pillow or torchvision raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def open_picture(data: bytes) -> Image.Image:
    """The picture, of which only the header was read.

    Raises:
        DecodeError: with the reason.
    """
    with reading(data):
        return _open(data)


@contextmanager
def reading(data: bytes) -> Iterator[None]:
    """In here a picture is read: what is raised within `library` becomes a DecodeError, what Pillow, libtiff and
    libjpeg say is told with its name."""
    try:
        with at_picture(), listening() as heard:
            yield
    except _Failed as failed:
        if any(_lacks_memory(said) for said in heard.lines):
            raise MemoryError(heard.lines[-1]) from failed.error
        raise DecodeError(_reason(data, failed.error, heard.said)) from failed.error
    except RuntimeError as error:  # torch's, where a decoded picture is copied
        if _lacks_memory(str(error)):
            raise MemoryError(str(error)) from error
        raise
    heard.tell()


@contextmanager
def library() -> Iterator[None]:
    """In here, within `reading`, Pillow or torchvision is called."""
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # they raise many kinds for bytes that strangers made
        if _lacks_memory(str(error)):
            raise MemoryError(str(error)) from error
        raise _Failed(error) from error


def _lacks_memory(said: str) -> bool:
    return any(words in said.casefold() for words in _NO_MEMORY)


def _open(data: bytes) -> Image.Image:
    with library():
        return Image.open(io.BytesIO(data), formats=_known())


@cache
def _known() -> tuple[str, ...]:
    Image.init()
    heif.register()
    return tuple(format for format in FORMATS if format in Image.OPEN)  # Pillow has AVIF since 11.3


def check_pixels(width: int, height: int) -> None:
    """
    Raises:
        DecodeError: a picture that claims to be larger than MAX_PIXELS.
    """
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than {MAX_PIXELS}: a decompression bomb?")


def decode(data: bytes, channels: Channels = 3, *, upright: bool = True, sound: bool = False) -> Tensor:
    """The picture as a tensor; see :func:`decode_array`."""
    import torch

    return torch.from_numpy(decode_array(data, channels, upright=upright, sound=sound))


def decode_array(
    data: bytes, channels: Channels = 3, *, upright: bool = True, sound: bool = False
) -> NDArray[np.uint8]:
    """The picture as uint8 [channels, height, width]. torch is imported for JPEGs and large WebPs alone.

    Args:
        upright: it is turned as the camera noted (see `tlx.data.pixels.orientation`).
        channels: 3 for RGB; 1 for grey, the luma of ITU-R BT.601, which JPEGs hold as it is; 4 for RGB and alpha, 255
            (opaque) where the picture has none.
        sound: a JPEG of which libjpeg will have nothing to say: threads decode such without waiting for each other.

    Raises:
        DecodeError: with the reason.
    """
    with reading(data):
        # reads the header only: what it is and how large, before any memory is taken
        image = _open(data)
        check_pixels(image.width, image.height)
        jpeg = image.format in ("JPEG", "MPO")
        if jpeg and b"\xff\xd9" not in data:  # Pillow would not miss it if all pixels are there
            raise DecodeError("damaged: it ends too early")
        size = max(channels, 3) * image.width * image.height
        large_webp = image.format == "WEBP" and _is_for_torchvision(image, channels, size)
        reserve(size, peak=PEAK if large_webp else _PEAKS.get(image.format or "", PEAK))
        if jpeg and torchvision_io() is not None:
            with nullcontext() if sound else written():
                stored = _with_torchvision("decode_jpeg", data, 1 if channels == 1 else 3)
            pixels = turned(stored, jpeg_orientation(data) if upright else 1).numpy()
            return _opaque(pixels) if channels == 4 else pixels
        if large_webp:
            stored = _with_torchvision("decode_webp", data, channels)
            return turned(stored, info_orientation(image.info) if upright else 1).numpy()
        return _with_pillow(image, data, channels, upright=upright)


def _is_for_torchvision(image: Image.Image, channels: Channels, size: int) -> bool:
    """Whether a WebP is large, and one that torchvision's decoder reads."""
    if size <= LARGE or channels == 1 or getattr(image, "is_animated", False):
        return False
    return torchvision_io() is not None


@cache
def torchvision_io() -> Any:
    """torchvision's decoders, imported where one is first needed; None where there are none: 0.29 announces that they
    will go. Pillow gives the same pixels, slower."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg, decode_webp
    except ImportError:
        return None
    use_one_thread()
    return SimpleNamespace(modes=ImageReadMode, decode_jpeg=decode_jpeg, decode_webp=decode_webp)


def _with_torchvision(decoder: str, data: bytes, channels: Channels) -> Tensor:
    import torch

    there = torchvision_io()
    mode = {1: there.modes.GRAY, 3: there.modes.RGB, 4: there.modes.RGB_ALPHA}[channels]
    with library():
        pixels: Tensor = getattr(there, decoder)(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
    return pixels


def _with_pillow(image: Image.Image, data: bytes, channels: Channels, *, upright: bool) -> NDArray[np.uint8]:
    _check_range(image)
    if max(image.size) > _LONGEST:
        raise DecodeError(f"wider or higher than {_LONGEST} pixels")
    turns = 1
    if image.format == "TIFF":
        if not _covers(image):
            raise DecodeError("damaged: parts of the picture are missing")
        if not upright:  # Pillow turns a TIFF while it decodes
            with library():
                noted = image.getexif().get(_ORIENTATION, 1)
            turns = inverse(noted) if noted in range(1, 9) else 1
    with library(), written() if image.format == "TIFF" else nullcontext():
        image.load()
    if image.format == "PNG" and _may_miss_rows(image, data):
        with library():
            missing = rows_are_missing(data)
        if missing:
            raise DecodeError("damaged: rows are missing at its end")
    if upright and image.format in ("JPEG", "MPO"):
        turns = jpeg_orientation(data)
    elif upright and image.format != "TIFF":  # a PNG may hold it behind the pixels
        turns = info_orientation(image.info)
    return _pixels(image, channels, turns)


def _covers(image: Any) -> bool:
    """Whether a TIFF's strips or tiles are enough for all of its pixels: Pillow leaves the others black."""
    if image.tile and image.tile[0][0] == "libtiff":  # which refuses it then
        return True
    planes = len(image.getbands()) if image.tag_v2.get(_PLANAR) == 2 else 1
    parts = [tile[1] for tile in image.tile]
    covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in parts)
    return bool(covered >= planes * image.width * image.height)


def _may_miss_rows(image: Image.Image, data: bytes) -> bool:
    """Whether a PNG's last row is all zeros; of an interlaced one that does not tell."""
    return data[28:29] != b"\0" or not any(image.crop((0, image.height - 1, image.width, image.height)).tobytes())


def _pixels(image: Image.Image, channels: Channels, orientation: int) -> NDArray[np.uint8]:
    """The loaded picture in 8 bits, upright; converted some rows at a time, so that no second copy of it is made."""
    convert, depth = _conversion(image, channels)
    width, height = upright_size(image.width, image.height, orientation)
    upright = np.empty((height, width, depth), np.uint8)
    stored = stored_view(upright, orientation)
    rows = max(_STRIP // (4 * image.width), 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        with library():
            part = image.crop((0, top, image.width, bottom)) if rows < image.height else image
            stored[top:bottom] = convert(part).reshape(bottom - top, image.width, depth)
    pixels: NDArray[np.uint8] = upright.transpose(2, 0, 1)
    if depth == channels:
        return pixels
    # the one channel several times, without a copy; writeable, since torch warns of what is not
    pixels = as_strided(pixels, (min(channels, 3), height, width), (0, *pixels.strides[1:]))
    return _opaque(pixels) if channels == 4 else pixels


def _check_range(image: Image.Image) -> None:
    """
    Raises:
        DecodeError: nobody knows which numbers are black and white.
    """
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        raise DecodeError(f"floating-point pixels have no known range; {_TO_8_BITS}")
    if image.format == "TIFF" and (image.mode == "I" or _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))):
        raise DecodeError(f"pixels of 32 bits, or with a sign, have no known range; {_TO_8_BITS}")
    if image.mode.startswith("I") and tags.get(_PHOTOMETRIC) == 0:  # Pillow would show the negative
        raise DecodeError(f"16 bits in which 0 is white are not supported; {_TO_8_BITS}")


def _conversion(image: Image.Image, channels: Channels) -> tuple[Callable[[Image.Image], NDArray[np.uint8]], int]:
    """What converts a part of the picture to 8 bits, and how many channels that gives: those asked for, or one."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut off at 255
        shift = 4 if getattr(image, "tag_v2", {}).get(_BITS) in (12, (12,)) else 8
        return lambda part: np.clip(np.asarray(part) >> shift, 0, 255).astype(np.uint8), 1
    mode, between = _MODES[channels], _BETWEEN.get(image.mode)
    return lambda part: np.asarray((part.convert(between) if between else part).convert(mode)), channels


def _opaque(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    made = np.empty((len(pixels) + 1, *pixels.shape[1:]), np.uint8)
    made[:-1], made[-1] = pixels, 255
    return made


def _reason(data: bytes, error: Exception, said: Sequence[str]) -> str:
    """
    Args:
        said: by libtiff, whose reason Pillow does not know.
    """
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError) and heif.is_heif(data) and not heif.register():
        return heif.NEEDED
    if isinstance(error, UnidentifiedImageError):
        format, why = _signed(data)
        if not format:
            return f"not a picture: it starts with {bytes(data[:8])!r}"
        return f"a damaged {format}, or of a kind that Pillow does not read: {why}"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels: a decompression bomb?"
    why = _last_line(error)
    if said and why.startswith("decoder error"):
        return f"damaged, or of a kind that Pillow does not read: {'; '.join(said[-_MOST_SAID:])}"
    return f"{'of a kind that Pillow does not read' if 'nsupported' in why else 'damaged'}: {why}"


def _signed(data: bytes) -> tuple[str, str]:
    """The format that a file begins as, and what Pillow says against it; empty where it begins as none."""
    for format in _known():
        factory, accept = Image.OPEN[format]
        answer: bool | str = False
        try:
            with listening(), library():
                answer = accept(data[:16]) if accept is not None else False
                if answer and not isinstance(answer, str):
                    factory(io.BytesIO(data), "")
        except _Failed as failed:
            if answer:  # else it is no such file, or too short to tell
                return format, _last_line(failed.error)
        if isinstance(answer, str):
            return format, answer
    return "", ""


def _last_line(error: Exception) -> str:
    if isinstance(error.__cause__, KeyError):
        return f"unknown code {error.__cause__}"  # in one of Pillow's tables
    lines = _PLACE.sub("", str(error).strip()).splitlines()
    return lines[-1] if lines else type(error).__name__
