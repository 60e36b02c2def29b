"""Memory that large pictures take: at most three times the decoded one, and a limit over all processes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import forked
import numpy as np
import pytest
from images import encoded, make_folder, picture, png_chunk
from PIL import Image

from tlx.base.errors import TlxError
from tlx.base.inputs import InputSpec
from tlx.data.build import write
from tlx.data.build.content import stored
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels import one_picture
from tlx.data.pixels.decode import decode
from tlx.data.pixels.one_picture import at_picture, reserve
from tlx.data.pixels.png_rows import rows_are_missing
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.check import check_shards
from tlx.data.shards.examine import examine
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import evaluation_batches

SIDE = 4000
DECODED = 3 * SIDE * SIDE
MIB = 1 << 20


def png(side: int = SIDE, *, colour: int = 2, bits: int = 8, more: bytes = b"") -> bytes:
    """A small file of a large picture: each row is of one value, the number of the row and 1."""
    compress, row = zlib.compressobj(1), {0: 1, 2: 3, 6: 4}[colour] * side * bits // 8
    rows = b"".join(compress.compress(b"\0" + bytes([y % 255 + 1]) * row) for y in range(side)) + compress.flush()

    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + more + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()[6:]
    return struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))


def peak(work: Callable[[Path], object], data: Path, warm: Path) -> tuple[int, int]:
    """Bytes by which the resident memory of a process that does `work` grows at most, and the room that it asks for.

    A process that has done nothing but that with a small file: what is left of earlier tests, in the allocator's hands
    and in pages that were not touched yet, would be counted with it.
    """
    context = forked.context()
    inside, outside = context.Pipe(duplex=False)
    process = context.Process(target=_grow, args=(outside, work, data, warm))
    process.start()
    outside.close()
    try:
        grown, room = inside.recv()
    finally:
        process.join()
    return grown, room


def _grow(outside: Connection, work: Callable[[Path], object], data: Path, warm: Path) -> None:
    rooms: list[int] = []
    one_picture._units = lambda: (MIB, 1 << 20)  # type: ignore[assignment]
    one_picture._take = lambda room, count: not rooms.append(count)  # type: ignore[assignment, func-returns-value]
    work(warm)  # what is imported when it is first used
    rooms.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with at_picture():
        work(data)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    outside.send((grown * 1024, sum(rooms) * MIB))


def read(reading: str, file: Path) -> None:
    READINGS[reading](file.read_bytes())


def show(shards: Path) -> None:
    """In evaluation."""
    batches = evaluation_batches(Manifest.open(shards), batch=2, transform=eval_transform(InputSpec(size=(32, 32))))
    assert sum(len(batch.labels) for batch in batches) == 2


def shards_of(data: bytes, folder: Path) -> Path:
    for label, name, content in (("a", "first.png", data), ("b", "second.png", encoded(picture(0), "PNG"))):
        (folder / "src" / label).mkdir(parents=True)
        (folder / "src" / label / name).write_bytes(content)
    return build_shards(str(folder / "src"), folder / "out", BuildOptions(val=0, jobs=0)).out / "train"


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small").write_bytes(png(8))
    return tmp_path / "small"


READINGS = {
    "decoded": lambda data: decode(data),
    "decoded, grey": lambda data: decode(data, 1),
    "looked at": lambda data: examine(data),
    "measured": lambda data: examine(data, measured=True),
    "made smaller": lambda data: stored(data, "png", resize=100, quality=90, rewrite=False, measured=True),
}
FILES = {
    "RGB": lambda: png(),
    "RGB, turned": lambda: png(more=turned()),
    "RGBA": lambda: png(colour=6),
    "grey": lambda: png(colour=0),
    "16 bits": lambda: png(colour=0, bits=16),
}
QUICK = [("decoded", "RGB"), ("made smaller", "RGB, turned")]


@pytest.mark.parametrize(
    ("reading", "file"),
    [
        pytest.param(reading, file, marks=[] if (reading, file) in QUICK else pytest.mark.slow)
        for reading in READINGS
        for file in FILES
    ],
)
def test_at_most_three_times_the_decoded_picture(reading, file, small, tmp_path):
    assert (tmp_path / "large").write_bytes(FILES[file]()) < DECODED // 50
    taken, room = peak(partial(read, reading), tmp_path / "large", small)
    print(f"{file}, {reading}: {taken / DECODED:.2f} x decoded")
    assert taken <= 3 * DECODED + 8 * MIB
    assert taken <= room + 8 * MIB


def test_and_it_is_the_picture():
    """Converted in strips, the rows are where they were."""
    for data in (png(1500), png(1500, colour=0, bits=16), png(1500, colour=6)):
        expected = (np.arange(1500) % 255 + 1).astype(np.uint8)
        np.testing.assert_array_equal(decode(data)[:, :, 7], np.stack([expected] * 3))
        exif = data[:33] + turned() + data[33:]
        np.testing.assert_array_equal(decode(exif)[:, 7], np.stack([expected[::-1]] * 3))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["JPEG", "progressive JPEG", "TIFF", "LZW", "BMP", "WEBP", "AVIF"])
def test_other_kinds(format, small, tmp_path):
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    image = Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], 2).astype(np.uint8))
    options = {"progressive JPEG": {"progressive": True}, "LZW": {"compression": "tiff_lzw"}, "AVIF": {"speed": 10}}
    if format not in Image.SAVE and format in ("AVIF", "WEBP"):
        pytest.skip("this Pillow cannot write it")
    name = {"progressive JPEG": "JPEG", "LZW": "TIFF"}.get(format, format)
    size = (tmp_path / "large").write_bytes(encoded(image, name, **options.get(format, {})))
    for reading in ("decoded", "made smaller"):
        taken, room = peak(partial(read, reading), tmp_path / "large", small)
        print(f"{format}, {reading}: {taken / DECODED:.2f} x decoded")
        assert taken <= room + 8 * MIB + 2 * size  # the file is read in here
        assert taken <= {"AVIF": 4}.get(format, 3) * DECODED + 8 * MIB + 2 * size


@pytest.mark.slow
def test_in_training(tmp_path):
    taken, room = peak(show, shards_of(png(), tmp_path / "large"), shards_of(png(8), tmp_path / "small"))
    print(f"shown: {taken / DECODED:.2f} x decoded")
    assert taken <= room + 8 * MIB
    assert taken <= 3 * DECODED + 8 * MIB


# Over all processes


@pytest.fixture
def little_room(tmp_path, monkeypatch):
    """Room for two units."""
    monkeypatch.setattr(one_picture.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(one_picture, "_units", lambda: (128 * MIB, 2))
    monkeypatch.setattr(one_picture, "_gave_up", False)
    return tmp_path


def hold(size: int, notes: Path, seconds: float = 0.15) -> None:
    with at_picture():
        reserve(size)
        began = time.monotonic()
        time.sleep(seconds)
        ended = time.monotonic()
    with notes.open("a") as file:
        file.write(f"{size} {began} {ended}\n")


@pytest.mark.parametrize(("size", "together"), [(60 * MIB, 1), (20 * MIB, 2), (500 * MIB, 1)])
def test_processes_wait_for_room(little_room, size, together):
    """A unit is 128 MiB, and reading takes three times the picture: 180 MiB are both units, 60 MiB are one."""
    notes = little_room / "notes"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hold, args=(size, notes)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    times = [tuple(float(word) for word in line.split()[1:]) for line in notes.read_text().splitlines()]
    assert len(times) == 4
    most = max(sum(began <= at < ended for began, ended in times) for at, _ in times)
    assert most == together


def test_small_pictures_wait_for_nothing(little_room):
    with at_picture():
        reserve(500 * MIB)
        with at_picture(lambda: "another, which does not"):
            reserve(16 * MIB)
    assert {p.name for p in one_picture._folder().iterdir()} == {"turn", "000", "001"}


def test_room_comes_back_from_who_is_killed(little_room):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(500 * MIB, little_room / "notes", 60.0))
    process.start()
    folder = one_picture._folder()
    until = time.monotonic() + 10
    while len(list(folder.iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    hold(500 * MIB, little_room / "notes", 0.0)
    assert len((little_room / "notes").read_text().splitlines()) == 1


def test_without_a_folder_there_is_no_limit(little_room, monkeypatch):
    monkeypatch.setattr(one_picture.tempfile, "gettempdir", lambda: str(little_room / "nowhere"))
    hold(500 * MIB, little_room / "notes", 0.0)
    assert (little_room / "notes").exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_of_somebody_elses_is_not_used(little_room, kind):
    place = one_picture._folder()
    place.rmdir()
    (little_room / "elsewhere").mkdir()
    place.symlink_to(little_room / "elsewhere") if kind == "link" else place.write_bytes(b"")
    hold(500 * MIB, little_room / "notes", 0.0)
    assert not list((little_room / "elsewhere").iterdir())


def test_a_process_that_is_stopped_is_waited_for_only_once(little_room, monkeypatch, capfd):
    monkeypatch.setattr(one_picture, "_PATIENCE", 0.3)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(500 * MIB, little_room / "notes", 60.0))
    process.start()
    until = time.monotonic() + 10
    while len(list(one_picture._folder().iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        for name in ("a.png", "b.png"):
            with at_picture(lambda name=name: name):
                reserve(500 * MIB)
        took = time.monotonic() - began
    finally:
        process.kill()
        process.join(10)
    assert 0.25 < took < 5
    err = capfd.readouterr().err
    assert err == (
        "warning: a.png: for 0.3 s no process has given back its share of the memory for large pictures "
        "(is one stopped?); they are read without a limit\n"
    )
    with at_picture():
        reserve(500 * MIB)  # there is room again, and it is waited for again
        assert not one_picture._gave_up


def test_who_has_the_turn_and_is_stopped_is_waited_for_only_once(little_room, monkeypatch):
    monkeypatch.setattr(one_picture, "_PATIENCE", 0.1)
    with one_picture.locked(one_picture._folder() / "turn"), at_picture():
        reserve(500 * MIB)
        assert one_picture._gave_up


def test_a_lock_that_is_removed_meanwhile_is_made_anew(little_room, monkeypatch):
    """By what tidies the folder for temporary files."""
    true, removed = one_picture.locked, []

    @contextmanager
    def locked(path, *, wait=True):
        if path.name == "000" and not removed:
            removed.append(path)
            yield None
            return
        with true(path, wait=wait) as file:
            yield file

    monkeypatch.setattr(one_picture, "locked", locked)
    with at_picture():
        reserve(500 * MIB)
        with pytest.raises(BlockingIOError), true(one_picture._folder() / "000", wait=False):
            pass
    assert removed
    with true(one_picture._folder() / "turn", wait=False), true(one_picture._folder() / "000", wait=False):
        pass


def test_room_grows_with_memory(monkeypatch):
    """Half of 2 GiB, 16 GiB and 2 TiB, in units that a picture of 48 MB fills."""
    expected = {2 << 30: (32 * MIB, 32), 16 << 30: (32 * MIB, 256), 2 << 40: (4 << 30, 256), 1 << 20: (32 * MIB, 1)}
    for limit, units in expected.items():
        monkeypatch.setattr(one_picture, "memory_limit", lambda limit=limit: limit)
        assert one_picture._units.__wrapped__() == units


def test_builds_checks_and_training_ask_for_room(tmp_path, monkeypatch):
    """For pictures and for progressive JPEGs, of which libjpeg keeps all coefficients; each once."""
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(one_picture, "_take", lambda room, count: not taken.append((one_picture.name_here()(), count)))
    monkeypatch.setattr(one_picture, "_units", lambda: (128 * MIB, 2))
    source = make_folder(tmp_path / "src", 2, 1, size=40)
    large = encoded(Image.new("RGB", (2500, 2400), (9, 9, 9)), "PNG")  # 18 MB decoded: 54 MB of room
    progressive = encoded(Image.new("RGB", (2500, 2400), (9, 9, 9)), "JPEG", progressive=True)
    (source / "class0" / "large.png").write_bytes(large)
    (source / "class1" / "progressive.jpg").write_bytes(progressive)
    build_shards(str(source), tmp_path / "out", BuildOptions(val=0, jobs=0))
    build_shards(str(source), tmp_path / "small", BuildOptions(val=0, jobs=0, resize=30))
    names = [name.rpartition("/")[2] for name, count in taken]
    assert sorted(names) == ["large.png", "large.png", "progressive.jpg", "progressive.jpg"]
    assert {count for _, count in taken} == {1}
    taken.clear()
    check_shards(tmp_path / "out", jobs=0)
    assert len(taken) == 2
    taken.clear()
    manifest = Manifest.open(tmp_path / "out" / "train")
    for batch in evaluation_batches(manifest, batch=4, transform=eval_transform(InputSpec(size=(16, 16)))):
        assert not batch.bad
    assert len(taken) == 2
    assert all("train/000000.tar: " in name for name, _ in taken)


def test_a_lack_of_memory_ends_a_build_and_is_no_bad_picture(tmp_path, monkeypatch):
    source = make_folder(tmp_path / "src", 2, 1, size=40)

    def lacking(*given, **options):
        raise MemoryError

    monkeypatch.setattr(write, "stored", lacking)
    with pytest.raises(Exception, match=r"0000\.jpg: there is not enough memory to read it\n  -> fewer --jobs"):
        build_shards(str(source), tmp_path / "out", BuildOptions(val=0, jobs=0, skip_bad=True))


@pytest.mark.parametrize("side", [1, 8])
def test_what_is_behind_the_last_row_is_not_inflated(side):
    """A PNG of one black pixel, and of 64, in front of 64 MiB."""
    compress = zlib.compressobj(9)
    rows = compress.compress(bytes(side * (1 + 3 * side))) + compress.compress(bytes(64 * MIB)) + compress.flush()
    whole = png(side)
    at = whole.index(b"IDAT")
    data = (
        whole[: at - 4] + struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows))
    )
    data += whole[-12:]
    tracemalloc.start()
    try:
        assert not rows_are_missing(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()
    assert decode(data).shape == (3, side, side)


def test_rows_in_many_chunks_are_counted():
    """IDATs of 1 and of 7 bytes; and one that lacks its last byte of pixels."""
    rows = zlib.compress(bytes(30 * 91))
    head = png(30)[:33]
    for missing in (False, True):
        body = zlib.compress(bytes(30 * 91 - 1)) if missing else rows
        for length in (1, 7, len(body)):
            pieces = [body[i : i + length] for i in range(0, len(body), length)]
            chunks = b"".join(struct.pack(">I", len(p)) + b"IDAT" + p + bytes(4) for p in pieces)
            assert rows_are_missing(head + chunks) is missing


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lack_of_memory_ends_a_check_and_a_view_with_the_pictures_name(tmp_path, monkeypatch, workers):
    shards = build_shards(
        str(make_folder(tmp_path / "src", 2, 1, size=40)), tmp_path / "out", BuildOptions(val=0, jobs=0)
    )

    def lacking(*given, **options):
        raise MemoryError

    for place in (
        "tlx.data.shards.examine.examine",
        "tlx.data.stream.pictures.decode",
        "tlx.data.pixels.jpeg_region.Regions.show",
    ):
        monkeypatch.setattr(place, lacking)
    lacks = r"train/000000\.tar: 00000000\d\.jpg: there is not enough memory to read it\n  -> "
    with pytest.raises(TlxError, match=lacks + "fewer --jobs"):
        check_shards(tmp_path / "out", jobs=0)
    manifest = Manifest.open(shards.out / "train")
    view = eval_transform(InputSpec(size=(16, 16)))
    with pytest.raises(TlxError, match=lacks + "fewer data.workers"):
        list(evaluation_batches(manifest, batch=2, transform=view, workers=workers))
