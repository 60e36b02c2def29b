"""What a shard stores of one picture: its own bytes, or smaller, or written again without loss.

``stored(data, extension, ...) -> Stored``
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, features

from tlx.base.errors import UserError
from tlx.data.build.row_tables import ParquetPictures, SavedPictures
from tlx.data.build.sources import EXTENSIONS, Picture, Source
from tlx.data.pixels import heif
from tlx.data.pixels.decode import (
    Channels,
    DecodeError,
    check_pixels,
    decode,
    decode_array,
    library,
    open_picture,
    reading,
    torchvision_io,
)
from tlx.data.pixels.decoder_messages import listening
from tlx.data.pixels.extension import extension
from tlx.data.pixels.markers import coding
from tlx.data.pixels.one_picture import reserve
from tlx.data.pixels.orientation import jpeg_orientation, upright_copy
from tlx.data.shards.examine import Examined, content_digest, examine, format_of

_jpeg = extension
_LOSSLESS = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # what a PNG can hold
_SHORT = {
    "jpeg": "jpg",
    "jpe": "jpg",
    "jfif": "jpg",
    "mpo": "jpg",
    "apng": "png",
    "heif": "heic",
    "hif": "heic",
}  # readers of WebDataset know pictures by their extension
_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L")
_KEPT = 2  # a JPEG may be decoded at a half, a quarter or an eighth that is at least so many times what is wanted

Rewrite = Literal["", "kept", "rewritten", "failed"]


@dataclass(frozen=True)
class Stored:
    """One picture as it goes into a shard.

    Attributes:
        extension: of its name there.
        before: its bytes, before it was written again.
        rewrite: "" where it was not asked for, or this is no JPEG; "kept": the bytes as they were are smaller;
            "failed": they were kept because libjpeg finds them damaged, or the pixels would have been others.
    """

    data: bytes
    extension: str
    seen: Examined
    before: int
    rewrite: Rewrite


def needs_extension(what: str) -> None:
    """
    Raises:
        UserError: tlx's C extension is missing.
    """
    if _jpeg is None:
        raise UserError(
            f"{what} needs tlx's C extension, which was not built when tlx was installed",
            todo="install a C compiler and libjpeg-turbo's header (Debian and Ubuntu: gcc libjpeg-dev; "
            "conda: c-compiler libjpeg-turbo), then tlx again; tlx doctor says whether it is there",
        )


def import_what_is_needed(*, resize: bool, rewrite: bool) -> None:
    """Imports torch before work is dealt to processes, where each of them would import it for itself. Where JPEGs are
    looked at by the extension, it is needed only for rare ones."""
    if resize or rewrite or _jpeg is None:
        torchvision_io()
    if resize:
        from torchvision.transforms import v2 as v2


def read(source: Source, picture: Picture) -> tuple[bytes, str]:
    """A picture's bytes and the extension of its name; where that is no picture's, the one for its content.

    Raises:
        DecodeError, OSError: it cannot be read.
    """
    if picture.path is not None:
        if os.path.exists(picture.path) and not os.path.isfile(picture.path):  # a named pipe would never end
            raise DecodeError("this is no file")
        data, extension = Path(picture.path).read_bytes(), picture.path.rpartition(".")[2].lower()
        if extension not in EXTENSIONS:
            extension = _by_content(data)
        return data, _SHORT.get(extension, extension)
    assert picture.place is not None
    split, place = picture.place
    items, buffer = source.items[split], io.BytesIO()
    if isinstance(items, (ParquetPictures, SavedPictures)):
        stored = items.bytes_of(place)
        if not stored:
            raise DecodeError("there is no picture in this row")
        extension = _by_content(stored)
        return stored, _SHORT.get(extension, extension)
    try:
        with listening() as heard:
            _lossless(items[place][0]).save(buffer, "PNG")
        heard.tell()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # whatever the data set's own reading may raise
        raise DecodeError(f"the data set gives no picture: {error}") from error
    return buffer.getvalue(), "png"


def _lossless(image: Image.Image) -> Image.Image:
    """The same picture as a PNG can hold it.

    Raises:
        DecodeError: its pixels have no known range.
    """
    if image.mode in _LOSSLESS:
        return image
    if image.mode in ("I", "F"):
        raise DecodeError(f"the data set gives pixels without a known range (mode {image.mode})")
    if image.mode.startswith("I;16"):  # of another byte order; Pillow would cut off at 255
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image.convert("RGB")


def _by_content(data: bytes) -> str:
    """Any other extension in a shard would not be taken for a picture, or for the label."""
    try:
        format = (open_picture(data).format or "").lower()
    except DecodeError:
        format = ""
    if not format and heif.is_heif(data):
        raise DecodeError(heif.NEEDED)
    if _SHORT.get(format, format) not in EXTENSIONS:
        raise DecodeError("neither its name nor its content is that of a picture")
    return format


def stored(data: bytes, extension: str, *, resize: int | None, quality: int, rewrite: bool, measured: bool) -> Stored:
    """What to store of a picture that was read.

    Args:
        resize: the short side in pixels that a larger one is made smaller to; never larger.
        quality: of a JPEG that is made smaller.
        rewrite: JPEGs are written again without loss, baseline with tables of their own and restart markers, where
            that is smaller or they were progressive.
        measured: take its moments (see `examine`).

    Raises:
        DecodeError: it cannot be read.
    """
    if resize is not None and _short_side(data) > resize:
        data, extension = _smaller(data, resize, quality)
    try:
        seen = examine(data, measured=measured)
    except DecodeError as error:
        if extension == "avif" and not features.check("avif"):
            raise DecodeError("this Pillow cannot read AVIF; since 11.3 it can") from error
        raise
    coded = coding(data) if rewrite else None
    if coded is None or not seen.format.startswith("jpeg"):
        return Stored(data, extension, seen, len(data), "")
    reserve(3 * seen.width * seen.height)
    again = _written_again(data)
    if again is None:
        return Stored(data, extension, seen, len(data), "failed")
    if len(again) >= len(data) and coded == "baseline":
        return Stored(data, extension, seen, len(data), "kept")
    seen = replace(seen, digest=content_digest(again), format=format_of(again, "jpeg"))
    return Stored(again, extension, seen, len(data), "rewritten")


def _written_again(data: bytes) -> bytes | None:
    """The JPEG coded anew; None where that fails, or would change a pixel.

    Coefficients stay what they are, but libjpeg smooths a progressive picture whose last scans are missing, and not a
    baseline one.
    """
    try:
        again: bytes = _jpeg.rewrite(data, restarts=True)
        same = np.array_equal(decode_array(data, sound=True), decode_array(again, sound=True))
        return again if same else None
    except (ValueError, DecodeError):
        return None


def _short_side(data: bytes) -> int:
    """0 for what is no picture."""
    try:
        return int(min(open_picture(data).size))
    except DecodeError:
        return 0


def _smaller(data: bytes, resize: int, quality: int) -> tuple[bytes, str]:
    """JPEGs stay JPEGs, everything else becomes PNG; upright, with transparency and colour profile, without what a
    camera wrote beside. With the triangle filter of the transforms, antialiased: as if they had resized the original.

    Raises:
        DecodeError: it cannot be read.
    """
    image = open_picture(data)
    check_pixels(image.width, image.height)
    profile = image.info.get("icc_profile")
    jpeg = data[:2] == b"\xff\xd8"
    simple = jpeg and image.mode in ("L", "RGB") and coding(data) in ("baseline", "progressive")
    if simple:
        picture = _scaled(data, image, resize)
    else:
        alpha = "A" in image.getbands() or "transparency" in image.info
        channels: Channels = 4 if alpha else 1 if image.mode in _GREY else 3
        del image  # of a WebP it holds as much memory as the picture
        picture = _resized(data, channels, resize)
    picture.info.clear()
    options: dict[str, Any] = {"icc_profile": profile} if profile and _fits(profile, picture) else {}
    buffer = io.BytesIO()
    with reading(data), library():
        if jpeg:
            picture.save(buffer, "JPEG", quality=quality, optimize=True, **options)
        else:
            picture.save(buffer, "PNG", **options)
    return buffer.getvalue(), "jpg" if jpeg else "png"


def _scaled(data: bytes, image: Image.Image, resize: int) -> Image.Image:
    """A JPEG, decoded no larger than needed."""
    reserve(3 * image.width * image.height)
    width, height = _sides(image.width, image.height, resize)
    with reading(data), library():
        image.draft(image.mode, (_KEPT * width, _KEPT * height))
        small = image.resize((width, height), Image.Resampling.BILINEAR)
    return Image.fromarray(upright_copy(np.asarray(small), jpeg_orientation(data)))


def _resized(data: bytes, channels: Channels, resize: int) -> Image.Image:
    from torchvision.transforms.v2 import functional

    pixels = decode(data, channels)
    width, height = _sides(pixels.shape[2], pixels.shape[1], resize)
    # not by Pillow, which would make what is transparent black: transparency is dropped, not blended, in training
    small = functional.resize(pixels, [height, width], antialias=True)
    return Image.fromarray(small.permute(1, 2, 0).squeeze(-1).contiguous().numpy())


def _sides(width: int, height: int, short: int) -> tuple[int, int]:
    """As torchvision's Resize rounds."""
    if width <= height:
        return short, max(int(short * height / width), 1)
    return max(int(short * width / height), 1), short


def _fits(profile: bytes, picture: Image.Image) -> bool:
    """Whether an ICC profile is for this kind of pixels; a CMYK picture's is not, once it is RGB."""
    return profile[16:20] == (b"GRAY" if picture.mode == "L" else b"RGB ")
