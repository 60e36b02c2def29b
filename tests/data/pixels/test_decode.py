"""Every kind of picture that people have, and bytes that are none."""

from __future__ import annotations

import contextlib
import io
import zlib

import numpy as np
import pytest
import torch
from images import encoded, picture
from PIL import Image

from tlx.data.pixels import decode as module
from tlx.data.pixels.decode import DecodeError, decode

PHOTO = picture(1, size=(40, 60))


def with_pillow(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *[("RGB", f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")],
        *[
            ("L", "JPEG"),
            ("CMYK", "JPEG"),
            ("CMYK", "TIFF"),
            ("P", "PNG"),
            ("LA", "PNG"),
            ("1", "PNG"),
            ("RGBA", "PNG"),
        ],
    ],
)
def test_formats_and_modes(mode, format, fallback, monkeypatch):
    data = encoded(PHOTO.convert(mode), format)
    if fallback:  # as with a torchvision that has no decoders any more
        monkeypatch.setattr(module, "torchvision_io", lambda: None)
    pixels = decode(data)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 40, 60))
    assert (pixels.int() - with_pillow(data).int()).abs().max() <= 2


def test_transparency_is_dropped():
    data = encoded(Image.fromarray(np.full((9, 9, 4), (200, 100, 50, 0), np.uint8)), "PNG")
    assert decode(data)[:, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled(format):
    grey = Image.fromarray(np.array([[0, 256 * 10, 65535]], dtype=np.uint16))
    pixels = decode(encoded(grey, format))
    assert pixels[:, 0].tolist() == [[0, 10, 255]] * 3
    assert pixels.dtype == torch.uint8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_camera_is_turned_upright(format):
    exif = Image.Exif()
    exif[0x112] = 6
    pixels = decode(encoded(PHOTO, format, exif=exif, **({"lossless": True} if format == "WEBP" else {})))
    assert tuple(pixels.shape) == (3, 60, 40)
    upright = torch.from_numpy(np.array(PHOTO.rotate(-90, expand=True))).permute(2, 0, 1)
    assert (pixels.int() - upright.int()).abs().float().mean() < 12


def test_a_broken_note_of_the_camera_is_no_broken_picture():
    assert decode(encoded(PHOTO, "PNG", exif=b"Exif\0\0MM\0*\xff\xff")).shape == (3, 40, 60)
    assert decode(encoded(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff")).shape == (3, 40, 60)


def test_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[:, 3, 3].tolist() == [255, 0, 0]


JPEG = encoded(PHOTO)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", r"not a picture: it starts with b'<html>40'"),
        (JPEG[: len(JPEG) // 2], "damaged: .*"),
        (JPEG[:-2], "damaged: .*"),
        (encoded(PHOTO, "PNG")[:300], "damaged: .*"),
        (encoded(PHOTO, "BMP")[:300], "damaged: .*"),
        (encoded(PHOTO.convert("F"), "TIFF"), "floating-point"),
    ],
)
def test_bytes_that_are_no_picture(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(data)


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_decompression_bombs_take_no_memory(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # some switch Pillow's own limit off, for all
    bomb = bytearray(encoded(Image.new("L", (64, 64)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode(bytes(bomb))
    jpeg = bytearray(JPEG)
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = (65_000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode(bytes(jpeg))


@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_garbage_never_escapes_as_another_error():
    rng = np.random.default_rng(0)
    for start in (JPEG, encoded(PHOTO, "PNG"), encoded(PHOTO, "WEBP"), encoded(PHOTO, "TIFF"), encoded(PHOTO, "GIF")):
        for _ in range(40):
            data = bytearray(start)
            for at in rng.integers(0, len(data), 6):
                data[at] = rng.integers(256)
            with contextlib.suppress(DecodeError):
                assert decode(bytes(data)).shape[0] == 3
