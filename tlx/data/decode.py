"""Bytes to pixels.

JPEGs go through torchvision's decoder; PNG, WebP, AVIF, GIF, BMP, TIFF and PPM through Pillow, which is asked for no
other kind: for EPS, whatever a file is called, it would start Ghostscript, and so run what a stranger wrote. Not PNGs
through torchvision: version 0.29's decoder ended the process with a segmentation fault on 288 of 300 in which six bytes
had been changed, and is no faster; its JPEG decoder survived 12,000 damaged files.

The camera's orientation (EXIF) is applied unless told otherwise; transparency is dropped, not blended, where it is not
asked for as a fourth channel; of an animation the first frame counts; 16 bits become 8. A JPEG that ends too early is
refused, one that libjpeg repairs by itself is taken, as Pillow and torchvision do.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tlx.data import heif
from tlx.errors import TlxError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced by torchvision 0.29: its decoders will go; Pillow gives the same pixels, slower
    decode_jpeg = None

# each would come once per picture: torchvision's announcement, what MAX_PIXELS decides here, dropped transparency
warnings.filterwarnings("ignore", message="The image decoding and encoding capab", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""A picture that claims more pixels (179 million) is refused before memory is taken for it: a decompression bomb."""


FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", heif.FORMAT)
"""What Pillow calls the kinds of pictures that are read; MPO comes with JPEG, HEIF with a package (`tlx.data.heif`)."""

Channels = Literal[1, 3, 4]
_MODES: dict[Channels, str] = {1: "L", 3: "RGB", 4: "RGBA"}


class DecodeError(TlxError):
    """These bytes are no picture, or a damaged one."""


def open_picture(data: bytes) -> Image.Image:
    """The picture, of which only the header was read; raises whatever Pillow raises."""
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


def decode(data: bytes, channels: Channels = 3, *, upright: bool = True) -> Tensor:
    """The picture as uint8 [channels, height, width].

    Args:
        upright: it is turned as the camera noted (EXIF).
        channels: 3 for RGB; 1 for grey, the luma of ITU-R BT.601, which JPEGs hold as it is; 4 for RGB and alpha, 255
            (opaque) where the picture has none.

    Raises:
        DecodeError: with the reason.
    """
    try:
        # reads the header only: what it is and how large, before any memory is taken
        image = open_picture(data)
        check_pixels(image.width, image.height)
        if image.format == "JPEG" and b"\xff\xd9" not in data:  # Pillow would not miss it if all pixels are there
            raise DecodeError("damaged: it ends too early")
        if image.format not in ("JPEG", "MPO") or decode_jpeg is None:
            return _with_pillow(image, channels, upright)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        pixels: Tensor = decode_jpeg(encoded, mode=mode, apply_exif_orientation=upright)
        return _opaque(pixels) if channels == 4 else pixels
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow and libjpeg raise many kinds for bytes that strangers made
        raise DecodeError(_reason(data, error)) from error


def _with_pillow(image: Image.Image, channels: Channels, upright: bool) -> Tensor:
    with suppress(Exception):  # a broken note of the camera; broken pixels are noticed below
        image = ImageOps.exif_transpose(image) if upright else image
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range; convert the picture to 8 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would cut off at 255
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        pixels = torch.from_numpy(grey).expand(min(channels, 3), -1, -1)
        return _opaque(pixels) if channels == 4 else pixels
    array = np.array(image.convert(_MODES[channels]))
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1))


def _opaque(pixels: Tensor) -> Tensor:
    return torch.cat([pixels, torch.full_like(pixels[:1], 255)])


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError) and heif.is_heif(data) and not heif.register():
        return heif.NEEDED
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture: it starts with {bytes(data[:8])!r}"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels: a decompression bomb?"
    return f"damaged: {str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__}"
