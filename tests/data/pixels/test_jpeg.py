"""The C extension tlx.data._jpeg: the region of a JPEG, resized, is what a full decode and an exact filter give."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT, SUPPORT, TESTS

from tlx.data.pixels import extension
from tlx.data.pixels.orientation import jpeg_orientation

SOURCE = ROOT / "tlx" / "data" / "_jpeg.c"
_jpeg = pytest.importorskip("tlx.data._jpeg", reason="tlx was installed without its C extension", exc_type=ImportError)

Box = tuple[int, int, int, int]
ANYTHING = r"\w"


def picture(width: int, height: int, seed: int = 0, noise: int = 20) -> np.ndarray:
    """Smooth shapes and some noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-noise, noise + 1, smooth.shape), 0, 255).astype(np.uint8)


def encoded(width: int, height: int, mode: str = "RGB", seed: int = 0, noise: int = 20, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(picture(width, height, seed, noise)).convert(mode)
    image.save(file, "JPEG", quality=88, **options)
    return file.getvalue()


def frame_at(data: bytes) -> int:
    return next(at for at in (data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) if at > 0)


def patched(data: bytes, width: int, height: int, luma_sampling: int) -> bytes:
    """Another size and luma sampling in the frame header; the blocks in an MCU, and the MCUs, must stay as many.

    A progressive picture's scans of one component count blocks, not MCUs, so its size must not cut through an MCU.
    """
    out, at = bytearray(data), frame_at(data)
    out[at + 5 : at + 9] = struct.pack(">HH", height, width)
    out[at + 11] = luma_sampling
    return bytes(out)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def as_411(width: int, height: int, **options: object) -> bytes:
    """4:1:1, which Pillow does not write: 4:2:0 has six blocks in an MCU, too."""
    across, down = ceil(width, 32), ceil(height, 8)
    if "progressive" in options:
        width, height = across * 32, down * 8
    return patched(encoded(across * 16, down * 16, subsampling="4:2:0", **options), width, height, 0x41)


def as_440(width: int, height: int, **options: object) -> bytes:
    """4:4:0, made from 4:2:2: four blocks in an MCU."""
    across, down = ceil(width, 8), ceil(height, 16)
    if "progressive" in options:
        width, height = across * 8, down * 16
    return patched(encoded(across * 16, down * 8, subsampling="4:2:2", **options), width, height, 0x12)


def grey_2x2(width: int, height: int, **options: object) -> bytes:
    """One component whose sampling factors, 2x2, mean nothing: some cameras write such files."""
    return patched(encoded(width, height, "L", **options), width, height, 0x22)


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """An EXIF block with two entries, the second the orientation, and a thumbnail that holds an end marker."""
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 7) + struct.pack(order + "HHI", 0x0112, kind, 1) + value
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HIH", 42, 8, 2)
    return b"Exif\0\0" + head + entries + bytes(4) + b"thumbnail \xff\xd8\xff\xd9"


KINDS = {
    "4:4:4": lambda w, h, **o: encoded(w, h, subsampling="4:4:4", **o),
    "4:2:2": lambda w, h, **o: encoded(w, h, subsampling="4:2:2", **o),
    "4:2:0": lambda w, h, **o: encoded(w, h, subsampling="4:2:0", **o),
    "4:4:0": as_440,
    "4:1:1": as_411,
    "grey": lambda w, h, **o: encoded(w, h, "L", **o),
    "grey 2x2": grey_2x2,
}
WAYS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart rows": {"restart_marker_rows": 1},
    "restart two rows": {"restart_marker_rows": 2},
    "restart blocks": {"restart_marker_blocks": 3},
    "progressive, restart": {"progressive": True, "restart_marker_rows": 1},
}


def view(
    data: bytes, crop: Box, resized: tuple[int, int], window: Box | None = None, channels: int = 3, **options: object
):
    decoder = _jpeg.Decoder()
    decoder.open(data)
    window = window or (0, 0, *resized)
    out = np.full((window[3], window[2], channels), 77, np.uint8)
    denominator = decoder.view(out, crop, resized, window, **options)
    return out, denominator


def full(data: bytes, channels: int = 3) -> np.ndarray:
    width, height = size(data)
    return view(data, (0, 0, width, height), (width, height), channels=channels)[0]


def size(data: bytes) -> tuple[int, int]:
    width, height, _ = _jpeg.Decoder().open(data)
    return width, height


def piece(rng: np.random.Generator, length: int) -> tuple[int, int]:
    size = int(rng.integers(1, length + 1))
    return int(rng.integers(0, length - size + 1)), size


# ---- decoding


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_picture_is_pillows(kind: str, way: str) -> None:
    """Pillow's wheel has its own, mostly newer, libjpeg-turbo: one level of difference is allowed."""
    for width, height in ((1, 1), (7, 5), (64, 48), (97, 61)):
        data = KINDS[kind](width, height, **WAYS[way])
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(full(data) - expected).max() <= 1
        if "grey" in kind:
            grey = np.asarray(Image.open(io.BytesIO(data))).astype(int)
            assert np.abs(full(data, 1)[..., 0] - grey).max() <= 1


@pytest.mark.parametrize("way", [*WAYS, "rewritten"])
@pytest.mark.parametrize("kind", KINDS)
def test_region_is_a_part_of_the_whole(kind: str, way: str) -> None:
    """To the bit: chroma upsampling at the region's edges sees the neighbours it sees in a full decode."""
    rng = np.random.default_rng(5)
    for seed, (width, height) in enumerate(((1, 1), (17, 33), (40, 9), (131, 140), (200, 77))):
        data = KINDS[kind](width, height, seed=seed, **WAYS.get(way, {}))
        if way == "rewritten":
            data = _jpeg.rewrite(data)
        width, height = size(data)
        for channels in (3, 1):
            whole = full(data, channels)
            for _ in range(12):
                (left, wide), (top, high) = piece(rng, width), piece(rng, height)
                part, _ = view(data, (left, top, wide, high), (wide, high), channels=channels)
                np.testing.assert_array_equal(part, whole[top : top + high, left : left + wide])


@pytest.mark.parametrize("way", [*WAYS, "rewritten"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_region_at_a_reduced_size_is_a_part_of_the_whole(kind: str, way: str, denominator: int) -> None:
    rng = np.random.default_rng(6)
    columns, rows = 26, 31
    width, height = columns * denominator, rows * denominator
    data = KINDS[kind](width, height, **WAYS.get(way, {}))
    if way == "rewritten":
        data = _jpeg.rewrite(data)
    columns, rows = (side // denominator for side in size(data))
    width, height = columns * denominator, rows * denominator
    whole, used = view(data, (0, 0, width, height), (columns, rows), least=1.0)
    assert used == denominator
    for _ in range(10):
        (left, wide), (top, high) = piece(rng, columns), piece(rng, rows)
        crop = tuple(denominator * v for v in (left, top, wide, high))
        part, used = view(data, crop, (wide, high), least=1.0)
        assert used == denominator
        np.testing.assert_array_equal(part, whole[top : top + high, left : left + wide])


def test_progressive_picture_without_its_last_scans() -> None:
    """libjpeg smooths between the blocks of such a picture, so that a region depends on what is around it."""
    data = encoded(120, 90, progressive=True)
    scans = [m.start() for m in re.finditer(b"\xff\xda", data)]
    tables = data.rfind(b"\xff\xc4", 0, scans[3])
    data = data[: tables if tables > scans[2] else scans[3]] + b"\xff\xd9"
    whole = full(data)
    part, _ = view(data, (37, 41, 50, 30), (50, 30))
    np.testing.assert_array_equal(part, whole[41:71, 37:87])


# ---- the filter


def weights(start: float, length: float, available: int, resized: int, bicubic: bool) -> np.ndarray:
    """Pillow's filter in 14 bits, the running sum rounded: int [resized, available]."""
    scale = length / resized
    stretch = max(scale, 1.0)
    support = (2 if bicubic else 1) * stretch
    table = np.zeros((resized, available), np.int64)
    for i in range(resized):
        center = start + (i + 0.5) * scale
        low, high = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), available)
        x = np.abs((np.arange(low, high) - center + 0.5) / stretch)
        if bicubic:
            near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
            values = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        else:
            values = np.maximum(1 - x, 0)
        running = np.floor(np.cumsum(values) * (16384 / values.sum()) + 0.5).astype(np.int64)
        running[-1] = 16384
        table[i, low:high] = np.diff(running, prepend=0)
    return table


def filtered(whole: np.ndarray, crop: Box, resized: tuple[int, int], bicubic: bool, s: int = 1) -> np.ndarray:
    """What `view` promises, slowly: down the columns first, 8 bits between the passes."""
    left, top, wide, high = crop
    x0, x1, y0, y1 = left // s, ceil(left + wide, s), top // s, ceil(top + high, s)
    source = whole[y0:y1, x0:x1].astype(np.int64)
    down = weights(top / s - y0, high / s, y1 - y0, resized[1], bicubic)
    across = weights(left / s - x0, wide / s, x1 - x0, resized[0], bicubic)
    rows = np.clip((np.einsum("oi,ixc->oxc", down, source) + 8192) >> 14, 0, 255)
    return np.clip((np.einsum("oi,yic->yoc", across, rows) + 8192) >> 14, 0, 255).astype(np.uint8)


def geometries(seed: int, count: int, width: int, height: int):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        (left, wide), (top, high) = piece(rng, width), piece(rng, height)
        resized = (int(rng.integers(1, 90)), int(rng.integers(1, 90)))
        if rng.random() < 0.2:
            resized = (wide, resized[1])
        if rng.random() < 0.2:
            resized = (resized[0], high)
        (x, w), (y, h) = piece(rng, resized[0]), piece(rng, resized[1])
        flags = {name: bool(rng.integers(2)) for name in ("bicubic", "mirror", "flip")}
        yield (left, top, wide, high), resized, (x, y, w, h), int(rng.choice((1, 3))), flags


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "grey"])
@pytest.mark.parametrize("way", ["baseline", "restart rows", "progressive"])
def test_crop_resize_window_mirror_and_flip(kind: str, way: str) -> None:
    data = KINDS[kind](150, 110, **WAYS[way])
    whole = {c: full(data, c) for c in (1, 3)}
    for crop, resized, (x, y, w, h), channels, flags in geometries(1, 60, 150, 110):
        expected = filtered(whole[channels], crop, resized, flags["bicubic"])[y : y + h, x : x + w]
        expected = expected[:: -1 if flags["flip"] else 1, :: -1 if flags["mirror"] else 1]
        got, _ = view(data, crop, resized, (x, y, w, h), channels, **flags)
        np.testing.assert_array_equal(got, expected)


def test_reduced_size_with_a_crop_between_pixels() -> None:
    width, height = 40 * 8, 30 * 8
    data = encoded(width, height)
    for s in (2, 4, 8):
        whole, used = view(data, (0, 0, width, height), (width // s, height // s), least=1.0)
        assert used == s
        for left, top, wide, high in ((0, 0, 101, 203), (13, 5, 250, 170), (width - 99, height - 77, 99, 77)):
            resized = (wide // (2 * s) or 1, high // (2 * s) or 1)
            crop = (left, top, wide, high)
            least = 0.99 * min(wide / resized[0], high / resized[1]) / s
            got, used = view(data, crop, resized, least=least)
            assert used == s
            np.testing.assert_array_equal(got, filtered(whole, crop, resized, False, s))


@pytest.mark.parametrize(
    ("least", "side", "expected"),
    [(0, 10, 1), (2, 100, 2), (2, 101, 1), (2, 50, 4), (2, 25, 8), (2, 1, 8), (1, 100, 4)],
)
def test_denominator_is_the_largest_that_keeps_enough(least: float, side: int, expected: int) -> None:
    data = encoded(500, 420)
    assert view(data, (10, 10, 400, 400), (side, side), least=least)[1] == expected
    assert view(data, (10, 10, 400, 400), (side, 1), least=least)[1] == expected  # both directions count


@pytest.mark.parametrize("bicubic", [False, True])
def test_close_to_pillow(bicubic: bool) -> None:
    """At least 50 dB: what is left is where the two round."""
    method = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    rng = np.random.default_rng(2)
    worst = 0.0
    for seed in range(12):
        data = encoded(500, 375, seed=seed, noise=12)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        wide, high = int(rng.integers(60, 500)), int(rng.integers(60, 375))
        left, top = int(rng.integers(0, 501 - wide)), int(rng.integers(0, 376 - high))
        expected = np.asarray(image.crop((left, top, left + wide, top + high)).resize((224, 224), method)).astype(float)
        got, _ = view(data, (left, top, wide, high), (224, 224), bicubic=bicubic)
        worst = max(worst, float(np.mean((got - expected) ** 2)))
    assert 10 * np.log10(255**2 / worst) >= 50


def test_hundreds_of_taps() -> None:
    data = encoded(1500, 900, noise=60)
    got, _ = view(data, (1, 2, 1499, 898), (1, 1))
    image = Image.open(io.BytesIO(data)).crop((1, 2, 1500, 900)).resize((1, 1), Image.Resampling.BILINEAR)
    assert np.abs(got[0, 0].astype(int) - np.asarray(image)[0, 0]).max() <= 1
    got, _ = view(data, (0, 0, 1500, 900), (1, 3), bicubic=True)
    image = Image.open(io.BytesIO(data)).resize((1, 3), Image.Resampling.BICUBIC)
    assert np.abs(got[:, 0].astype(int) - np.asarray(image)[:, 0]).max() <= 1


DIGEST = """
import hashlib, sys
sys.path[:0] = sys.argv[1:]
from test_jpeg import KINDS, geometries, view, _jpeg
digest = hashlib.sha256()
for kind in KINDS:
    data = KINDS[kind](150, 110)
    for crop, resized, window, channels, flags in geometries(3, 120, 150, 110):
        digest.update(view(data, crop, resized, window, channels, **flags)[0].tobytes())
print(_jpeg.about().split(", ")[1], digest.hexdigest())
"""


def test_plain_c_gives_the_same_bytes() -> None:
    results = []
    for plain in ("0", "1"):
        environment = {**os.environ, "TLX_JPEG_PLAIN": plain}
        command = [sys.executable, "-c", DIGEST, str(Path(__file__).parent), str(SUPPORT)]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
        results.append(answer.stdout.strip().rsplit(" ", 1))
    assert results[1][0] == "plain C"
    assert results[0][1] == results[1][1]


# ---- headers


def test_components() -> None:
    decoder = _jpeg.Decoder()
    assert decoder.open(encoded(30, 20, "L"))[2] == 1
    assert decoder.open(encoded(30, 20, "CMYK"))[2] == 4
    with pytest.raises(ValueError, match="four components"):
        decoder.view(bytearray(3), (0, 0, 1, 1), (1, 1), (0, 0, 1, 1))


def with_frame(data: bytes, marker: int) -> bytes:
    at = frame_at(data)
    return data[: at + 1] + bytes([marker]) + data[at + 2 :]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda s: b"", "early"),
        (lambda s: b"\xff", "early"),
        (lambda s: b"GIF89a" + bytes(50), "Not a JPEG"),
        (lambda s: s[:40], "early"),
        (lambda s: s[: len(s) // 2], "early"),
        (lambda s: s[:-2], "early"),
        (lambda s: s[:-1], "early"),
        (lambda s: s[:2] + b"\xff\xd9", "image"),
        (lambda s: with_frame(s, 0xC3), "SOF|lossless"),
        (lambda s: with_frame(s, 0xC9), "arithmetic"),
        (lambda s: s[: frame_at(s) + 4] + b"\x0c" + s[frame_at(s) + 5 :], "8 bits|precision"),
        (lambda s: patched(s, 65500, 65500, 0x22), "early"),
        (lambda s: patched(s, 65501, 8, 0x22), "65500"),
        (lambda s: patched(s, 8, 0, 0x22), ANYTHING),
    ],
)
def test_refused(make, reason: str) -> None:
    data = make(encoded(64, 48, exif=exif(3)))
    decoder = _jpeg.Decoder()
    with pytest.raises(ValueError, match=reason):
        decoder.open(data)
    with pytest.raises(ValueError, match="no picture is open"):
        decoder.view(bytearray(3), (0, 0, 1, 1), (1, 1), (0, 0, 1, 1))
    with pytest.raises(ValueError, match=ANYTHING):
        _jpeg.rewrite(data)
    assert decoder.open(encoded(9, 8))[:2] == (9, 8)  # the next picture is not affected


def test_what_libjpeg_would_repair_is_left_to_others() -> None:
    data = bytearray(encoded(64, 48))
    middle = data.find(b"\xff\xda") + 300
    data[middle : middle + 2] = b"\xff\xd9"  # an end marker in the middle
    with pytest.raises(ValueError, match="damaged: libjpeg had to guess"):
        view(bytes(data), (0, 0, 64, 48), (64, 48))


def test_nothing_is_kept_from_the_picture_before() -> None:
    """libjpeg itself would decode a picture without tables by those of the last one."""
    decoder = _jpeg.Decoder()
    whole = encoded(64, 48, optimize=True)
    start, end = whole.find(b"\xff\xdb"), whole.find(b"\xff\xc0")
    without = whole[:start] + whole[end:]
    for before in (None, whole):
        if before:
            decoder.open(before)
            decoder.view(bytearray(64 * 48 * 3), (0, 0, 64, 48), (64, 48), (0, 0, 64, 48))
        decoder.open(without)
        with pytest.raises(ValueError, match="0x"):
            decoder.view(bytearray(64 * 48 * 3), (0, 0, 64, 48), (64, 48), (0, 0, 64, 48))


def test_an_end_marker_in_the_middle() -> None:
    data = bytearray(encoded(64, 48))
    middle = data.find(b"\xff\xda") + 300
    data[middle : middle + 2] = b"\xff\xd9"
    with pytest.raises(ValueError, match=ANYTHING):
        _jpeg.rewrite(bytes(data))


def test_picture_after_the_end_marker_is_ignored() -> None:
    data = encoded(64, 48)
    np.testing.assert_array_equal(full(data + data[:100]), full(data))


def test_too_many_scans() -> None:
    data = encoded(16, 16, progressive=True)
    last = data.rfind(b"\xff\xda")
    tables = data.rfind(b"\xff\xc4", 0, last)
    bomb = data[:-2] + data[tables:-2] * 600 + b"\xff\xd9"
    decoder = _jpeg.Decoder()
    decoder.open(bomb)
    with pytest.raises(ValueError, match="500 scans"):
        decoder.view(bytearray(768), (0, 0, 16, 16), (16, 16), (0, 0, 16, 16))
    with pytest.raises(ValueError, match=ANYTHING):
        _jpeg.rewrite(bomb)


@pytest.mark.parametrize(
    ("size", "crop", "resized", "window", "options", "reason"),
    [
        (48, (0, 0, 31, 20), (4, 4), (0, 0, 4, 4), {}, "crop"),
        (48, (-1, 0, 5, 5), (4, 4), (0, 0, 4, 4), {}, "crop"),
        (48, (0, 16, 5, 5), (4, 4), (0, 0, 4, 4), {}, "crop"),
        (48, (0, 0, 0, 5), (4, 4), (0, 0, 4, 4), {}, "crop"),
        (48, (0, 0, 2**31 - 1, 5), (4, 4), (0, 0, 4, 4), {}, "crop"),
        (48, (5, 5, 5, 5), (0, 4), (0, 0, 4, 4), {}, "resized"),
        (48, (5, 5, 5, 5), (4, (1 << 28) + 1), (0, 0, 4, 4), {}, "resized"),
        (48, (5, 5, 5, 5), (4, 4), (1, 0, 4, 4), {}, "window"),
        (48, (5, 5, 5, 5), (4, 4), (0, -1, 4, 4), {}, "window"),
        (48, (5, 5, 5, 5), (4, 4), (0, 0, 4, 0), {}, "window"),
        (47, (5, 5, 5, 5), (4, 4), (0, 0, 4, 4), {}, "bytes"),
        (32, (5, 5, 5, 5), (4, 4), (0, 0, 4, 4), {}, "bytes"),
        (48, (5, 5, 5, 5), (4, 4), (0, 0, 4, 4), {"least": -1.0}, "least"),
        (48, (5, 5, 5, 5), (4, 4), (0, 0, 4, 4), {"least": float("nan")}, "least"),
    ],
)
def test_impossible_geometry(size, crop, resized, window, options, reason) -> None:
    decoder = _jpeg.Decoder()
    decoder.open(encoded(30, 20))
    out = bytearray(size)
    with pytest.raises(ValueError, match=reason):
        decoder.view(out, crop, resized, window, **options)
    assert not any(out)


def test_wrong_types() -> None:
    decoder = _jpeg.Decoder()
    with pytest.raises(TypeError):
        decoder.open("picture.jpg")
    decoder.open(encoded(30, 20))
    with pytest.raises((TypeError, BufferError)):
        decoder.view(bytes(3), (0, 0, 1, 1), (1, 1), (0, 0, 1, 1))
    with pytest.raises((TypeError, BufferError)):
        decoder.view(np.zeros((3, 2), np.uint8)[:, 0], (0, 0, 1, 1), (1, 1), (0, 0, 1, 1))
    with pytest.raises(TypeError):
        _jpeg.Decoder(1)


# ---- the decoder as an object


def test_data_is_held_while_a_picture_is_open() -> None:
    decoder, data = _jpeg.Decoder(), bytearray(encoded(30, 20))
    for let_go in (
        decoder.close,
        lambda: decoder.open(encoded(8, 8)),
        lambda: decoder.view(bytearray(3), (0, 0, 1, 1), (1, 1), (0, 0, 1, 1)),
    ):
        decoder.open(memoryview(data))
        with pytest.raises(BufferError):
            data.append(0)
        let_go()
        data.append(0)
    decoder.close()
    decoder.close()


def test_gil_is_released_and_a_second_use_is_refused() -> None:
    data = encoded(1600, 1600)
    decoder, other, seen = _jpeg.Decoder(), _jpeg.Decoder(), []
    small = encoded(8, 8)
    out = bytearray(1600 * 1600 * 3)
    decoder.open(data)
    thread = threading.Thread(target=decoder.view, args=(out, (0, 0, 1600, 1600), (1600, 1600), (0, 0, 1600, 1600)))
    thread.start()
    while thread.is_alive() and not seen:
        other.open(small)
        try:
            decoder.close()
        except RuntimeError as error:
            seen.append(str(error))
    thread.join()
    assert seen, "the main thread never ran while the other one decoded"
    assert "another thread" in seen[0]
    np.testing.assert_array_equal(np.frombuffer(out, np.uint8).reshape(1600, 1600, 3), full(data))


# ---- rewrite


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_rewritten_picture_is_the_same(kind: str, way: str) -> None:
    for width, height in ((1, 1), (97, 61)):
        data = KINDS[kind](width, height, **WAYS[way])
        for restarts in (True, False):
            new = _jpeg.rewrite(data, restarts=restarts)
            assert new[frame_at(new) + 1] == 0xC0
            np.testing.assert_array_equal(full(new), full(data))
            assert (b"\xff\xdd" in new) == restarts
        assert _jpeg.rewrite(new, restarts=False) == new


def test_rewritten_picture_is_smaller_and_keeps_its_markers() -> None:
    block = exif(6)
    data = encoded(400, 300, exif=block, comment=b"a remark", icc_profile=b"profile" * 20000)
    new = _jpeg.rewrite(data)
    assert len(new) < len(data)
    assert _jpeg.Decoder().open(new) == (400, 300, 3)
    assert jpeg_orientation(new) == 6
    old_image, new_image = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(new))
    for key in ("exif", "comment", "icc_profile", "jfif_density"):
        assert new_image.info[key] == old_image.info[key]
    assert len(re.findall(rb"\xff[\xd0-\xd7]", new[new.rfind(b"\xff\xda") :])) == ceil(300, 16) - 1
    cmyk = encoded(50, 40, "CMYK")
    before, after = (np.asarray(Image.open(io.BytesIO(file))) for file in (cmyk, _jpeg.rewrite(cmyk)))
    np.testing.assert_array_equal(after, before)


def test_damage_above_a_restart_marker_does_not_matter() -> None:
    """Whether decoding begins at the marker, as it does, or above it: bytes changed there leave the region as it is."""
    data = bytearray(_jpeg.rewrite(encoded(200, 400)))
    expected, _ = view(bytes(data), (20, 300, 100, 80), (50, 40))
    start = data.rfind(b"\xff\xda") + 14
    stop = start + (len(data) - start) // 2
    for at in range(start, stop):
        if data[at] not in (0xFF, 0) and not 0xD0 <= data[at] <= 0xD7:
            data[at] = 0x55
    changed, _ = view(bytes(data), (20, 300, 100, 80), (50, 40))
    np.testing.assert_array_equal(changed, expected)


# ---- built otherwise


def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if not found:
        pytest.skip("no C compiler")
    header = subprocess.run(
        [found, "-E", "-"], input="#include <stdio.h>\n#include <jpeglib.h>\n", capture_output=True, text=True
    )
    if header.returncode:
        pytest.skip("no libjpeg header")
    return found


def fuzz_bases(folder: Path) -> None:
    folder.mkdir()
    small = {
        f"{kind}-{way}": make(61, 45, **WAYS[way])
        for kind, make in KINDS.items()
        for way in ("baseline", "progressive")
    }
    others = {
        "cmyk": encoded(40, 30, "CMYK"),
        "rows": encoded(70, 90, restart_marker_rows=1),
        "rewritten": _jpeg.rewrite(encoded(70, 90, seed=3)),
        "blocks": encoded(50, 50, restart_marker_blocks=2, progressive=True),
        "exif-big": encoded(40, 30, exif=exif(5, ">")),
        "exif-little": encoded(40, 30, exif=exif(7, "<", 4)),
        "exif-endless": encoded(
            8, 8, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(24)
        ),  # 65,535 entries, it says
        "long-exif": encoded(9, 9, exif=exif(8) * 12, comment=b"remark" * 9),
        "wide": encoded(300, 20),
        "one": encoded(1, 1),
    }
    for name, data in {**small, **others}.items():
        (folder / f"{name.replace(':', '')}.jpg").write_bytes(data)


def fuzz(tmp_path: Path, count: int, plain: str) -> None:
    cc = compiler()
    library = tmp_path / "_jpeg.so"
    flags = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [
        "-shared",
        "-fPIC",
        "-I" + sysconfig.get_paths()["include"],
        str(SOURCE),
        "-o",
        str(library),
        "-ljpeg",
        "-lm",
    ]
    built = subprocess.run([cc, *flags], capture_output=True, text=True)
    asan = subprocess.run([cc, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if built.returncode or not os.path.isabs(asan):
        pytest.skip("no AddressSanitizer: " + (built.stderr.strip() or "no libasan.so").splitlines()[-1])
    fuzz_bases(tmp_path / "bases")
    environment = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own; the driver compares the memory in use
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "TLX_JPEG_PLAIN": plain,
    }
    command = [
        sys.executable,
        str(SUPPORT / "fuzz_jpeg.py"),
        str(library),
        str(tmp_path / "bases"),
        str(count),
        "1",
    ]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(answer.stdout)
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-6000:]


@pytest.mark.parametrize("plain", ["0", "1"])
def test_damaged_bytes_under_address_sanitizer(tmp_path: Path, plain: str) -> None:
    fuzz(tmp_path, 1500, plain)


@pytest.mark.slow
@pytest.mark.parametrize("plain", ["0", "1"])
def test_50_000_damaged_bytes_under_address_sanitizer(tmp_path: Path, plain: str) -> None:
    fuzz(tmp_path, 50_000, plain)


def test_installing_goes_on_without_a_compiler(tmp_path: Path) -> None:
    (tmp_path / "tlx" / "data").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(SOURCE, tmp_path / "tlx" / "data")
    if subprocess.run([sys.executable, "-c", "import setuptools"], capture_output=True).returncode:
        pytest.skip("no setuptools")
    answer = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        env={**os.environ, "CC": "no-such-compiler"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert "libjpeg-dev" in answer.stdout + answer.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_everything_works_without_the_extension() -> None:
    """The same tests, in a process to which it is not there."""
    names = ("stream/test_dealing.py", "stream/test_bad_samples.py", "pixels/test_decode.py")
    files = [str(TESTS / "data" / name) for name in names]
    lines = f"""
import sys
sys.modules["tlx.data._jpeg"] = None
import pytest
from tlx.data.pixels.jpeg_region import decoder
assert decoder().startswith("torchvision"), decoder()
sys.exit(pytest.main(["-x", "-m", "not slow and not gpu", "-p", "no:cacheprovider", *{files!r}]))
"""
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_one_that_was_built_for_another_source_is_as_good_as_none(capsys):
    assert extension.fitting(_jpeg) is _jpeg
    assert capsys.readouterr() == ("", "")
    old, other = types.ModuleType("_jpeg"), types.ModuleType("_jpeg")
    other.INTERFACE = extension.INTERFACE + 1
    for module in (old, other):
        assert extension.fitting(module) is None
        assert capsys.readouterr().err.startswith(
            "warning: tlx's C extension was built for another version of tlx and is not used"
        )
