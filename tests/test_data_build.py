"""Building shards: what is in them, what is refused, what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from textwrap import dedent

import numpy as np
import pytest
import webdataset
from images import encoded, make_folder, picture
from PIL import Image

from tlx.data.check import check_shards, describe_shards
from tlx.data.datasets import read_items
from tlx.data.decode import decode
from tlx.data.manifest import Manifest
from tlx.data.reader import ShardReader
from tlx.data.write import BuildOptions, build_shards
from tlx.errors import UserError


def options(**settings):
    return BuildOptions(**{"val": 0.2, "shard_samples": 10, "jobs": 0} | settings)


@pytest.fixture
def src(tmp_path):
    return make_folder(tmp_path / "src", per_class=15, size=24)


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


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
    for file in names(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    digests = {Manifest.open(tmp_path / name / "train").digest for name in ("one", "two")}
    assert len(digests) == 1


def test_a_limit_by_bytes(src, tmp_path):
    build_shards(str(src), tmp_path / "out", options(shard_bytes=20480, shard_samples=1000))
    shards = Manifest.open(tmp_path / "out" / "train").shards
    assert len(shards) > 2
    assert {s.bytes for s in shards[:-1]} == {20480}
    build_shards(str(src), tmp_path / "tiny", options(shard_bytes=1))
    assert {s.samples for s in Manifest.open(tmp_path / "tiny" / "train").shards} == {1}


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
    with pytest.raises(UserError, match=r"this folder holds no shards|these tars have no index"):
        Manifest.open(out / "train")
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


@pytest.mark.parametrize("settings", [{"shard_samples": 0}, {"resize": 0}, {"quality": 101}, {"val": 1.5}])
def test_options_out_of_range(src, tmp_path, settings):
    with pytest.raises(UserError):
        build_shards(str(src), tmp_path / "out", options(**settings))


def test_killed_in_the_middle_and_run_again(tmp_path):
    src, out, whole = make_folder(tmp_path / "src", per_class=40, size=24), tmp_path / "out", tmp_path / "whole"
    lines = f"""
        import time
        import tlx.data.write as write
        plain = write._content
        def slow(*given):
            time.sleep(0.02)
            return plain(*given)
        write._content = slow
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
    assert names(out) == names(whole)
    for file in names(whole):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert all((out / "train" / name).stat().st_mtime_ns == made for name, made in kept.items())


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
