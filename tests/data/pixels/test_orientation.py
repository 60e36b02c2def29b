"""How the camera was held: one reader of its note, whichever decoder shows the picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from images import png_chunk
from PIL import Image, ImageOps

from tlx.data.build import content
from tlx.data.pixels import decode
from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.crop_geometry import Exactly, ResizedCrop
from tlx.data.pixels.orientation import info_orientation, inverse, jpeg_orientation, orientation, stored_view, turned
from tlx.data.shards import examine

COLOURS = {"r": (220, 30, 30), "g": (30, 200, 30), "b": (30, 30, 220), "w": (230, 230, 230)}
WIDTH, HEIGHT = 48, 32  # of a picture of four fields, as it is stored: red, green above blue, white

UPRIGHT = {1: "rg/bw", 2: "gr/wb", 3: "wb/gr", 4: "bw/rg", 5: "rb/gw", 6: "br/wg", 7: "wg/br", 8: "gw/rb"}
"""Orientation -> the fields as they are seen, by hand from EXIF's table of where row 0 and column 0 are."""


def fields() -> Image.Image:
    pixels = np.empty((2, 2, 3), np.uint8)
    for place, name in enumerate("rgbw"):
        pixels[place // 2, place % 2] = COLOURS[name]
    return Image.fromarray(pixels.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1))


def seen(pixels: torch.Tensor | np.ndarray) -> str:
    """The fields of a picture [3, height, width]."""
    picture = np.asarray(pixels).astype(int)
    height, width = picture.shape[1:]

    def name(row: int, column: int) -> str:
        colour = picture[:, height * (2 * row + 1) // 4, width * (2 * column + 1) // 4]
        return min(COLOURS, key=lambda n: int(np.abs(colour - COLOURS[n]).sum()))

    return "/".join("".join(name(row, column) for column in (0, 1)) for row in (0, 1))


def tiff(number: int, *, order: str = ">", kind: int = 3, count: int = 1) -> bytes:
    """An EXIF block of two entries, the second the orientation."""
    letter = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i"}[kind]
    values = struct.pack(order + letter * count, *[number, *[1] * (count - 1)])
    inside, behind = (values.ljust(4, b"\0"), b"") if len(values) <= 4 else (struct.pack(order + "I", 38), values)
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 7) + struct.pack(order + "HHI", 0x0112, kind, count) + inside
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HIH", 42, 8, 2)
    return head + entries + bytes(4) + behind


def app1(block: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block


def xmp(number: int) -> bytes:
    text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{number}"/></x:xmpmeta>'
    return b"http://ns.adobe.com/xap/1.0/\0" + text.encode()


def jpeg(*segments: bytes, **options: object) -> bytes:
    buffer = io.BytesIO()
    fields().save(buffer, "JPEG", quality=95, subsampling=0, **options)
    data = buffer.getvalue()
    return data[:2] + b"".join(segments) + data[2:]


EXIF = b"Exif\0\0"
NOTES = {  # what stands before the pixels, and the orientation by Pillow's rules
    "none": ([], 1),
    **{f"big-endian {n}": ([app1(EXIF + tiff(n))], n) for n in range(1, 9)},
    **{f"little-endian {n}": ([app1(EXIF + tiff(n, order="<"))], n) for n in (2, 6)},
    **{f"beyond {n}": ([app1(EXIF + tiff(n))], 1) for n in (0, 9, 255)},
    "XMP before EXIF": ([app1(xmp(3)), app1(EXIF + tiff(6))], 6),
    "XMP behind EXIF": ([app1(EXIF + tiff(6)), app1(xmp(3))], 6),
    "XMP alone": ([app1(xmp(8))], 8),
    "XMP, and EXIF without it": ([app1(xmp(8)), app1(EXIF + b"MM\0*\0\0\0\x08\0\0\0\0\0\0")], 8),
    "XMP, and EXIF with nonsense": ([app1(xmp(8)), app1(EXIF + tiff(99))], 1),
    "LONG, big-endian": ([app1(EXIF + tiff(6, kind=4))], 6),
    "LONG, little-endian": ([app1(EXIF + tiff(6, kind=4, order="<"))], 6),
    "signed": ([app1(EXIF + tiff(6, kind=8))], 6),
    "two values": ([app1(EXIF + tiff(6, count=2))], 6),
    "three values": ([app1(EXIF + tiff(6, count=3))], 6),
    "no value": ([app1(EXIF + tiff(6, count=1).replace(b"\0\x03\0\0\0\x01\0\x06", b"\0\x03\0\0\0\0\0\x06"))], 1),
    "a byte": ([app1(EXIF + tiff(6, kind=1))], 1),
    "Exif, then 0 and 255": ([app1(b"Exif\0\xff" + tiff(6))], 1),
    "Exif twice": ([app1(EXIF + EXIF + tiff(6))], 6),
    "in two segments": ([app1(EXIF + tiff(6)[:20]), app1(EXIF + tiff(6)[20:])], 6),
    "broken": ([app1(EXIF + b"MM\0*\xff\xff\xff\xff")], 1),
    "cut": ([app1(EXIF + tiff(6)[:30])], 1),
    "fill bytes and junk before it": ([app1(b"other"), b"junk\xff\xff", app1(EXIF + tiff(6))], 6),
}


@pytest.mark.parametrize("name", NOTES)
def test_one_orientation_whatever_reads_it(name, monkeypatch, capfd):
    segments, expected = NOTES[name]
    data = jpeg(*segments)
    assert jpeg_orientation(data) == expected
    shown = {"torchvision": decode.decode(data)}
    assert seen(decode.decode(data, upright=False)) == UPRIGHT[1]
    with monkeypatch.context() as without:
        without.setattr(decode, "torchvision_io", lambda: None)
        shown["Pillow"] = decode.decode(data)
    for width, height in ((30, 40), (40, 30)):
        out = np.zeros((height, width, 3), np.uint8)
        view = regions.Regions(ResizedCrop((height, width), False, Exactly(width, height)))
        if view.show(data, 0, out):
            shown[f"tlx's own, {width} x {height}"] = out.transpose(2, 0, 1)
    shown["made smaller"] = decode.decode(
        content.stored(data, "jpg", resize=24, quality=95, rewrite=False, measured=False).data
    )
    assert {how: seen(pixels) for how, pixels in shown.items()} == dict.fromkeys(shown, UPRIGHT[expected])
    assert shown["torchvision"].shape[1:] == ((WIDTH, HEIGHT) if expected >= 5 else (HEIGHT, WIDTH))
    for measured in (False, True):
        looked = examine.examine(data, measured=measured)
        assert (looked.height, looked.width) == tuple(shown["torchvision"].shape[1:])
    with monkeypatch.context() as without:
        without.setattr(examine, "_jpeg", None)
        assert examine.examine(data).height == looked.height
    capfd.readouterr()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(set(NOTES) - {"broken", "cut"}))  # of these Pillow raises
def test_as_pillow_turns_it(name):
    segments, expected = NOTES[name]
    with Image.open(io.BytesIO(jpeg(*segments))) as image:
        assert seen(np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)) == UPRIGHT[expected]


def png_with(chunks: bytes, *, behind: bool) -> bytes:
    buffer = io.BytesIO()
    fields().save(buffer, "PNG")
    data = buffer.getvalue()
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    return data[:at] + chunks + data[at:]


def saved(format: str, number: int, **options: object) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = number
    fields().save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


RAW = "Raw profile type exif"
OTHERS = {
    "PNG": lambda n: png_with(png_chunk(b"eXIf", tiff(n)), behind=False),
    "PNG, behind the pixels": lambda n: png_with(png_chunk(b"eXIf", tiff(n)), behind=True),
    "PNG, ImageMagick's": lambda n: png_with(
        png_chunk(b"tEXt", f"{RAW}\0\nexif\n{len(tiff(n)):8}\n{tiff(n).hex()}\n".encode()), behind=False
    ),
    "PNG, XMP": lambda n: png_with(
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<a>tiff:Orientation>%d<" % n), behind=False
    ),
    "WebP": lambda n: saved("WEBP", n, lossless=True),
    "AVIF": lambda n: saved("AVIF", n, quality=95),
    "TIFF": lambda n: saved("TIFF", n),
    "TIFF, compressed": lambda n: saved("TIFF", n, compression="tiff_lzw"),
}


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_files(name, number):
    if name == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    data = OTHERS[name](number)
    assert seen(decode.decode(data)) == UPRIGHT[number]
    assert decode.decode(data).shape[1:] == ((WIDTH, HEIGHT) if number >= 5 else (HEIGHT, WIDTH))
    assert seen(decode.decode(data, upright=False)) == UPRIGHT[1]
    assert decode.decode(data, upright=False).shape[1:] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_odd_orientations_of_a_tiff(kind, count, capfd):
    """Pillow turns it; as it is stored it can be had all the same."""
    data = bytearray(saved("TIFF", 6))
    (at,) = struct.unpack_from("<I", data, 4)
    place = next(p for p in range(at + 2, len(data), 12) if data[p : p + 2] == b"\x12\x01")
    data[place + 2 : place + 8] = struct.pack("<HI", kind, count)
    assert seen(decode.decode(bytes(data), upright=False)) == UPRIGHT[1]
    read = (kind, count) in ((3, 1), (3, 2), (4, 1))  # a byte is no number to Pillow; two LONGs stand elsewhere
    assert seen(decode.decode(bytes(data))) == UPRIGHT[6 if read else 1]
    capfd.readouterr()


def test_what_turns_a_picture_and_back():
    """Of 2 x 3 numbers: 0 1 2 above 3 4 5."""
    stored = np.arange(6).reshape(2, 3)
    by_hand = {
        1: [[0, 1, 2], [3, 4, 5]],
        2: [[2, 1, 0], [5, 4, 3]],
        3: [[5, 4, 3], [2, 1, 0]],
        4: [[3, 4, 5], [0, 1, 2]],
        5: [[0, 3], [1, 4], [2, 5]],
        6: [[3, 0], [4, 1], [5, 2]],
        7: [[5, 2], [4, 1], [3, 0]],
        8: [[2, 5], [1, 4], [0, 3]],
    }
    for number, expected in by_hand.items():
        assert turned(torch.from_numpy(stored)[None], number)[0].tolist() == expected
        upright = np.zeros_like(np.array(expected))
        stored_view(upright, number)[:] = stored
        assert upright.tolist() == expected
        assert turned(torch.tensor(expected)[None], inverse(number))[0].tolist() == stored.tolist()


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_a_cut_block(length):
    assert orientation(tiff(6)[:length]) == (6 if length >= 34 else 1)


def test_an_entry_outside_the_block():
    block = bytearray(tiff(6))
    block[4:8] = struct.pack(">I", 2**32 - 4)
    assert orientation(bytes(block)) == 1
    far = tiff(6, count=3)[:-6]  # the three values are not there
    assert orientation(far) == 1


@pytest.mark.parametrize("name", [b"exif", b"xmp"])
def test_a_text_that_is_called_so_is_no_note(name):
    """Pillow gives the text of a PNG's zTXt and iTXt chunks under the names that they have."""
    text = b"tiff:Orientation>6<" if name == b"exif" else b"words"
    for body in (name + b"\0\0" + zlib.compress(text), name + b"\0\0\0\0\0" + text):
        data = png_with(png_chunk(b"iTXt" if body.endswith(text) else b"zTXt", body), behind=False)
        assert seen(decode.decode(data)) == UPRIGHT[1]
        assert examine.examine(data).height == HEIGHT
    both = {"exif": "a text", RAW: f"\nexif\n4\n{tiff(6).hex()}\n"}
    assert info_orientation(both) == 6
    assert info_orientation({"xmp": ("neither", "nor")}) == 1


def test_what_pillow_has_found():
    assert info_orientation({}) == 1
    assert info_orientation({"exif": EXIF + tiff(5)}) == 5
    assert info_orientation({"exif": b"nonsense", "xmp": b'tiff:Orientation="4"'}) == 4
    assert info_orientation({RAW: "\nexif\n4\nno hexadecimal number\n"}) == 1
