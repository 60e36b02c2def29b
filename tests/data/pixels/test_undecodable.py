"""Pictures that cannot be decoded, or whose pixels have no known range, are refused by name; none passes as black."""

from __future__ import annotations

import io
import os
import struct
import sys
import tarfile
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from images import encoded, index_shards, make_folder, picture, png_chunk
from PIL import Image

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.build import content
from tlx.data.build.sources import Picture, Source
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels import decoder_messages
from tlx.data.pixels.decode import DecodeError, decode, library, reading
from tlx.data.pixels.one_picture import at_picture
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.check import check_shards
from tlx.data.shards.examine import examine
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import evaluation_batches
from tlx.data.stream.threads import in_threads

PHOTO = picture(1, size=(20, 30))


@pytest.fixture(autouse=True)
def _nobody_else_writes(monkeypatch):
    """Whatever threads other tests have left, and however much they have made a process tell, which ends somewhere."""
    monkeypatch.setattr(decoder_messages, "_others_write", lambda: False)
    monkeypatch.setattr(decoder_messages, "_told", set())


def with_tag(data: bytes, tag: int, value: bytes) -> bytes:
    """A little-endian TIFF with another value (4 bytes) in one of its entries."""
    out = bytearray(data)
    (at,) = struct.unpack_from("<I", out, 4)
    for place in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", out, at)[0], 12):
        if struct.unpack_from("<H", out, place)[0] == tag:
            out[place + 8 : place + 12] = value
            return bytes(out)
    raise AssertionError(f"no tag {tag}")


def tiff(pixels: bytes, width: int, height: int, *tags: tuple[int, int, int]) -> bytes:
    """A little-endian grey TIFF of one strip; `tags` are (number, type, value), instead of or beside the usual ones."""
    usual = {256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1), 278: (4, height)}
    usual |= {number: (kind, value) for number, kind, value in tags}
    entries = len(usual) + 2
    start = 8 + 2 + 12 * entries + 4
    usual |= {273: (4, start), 279: (4, len(pixels))}
    listed = b"".join(struct.pack("<HHII", n, kind, 1, value) for n, (kind, value) in sorted(usual.items()))
    return b"II*\0" + struct.pack("<IH", 8, entries) + listed + bytes(4) + pixels


def png(rows: bytes, width: int = 30, height: int = 20, *, interlaced: int = 0) -> bytes:
    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", start)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


ROW = b"\0" + bytes([200]) * 90
LZW = encoded(PHOTO, "TIFF", compression="tiff_lzw")
PNG = encoded(PHOTO, "PNG")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def two_strips(count: int) -> bytes:
    """20 rows of 30 pixels in strips of ten, of which `count` are there."""
    whole = tiff(bytes([200]) * 600, 30, 20, (278, 4, 10))
    first = struct.unpack_from("<I", whole, 4)[0] + 2
    table = len(whole)
    out = bytearray(whole)
    for place in range(first, first + 12 * 9, 12):
        number = struct.unpack_from("<H", out, place)[0]
        if number in (273, 279):
            offset = struct.unpack_from("<I", out, place + 8)[0]
            values = [offset, offset + 300] if number == 273 else [300, 300]
            if count == 1:
                out[place + 8 : place + 12] = struct.pack("<I", values[0])
            else:
                out[place + 4 : place + 12] = struct.pack("<II", 2, table + (0 if number == 273 else 8))
    return bytes(out) + struct.pack("<II", *[len(whole) - 600, len(whole) - 300]) + struct.pack("<II", 300, 300)


UNDECODABLE = {
    "webp in a TIFF": (with_tag(LZW, 259, struct.pack("<I", 50001)), "damaged, or of a kind .* WEBP compression"),
    "unknown codec": (with_tag(LZW, 259, struct.pack("<I", 34712)), "a damaged TIFF, or of a kind .* code 34712"),
    "damaged LZW": (LZW[:20] + b"\xff" * 40 + LZW[60:], "damaged"),
    "a strip is missing": (two_strips(1), "damaged: parts of the picture are missing"),
    "damaged zlib": (flipped(PNG, 45), "damaged: broken data stream"),
    "rows are missing": (png(ROW * 10), "damaged: rows are missing at its end"),
    "a part of a row is missing": (png(ROW * 19 + ROW[:50]), "damaged: .*truncated"),
    "no rows": (png(b""), "damaged"),
    "interlaced rows are missing": (png(bytes(39), interlaced=1), "damaged: rows are missing at its end"),
    "a damaged header": (flipped(PNG, 16), "a damaged PNG, or of a kind"),
    "a damaged first chunk": (flipped(PNG, 12), "a damaged PNG, or of a kind"),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_undecodable(name, capfd):
    data, reason = UNDECODABLE[name]
    for upright in (True, False):
        with pytest.raises(DecodeError, match=reason) as caught:
            decode(data, upright=upright)
        assert "not a picture" not in str(caught.value)
    for measured in (True, False):
        with pytest.raises(DecodeError, match=reason):
            examine(data, measured=measured)
    with pytest.raises(DecodeError, match=reason):
        content.stored(data, "png", resize=8, quality=90, rewrite=False, measured=False)
    assert capfd.readouterr() == ("", "")  # the libraries' own words are in the reason


@pytest.mark.parametrize(
    "data",
    [
        png(ROW * 10 + (b"\0" + bytes(90)) * 10),
        png(bytes(4000), interlaced=1),
        two_strips(2),
        encoded(Image.new("RGB", (40, 30)), "PNG"),
        encoded(Image.new("1", (40, 30)), "PNG"),
        encoded(Image.new("RGBA", (40, 30)), "PNG"),
    ],
)
def test_what_is_black_is_no_fault(data):
    pixels = decode(data)
    assert pixels[:, -1].max() in (0, 200)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(image.convert("RGB")))


def test_a_build_and_a_check_name_them(tmp_path):
    make_folder(tmp_path / "src", 2, 2)
    names = {"webp in a TIFF": "codec.tif", "rows are missing": "rows.png", "damaged LZW": "lzw.tif"}
    for name, file in names.items():
        (tmp_path / "src" / "class0" / file).write_bytes(UNDECODABLE[name][0])
    with pytest.raises(UserError, match="3 unreadable pictures") as caught:
        build_shards(str(tmp_path / "src"), tmp_path / "out", BuildOptions(val=0, jobs=0))
    for file in names.values():
        assert f"class0/{file}: damaged" in str(caught.value)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name, file in {**names, "": "good.png"}.items():
            stem, _, extension = file.partition(".")
            for member, data in (
                (f"{stem}.{extension}", UNDECODABLE[name][0] if name else PNG),
                (f"{stem}.cls", str(int(not name)).encode()),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_shards(tmp_path / "tars")
    bad = check_shards(tmp_path / "tars", jobs=0).bad
    assert sorted(b.where.rpartition(" ")[2] for b in bad) == sorted(names.values())


# Ranges

SIXTEEN = np.array([[0, 1000, 65535]], np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(SIXTEEN.tobytes(), 3, 1, (258, 3, 16)), [0, 3, 255]),
        (tiff(bytes([0, 0x08, 0x00, 0xFF, 0xF0]), 3, 1, (258, 3, 12)), [0, 128, 255]),  # 000, 800, FFF in 12 bits
        (b"P5 3 1 65535\n" + SIXTEEN.byteswap().tobytes(), [0, 3, 255]),
        (b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes(), [0, 128, 255]),
        (tiff(bytes([0, 3, 255]), 3, 1), [0, 3, 255]),
        (tiff(bytes([0, 3, 255]), 3, 1, (262, 3, 0)), [255, 252, 0]),  # 0 is white
    ],
    ids=["TIFF 16", "TIFF 12", "PGM 16", "PGM 10", "TIFF 8", "TIFF 8, 0 is white"],
)
def test_what_has_a_known_range(data, expected):
    for channels in (1, 3):
        assert decode(data, channels)[:, 0].tolist() == [expected] * channels


NUMBERS = np.array([[-5, 0, 70_000]])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(NUMBERS.astype("<u4").tobytes(), 3, 1, (258, 3, 32)), "32 bits, or with a sign, have no known range"),
        (tiff(NUMBERS.astype("<i4").tobytes(), 3, 1, (258, 3, 32), (339, 3, 2)), "have no known range"),
        (tiff(NUMBERS.astype("<i2").tobytes(), 3, 1, (258, 3, 16), (339, 3, 2)), "have no known range"),
        (tiff(np.array([-5, 0, 7], np.int8).tobytes(), 3, 1, (339, 3, 2)), "have no known range"),
        (tiff(NUMBERS.astype("<f4").tobytes(), 3, 1, (258, 3, 32), (339, 3, 3)), "floating-point .* no known range"),
        (tiff(SIXTEEN.tobytes(), 3, 1, (258, 3, 16), (262, 3, 0)), "16 bits in which 0 is white"),
        (b"Pf 3 1 -1.0\n" + NUMBERS.astype("<f4").tobytes(), "floating-point .* no known range"),
    ],
    ids=["u32", "i32", "i16", "i8", "f32", "16, 0 is white", "PFM"],
)
def test_what_has_no_known_range_is_refused(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(data)
    with pytest.raises(DecodeError, match=reason):
        content.stored(data, "tif", resize=1, quality=90, rewrite=False, measured=True)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_data_set_without_a_known_range_is_refused(mode):
    source = Source(("a", "b"), {}, items={"train": [(Image.new(mode, (4, 4), 7), 0)]})
    with pytest.raises(DecodeError, match=f"without a known range .mode {mode}."):
        content.read(source, Picture("item 0", 0, place=("train", 0)))


def test_16_bits_of_another_byte_order_in_a_data_set():
    big = Image.frombytes("I;16B", (3, 1), SIXTEEN.byteswap().tobytes())
    source = Source(("a", "b"), {}, items={"train": [(big, 0)]})
    data, extension = content.read(source, Picture("item 0", 0, place=("train", 0)))
    assert extension == "png"
    assert decode(data, 1)[0, 0].tolist() == [0, 3, 255]


# What libraries say


REPAIRED = encoded(PHOTO)[:-2] + b"some bytes" + b"\xff\xd9"  # libjpeg counts and passes over them


def test_what_libjpeg_says_names_the_picture(capfd):
    with at_picture(lambda: "shards/0.tar: a.jpg"):
        assert decode(REPAIRED).shape == (3, 20, 30)
    err = capfd.readouterr().err
    assert err == "warning: shards/0.tar: a.jpg: Corrupt JPEG data: 3 extraneous bytes before marker 0xd9\n"
    with at_picture(lambda: "shards/0.tar: a.jpg"):
        decode(REPAIRED)
    assert capfd.readouterr().err == ""  # once in a process
    with at_picture(lambda: "shards/0.tar: b.jpg"):
        decode(REPAIRED)
    assert "b.jpg: Corrupt JPEG data" in capfd.readouterr().err


def with_a_long_notice() -> bytes:
    """A TIFF with a copyright notice that is longer than the file, it says."""
    data = tiff(bytes([0, 3, 255]), 3, 1, (33432, 2, 0))
    entry = data.index(struct.pack("<HHI", 33432, 2, 1))
    return data[: entry + 4] + struct.pack("<II", 60_000, 8) + data[entry + 12 :]


def test_what_pillow_says_names_the_picture(capfd, recwarn):
    data = with_a_long_notice()
    with at_picture(lambda: "odd\x1b.tif"):
        assert decode(data)[:, 0].tolist() == [[0, 3, 255]] * 3
    err = capfd.readouterr().err
    assert err.startswith("warning: odd\\x1b.tif: Tag data larger than file. Skipping tag 33432")
    assert not recwarn.list


def test_what_pillow_logs_is_a_part_of_the_reason(capfd):
    many = tiff(bytes(9), 3, 1, (277, 4, 65535))
    with pytest.raises(DecodeError, match=r"a damaged TIFF, or of a kind .*: Invalid value for samples per pixel"):
        decode(many)
    assert capfd.readouterr().err == ""


def test_a_build_a_check_and_a_view_name_it(tmp_path, capfd):
    make_folder(tmp_path / "src", 2, 2)
    rows = encoded(PHOTO, restart_marker_rows=1)
    (tmp_path / "src" / "class0" / "repaired.jpg").write_bytes(rows.replace(b"\xff\xd0", b"some bytes\xff\xd0", 1))
    decoder_messages._told.clear()
    build_shards(str(tmp_path / "src"), tmp_path / "out", BuildOptions(val=0, jobs=0))
    err = capfd.readouterr().err
    assert "class0/repaired.jpg: Corrupt JPEG data" in err
    assert err.count("Corrupt") == 1
    check_shards(tmp_path / "out", jobs=0)
    err = capfd.readouterr().err
    assert err.count("Corrupt") == 1
    assert "train/000000.tar: 00000000" in err
    decoder_messages._told.clear()
    (tmp_path / "src" / "class0" / "odd.tif").write_bytes(with_a_long_notice())
    build_shards(str(tmp_path / "src"), tmp_path / "two", BuildOptions(val=0, jobs=0))
    assert "class0/odd.tif: Tag data larger than file" in capfd.readouterr().err
    manifest = Manifest.open(tmp_path / "two" / "train")
    view = eval_transform(InputSpec(size=(32, 32)))
    for batch in evaluation_batches(manifest, batch=6, transform=view, workers=1):
        assert len(batch.labels) == 6
    err = capfd.readouterr().err
    assert err.count("Tag data larger than file") == 1
    assert "two/train/000000.tar: 00000000" in err


def test_what_others_write_meanwhile_goes_on_to_standard_error(capfd):
    """In full, and as it is; only what is certainly a library's is the picture's."""
    lines = [
        b"ValueError: of another thread.\n",
        b"fault: a watchdog's\n",
        b"Fatal Python error: Aborted\n",
        b"Corrupt JPEG data: by hand\n",
        b"TIFFReadDirectory: Warning, by hand.\n",
        b"tempfile.tif: WEBP compression support is not configured.\n",
        b"Fax4: a line without an end\n",
        b"\xff" * 100_000 + b"\n",
    ]
    with reading(b""), library(), decoder_messages.written():
        thread = threading.Thread(target=lambda: [os.write(2, line) for line in lines])
        thread.start()
        thread.join()
    errors = capfd.readouterr().err.splitlines()
    mine = "Corrupt JPEG data: by hand; Warning, by hand.; WEBP compression support is not configured."
    assert errors[-1] == f"warning: a picture: {mine}"
    assert errors[:4] == [lines[i].decode().strip() for i in (0, 1, 2, 6)]
    assert len(errors) == 6
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_where_other_threads_may_write_standard_error_stays(capfd, monkeypatch):
    """And nothing waits: in training's main process a watchdog may end it at any time."""
    monkeypatch.undo()
    monkeypatch.setattr(decoder_messages, "_told", set())
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="tlx-watch")
    thread.start()
    try:
        with at_picture(lambda: "a.jpg"), reading(b""), decoder_messages.written():
            os.write(2, b"fault: the last words\n")
            assert capfd.readouterr().err == "fault: the last words\n"
        assert decode(REPAIRED).shape == (3, 20, 30)
        assert "Corrupt JPEG data" in capfd.readouterr().err  # nameless, by libjpeg itself
        monkeypatch.setattr(decoder_messages, "is_worker", lambda: True)  # its threads do not write
        with reading(b""), decoder_messages.written():
            os.write(2, b"Premature end of JPEG file\n")
        assert capfd.readouterr().err == "warning: a picture: Premature end of JPEG file\n"
    finally:
        done.set()
        thread.join()


def test_threads_that_read_pictures_do_not_hinder(capfd, monkeypatch):
    def others(item: int) -> bool:
        return decoder_messages._others_write()

    before = [thread for thread in threading.enumerate() if thread is threading.main_thread()]
    monkeypatch.undo()
    monkeypatch.setattr(decoder_messages.threading, "enumerate", lambda: [*before, *pool()])

    def pool() -> list[threading.Thread]:
        return [t for t in threading._active.values() if t.name.startswith("tlx-in-threads")]  # type: ignore[attr-defined]

    assert list(in_threads(others, range(6), 3)) == [False] * 6


def test_nothing_is_redirected_while_a_picture_waits_for_room(capfd, monkeypatch):
    shown = []

    def waits(size: int, peak: int = 3) -> None:
        os.write(2, b"while it waits\n")
        shown.append(capfd.readouterr().err)

    monkeypatch.setattr("tlx.data.pixels.decode.reserve", waits)
    decode(LZW)
    decode(REPAIRED)
    assert shown == ["while it waits\n"] * 2


def test_each_thread_is_told_of_its_own_picture(capfd):
    """Whatever the others read meanwhile; and a reason is the same each time."""
    decoder_messages._told.clear()
    codec, odd = UNDECODABLE["webp in a TIFF"][0], with_a_long_notice()

    def read(number: int) -> str:
        with at_picture(lambda: f"picture {number}"):
            try:
                return str(decode([codec, odd, REPAIRED, PNG][number % 4]).shape)
            except DecodeError as error:
                return str(error)

    found = list(in_threads(read, range(40), 4))
    assert [set(found[i::4]) for i in (1, 2, 3)] == [{"torch.Size([3, 1, 3])"}, *[{"torch.Size([3, 20, 30])"}] * 2]
    reason = "damaged, or of a kind that Pillow does not read: WEBP compression support is not configured."
    assert set(found[0::4]) == {reason}
    told = [line.removeprefix("warning: picture ") for line in capfd.readouterr().err.splitlines()]
    said = {1: "Tag data larger than file", 2: "Corrupt JPEG data"}
    assert sorted(line.split(":")[0] for line in told) == sorted(str(i) for i in range(40) if i % 4 in said)
    assert all(said[int(line.split(":")[0]) % 4] in line for line in told)


def test_filters_of_warnings_are_left_alone(capfd):
    """A warning that Python shows once comes once, however many pictures are read in between."""
    code = "warnings.warn('once', stacklevel=1)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        decode(PNG)
        space = {"warnings": warnings, "__name__": "someone"}
        for _ in range(3):
            exec(code, space)
            decode(PNG)
            decode(with_a_long_notice())
    assert [str(w.message) for w in caught] == ["once"]
    shown = warnings.showwarning
    with warnings.catch_warnings(record=True) as caught:
        decode(PNG)
        warnings.simplefilter("always")
        warnings.warn("of somebody else", stacklevel=1)
    assert [str(w.message) for w in caught] == ["of somebody else"]
    assert warnings.showwarning is shown
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("ignore")  # which somebody has chosen
        warnings.showwarning = lambda *given: None
        decoder_messages._told.clear()
        capfd.readouterr()
        decode(with_a_long_notice())
        assert capfd.readouterr().err == ""


def test_a_data_sets_own_reading_names_the_picture(capfd):
    class Warns:
        def __getitem__(self, place: int) -> tuple[Image.Image, int]:
            with Image.open(io.BytesIO(with_a_long_notice())) as image:
                image.load()
                return image.copy(), 0

    source = Source(("a", "b"), {}, items={"train": Warns()})  # type: ignore[dict-item]
    with at_picture(lambda: "item 7 of train"):
        content.read(source, Picture("item 7", 0, place=("train", 7)))
    assert capfd.readouterr().err.startswith("warning: item 7 of train: Tag data larger than file")


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize(("kind", "value"), [(3, 9), (3, 0), (2, 0x36)], ids=["9", "0", "text"])
def test_a_tiffs_orientation_that_is_none(kind, value, upright):
    data = tiff(bytes([0, 3, 255]), 3, 1, (274, kind, value))
    assert decode(data, 1, upright=upright)[0].tolist() == [[0, 3, 255]]


def test_what_is_too_short_to_tell(monkeypatch):
    """Early versions of Pillow look beyond its end."""

    def looks(prefix: bytes) -> bool:
        return prefix[:1] == b"P" and prefix[1] in b"0123456"

    monkeypatch.setitem(Image.OPEN, "PPM", (Image.OPEN["PPM"][0], looks))
    with pytest.raises(DecodeError, match=r"^not a picture: it starts with b'P'$"):
        decode(b"P")


def test_a_closed_standard_error_is_no_obstacle(capfd):
    saved = os.dup(2)
    os.close(2)
    try:
        assert decode(REPAIRED).shape == (3, 20, 30)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    sys.stderr.flush()


def test_an_own_mistake_is_no_damage_of_the_picture(monkeypatch):
    """Only what Pillow and torchvision raise is said of the picture."""

    def wrong(*given):
        raise TypeError("a mistake of tlx's")

    monkeypatch.setattr("tlx.data.pixels.decode.info_orientation", wrong)
    with pytest.raises(TypeError, match="a mistake of tlx's"):
        decode(PNG)


def test_a_row_beyond_all_bounds_is_no_lack_of_memory():
    start = struct.pack(">IIBBBBB", 170_000_000, 1, 16, 6, 0, 0, 0)
    whole = png(b"", 1, 1)
    at = whole.index(b"IHDR")
    data = whole[: at + 4] + start + struct.pack(">I", zlib.crc32(b"IHDR" + start)) + whole[at + 21 :]
    with pytest.raises(DecodeError, match="wider or higher than 33554432 pixels"):
        decode(data)


@pytest.mark.parametrize(
    "said", ["out of memory error when reading image file", "Out of memory", "Insufficient memory (case 4)"]
)
def test_a_lack_of_memory_is_no_damage_of_the_picture(monkeypatch, said):
    def lacking(self):
        raise OSError(said)

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lacking)
    with pytest.raises(MemoryError):
        decode(PNG)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_large_webp_is_the_same_picture(mode, lossless, monkeypatch):
    """torchvision reads it, in less memory."""
    image, exif = picture(2, size=(40, 30)).convert(mode), Image.Exif()
    exif[0x0112] = 6
    if mode == "RGBA":
        image.putalpha(picture(1, size=(40, 30)).convert("L"))
    data = encoded(image, "WEBP", lossless=lossless, exif=exif)
    small = [decode(data, channels) for channels in (1, 3, 4)]
    monkeypatch.setattr("tlx.data.pixels.decode.LARGE", 100)
    for channels, pixels in zip((1, 3, 4), small, strict=True):
        assert torch.equal(decode(data, channels), pixels)
    frames = encoded(image, "WEBP", save_all=True, append_images=[image.rotate(90)])
    assert decode(frames).shape == (3, 40, 30)
    with pytest.raises(DecodeError, match="damaged"):
        decode(data[:-30])
