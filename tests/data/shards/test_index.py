"""An index for tars made elsewhere, and the index itself: damage is noticed and named."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from foreign_tars import samples, tar_of
from images import encoded, index_shards, make_shards, picture
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.shards import shards
from tlx.data.remote.shard_cache import CacheSpec
from tlx.data.shards.check import check_shards
from tlx.data.shards.index import index_folder, label_rule
from tlx.data.shards.labels import LabelRule
from tlx.data.shards.manifest import Manifest, write_index
from tlx.data.stream.reader import ShardReader

JPEG = encoded(picture(0, size=16))


@pytest.mark.parametrize(
    ("extension", "labels", "classes", "expected"),
    [
        ("cls", [1, 0, 1], ("0", "1"), [1, 0, 1]),
        ("cls", ["rose", "iris", "rose"], ("iris", "rose"), [1, 0, 1]),
        ("txt", ["rose\n", " iris", "rose"], ("iris", "rose"), [1, 0, 1]),
        ("json", ["1", "0", "1"], ("0", "1"), [1, 0, 1]),
        ("json", ['{"label": 1}', '{"cls": 0, "x": [2]}', '{"class": 1}'], ("0", "1"), [1, 0, 1]),
        ("json", ['{"label": "rose"}', '{"label": "iris"}', '"rose"'], ("iris", "rose"), [1, 0, 1]),
    ],
)
def test_labels_of_every_kind(tmp_path, extension, labels, classes, expected):
    tar_of(tmp_path / "d" / "a.tar", samples(labels, extension))
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert manifest.classes == classes
    assert manifest.labels.tolist() == expected


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_other_members(tmp_path, format):
    deep = "deep/" * 15 + "é" * 20 + "/"
    members = [*samples([0, 1], prefix=deep, image="JPEG"), (".hidden.jpg", b"y")]
    members.insert(2, (f"{deep}0000.seg.png", b"a mask, not the picture"))
    tar_of(tmp_path / "d" / "a.tar", members, format)
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert [ShardReader(manifest).read(i) for i in (0, 1)] == [members[0][1], members[3][1]]
    assert manifest.describe(1).endswith("éé/0001.JPEG")


NESTED = b'{"annotation": {"label": "rose", "ids": [4, 7]}, "a.b": 1, "split": "train", "size": {"w": 5}}'


@pytest.mark.parametrize(
    ("key", "name"), [("annotation.label", "rose"), ("annotation.ids.1", 7), ("a.b", 1), ("split", "train")]
)
def test_a_label_anywhere_in_a_json(tmp_path, key, name):
    tar_of(tmp_path / "d" / "a.tar", [("1.jpg", JPEG), ("1.json", NESTED), ("1.cls", b"0")])
    (tmp_path / "names.txt").write_text("\n".join([*"01234567", "rose", "train"]))
    rule = LabelRule.make(key=key)
    manifest = index_shards(tmp_path / "d", classes=tmp_path / "names.txt", labels=rule, jobs=0)["d"]
    assert manifest.classes[manifest.labels[0]] == str(name)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("annotation.lable", r'a\.tar: 1: the \.json has no "annotation.lable"; did you mean "annotation.label"'),
        ("zzzz", r'has no "zzzz"; its keys: annotation\.label, annotation\.ids\.0, annotation\.ids\.1, a\.b, split'),
        ("annotation.ids.2", 'has no "annotation.ids.2"'),
        ("annotation", "neither a number nor a name"),
    ],
)
def test_a_key_that_leads_nowhere(tmp_path, key, message):
    tar_of(tmp_path / "d" / "a.tar", [("1.jpg", JPEG), ("1.json", NESTED)])
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path / "d", labels=LabelRule.make(key=key), jobs=0)


def by_folder(count=2, prefix=""):
    return [
        (f"{prefix}{name}/{i:02d}.jpg", encoded(picture(0, size=8, seed=i)))
        for name in ("cats", "007")
        for i in range(count)
    ]


def test_folders_are_labels_where_nothing_else_is(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", by_folder(prefix="./deep/"))
    tar_of(tmp_path / "d" / "b.tar", by_folder())
    manifest = index_shards(tmp_path / "d", jobs=2)["d"]
    assert manifest.classes == ("007", "cats")
    assert manifest.labels.tolist() == [1, 1, 0, 0] * 2
    assert json.loads((tmp_path / "d" / "index.json").read_text())["labels"] == {"from": "folder"}
    assert check_shards(tmp_path / "d", jobs=0).good
    assert index_shards(tmp_path / "d", jobs=0)["d"].digest == manifest.digest
    tar_of(tmp_path / "d" / "b.tar", [("cats/0.jpg", JPEG), ("dogs/0.jpg", JPEG), *by_folder()[2:]])
    assert len(check_shards(tmp_path / "d", jobs=0).stale) == 1


@pytest.mark.parametrize(
    "members",
    [
        [*by_folder(), ("cats/9.jpg", JPEG), ("cats/9.cls", b"0")],
        [*by_folder(), ("loose.jpg", JPEG)],
        [*by_folder(), ("./loose.jpg", JPEG)],
    ],
)
def test_folders_are_no_labels_where_some_have_others(tmp_path, members):
    tar_of(tmp_path / "d" / "a.tar", members)
    with pytest.raises(
        UserError, match=r"no label among jpg; looked for \.cls, \.json, \.txt[\s\S]*--label-from folder"
    ):
        index_shards(tmp_path / "d", jobs=0)


def test_tars_with_and_without_labels(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", by_folder())
    tar_of(tmp_path / "d" / "b.tar", samples([0, 1]))
    with pytest.raises(UserError, match=r"a\.tar: no sample has a label, in other tars they have\n"):
        index_shards(tmp_path / "d", jobs=0)
    tar_of(tmp_path / "e" / "train" / "a.tar", by_folder())
    tar_of(tmp_path / "e" / "val" / "b.tar", samples(["007", "cats"]))
    with pytest.raises(
        UserError, match=r"train/a\.tar: no sample has a label, .* one by one, the second with --classes"
    ):
        index_shards(tmp_path / "e", jobs=0)
    index_shards(tmp_path / "e" / "train", jobs=0)
    val = index_shards(tmp_path / "e" / "val", classes=tmp_path / "e" / "train", jobs=0)["val"]
    assert val.labels.tolist() == [0, 1]


def test_the_choice_is_kept_and_another_may_be_made(tmp_path):
    members = [(f"{c}/{i}.{e}", d) for c in "ab" for i in "01" for e, d in (("jpg", JPEG), ("cls", i.encode()))]
    tar_of(tmp_path / "d" / "a.tar", members)
    assert index_shards(tmp_path / "d", labels=LabelRule.make("folder"), jobs=0)["d"].labels.tolist() == [0, 0, 1, 1]
    assert check_shards(tmp_path / "d", jobs=0).good
    again = index_shards(tmp_path / "d", jobs=0)["d"]
    assert (again.labels.tolist(), again.classes) == ([0, 0, 1, 1], ("a", "b"))
    assert label_rule(tmp_path / "d") == LabelRule("folder")
    other = index_shards(tmp_path / "d", labels=LabelRule.make("cls"), jobs=0)["d"]
    assert other.labels.tolist() == [0, 1, 0, 1]
    assert check_shards(tmp_path / "d", jobs=0).good


def test_rules_that_make_no_sense():
    assert LabelRule.make() == LabelRule("auto")
    assert LabelRule.make(".cls") == LabelRule.make("CLS") == LabelRule("cls")
    assert LabelRule.make("Label.cls", picture=".Image.JPG") == LabelRule("label.cls", picture="image.jpg")
    assert LabelRule.make("json", "a") == LabelRule.make(key="a") == LabelRule("json", "a")
    for arguments, message in (
        (("foldr",), 'did you mean "folder"'),
        (("cls", "a"), "is for a .json, and the labels come from cls"),
        ((None, ""), "the key of the label is empty"),
    ):
        with pytest.raises(UserError, match=message):
            LabelRule.make(*arguments)


def test_the_command_takes_the_rule(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", [("1.jpg", JPEG), ("1.json", b'{"y": {"z": 0}}')])
    run = CliRunner().invoke(shards, ["index", str(tmp_path / "d"), "--label-key", "y.z", "--jobs", "0"])
    assert run.exit_code == 0, run.output
    assert label_rule(tmp_path / "d") == LabelRule("json", "y.z")


def test_pictures_of_every_kind_are_indexed(tmp_path):
    endings = ["jpg", "JPEG", "jpe", "JFIF", "png", "WebP", "bmp", "TIF", "tiff", "gif", "ppm", "pgm", "avif"]
    members = [m for i, e in enumerate(endings) for m in ((f"é {i}.{e}", JPEG), (f"é {i}.CLS", b"0"))]
    tar_of(tmp_path / "d" / "a.tar", members)
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert len(manifest) == len(endings)
    assert manifest.describe(5).endswith("é 5.WebP")


def test_several_tars_in_two_processes(tmp_path):
    for name, count in (("b", 2), ("a", 3)):
        tar_of(tmp_path / "d" / f"{name}.tar", samples(range(count)))
    manifest = index_shards(tmp_path / "d", jobs=2)["d"]
    assert [(s.name, s.samples) for s in manifest.shards] == [("a.tar", 3), ("b.tar", 2)]
    assert manifest.labels.tolist() == [0, 1, 2, 0, 1]
    assert manifest.locate(4)[0].name == "b.tar"


def test_splits_share_their_classes(tmp_path):
    tar_of(tmp_path / "train" / "a.tar", samples(["x", "y", "z"], "txt"))
    tar_of(tmp_path / "val" / "a.tar", samples(["z", "x"], "txt"))
    both = index_shards(tmp_path, jobs=0)
    assert both["val"].classes == both["train"].classes == ("x", "y", "z")
    assert both["val"].labels.tolist() == [2, 0]
    (tmp_path / "val" / "index.json").unlink()
    assert index_shards(tmp_path / "val", classes=tmp_path / "train", jobs=0)["val"].labels.tolist() == [2, 0]
    (tmp_path / "names.txt").write_text("z\n\ny\nx\n")
    assert index_shards(tmp_path / "val", classes=tmp_path / "names.txt", jobs=0)["val"].labels.tolist() == [0, 2]


def test_our_own_shards_keep_their_names_and_their_digest(tmp_path):
    train = make_shards(tmp_path / "s", per_class=3) / "train"
    before = Manifest.open(train)
    (train / "index.npy").unlink()
    assert index_shards(train, jobs=0)["train"].digest == before.digest
    (train / "index.json").unlink()  # the build remembers them too
    assert index_shards(train, jobs=0)["train"].classes == ("class0", "class1", "class2")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", JPEG)], r"a\.tar: 1: no label among jpg; looked for \.cls"),
        ([("1.cls", b"0")], "1: no pictures among cls"),
        ([("1.jpg", JPEG), ("1.png", JPEG), ("1.cls", b"0")], "1: 2 pictures among jpg, png, cls; --picture jpg"),
        ([("1.a.jpg", JPEG), ("1.b.png", JPEG), ("1.cls", b"0")], "1: 2 pictures among a.jpg, b.png, cls; --picture a"),
        ([("1.jpg", JPEG), ("1.a.cls", b"0"), ("1.b.cls", b"0")], "1: 2 labels among a.cls, b.cls; --label-from a.cls"),
        ([*samples([0]), *samples([1])], "two samples are called 0000"),
        ([("1.jpg", JPEG), ("1.jpg", JPEG), ("1.cls", b"0")], "two samples are called 1"),
        ([("1.jpg", JPEG), ("2.jpg", JPEG), ("1.cls", b"0"), ("2.cls", b"0")], "two samples are called 1"),
        ([("1.jpg", JPEG), ("1.cls", b"\xff\xfe")], "1: 'utf-8' codec"),
        ([("1.jpg", JPEG), ("1.cls", b"")], "neither a number nor a name"),
        ([("1.jpg", JPEG), ("1.json", b'{"label": 1.5}')], "neither a number nor a name"),
        ([("1.jpg", JPEG), ("1.json", b'{"caption": "x"}')], "none of the keys label, cls, class; its keys: caption"),
        ([("1.jpg", JPEG), ("1.json", b"{")], "1: "),
        ([("1.jpg", JPEG), ("1.txt", b"a\x1b[2Jb")], "cannot be shown"),
        ([("1.jpg", JPEG), ("1.cls", b"99999999999")], "labels go from 99999999999 to 99999999999, but none is 0"),
        ([("1.jpg", JPEG), ("1.cls", b"9" * 2000)], "has 2,000 characters"),
        ([*samples([0, 2])], "labels go from 0 to 2, but none is 1"),
        ([*samples([1, 2])], r"labels go from 1 to 2, but none is 0[\s\S]*--classes"),
        ([*samples([0, "rose"])], r"some labels are numbers \(0\), others names \(rose\)"),
        ([], "hold no samples"),
    ],
)
def test_tars_that_cannot_be_indexed(tmp_path, members, message):
    tar_of(tmp_path / "d" / "a.tar", members)
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path / "d", jobs=0)
    assert not (tmp_path / "d" / "index.json").exists()


def test_all_problems_are_named_at_once(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", [("1.jpg", JPEG), ("2.cls", b"0")])
    tar_of(tmp_path / "d" / "b.tar", [("3.jpg", JPEG)])
    with pytest.raises(UserError, match="3 problems") as caught:
        index_shards(tmp_path / "d", jobs=0)
    assert str(caught.value).count("\n  " + str(tmp_path)) == 3


def test_compressed_tars_say_how_to_convert(tmp_path):
    data = tar_of(tmp_path / "a.tar", samples([0])).read_bytes()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.tar.gz").write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match=r"1 compressed tar, such as a\.tar\.gz[\s\S]*gunzip a\.tar\.gz"):
        index_shards(tmp_path / "d", jobs=0)
    (tmp_path / "d" / "a.tar.gz").rename(tmp_path / "d" / "a.tar")
    with pytest.raises(UserError, match=r"compressed although it is called \.tar"):
        index_shards(tmp_path / "d", jobs=0)


def test_truncated_tars(tmp_path):
    tar = tar_of(tmp_path / "d" / "a.tar", samples([0, 1, 0, 1]))
    with tarfile.open(tar) as opened:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in opened]
    whole = tar.read_bytes()
    for cut in (1, 100, 512, 700, ends[3], ends[3] + 100, ends[3] + 600, ends[-1]):
        tar.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.tar: not a whole tar: "):
            index_shards(tmp_path / "d", jobs=0)
    tar.write_bytes(whole[: ends[3]] + b"\1" * 512 + whole[ends[3] + 512 :])
    with pytest.raises(UserError, match=f"damaged or cut off at byte {ends[3]}"):
        index_shards(tmp_path / "d", jobs=0)
    tar.write_bytes(whole[: ends[-1] + 512])
    assert len(index_shards(tmp_path / "d", jobs=0)["d"]) == 4


def test_nothing_to_index(tmp_path):
    with pytest.raises(UserError, match=r"no \.tar files here"):
        index_shards(tmp_path, jobs=0)
    with pytest.raises(UserError, match="no such folder"):
        index_shards(tmp_path / "x", jobs=0)


@pytest.fixture
def train(tmp_path):
    return make_shards(tmp_path / "s", per_class=5) / "train"


def test_opening_what_is_not_there(tmp_path, train):
    with pytest.raises(UserError, match=r"holds splits: train, val[\s\S]*use .*/s/train"):
        Manifest.open(tmp_path / "s")
    (train / "index.json").unlink()
    with pytest.raises(UserError, match=r"no index[\s\S]*tlx shards index"):
        Manifest.open(train)
    with pytest.raises(UserError, match="no such folder"):
        Manifest.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no shards"):
        Manifest.open(tmp_path)


def rewrite(folder, **changes):
    header = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(header | changes))


def test_shards_have_hashes(train):
    """By hand: of the whole file, as `sha256sum` gives it; from a build and from indexing alike."""
    header = json.loads((train / "index.json").read_text())
    assert header["format"] == 2
    for shard in header["shards"]:
        assert shard["sha256"] == hashlib.sha256((train / shard["name"]).read_bytes()).hexdigest()
    whole = (train / "index.json").read_bytes()
    built = Manifest.open(train)
    assert index_shards(train, jobs=0)["train"].content == built.content
    assert (train / "index.json").read_bytes() == whole
    hashes = "\n".join(shard["sha256"] for shard in header["shards"])
    assert built.content == hashlib.sha256(hashes.encode()).hexdigest()


def test_an_index_without_hashes_is_the_same_data(train):
    """As earlier versions wrote it, whose digest is that of the text."""
    whole = Manifest.open(train)
    without = index_shards(train, hashes=False, jobs=0)["train"]
    text = (train / "index.json").read_bytes()
    assert json.loads(text)["format"] == 1
    assert without.digest == whole.digest == hashlib.sha256(text).hexdigest()
    assert without.content is None
    assert [s.sha256 for s in without.shards] == [None, None]
    assert without.records.tolist() == whole.records.tolist()


def test_fifty_bytes_changed_in_a_tar_are_found(train):
    """In what fills a label of one byte up to its block: pictures and labels are as they were."""
    tar, offset, _ = Manifest.open(train).locate(9)
    content = bytearray(tar.read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    assert content[offset - 612 : offset - 562] == bytes(50)
    content[offset - 612 : offset - 562] = b"x" * 50
    tar.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    report = check_shards(train, jobs=0)
    assert report.bad == ()
    changed = f"{tar}: its bytes were changed: their SHA-256 is {found}, expected {expected}"
    assert report.stale == (f"{changed}; bring the former file back, or tlx shards index {train}",)
    index_shards(train, hashes=False, jobs=0)
    assert check_shards(train, jobs=0).good
    said = CliRunner().invoke(shards, ["check", str(train), "--jobs", "0"])
    assert said.exit_code == 0
    assert "note: 2 tars have no hash in the index" in said.stdout
    CliRunner().invoke(shards, ["index", str(train), "--jobs", "0"])
    assert Manifest.open(train).shards[1].sha256 == found


@pytest.mark.parametrize("stage", [False, True])
def test_an_index_that_claims_what_no_file_has(train, tmp_path, stage):
    header = json.loads((train / "index.json").read_text())
    header["shards"][1]["bytes"] = 1 << 62
    (train / "index.json").write_text(json.dumps(header))
    told = r"index is damaged: it says that 000001\.tar has 4,611,686,018,427,387,904 bytes; no file has"
    for location in (train, f"file://{train}", f"pipe:cat {train}/{{}}"):
        with pytest.raises(UserError, match=told):
            Manifest.open(location, CacheSpec(tmp_path / "cache", stage=stage))
    for command in ("show", "check"):
        with pytest.raises(UserError, match=told):
            CliRunner().invoke(shards, [command, str(train)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("sample", "field", "value"),
    [
        (0, "offset", 0),
        (9, "offset", 100),
        (9, "offset", 513),
        (14, "offset", 1 << 62),
        (14, "offset", 2**64 - 512),
        (14, "size", 2**32 - 1),
    ],
)
def test_places_that_are_in_no_tar(train, sample, field, value):
    records = np.array(Manifest.open(train).records)
    records[field][sample] = value
    header = json.loads((train / "index.json").read_text())
    buffer = io.BytesIO()
    np.save(buffer, records)
    (train / "index.npy").write_bytes(buffer.getvalue())
    rewrite(train, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    name = header["shards"][0 if sample < 8 else 1]["name"]
    with pytest.raises(UserError, match=rf"index is damaged: it has a sample of {name} at a place that is not in"):
        Manifest.open(train)
    rewrite(train, samples=1 << 40)
    with pytest.raises(UserError, match="do not add up"):
        Manifest.open(train)


def test_damaged_indexes(train):
    good = (train / "index.json").read_text()
    for changes, message in (
        ({"format": 9}, "has format 9; this tlx reads 1 to 3"),
        ({"sha256": "0"}, "not the one that index.json was written for"),
        ({"classes": ["only"]}, "labels without a class name"),
        ({"shards": [{"name": "../../etc/passwd", "samples": 15, "bytes": 1}]}, "outside its folder"),
        ({"shards": [{"name": "000000.tar", "samples": 3, "bytes": 1}]}, "do not add up"),
    ):
        rewrite(train, **changes)
        with pytest.raises(UserError, match=message):
            Manifest.open(train)
        (train / "index.json").write_text(good)
    (train / "index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index of tlx"):
        Manifest.open(train)
    (train / "index.json").write_text(good)
    (train / "index.npy").write_bytes((train / "index.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        Manifest.open(train)


def test_pickles_inside_an_index_are_not_loaded(train):
    """np.save of objects is a pickle, which runs code when it is loaded."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    (train / "index.npy").write_bytes(buffer.getvalue() + b" " * 500)
    rewrite(train, sha256=hashlib.sha256((train / "index.npy").read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"cannot be read: .*Python objects"):
        Manifest.open(train)


def test_the_index_is_mapped_not_loaded(train):
    manifest = Manifest.open(train)
    assert isinstance(manifest.records, np.memmap)
    assert manifest.samples_per_shard.tolist() == [8, 7]
    assert [manifest.shard_of(i) for i in (0, 7, 8, 14)] == [0, 0, 1, 1]


def test_a_label_far_above_the_others(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", samples([0, 2_000_000_000]))
    with pytest.raises(UserError, match="labels go from 0 to 2000000000, but none is 1"):
        index_shards(tmp_path / "d", jobs=0)


def test_a_json_nested_too_deep(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", samples(["[" * 200_000], "json"))
    with pytest.raises(UserError, match=r"a\.tar: 0000: the \.json is nested too deep"):
        index_shards(tmp_path / "d", jobs=0)


def test_class_names_in_another_encoding(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", samples([0, 1]))
    (tmp_path / "names.txt").write_bytes("r\xf6schen\nb".encode("latin-1"))
    with pytest.raises(UserError, match=r"names\.txt: the class names cannot be read"):
        index_shards(tmp_path / "d", classes=tmp_path / "names.txt", jobs=0)


@pytest.mark.parametrize("changes", [{"labels": {"from": "xx"}}, {"labels": {"from": [5]}}, {"classes": [1, 2]}])
def test_an_index_with_nonsense_is_mended_by_indexing_again(train, changes):
    whole = Manifest.open(train)
    rewrite(train, **changes)
    again = index_shards(train, jobs=0)["train"]
    assert again.labels.tolist() == whole.labels.tolist()
    assert all(isinstance(name, str) for name in again.classes)


def test_an_index_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    tar_of(tmp_path / "d" / "a.tar", samples([0, 1, 0]))
    before = index_shards(tmp_path / "d", jobs=0)["d"]
    flushed, real = [], os.fsync

    def full(file):
        flushed.append(file)
        if len(flushed) == 2:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_index(tmp_path / "d", classes=["x", "y"], shards=before.shards, records=before.records[::-1])
    after = Manifest.open(tmp_path / "d")
    assert (after.digest, after.classes) == (before.digest, before.classes)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["a.tar", "index.json", "index.npy"]


# What is passed over


def link(name, target, type=tarfile.LNKTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info


def tar_with_links(path, members):
    """Members are (name, data), or headers without data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def told_of(passed_over):
    return [(p.kind, p.name, p.count) for p in passed_over]


OTHER = encoded(picture(1, size=16))


def test_links_in_a_tar_are_their_targets(tmp_path):
    """Hard links by their whole name, symbolic ones from where they lie, links to links; labels too."""
    members = [
        ("a/1.jpg", JPEG),
        link("a/2.jpg", "a/1.jpg"),
        ("b/1.jpg", OTHER),
        link("b/2.jpg", "1.jpg", tarfile.SYMTYPE),
        link("b/3.jpg", "../a/2.jpg", tarfile.SYMTYPE),
        link("b/4.jpg", "5.jpg", tarfile.SYMTYPE),
        link("b/5.jpg", "./b/2.jpg"),
        link("b/6.jpg", "/etc/passwd", tarfile.SYMTYPE),
        link("b/7.jpg", "b/8.jpg"),
        link("b/8.jpg", "8.jpg", tarfile.SYMTYPE),
        link("c", "a", tarfile.SYMTYPE),
        link("d/1.jpg", "../../a/1.jpg", tarfile.SYMTYPE),
    ]
    tar_with_links(tmp_path / "d" / "a.tar", members)
    made = index_folder(tmp_path / "d", jobs=0)
    manifest = made.manifests["d"]
    assert [ShardReader(manifest).read(i) for i in range(len(manifest))] == [
        JPEG,
        JPEG,
        OTHER,
        OTHER,
        JPEG,
        OTHER,
        OTHER,
    ]
    assert manifest.labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
    dangling = [
        "b/6.jpg -> /etc/passwd",
        "b/7.jpg -> b/8.jpg",
        "b/8.jpg -> 8.jpg",
        "c -> a",
        "d/1.jpg -> ../../a/1.jpg",
    ]
    assert told_of(made.passed_over) == [("link to what is not in the tar", name, 1) for name in dangling]
    report = check_shards(tmp_path / "d", jobs=0)
    assert (report.good, report.samples, report.passed_over) == (True, 7, made.passed_over)
    assert report.plain()["passed_over"][3] == {"kind": "link to what is not in the tar", "name": "c -> a", "count": 1}


def test_a_label_that_is_a_link(tmp_path):
    tar = tmp_path / "d" / "a.tar"
    tar_with_links(tar, [("1.jpg", JPEG), ("1.cls", b"0"), ("2.jpg", OTHER), link("2.cls", "1.cls")])
    assert index_shards(tmp_path / "d", jobs=0)["d"].labels.tolist() == [0, 0]
    tar_with_links(tar, [("1.jpg", JPEG), ("1.cls", b"0"), ("2.jpg", OTHER), link("2.cls", "/x", tarfile.SYMTYPE)])
    with pytest.raises(UserError, match=r"2: no label among jpg; .*; 2\.cls -> /x leads to nothing in this tar"):
        index_shards(tmp_path / "d", jobs=0)


def test_an_index_of_an_earlier_version_lacks_what_links_stand_for(tmp_path):
    """It is read as it is; `check` says what is missing."""
    tar_with_links(tmp_path / "d" / "a.tar", [("a/1.jpg", JPEG), ("b/1.jpg", OTHER), link("b/2.jpg", "a/1.jpg")])
    before = index_shards(tmp_path / "d", jobs=0)["d"]
    shards_then = [replace(before.shards[0], samples=2)]
    write_index(
        tmp_path / "d", classes=["a", "b"], shards=shards_then, records=before.records[:2], labels={"from": "folder"}
    )
    assert len(Manifest.open(tmp_path / "d")) == 2
    report = check_shards(tmp_path / "d", jobs=0)
    assert len(report.stale) == 1
    assert "its members or labels are not what the index says (1 more, 0 fewer samples)" in report.stale[0]


def test_what_is_no_sample_is_counted(tmp_path):
    members = [
        ("README.md", b"x"),
        ("README.txt", b"x"),
        ("LICENSE", b"x"),
        ("data/classes.txt", b"a\nb"),
        *samples([0, 1, 1]),
        ("0002.seg.png", b"x"),
        ("0003.jpg", JPEG),
        ("0003.cls", b"0"),
        ("0003.seg.png", b"x"),
        ("@eaDir/1.jpg", b"x"),
        ("._0001.jpg", b"x"),
        (".git/1.jpg", b"x"),
        ("info.json", b"{}"),
    ]
    tar_of(tmp_path / "d" / "a.tar", members)
    tar_of(tmp_path / "d" / "._a.tar", [])
    made = index_folder(tmp_path / "d", jobs=0)
    assert made.manifests["d"].labels.tolist() == [0, 1, 1, 0]
    assert told_of(made.passed_over) == [
        ("made by a system or program", str(tmp_path / "d" / "._a.tar"), 1),
        ("made by a system or program", "@eaDir/1.jpg", 1),
        ("made by a system or program", "._0001.jpg", 1),
        ("hidden", ".git/1.jpg", 1),
        ("no picture (.md)", "README.md", 1),
        ("no picture (.txt)", "README.txt", 1),
        ("no picture", "LICENSE", 1),
        ("no picture (.txt)", "data/classes.txt", 1),
        ("no picture (.json)", "info.json", 1),
        ("member that is not used", "*.seg.png", 2),
    ]
    assert check_shards(tmp_path / "d", jobs=0).good


def test_a_picture_that_is_missing_is_no_stray_document(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", [*samples([0, 1]), ("0005.cls", b"0")])
    with pytest.raises(UserError, match="0005: no pictures among cls"):
        index_shards(tmp_path / "d", jobs=0)


def test_a_readme_among_class_folders(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", [("README.txt", b"x"), ("labels.json", b"[]"), *by_folder()])
    made = index_folder(tmp_path / "d", jobs=0)
    assert len(made.manifests["d"]) == 4
    assert [p.name for p in made.passed_over] == ["README.txt", "labels.json"]


@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("image.jpg", "label.cls"),
        ("IMAGE.JPEG", "meta.json"),
        ("jpg", "label.cls"),
        ("left.png", "cls"),
        ("x.jpg", "y.txt"),
    ],
)
def test_extensions_of_several_parts(tmp_path, picture, label):
    members = []
    for n, i in enumerate((0, 1, 0)):
        members += [(f"d/{n}.{picture}", JPEG), (f"d/{n}.{label}", str(i).encode())]
    tar_of(tmp_path / "d" / "a.tar", members)
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert manifest.labels.tolist() == [0, 1, 0]
    assert manifest.describe(1).endswith(f"d/1.{picture}")
    assert check_shards(tmp_path / "d", jobs=0).good


def test_the_picture_and_the_label_can_be_said(tmp_path):
    members = [("1.left.jpg", JPEG), ("1.right.jpg", OTHER), ("1.coarse.cls", b"0"), ("1.fine.cls", b"1")]
    (tmp_path / "names.txt").write_text("x\ny\n")
    tar_of(tmp_path / "d" / "a.tar", members)
    arguments = ["--picture", "right.jpg", "--label-from", "fine.cls", "--classes", tmp_path / "names.txt", "--jobs", 0]
    run = CliRunner().invoke(shards, ["index", str(tmp_path / "d"), *map(str, arguments)])
    assert run.exit_code == 0, run.output
    assert "left out, member that is not used: 2 (*.left.jpg, *.coarse.cls)" in run.output
    manifest = Manifest.open(tmp_path / "d")
    assert (ShardReader(manifest).read(0), manifest.labels.tolist()) == (OTHER, [1])
    assert label_rule(tmp_path / "d") == LabelRule("fine.cls", picture="right.jpg")
    assert check_shards(tmp_path / "d", jobs=0).good
    for arguments, message in (
        ({"picture": "exe"}, "is no extension of a picture"),
        ({"place": "label.xml"}, 'labels are not read from "label.xml"'),
        ({"numbers": "name"}, 'did you mean "names"'),
    ):
        with pytest.raises(UserError, match=message):
            LabelRule.make(**arguments)


def test_names_may_have_dots_where_that_is_said(tmp_path):
    members = [("cat/img.2024.1.jpg", JPEG), ("dog/a.b.jpg", OTHER), ("cat/img.2024.0.JPG", OTHER), ("cat/x.jpg", JPEG)]
    tar_of(tmp_path / "d" / "a.tar", members)
    with pytest.raises(UserError, match=r"--last-dot: at the last"):
        index_shards(tmp_path / "d", labels=LabelRule("folder"), jobs=0)
    run = CliRunner().invoke(shards, ["index", str(tmp_path / "d"), "--last-dot", "--jobs", "0"])
    assert run.exit_code == 0, run.output
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]  # what was said before stays
    assert manifest.labels.tolist() == [0, 1, 0, 0]
    assert [ShardReader(manifest).read(i) for i in range(4)] == [JPEG, OTHER, OTHER, JPEG]
    assert label_rule(tmp_path / "d") == LabelRule("folder", last_dot=True)


def test_meta_data_beside_a_picture_are_no_label(tmp_path):
    members = [m for name, data in by_folder() for m in ((name, data), (name.replace(".jpg", ".meta.json"), b"{}"))]
    tar_of(tmp_path / "d" / "a.tar", members)
    assert index_shards(tmp_path / "d", jobs=0)["d"].classes == ("007", "cats")


@pytest.mark.parametrize("extension", ["cls", "txt", "json"])
def test_a_byte_order_mark_before_a_label(tmp_path, extension):
    tar_of(tmp_path / "d" / "a.tar", samples([b"\xef\xbb\xbf1", b"0"], extension))
    assert index_shards(tmp_path / "d", jobs=0)["d"].labels.tolist() == [1, 0]


def test_backslashes_in_a_tar(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", [(f"v1.0\\{c}\\{i}.jpg", JPEG) for c in "ab" for i in range(2)])
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert (manifest.classes, manifest.labels.tolist()) == (("a", "b"), [0, 0, 1, 1])


def test_tars_in_a_folder_and_below_it(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", samples([0, 1]))
    tar_of(tmp_path / "d" / "train" / "b.tar", samples([0, 1, 0]))
    (tmp_path / "d" / "empty").mkdir()
    run = CliRunner().invoke(shards, ["index", str(tmp_path / "d"), "--jobs", "0"])
    said = f"left out, folder of tars below tars; index it on its own: 1 ({tmp_path}/d/train)"
    assert said in run.output
    assert len(Manifest.open(tmp_path / "d")) == 2
    assert said in CliRunner().invoke(shards, ["check", str(tmp_path / "d"), "--jobs", "0"]).output
