"""Building shards: what is in them, what is refused, what an interruption leaves."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import numpy as np
import psutil
import pytest
import torch
import webdataset
from built import assert_same_files, names, options
from images import encoded, make_folder, picture
from PIL import ExifTags, Image, ImageCms, features
from torchvision.transforms.v2 import functional
from typer.testing import CliRunner

from tlx.base import locks
from tlx.base.errors import TlxError, UserError
from tlx.base.files import write_whole
from tlx.cli.shards import shards as command
from tlx.data.build import content, progress, write
from tlx.data.build.datasets import read_items
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels.decode import decode
from tlx.data.shards.check import check_shards, describe_shards
from tlx.data.shards.examine import examine
from tlx.data.shards.index import index_folder
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.tars import add_sample
from tlx.data.stream.reader import ShardReader

RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_shards_are_plain_webdataset_with_the_original_bytes(src, tmp_path):
    out = tmp_path / "out"
    summary = build_shards(str(src), out, options())
    assert summary.splits["train"]["samples"] == 36
    assert summary.splits["val"] == {"samples": 9, "shards": 1, "bytes": summary.splits["val"]["bytes"]}
    assert names(out) == [
        "build.json",
        *[f"train/00000{i}.tar" for i in range(4)],
        *["train/index.json", "train/index.npy", "val/000000.tar", "val/index.json", "val/index.npy"],
    ]
    with tarfile.open(out / "train" / "000001.tar") as tar:
        members = tar.getmembers()
    assert {m.name for m in members[:2]} == {"000000009.jpg", "000000009.cls"}
    assert all(m.mtime == 0 and m.isreg() for m in members)
    originals = {p.read_bytes(): p.parent.name for p in src.rglob("*.jpg")}
    seen = set()
    for split, shards in (("train", 4), ("val", 1)):
        urls = [str(out / split / f"{i:06d}.tar") for i in range(shards)]
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            assert originals[sample["jpg"]] == summary.classes[int(sample["cls"])]
            seen.add(sample["jpg"])
    assert len(seen) == 45


def test_a_tar_has_the_bytes_of_webdatasets_writer():
    ours, theirs = io.BytesIO(), io.BytesIO()
    long = "k" * 120  # needs a header of its own
    samples = {"000000000": {"jpg": b"x" * 700, "cls": b"3"}, long: {"seg.png": b"", "json": b"{}"}}
    with tarfile.open(fileobj=ours, mode="w|") as tar:
        for key, members in samples.items():
            add_sample(tar, key, members)
    with webdataset.TarWriter(theirs, encoder=False, mtime=0) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    assert ours.getvalue() == theirs.getvalue()


def test_the_index_leads_to_the_same_bytes(src, tmp_path):
    build_shards(str(src), tmp_path / "out", options())
    manifest = Manifest.open(tmp_path / "out" / "train")
    reader = ShardReader(manifest)
    urls = [str(manifest.path / s.name) for s in manifest.shards]
    for place, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False)):
        assert reader.read(place) == sample["jpg"]
        assert manifest.labels[place] == int(sample["cls"])
        assert manifest.describe(place).endswith(f"{sample['__key__']}.jpg")
    assert place == len(manifest) - 1
    assert manifest.counts().tolist() == [12, 12, 12]


def test_classes_are_spread_over_shards(src, tmp_path):
    build_shards(str(src), tmp_path / "out", options())
    labels = Manifest.open(tmp_path / "out" / "train").labels
    assert all(len(set(labels[at : at + 9])) == 3 for at in range(0, 36, 9))


def test_the_same_request_gives_the_same_bytes_in_any_number_of_processes(src, tmp_path):
    for name, jobs in (("one", 0), ("two", 2)):
        build_shards(str(src), tmp_path / name, options(jobs=jobs))
    assert_same_files(tmp_path / "one", tmp_path / "two")
    digests = {Manifest.open(tmp_path / name / "train").digest for name in ("one", "two")}
    assert len(digests) == 1


def test_a_limit_by_bytes(src, tmp_path):
    build_shards(str(src), tmp_path / "out", options(shard_bytes=20480, shard_samples=1000))
    shards = Manifest.open(tmp_path / "out" / "train").shards
    assert len(shards) > 2
    assert {s.bytes for s in shards[:-1]} == {20480}
    build_shards(str(src), tmp_path / "tiny", options(shard_bytes=1))
    assert {s.samples for s in Manifest.open(tmp_path / "tiny" / "train").shards} == {1}


def test_every_shard_has_the_mix_of_the_whole(tmp_path):
    """A list sorted by class, 900 of one and 60 of another: shards of 96 have about 90 and 6."""
    common, rare = (encoded(picture(label, size=8)) for label in (0, 1))
    rows = ["path,label"]
    for i in range(960):
        name = f"{i:04d}.jpg"
        (tmp_path / name).write_bytes(common if i < 900 else rare)
        rows.append(f"{name},{'common' if i < 900 else 'rare'}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    build_shards(str(tmp_path / "list.csv"), tmp_path / "out", BuildOptions(val=0, shard_samples=96, jobs=0))
    counts = Manifest.open(tmp_path / "out" / "train").labels.reshape(10, 96).sum(axis=1)
    spread = (96 * 60 / 960 * (1 - 60 / 960) * (1 - 96 / 960)) ** 0.5  # of a hypergeometric draw
    assert abs(counts - 6).max() < 4 * spread
    assert counts.std() < 2 * spread


def test_a_few_shards_use_all_cores_and_stay_the_same(src, tmp_path):
    for name, jobs in (("one", 0), ("many", 12)):
        build_shards(str(src), tmp_path / name, options(jobs=jobs, shard_samples=100, resize=16))
    assert_same_files(tmp_path / "many", tmp_path / "one")


def test_resizing_touches_only_what_is_larger(tmp_path):
    src = tmp_path / "src"
    for label, name in enumerate(("a", "b")):
        (src / name).mkdir(parents=True)
        (src / name / "big.jpg").write_bytes(encoded(picture(label, size=(80, 60))))
        (src / name / "big.png").write_bytes(encoded(picture(label, size=(80, 120)), "PNG"))
        (src / name / "small.jpg").write_bytes(encoded(picture(label, size=(20, 30))))
    build_shards(str(src), tmp_path / "out", options(val=0, resize=40))
    manifest = Manifest.open(tmp_path / "out" / "train")
    sizes, kept = [], 0
    for sample in range(6):
        data = ShardReader(manifest).read(sample)
        kept += data in {p.read_bytes() for p in src.rglob("*") if p.is_file()}
        sizes.append((manifest.describe(sample).rpartition(".")[2], *decode(data).shape[1:]))
    assert sorted(sizes) == sorted([("jpg", 53, 40), ("png", 40, 60), ("jpg", 20, 30)] * 2)
    assert kept == 2


def one_stored(tmp_path, name, data, **settings):
    """What a build stores of one picture: its bytes and its extension."""
    src = tmp_path / "one"
    for place in ("a", "b"):
        (src / place).mkdir(parents=True, exist_ok=True)
    (src / "b" / "x.png").write_bytes(encoded(picture(0, size=8), "PNG"))
    (src / "a" / name).write_bytes(data)
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    build_shards(str(src), out, BuildOptions(val=0, jobs=0, **settings))
    (src / "a" / name).unlink()
    manifest = Manifest.open(out / "train")
    sample = manifest.labels.tolist().index(0)
    return ShardReader(manifest).read(sample), manifest.describe(sample).rpartition(".")[2]


def noise(small, original, short):
    """Peak signal to noise in dB of the luma, against what torchvision makes of the original; JPEGs halve the rest."""
    expected = functional.resize(decode(original, 1), [short], antialias=True)
    error = float(((decode(small, 1).float() - expected.float()) ** 2).mean())
    return 10 * np.log10(255**2 / error) if error else 99.0


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(120, 90), (900, 1300)])
def test_a_smaller_picture_is_what_the_transforms_would_have_made(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    smooth = picture(1, size=40).resize(size[::-1], Image.Resampling.BICUBIC)
    data = encoded(smooth, quality=97, exif=exif, icc_profile=RGB_PROFILE, comment=b"my house")
    small, extension = one_stored(tmp_path, "x.JPEG", data, resize=64)
    expected = functional.resize(decode(data), [64], antialias=True)
    assert decode(small).shape == expected.shape
    assert min(expected.shape[1:]) == 64
    assert (expected.shape[2] < expected.shape[1]) == ((size[1] < size[0]) == (orientation == 1))
    assert noise(small, data, 64) > 40
    with Image.open(io.BytesIO(small)) as image:
        assert image.info["icc_profile"] == RGB_PROFILE
        assert dict(image.getexif()) == {}
        assert "comment" not in image.info
    assert extension == "jpg"


def test_what_is_grey_or_transparent_stays_so_when_it_is_made_smaller(tmp_path):
    grey = picture(0, size=80).convert("L")
    for data, name in ((encoded(grey), "x.jpg"), (encoded(grey, "PNG"), "x.png"), (encoded(grey, "BMP"), "x.bmp")):
        small, _ = one_stored(tmp_path, name, data, resize=32)
        assert Image.open(io.BytesIO(small)).mode == "L"
        assert noise(small, data, 32) > 40
    clear = picture(0, size=80).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((80, 80)))
    data = encoded(clear, "PNG")
    small, extension = one_stored(tmp_path, "x.webp", data, resize=32)
    assert torch.equal(decode(small, 4), functional.resize(decode(data, 4), [32], antialias=True))
    assert extension == "png"
    cmyk = encoded(picture(0, size=80).convert("CMYK"), icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    small, _ = one_stored(tmp_path, "x.jpg", cmyk, resize=32)
    assert noise(small, cmyk, 32) > 40
    assert "icc_profile" not in Image.open(io.BytesIO(small)).info


def test_a_damaged_large_picture_is_not_made_smaller(tmp_path):
    data = encoded(picture(0, size=200))
    with pytest.raises(UserError, match="1 unreadable picture"):
        one_stored(tmp_path, "x.jpg", data[: len(data) // 2], resize=64)


rewriting = pytest.mark.skipif(content._jpeg is None, reason="needs tlx's C extension")
KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive 4:2:0": {"subsampling": 2, "progressive": True},
    "progressive 4:4:4": {"subsampling": 0, "progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "optimised": {"optimize": True},
}


@rewriting
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_rewriting_keeps_every_pixel(tmp_path, kind, mode):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    for size in ((97, 131), (8, 5)):
        data = encoded(picture(1, size=size).convert(mode), exif=exif, **KINDS[kind])
        again, _ = one_stored(tmp_path, "x.jpg", data, rewrite=True)
        assert torch.equal(decode(again), decode(data))
        assert "progressive" not in Image.open(io.BytesIO(again)).info
        assert len(again) <= len(data) or "progressive" in kind
        assert again != data or "progressive" not in kind


@rewriting
def test_rewriting_is_counted(tmp_path):
    src = make_folder(tmp_path / "src", per_class=4, size=64)
    (src / "class0" / "0000.jpg").write_bytes(encoded(picture(0, size=64), progressive=True))
    (src / "class0" / "x.png").write_bytes(encoded(picture(0, size=64, seed=9), "PNG"))
    # a stray byte before a marker: libjpeg repairs it with a warning, and rewriting refuses what has to be repaired
    repaired = bytearray(encoded(picture(1, size=64)))
    repaired[-2:-2] = b"\0\0\0"
    (src / "class1" / "0000.jpg").write_bytes(repaired)
    summary = build_shards(str(src), tmp_path / "out", options(val=0, rewrite=True))
    done = summary.rewrites
    assert (done.rewritten + done.kept, done.failed) == (11, 1)
    assert done.after < done.before
    assert summary.statistics["train"].formats == {"jpeg": 12, "png": 1}
    again = build_shards(str(src), tmp_path / "out", options(val=0, rewrite=True))
    assert (again.rewrites, again.already) == (done, True)
    stored = {ShardReader(m).read(i) for m in [Manifest.open(tmp_path / "out" / "train")] for i in range(len(m))}
    assert bytes(repaired) in stored
    assert check_shards(tmp_path / "out", jobs=0).good
    assert build_shards(str(src), tmp_path / "plain", options(val=0)).rewrites is None


@rewriting
def test_a_rewriting_that_changes_a_pixel_is_not_used(tmp_path, monkeypatch):
    class Wrong:
        @staticmethod
        def rewrite(data, restarts):
            return encoded(picture(2, size=64), quality=20)

    monkeypatch.setattr(content, "_jpeg", Wrong)
    data = encoded(picture(1, size=64), progressive=True)
    assert one_stored(tmp_path, "x.jpg", data, rewrite=True)[0] == data


def test_rewriting_without_the_extension(src, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_jpeg", None)
    with pytest.raises(UserError, match=r"--rewrite needs tlx's C extension[\s\S]*libjpeg-dev"):
        build_shards(str(src), tmp_path / "out", options(rewrite=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "format", "stored"),
    [
        ("a.JPG", "JPEG", "jpg"),
        ("a.jpe", "JPEG", "jpg"),
        ("a.JFIF", "JPEG", "jpg"),
        ("my.old cat.v2.jpeg", "JPEG", "jpg"),
        ("日本 é.Png", "PNG", "png"),
        ("a.WebP", "WEBP", "webp"),
        ("a.bmp", "BMP", "bmp"),
        ("a.TIF", "TIFF", "tif"),
        ("a.tiff", "TIFF", "tiff"),
        ("a.gif", "GIF", "gif"),
        ("a.ppm", "PPM", "ppm"),
        ("a.pgm", "PPM", "pgm"),
        pytest.param(
            *("a.AVIF", "AVIF", "avif"),
            marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF"),
        ),
    ],
)
def test_every_kind_of_picture_in_and_out(tmp_path, name, format, stored):
    image = picture(0, size=20)
    data = encoded(image.convert("L") if name.endswith("pgm") else image, format)
    found, extension = one_stored(tmp_path, name, data)
    assert (found, extension) == (data, stored)


def test_a_picture_with_a_second_one_for_the_other_eye(tmp_path):
    """Of MPO, a JPEG with further ones behind it, the first is shown."""
    data = encoded(picture(0, size=20), "MPO", save_all=True, append_images=[picture(1, size=20)])
    assert one_stored(tmp_path, "IMG_1.MPO", data) == (data, "jpg")
    alone = decode(encoded(picture(0, size=20), "JPEG", quality=75))
    assert (decode(data).float() - alone.float()).abs().mean() < 2


def test_pictures_without_files_are_stored_without_loss(tmp_path):
    class Digits:
        def __len__(self):
            return 10

        def __getitem__(self, place):
            if place > 9:
                raise IndexError
            return Image.fromarray(np.full((8, 8), place * 20, np.uint8)), place % 2

    source = read_items({"train": Digits(), "val": Digits()}, ["even", "odd"])
    build_shards(source, tmp_path / "out", BuildOptions(jobs=2, shard_samples=3))
    manifest = Manifest.open(tmp_path / "out" / "val")
    shades = {int(decode(ShardReader(manifest).read(i))[0, 0, 0]): int(manifest.labels[i]) for i in range(10)}
    assert shades == {place * 20: place % 2 for place in range(10)}
    assert build_shards(source, tmp_path / "out", BuildOptions(shard_samples=3)).already
    single = read_items({"train": Digits()}, ["even", "odd"])
    summary = build_shards(single, tmp_path / "split", BuildOptions(jobs=0, val=0.2))
    assert {split: sizes["samples"] for split, sizes in summary.splits.items()} == {"train": 8, "val": 2}


def test_unreadable_pictures_are_an_error_that_names_them(src, tmp_path):
    (src / "class1" / "0003.jpg").write_bytes(b"<html>")
    (src / "class2" / "0007.jpg").write_bytes((src / "class2" / "0007.jpg").read_bytes()[:200])
    (src / "class0" / "link.jpg").symlink_to("/nowhere.jpg")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"3 unreadable pictures:\n[\s\S]*--skip-bad") as caught:
        build_shards(str(src), out, options())
    for words in ("class1/0003.jpg: not a picture", "class2/0007.jpg: damaged", "link.jpg: [Errno 2]"):
        assert words in str(caught.value)
    unfinished = (lambda: Manifest.open(out / "train"), lambda: check_shards(out, jobs=0), lambda: index_folder(out))
    for read in unfinished:
        with pytest.raises(UserError, match=r"the build of this folder is unfinished\n  -> the same tlx shards build"):
            read()
    summary = build_shards(str(src), out, options(skip_bad=True))
    assert len(summary.bad) == 3
    assert sum(s["samples"] for s in summary.splits.values()) == 45 - 2
    assert check_shards(out, jobs=0).good
    assert build_shards(str(src), out, options()).bad == summary.bad  # remembered


def test_the_last_picture_of_a_class_cannot_be_skipped(src, tmp_path):
    for file in (src / "class1").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no readable training picture is left of: class1"):
        build_shards(str(src), tmp_path / "out", options(skip_bad=True))


def test_a_finished_folder_is_left_alone(src, tmp_path):
    out = tmp_path / "out"
    first = build_shards(str(src), out, options())
    before = {f: os.stat(out / f).st_mtime_ns for f in names(out)}
    again = build_shards(str(src), out, options(jobs=2))
    assert again.already
    assert (again.splits, again.classes) == (first.splits, first.classes)
    for settings, words in (({"val": 0.3}, "val: 0.2 there, 0.3 now"), ({"resize": 12}, "resize: None there, 12 now")):
        with pytest.raises(UserError, match=f"finished shards of another request .*{words}"):
            build_shards(str(src), out, options(**settings))
    make_folder(src, per_class=16, size=24)
    with pytest.raises(UserError, match="source has changed"):
        build_shards(str(src), out, options())
    assert {f: os.stat(out / f).st_mtime_ns for f in names(out)} == before


def test_folders_that_are_not_ours_are_refused(src, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for out, words in (
        (tmp_path / "full", "not empty and was not made by"),
        (src / "class0" / "0000.jpg", "among their own source|this is a file"),
        (src / "shards", "among their own source"),
        (src, "among their own source"),
    ):
        with pytest.raises(UserError, match=words):
            build_shards(str(src), out, options())
    assert not (src / "shards").exists()


def test_a_new_disk_is_an_empty_folder(src, tmp_path):
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    assert build_shards(str(src), tmp_path / "disk", options()).splits["train"]["samples"] == 36


@pytest.mark.parametrize(
    "settings", [{"shard_samples": 0}, {"resize": 0}, {"quality": 101}, {"val": 1.5}, {"jobs": -4}]
)
def test_options_out_of_range(src, tmp_path, settings):
    with pytest.raises(UserError):
        build_shards(str(src), tmp_path / "out", options(**settings))


def test_killed_in_the_middle_and_run_again(tmp_path):
    src, out, whole = make_folder(tmp_path / "src", per_class=40, size=24), tmp_path / "out", tmp_path / "whole"
    lines = f"""
        import time
        import tlx.data.build.write as write
        plain = write._stored
        def slow(*given):
            time.sleep(0.02)
            return plain(*given)
        write._stored = slow
        write.build_shards({str(src)!r}, {str(out)!r}, write.BuildOptions(val=0.2, shard_samples=10, jobs=0))
    """
    process = subprocess.Popen([sys.executable, "-c", dedent(lines)])
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/0*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    halfway = names(out)
    assert "train/index.json" not in halfway
    assert any(name.endswith(".tmp") for name in halfway)
    for tar in out.glob("train/0*.tar"):
        with tarfile.open(tar) as opened:
            assert len(opened.getnames()) == 20
    kept = {t.name: t.stat().st_mtime_ns for t in out.glob("train/0*.tar")}
    with pytest.raises(UserError, match="interrupted build of another request"):
        build_shards(str(src), out, options(seed=9))
    build_shards(str(src), out, options())
    build_shards(str(src), whole, options())
    assert_same_files(out, whole)
    assert all((out / "train" / name).stat().st_mtime_ns == made for name, made in kept.items())


def killed_at(moment, src, out, settings):
    """A build whose process ends by SIGKILL at its nth flush or rename, counted in it and in its workers each."""
    main, left = os.getpid(), moment

    def dying(plain):
        def call(*given):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(main, signal.SIGKILL)
            return plain(*given)

        return call

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    build_shards(str(src), out, settings)


@pytest.mark.parametrize("jobs", [0, 2])
def test_killed_at_any_moment(tmp_path, jobs):
    src = make_folder(tmp_path / "src", per_class=20, size=24)
    (src / "class1" / "0003.jpg").write_bytes(b"<html>")
    out, whole, settings = tmp_path / "out", tmp_path / "whole", options(skip_bad=True, jobs=jobs)
    build_shards(str(src), whole, options(skip_bad=True))
    killed = 0
    for moment in (1, 2, 3, 4, 6, 8, 10, 12):
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(moment, src, out, settings))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for tar in out.glob("*/[0-9]*.tar"):
            assert tar.read_bytes() == (whole / tar.relative_to(out)).read_bytes()
    assert killed >= 5
    build_shards(str(src), out, settings)
    assert_same_files(out, whole)
    assert not [name for name in names(out) if "/." in name or name.startswith(".")]


@pytest.mark.slow
def test_the_command_killed_at_random_moments(tmp_path):
    src = make_folder(tmp_path / "src", per_class=400, size=96)
    settings = ["--val", "0.2", "--shard-samples", "20", "--jobs", "2"]
    out, whole, rng = tmp_path / "out", tmp_path / "whole", np.random.default_rng(0)
    build_shards(str(src), whole, options(shard_samples=20))
    killed = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-m", "tlx", "shards", "build", str(src), str(out), *settings])
        while process.poll() is None and not out.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        for tar in out.glob("*/[0-9]*.tar"):
            assert tar.read_bytes() == (whole / tar.relative_to(out)).read_bytes()
    assert killed > 3
    build_shards(str(src), out, options(shard_samples=20))
    assert_same_files(out, whole)


def slow_build(src, out, jobs):
    plain = write._stored

    def slow(*given):
        time.sleep(0.01)
        return plain(*given)

    write._stored = slow
    build_shards(str(src), out, options(jobs=jobs))


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def from_a_shell(src, out, jobs, told):
    """A shell that starts a build in the background and ends; the build's number comes through `told`."""
    builder = multiprocessing.get_context("fork").Process(target=slow_build, args=(src, out, jobs))
    builder.start()
    told.send(builder.pid)
    wait_until(lambda: list(out.glob("train/.*.tmp")))
    os._exit(0)


@pytest.fixture
def left_alone(tmp_path, request):
    """A build in so many processes, whose shell is gone: its source, its folder, and its process."""
    src, out = make_folder(tmp_path / "src", per_class=40, size=24), tmp_path / "out"
    here, there = multiprocessing.Pipe()
    shell = multiprocessing.get_context("fork").Process(target=from_a_shell, args=(src, out, request.param, there))
    shell.start()
    builder = psutil.Process(here.recv())
    shell.join()
    yield src, out, builder
    with contextlib.suppress(psutil.NoSuchProcess):
        builder.kill()


@pytest.mark.parametrize("left_alone", [0, 2], indirect=True)
def test_a_build_outlives_the_shell_that_started_it(left_alone, tmp_path):
    src, out, builder = left_alone
    assert builder.is_running()
    wait_until(lambda: not builder.is_running() or builder.status() == psutil.STATUS_ZOMBIE)
    assert json.loads((out / "build.json").read_text())["state"] == "done"
    build_shards(str(src), tmp_path / "whole", options())
    assert_same_files(out, tmp_path / "whole")


@pytest.mark.parametrize("left_alone", [2], indirect=True)
def test_its_workers_end_with_it(left_alone):
    _, out, builder = left_alone
    crew = builder.children()
    assert len(crew) == 2
    builder.kill()
    assert psutil.wait_procs(crew, timeout=20)[1] == []
    assert json.loads((out / "build.json").read_text())["state"] == "building"


def test_a_worker_that_the_build_has_left_writes_no_more(src, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "is_orphaned", lambda: True)
    with pytest.raises(TlxError, match="the build that asked for this shard is gone"):
        build_shards(str(src), tmp_path / "out", options())
    assert not list((tmp_path / "out").glob("train/*"))


@pytest.mark.parametrize("thread", [False, True])
def test_the_command_ignores_a_hangup(src, tmp_path, thread):
    """As under nohup, and so of any terminal that is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    words = ["build", str(src), str(tmp_path / "out"), "--val", "0.2", "--jobs", "0"]
    try:
        if thread:  # where signals cannot be set, it builds all the same
            with ThreadPoolExecutor(1) as pool:
                done = pool.submit(CliRunner().invoke, command, words).result()
        else:
            done = CliRunner().invoke(command, words)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert done.exit_code == 0, done.output
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_ends_no_work(monkeypatch):
    class Closed(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def flush(self):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    assert list(progress.in_processes(abs, [-1, -2, -3], jobs=0, title="working")) == [1, 2, 3]


def test_killed_before_the_first_word(src, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".build.json.123.tmp").write_text("{")
    build_shards(str(src), out, options())
    assert not (out / ".build.json.123.tmp").exists()


def test_killed_before_tidying_up(src, tmp_path):
    out = tmp_path / "out"
    build_shards(str(src), out, options())
    (out / "train" / ".000000.json").write_text("{}")
    assert build_shards(str(src), out, options()).already
    assert not (out / "train" / ".000000.json").exists()


@pytest.mark.parametrize("damage", ["no note", "half a note", "half a tar"])
def test_a_shard_is_kept_only_with_its_note(src, tmp_path, monkeypatch, damage):
    out, whole = tmp_path / "out", tmp_path / "whole"
    build_shards(str(src), whole, options())

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            build_shards(str(src), out, options())
    note, tar = out / "train" / ".000001.json", out / "train" / "000001.tar"
    if damage == "no note":
        note.unlink()
    elif damage == "half a note":
        note.write_bytes(note.read_bytes()[:50])
    else:
        os.truncate(tar, 512)
    build_shards(str(src), out, options())
    assert_same_files(out, whole)


def test_two_builds_do_not_meet(src, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    with (
        locks.locked_folder(out, "mine", todo=""),
        pytest.raises(UserError, match="another build is writing shards here"),
    ):
        build_shards(str(src), out, options())
    assert names(out) == []
    build_shards(str(src), out, options())


def test_an_interrupted_build_of_other_pictures_starts_over(src, tmp_path):
    out = tmp_path / "out"
    (src / "class1" / "0003.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match="1 unreadable"):
        build_shards(str(src), out, options())
    (src / "class1" / "0003.jpg").unlink()
    (out / "train" / "000077.tar").write_bytes(b"old")
    build_shards(str(src), out, options())
    assert check_shards(out, jobs=0).good
    assert not (out / "train" / "000077.tar").exists()


def test_what_shards_hold(src, tmp_path):
    build_shards(str(src), tmp_path / "out", options())
    both = describe_shards(tmp_path / "out")
    assert list(both) == ["train", "val"]
    assert both["val"].counts == {"class0": 3, "class1": 3, "class2": 3}
    assert (both["train"].samples, both["train"].shards) == (36, 4)
    assert describe_shards(tmp_path / "out" / "val")["val"] == both["val"]
    assert json.loads((tmp_path / "out" / "build.json").read_text())["state"] == "done"


def test_names_never_become_paths(tmp_path):
    """A class called ../../up, a file name with dots and spaces: nothing outside of the folder, nothing odd inside."""
    make_folder(tmp_path / "p", 2, 2, 16)
    (tmp_path / "p" / "class0" / "0000.jpg").rename(tmp_path / "p" / "class0" / ".. x.y.jpg")
    rows = "path,label\np/class0/.. x.y.jpg,../../up\np/class1/0000.jpg,/etc\n"
    (tmp_path / "list.csv").write_text(rows)
    before = set(names(tmp_path))
    build_shards(str(tmp_path / "list.csv"), tmp_path / "out", options(val=0))
    new = set(names(tmp_path)) - before
    assert new == {"out/build.json", "out/train/000000.tar", "out/train/index.json", "out/train/index.npy"}
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as tar:
        assert {name.partition(".")[0] for name in tar.getnames()} == {"000000000", "000000001"}
    assert Manifest.open(tmp_path / "out" / "train").classes == ("../../up", "/etc")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_note_of_the_camera_does_not_stop_a_picture_from_being_made_smaller(monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = 6, "x" * 20, 72.0
    whole = encoded(picture(0, size=(40, 30)), exif=exif)
    start, length = whole.index(b"Exif"), len(exif.tobytes())
    rng, wide = np.random.default_rng(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            data[start + rng.integers(length)] = rng.integers(256)
        small = content.stored(bytes(data), "jpg", resize=16, quality=90, rewrite=False, measured=False).seen
        assert min(small.width, small.height) == 16
        wide += small.width > small.height
        seen = examine(bytes(data))
        assert (small.width > small.height) == (seen.width > seen.height)
    assert 0 < wide < 400  # some have lost their orientation, some have not


def test_whatever_a_picture_does_it_is_named(src, tmp_path, monkeypatch):
    def odd(data, *given):
        raise RecursionError("too deep")

    monkeypatch.setattr(content, "_resized", odd)
    (src / "class1" / "odd.png").write_bytes(encoded(picture(0, size=30), "PNG"))
    with pytest.raises(UserError, match=r"1 unreadable picture:\n.*odd\.png: .*too deep"):
        build_shards(str(src), tmp_path / "out", options(resize=8))
    monkeypatch.setattr(write, "read", odd)
    with pytest.raises(UserError, match=r"unreadable pictures:\n.*\.jpg: RecursionError: too deep"):
        build_shards(str(src), tmp_path / "other", options())


def test_another_spelling_of_the_source_is_the_same_source(src, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build_shards("src", tmp_path / "out", options())
    assert build_shards(str(src), tmp_path / "out", options()).already
    assert build_shards("./src/../src", tmp_path / "out", options()).already
    state = json.loads((tmp_path / "out" / "build.json").read_text())
    (tmp_path / "out" / "build.json").write_text(json.dumps({**state, "pictures": "0", "state": "building"}))
    build_shards("src", tmp_path / "out", options())
    assert "removed: 5 shards" in capsys.readouterr().err


def test_finished_shards_are_looked_at(src, tmp_path):
    build_shards(str(src), tmp_path / "out", options())
    os.truncate(tmp_path / "out" / "train" / "000002.tar", 0)
    with pytest.raises(UserError, match=r"000002\.tar: this shard was written with \d+ bytes and now has 0"):
        build_shards(str(src), tmp_path / "out", options())


def test_a_build_that_waited_for_another_finds_its_work_done(src, tmp_path, monkeypatch):
    out, meanwhile = tmp_path / "out", []
    reading = write._read

    def slow(source, settings, *order):
        found = reading(source, settings, *order)
        if not meanwhile:
            meanwhile.append(True)
            build_shards(source, out, settings)
        return found

    monkeypatch.setattr(write, "_read", slow)
    assert build_shards(str(src), out, options()).already


def test_a_full_disk_is_named_and_nothing_is_left_on_it(src, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "add_sample", full)
        with pytest.raises(OSError, match="No space left") as caught:
            build_shards(str(src), tmp_path / "out", options(jobs=2))
    assert caught.value.filename == str(tmp_path / "out" / "train" / "000000.tar")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(tmp_path / "out" / "index.npy", b"x")
    assert caught.value.filename == str(tmp_path / "out" / "index.npy")
    assert names(tmp_path / "out") == ["build.json"]


def test_no_picture_at_all_is_left(tmp_path):
    src = make_folder(tmp_path / "src", 2, 2, 16)
    for file in src.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no readable picture is left"):
        build_shards(str(src), tmp_path / "out", options(skip_bad=True))


@pytest.mark.parametrize("text", ["[1]", "{}", '{"format": 1}', "\xff", "[" * 200_000, "half", "statistics"])
def test_a_damaged_build_file(src, tmp_path, text):
    build_shards(str(src), tmp_path / "out", options())
    file = tmp_path / "out" / "build.json"
    state = json.loads(file.read_text())
    if text == "half":
        del state["splits"]
    state["statistics"] = {"train": {}}
    file.write_text(json.dumps(state) if text in ("half", "statistics") else text, encoding="latin-1")
    with pytest.raises(UserError, match=r"build\.json: not a build of tlx"):
        build_shards(str(src), tmp_path / "out", options())


def test_files_without_a_pictures_extension_are_known_by_their_content(tmp_path):
    rows = ["path,label"]
    for place, (name, format) in enumerate(
        [("img001", "JPEG"), ("a.cls", "PNG"), ("b.v2/x", "GIF"), ("c.JSON", "PPM")]
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(place % 2, size=16), format))
        rows.append(f"{name},{place % 2}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    build_shards(str(tmp_path / "list.csv"), tmp_path / "out", options(val=0))
    with tarfile.open(tmp_path / "out" / "train" / "000000.tar") as tar:
        assert sorted({name.partition(".")[2] for name in tar.getnames()}) == ["cls", "gif", "jpg", "png", "ppm"]
    (tmp_path / "img001").write_bytes(b"no picture")
    with pytest.raises(UserError, match="img001: neither its name nor its content is that of a picture"):
        build_shards(str(tmp_path / "list.csv"), tmp_path / "other", options(val=0))


def test_a_source_without_a_name(tmp_path):
    with pytest.raises(UserError, match="the source has no name"):
        build_shards("", tmp_path / "out", options())
