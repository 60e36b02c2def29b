"""What is said of pictures: readable or not, statistics, duplicates; and the commands that print it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from images import encoded, index_shards, make_folder, make_shards, picture
from PIL import ExifTags, Image
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.shards import shards as commands
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels.decode import DecodeError, decode
from tlx.data.pixels.markers import coding, without_notes
from tlx.data.shards import examine as examining
from tlx.data.shards import statistics
from tlx.data.shards.check import check_shards, describe_shards
from tlx.data.shards.duplicates import find_duplicates
from tlx.data.shards.examine import content_digest, examine
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.statistics import FACT, chosen_for_measuring
from tlx.data.stream.reader import ShardReader


def run(*arguments):
    return CliRunner().invoke(commands, [str(a) for a in arguments], catch_exceptions=False)


# One picture


@pytest.fixture(params=["with tlx's decoder", "without"])
def either_way(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(examining, "_jpeg", None)
    elif examining._jpeg is None:
        pytest.skip("needs tlx's C extension")


JPEGS = [
    encoded(picture(0, size=(90, 70))),
    encoded(picture(1, size=(33, 41)), progressive=True),
    encoded(picture(1, size=(40, 40)), subsampling=0, restart_marker_rows=1),
    encoded(picture(2, size=(50, 60)).convert("L")),
    encoded(picture(2, size=(50, 60)).convert("CMYK")),
    encoded(picture(0, size=(3, 5))),
]


def accepts(function, data):
    try:
        function(data)
    except DecodeError:
        return False
    return True


@pytest.mark.usefixtures("either_way")
def test_what_is_examined_in_short_is_refused_as_if_it_were_decoded(capfd):
    rng = np.random.default_rng(0)
    verdicts = {True: 0, False: 0}
    for turn in range(900):
        data = bytearray(JPEGS[turn % len(JPEGS)])
        if turn % 3 == 0:
            del data[rng.integers(len(data)) :]
        elif turn % 3 == 1:
            for _ in range(rng.integers(1, 6)):
                data[rng.integers(len(data))] = rng.integers(256)
        else:
            start = rng.integers(len(data))
            data[start : start + rng.integers(1, 400)] = b""
        good = accepts(decode, bytes(data))
        assert accepts(examine, bytes(data)) == good, turn
        verdicts[good] += 1
    capfd.readouterr()  # libjpeg's warnings
    assert min(verdicts.values()) > 200


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("marker", [b"\xe6", b"\x77", b"\xcf", b"\xd9"])
def test_a_stray_marker_among_the_coded_data(marker, capfd):
    """libjpeg fills up what is missing, and it is the caller who decides whether that is a picture."""
    data = encoded(picture(0, size=200))
    middle = len(data) * 2 // 3
    broken = data[:middle] + b"\xff" + marker + data[middle + 2 :]
    assert accepts(examine, broken) == accepts(decode, broken)
    capfd.readouterr()


@pytest.mark.usefixtures("either_way")
def test_what_a_picture_is():
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for data, expected in (
        (JPEGS[0], (70, 90, "jpeg")),
        (JPEGS[1], (41, 33, "jpeg progressive")),
        (JPEGS[4], (60, 50, "jpeg")),
        (encoded(picture(0, size=(90, 70)), exif=turned), (90, 70, "jpeg")),
        (encoded(picture(0, size=(9, 7)), "PNG"), (7, 9, "png")),
        (encoded(picture(0, size=(9, 7)), "WEBP"), (7, 9, "webp")),
    ):
        for measured in (False, True):
            seen = examine(data, measured=measured)
            assert (seen.width, seen.height, seen.format) == expected
            assert (seen.moments is not None) == measured


def test_moments_are_those_of_the_pixels():
    data = encoded(picture(1, size=(60, 50)), "PNG")
    pixels = decode(data).double().flatten(1) / 255
    expected = torch.cat([pixels.mean(1), (pixels**2).mean(1)])
    assert torch.allclose(torch.tensor(examine(data, measured=True).moments, dtype=torch.float64), expected)
    tall = encoded(picture(1, size=(900, 20)), "PNG")  # of a large one, some rows
    rows = decode(tall)[:, ::14].double().flatten(1) / 255
    assert examine(tall, measured=True).moments[:3] == pytest.approx(rows.mean(1).tolist())


def test_a_digest_sees_the_picture_and_not_the_notes():
    image, exif = picture(0), Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    plain, noted = encoded(image), encoded(image, exif=exif, comment=b"x")
    assert plain != noted
    assert content_digest(plain) == content_digest(noted)
    assert content_digest(plain) != content_digest(encoded(image, quality=91))
    png = encoded(image, "PNG")
    assert content_digest(png) != content_digest(png + b"\0")
    assert coding(png) is coding(b"") is coding(b"\xff\xd8\xff") is None
    assert b"".join(without_notes(b"\xff\xd8\xff\xe0\0\1")) == b"\xff\xd8\xff\xe0\0\1"


# Statistics and duplicates


def test_statistics_of_a_build_and_of_a_check(tmp_path):
    src = make_folder(tmp_path / "src", per_class=6, size=(30, 40))
    (src / "class0" / "0000.jpg").write_bytes(encoded(picture(0, size=(300, 250)), progressive=True))
    (src / "class1" / "0009.png").write_bytes(encoded(picture(1, size=(240, 224)), "PNG"))
    built = build_shards(str(src), tmp_path / "s", BuildOptions(val=0.2, shard_samples=5, jobs=0))
    both = [built.statistics, check_shards(tmp_path / "s", jobs=2).statistics]
    assert both[0] == both[1]
    files = list(src.rglob("*.*"))
    train, val = both[0]["train"], both[0]["val"]
    assert (train.samples, val.samples, train.measured) == (16, 3, 16)
    assert train.counts == {"class0": 5, "class1": 6, "class2": 5}
    assert sum(s.bytes * s.samples for s in (train, val)) == pytest.approx(
        sum(len(p.read_bytes()) for p in files), abs=10
    )
    assert max(train.width[2], val.width[2]) == 250
    assert (train.width[:2], train.height[:2]) == ((40, 40), (30, 30))
    assert sum(s.small * s.samples for s in (train, val)) == pytest.approx(17, abs=0.01)
    formats = {k: train.formats.get(k, 0) + val.formats.get(k, 0) for k in (*train.formats, *val.formats)}
    assert formats == {"jpeg": 17, "jpeg progressive": 1, "png": 1}
    means = [(decode(p.read_bytes()).double() / 255).flatten(1) for p in files]
    overall = torch.stack([m.mean(1) for m in means]).mean(0)
    weighed = [(a * 16 + b * 3) / 19 for a, b in zip(train.mean, val.mean, strict=True)]
    assert weighed == pytest.approx(overall.tolist(), abs=0.002)
    spread = (torch.stack([(m**2).mean(1) for m in means]).mean(0) - overall**2).sqrt()
    assert list(train.std) == pytest.approx(spread.tolist(), abs=0.05)


def test_only_so_many_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "MEASURED", 4)
    chosen = chosen_for_measuring("train", 100)
    assert len(chosen) == 4
    assert chosen == chosen_for_measuring("train", 100) != chosen_for_measuring("val", 100)
    assert all(0 <= place < 100 for place in chosen)
    src = make_folder(tmp_path / "src", per_class=6, size=16)
    built = build_shards(str(src), tmp_path / "s", BuildOptions(val=0, shard_samples=5, jobs=0))
    assert (built.statistics["train"].measured, built.statistics["train"].samples) == (4, 18)


def twins(tmp_path):
    """train and val with copies: across, within, and under another label; one differs in its notes only."""
    src = tmp_path / "src"
    make_folder(src / "train", 2, 6, 24)
    make_folder(src / "val", 2, 2, 24, seed=1)
    leak = (src / "train" / "class0" / "0001.jpg").read_bytes()
    (src / "val" / "class0" / "leak.jpg").write_bytes(leak[:2] + b"\xff\xfe\0\5abc" + leak[2:])
    shutil.copy(src / "train" / "class1" / "0000.jpg", src / "train" / "class1" / "again.jpg")
    shutil.copy(src / "train" / "class1" / "0000.jpg", src / "train" / "class1" / "and again.jpg")
    shutil.copy(src / "train" / "class0" / "0005.jpg", src / "train" / "class1" / "other.jpg")
    return src


def test_duplicates_are_named(tmp_path):
    built = build_shards(str(twins(tmp_path)), tmp_path / "s", BuildOptions(jobs=0, shard_samples=4))
    (across,) = built.duplicates.across
    assert {str(c).replace(str(tmp_path), "") for c in across} == {
        "train: /src/train/class0/0001.jpg",
        "val: /src/val/class0/leak.jpg",
    }
    (contradicting,) = built.duplicates.contradicting
    assert {(c.label, c.name.rpartition("/")[2]) for c in contradicting} == {
        ("class0", "0005.jpg"),
        ("class1", "other.jpg"),
    }
    assert sorted(len(g) for g in built.duplicates.within("train")) == [2, 3]
    assert built.duplicates.within("val") == ()
    checked = check_shards(tmp_path / "s", jobs=0)
    assert sorted(map(len, checked.duplicates.groups)) == [2, 2, 3]
    by_label = [sorted((c.split, c.label) for c in g) for g in checked.duplicates.groups]
    assert sorted(by_label) == sorted(sorted((c.split, c.label) for c in g) for g in built.duplicates.groups)
    assert all(c.name.startswith(str(tmp_path / "s" / c.split)) for g in checked.duplicates.groups for c in g)
    assert checked.good  # a warning


def test_duplicates_by_both_halves_of_the_digest():
    def rows(*digests):
        records = np.zeros(len(digests), FACT)
        records["digest"] = np.reshape(digests, (-1, 2))
        return records

    found = find_duplicates({"a": rows((1, 2), (1, 3), (7, 7), (1, 2)), "b": rows((7, 7), (2, 1)), "c": rows((1, 2))})
    assert found == [[("a", 0), ("a", 3), ("c", 0)], [("a", 2), ("b", 0)]]
    assert find_duplicates({"a": rows(), "b": rows((1, 1))}) == []


# The commands


def test_build_warns_of_a_leak(tmp_path):
    result = run("build", twins(tmp_path), tmp_path / "s", "--jobs", 0)
    assert result.exit_code == 0
    assert "warning: 1 picture in several splits" in result.stdout
    assert "leak.jpg" in result.stdout
    assert "train: 3 copies of other pictures in it" in result.stdout
    assert "other.jpg (class1)" in result.stdout
    again = run("build", twins(tmp_path), tmp_path / "s", "--jobs", 0)
    assert "leak.jpg" in again.stdout
    assert "nothing done" in again.stdout


def test_check_reports_all_of_it(tmp_path):
    folder = make_shards(tmp_path / "s", per_class=5)
    report = tmp_path / "report.json"
    result = run("check", folder, "--json", report, "--jobs", 0)
    assert result.exit_code == 0
    assert "mean of R, G, B" in result.stdout
    said = json.loads(report.read_text())
    assert (said["good"], said["samples"], said["bad"], said["stale"]) == (True, 21, [], [])
    assert said["splits"]["train"]["counts"] == {"class0": 5, "class1": 5, "class2": 5}
    assert said["statistics"]["val"]["formats"] == {"jpeg": 6}
    tar, offset, _ = Manifest.open(folder / "train").locate(0)
    data = bytearray(tar.read_bytes())
    data[offset : offset + 40] = b"\0" * 40
    tar.write_bytes(data)
    result = run("check", folder, "--json", report, "--jobs", 2)
    assert result.exit_code == 1
    assert "000000.tar: 000000000.jpg: not a picture" in result.stdout
    said = json.loads(report.read_text())
    assert [b["id"] for b in said["bad"]] == [0]
    assert said["statistics"]["train"]["samples"] == 14


def test_show_says_what_the_build_noted(tmp_path):
    folder = make_shards(tmp_path / "s", per_class=5)
    assert "short side below 224" in run("show", folder).stdout
    assert "short side below 224" in run("show", folder / "train").stdout
    (folder / "build.json").unlink()  # as tars that were made elsewhere
    result = run("show", folder)
    assert result.exit_code == 0
    assert "short side" not in result.stdout
    assert "class2" in result.stdout


def test_names_cannot_act_on_the_terminal(tmp_path):
    src = make_folder(tmp_path / "src", per_class=4, size=16)
    for name in ("\x1b[2Ja.jpg", "\x1b[2Jb.jpg"):
        (src / "class0" / name).write_bytes(encoded(picture(0, size=16, seed=77)))
    result = run("build", src, tmp_path / "s", "--val", 0, "--jobs", 0)
    assert "copy of other pictures" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("command", ["build", "index", "check", "show"])
def test_every_command_has_an_example(command):
    assert re.search(rf"Example:\n +tlx shards {command} ", run(command, "--help").stdout)


def test_a_split_without_a_readable_picture(tmp_path):
    folder = make_shards(tmp_path / "s", per_class=2)
    for tar in (folder / "val").glob("*.tar"):
        tar.write_bytes(b"\0" * tar.stat().st_size)
    report = check_shards(folder, jobs=0)
    assert list(report.statistics) == ["train"]
    assert len(report.bad) == 3
    assert io.BytesIO(json.dumps(report.plain()).encode())


def test_the_stored_bytes_are_what_is_examined(tmp_path):
    folder = make_shards(tmp_path / "s", per_class=2)
    report = check_shards(folder / "train", jobs=0)
    manifest = Manifest.open(folder / "train")
    sizes = [len(ShardReader(manifest).read(i)) for i in range(len(manifest))]
    assert report.statistics["train"].bytes == round(np.mean(sizes))


def test_a_split_without_an_index_is_not_passed_over(tmp_path):
    folder = make_shards(tmp_path / "s", per_class=2)
    (folder / "val" / "index.json").unlink()
    for command in (check_shards, describe_shards):
        with pytest.raises(UserError, match="these shards have no index: val"):
            command(folder)


def test_a_split_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    folder = make_shards(tmp_path / "s", per_class=2)
    listdir, scandir = os.listdir, os.scandir

    def guarded(real):
        def look(path="."):
            if os.fspath(path) == str(folder / "train"):
                raise PermissionError(13, "Permission denied", str(folder / "train"))
            return real(path)

        return look

    monkeypatch.setattr(os, "listdir", guarded(listdir))  # root may read whatever its mode says
    monkeypatch.setattr(os, "scandir", guarded(scandir))
    for command in (describe_shards, index_shards):
        with pytest.raises(UserError, match="train: this folder cannot be read: Permission denied"):
            command(folder)


def test_tars_joined_with_cat_are_noticed(tmp_path):
    folder = make_shards(tmp_path / "s", per_class={"train": 2}) / "train"
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(UserError, match=r"000000\.tar: .*there is more after its end mark.*tar -A"):
        index_shards(folder, jobs=0)
    os.truncate(tar, tar.stat().st_size // 2)
    with tar.open("ab") as file:
        file.write(b"\0" * 12345)  # more padding is no fault
    index_shards(folder, jobs=0)
    assert check_shards(folder, jobs=0).good


@pytest.mark.parametrize("kind", ["dangling", "folder"])
def test_tars_that_cannot_be_opened(tmp_path, kind):
    folder = make_shards(tmp_path / "s", per_class={"train": 4}) / "train"
    tar = folder / "000001.tar"
    tar.unlink()
    if kind == "dangling":
        tar.symlink_to("/nowhere.tar")
    else:
        tar.mkdir()
    with pytest.raises(UserError, match=r"1 problem:\n.*000001\.tar: it cannot be read: "):
        index_shards(folder, jobs=0)
    report = check_shards(folder, jobs=0)
    assert len(report.stale) == 1
    assert len(report.bad) == report.samples // 2


def test_what_the_commands_say_of_odd_files_and_numbers(tmp_path):
    src = make_folder(tmp_path / "src", per_class=2, size=16)
    (src / "class0" / "\x1b[2Jnotes.txt").write_text("x")
    (src / "class1" / "\x1b[2Jbad.jpg").write_text("x")
    done = run("build", src, tmp_path / "s", "--val", 0, "--jobs", 0, "--skip-bad")
    assert "left out, unreadable" in done.output
    assert "left out, no picture" in done.output
    assert "\x1b" not in done.output
    assert "in 1 shard, " in done.output
    assert "in 1 shard, " in run("index", tmp_path / "s", "--jobs", 0).output
    assert "in 1 shard, " in run("show", tmp_path / "s").output
    for command in (
        ["build", src, tmp_path / "other", "--val", 0],
        ["check", tmp_path / "s"],
        ["index", tmp_path / "s"],
    ):
        assert run(*command, "--jobs", "-4").exit_code == 2
    with pytest.raises(UserError) as caught:
        build_shards(str(src), tmp_path / "other", BuildOptions(val=0, jobs=0))
    assert "\x1b" not in str(caught.value)


def test_a_report_that_cannot_be_written_is_said_first(tmp_path):
    with pytest.raises(UserError, match="nosuch: there is no such folder"):
        run("check", tmp_path / "neither", "--json", tmp_path / "nosuch" / "x.json")
