"""tests/bench/read_pictures.py over every kind of picture that Pillow writes: read as Pillow reads it, or refused."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from images import encoded, picture
from PIL import Image
from places import TESTS

sys.path.append(str(TESTS / "bench"))
import read_pictures
from read_pictures import look, main

PHOTO = picture(1, size=(21, 34))
WAYS = {
    "JPEG": [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}],
    "PNG": [{}, {"optimize": True}, {"bits": 4}],
    "TIFF": [
        {"compression": c} for c in (None, "tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", "group4", "zstd")
    ],
    "WEBP": [{}, {"lossless": True}],
    "GIF": [{}, {"interlace": 0}],
    "BMP": [{}],
    "PPM": [{}],
    "AVIF": [{}],
}
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16", "La", "PA")


def of_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)
    if mode == "P":
        return PHOTO.quantize(100)
    if mode == "PA":
        return PHOTO.quantize(100).convert("PA")
    return (
        PHOTO.convert("LA").convert("La")
        if mode == "La"
        else PHOTO.convert("RGB").convert(mode)
        if mode != "LAB"
        else Image.frombytes("LAB", PHOTO.size, PHOTO.tobytes())
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place, exif = tmp_path_factory.mktemp("kinds"), Image.Exif()
    exif[0x0112] = 6
    for format, ways in WAYS.items():
        for number, options in enumerate(ways):
            for mode in MODES:
                for note in ({}, {"exif": exif}):
                    try:
                        data = encoded(of_mode(mode), format, **options, **note)
                    except (OSError, ValueError, KeyError, RuntimeError):  # Pillow does not write it
                        continue
                    name = f"{format}-{number}-{mode.replace(';', '_')}{'-turned' if note else ''}"
                    (place / name).write_bytes(data)
                    (place / f"{name}-cut").write_bytes(data[: len(data) * 2 // 3])
    frames = [picture(label, size=20) for label in range(3)]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        (place / f"{format}-frames").write_bytes(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    (place / "deeper").mkdir()
    (place / "deeper" / "text.jpg").write_text("no picture", encoding="utf-8")
    (place / "deeper" / "empty.png").write_bytes(b"")
    return place


def test_every_kind(folder, tmp_path, capsys):
    failed = main([str(folder), "--json", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert not failed, said
    alone = [line for line in said.splitlines() if line.startswith("refused by tlx alone")]
    refusals = ("no known range", "it ends too early", "rows are missing")
    assert all(any(words in line for words in refusals) for line in alone), "\n".join(alone)
    total, same = (int(said.splitlines()[-1].split(words)[0].split()[-1]) for words in (" files", " same"))
    assert total > 150
    assert same > 60
    assert "refused: kinds" in said.replace(str(folder.name), "kinds")


def test_a_difference_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(PHOTO, "PNG"))
    (tmp_path / "text").write_bytes(b"no picture")
    assert look(tmp_path / "a.png", "a.png").verdict == "same"
    assert look(tmp_path / "text", "text").verdict == "refused"
    true = read_pictures.by_tlx
    monkeypatch.setattr(read_pictures, "by_tlx", lambda data: true(data)[::-1])
    assert look(tmp_path / "a.png", "a.png").verdict == "DIFFERENT"
    monkeypatch.setattr(read_pictures, "by_tlx", lambda data: true(data).transpose(1, 0, 2))
    assert look(tmp_path / "a.png", "a.png").said == "decoded: (34, 21, 3) and not (21, 34, 3)"
    monkeypatch.setattr(read_pictures, "by_tlx", lambda data: np.zeros((2, 3, 3), np.uint8))
    assert look(tmp_path / "text", "text").verdict == "READ BY TLX ALONE"
    monkeypatch.setattr(read_pictures, "by_tlx", true)
    monkeypatch.setattr(read_pictures, "examine", lambda data: (_ for _ in ()).throw(read_pictures.DecodeError("no")))
    assert look(tmp_path / "a.png", "a.png").verdict == "CHECKED OTHERWISE"
    assert main([str(tmp_path)]) == 1


def test_twelve_bits(tmp_path):
    """Of 0x000, 0x800, 0xFFF the upper eight."""
    entries = {256: 3, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 5}
    listed = b"".join(struct.pack("<HHII", n, 4, 1, value) for n, value in entries.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    (tmp_path / "12.tif").write_bytes(head + listed + bytes(4) + bytes([0, 0x08, 0x00, 0xFF, 0xF0]))
    assert read_pictures.by_tlx((tmp_path / "12.tif").read_bytes())[0, :, 0].tolist() == [0, 128, 255]
    assert look(tmp_path / "12.tif", "12.tif").verdict == "same"


def test_the_reason_of_each_refusal(tmp_path):
    cases = {
        "float.tif": (encoded(PHOTO.convert("F"), "TIFF"), "floating-point"),
        "text.jpg": (b"no picture", "not a picture: it starts with b'no pictu'"),
        "header.png": (encoded(PHOTO, "PNG")[:20], "damaged"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert reason in look(tmp_path / name, name).said
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(b"no picture"))
