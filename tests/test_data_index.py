"""An index for tars made elsewhere, and the index itself: damage is noticed and named."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from images import encoded, make_shards, picture

from tlx.data.index import index_shards
from tlx.data.manifest import Manifest
from tlx.data.reader import ShardReader
from tlx.errors import UserError

JPEG = encoded(picture(0, size=16))


def tar_of(path, members, format=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(labels, extension="cls", image="jpg", prefix=""):
    for i, label in enumerate(labels):
        yield f"{prefix}{i:04d}.{image}", encoded(picture(i % 3, size=16, seed=i))
        yield f"{prefix}{i:04d}.{extension}", label if isinstance(label, bytes) else str(label).encode()


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
        ([("1.jpg", JPEG), ("1.png", JPEG), ("1.cls", b"0")], "1: 2 pictures among jpg, png, cls"),
        ([*samples([0]), *samples([1])], "two samples are called 0000"),
        ([("1.jpg", JPEG), ("1.jpg", JPEG), ("1.cls", b"0")], "two samples are called 1"),
        ([("1.jpg", JPEG), ("2.jpg", JPEG), ("1.cls", b"0"), ("2.cls", b"0")], "two samples are called 1"),
        ([("1.jpg", JPEG), ("1.cls", b"\xff\xfe")], "1: 'utf-8' codec"),
        ([("1.jpg", JPEG), ("1.cls", b"")], "neither a number nor a name"),
        ([("1.jpg", JPEG), ("1.json", b'{"label": 1.5}')], "neither a number nor a name"),
        ([("1.jpg", JPEG), ("1.json", b'{"caption": "x"}')], "neither a number nor a name"),
        ([("1.jpg", JPEG), ("1.json", b"{")], "1: "),
        ([("1.jpg", JPEG), ("1.txt", b"a\x1b[2Jb")], "cannot be shown"),
        ([("1.jpg", JPEG), ("1.cls", b"99999999999")], "out of range"),
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


def test_damaged_indexes(train):
    good = (train / "index.json").read_text()
    for changes, message in (
        ({"format": 9}, "has format 9; this tlx reads 1"),
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
    import hashlib

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
