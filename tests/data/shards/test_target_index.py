"""Targets of tars made elsewhere, by dotted keys of their .json; and what `tlx shards show` says of targets."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from foreign_tars import tar_of
from images import encoded, index_shards, make_target_shards, picture
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.data.shards.check import check_shards
from tlx.data.shards.index import index_folder
from tlx.data.shards.labels import LabelRule, folders_of
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.target_summary import Column, Pair, summarise_targets
from tlx.data.shards.targets import Target

IMAGE = encoded(picture(0, size=8))


def tars(folder, *samples, beside=("cls",)):
    """One tar; a sample is what its .json holds, None for none, bytes as they are."""
    members = []
    for i, said in enumerate(samples):
        members.append((f"{i:04d}.jpg", IMAGE))
        members += [(f"{i:04d}.{extension}", b"ab"[i % 2 : i % 2 + 1]) for extension in beside]
        if said is not None:
            members.append((f"{i:04d}.json", said if isinstance(said, bytes) else json.dumps(said).encode()))
    tar_of(folder / "0.tar", members)
    return folder


def indexed(folder, *targets, place=None, **settings):
    return index_folder(folder, labels=LabelRule.make(place, targets=targets), jobs=0, **settings).manifests[
        folder.name
    ]


def test_every_kind_by_hand(tmp_path):
    folder = tars(
        tmp_path / "t",
        {"attributes": {"colour": "red"}, "annotation": {"tags": ["wet", "old"]}, "age": 3, "box": [1, 2.5], "x": 1},
        {"attributes": {}, "annotation": {"tags": []}, "age": None, "box": None, "x": 0},
        {"attributes": {"colour": 7}, "annotation": {"tags": ["?wet"]}, "age": -2.5, "box": [0, 0], "y": True},
        None,
        {"attributes": {"colour": "red"}, "annotation": {"tags": {"wet": 1, "old": False}}, "x": None, "y": 0},
    )
    made = indexed(
        folder, "colour=attributes.colour", "tags:labels=annotation.tags", "age:number", "box:number", "xy:labels=x,y"
    )
    assert made.targets["colour"] == Target("colour", "class", ("7", "red"))
    assert made.targets["tags"].classes == ("old", "wet")
    assert made.values("colour").tolist() == [1, -1, 0, -1, 1]
    assert made.values("tags").tolist() == [[1, 1], [0, 0], [0, -1], [-1, -1], [0, 1]]
    assert np.nan_to_num(made.values("age"), nan=-99).tolist() == [[3], [-99], [-2.5], [-99], [-99]]
    assert np.nan_to_num(made.values("box"), nan=-99)[:3].tolist() == [[1, 2.5], [-99, -99], [0, 0]]
    assert made.values("xy").tolist() == [[1, -1], [0, -1], [-1, 1], [-1, -1], [-1, 0]]
    assert made.labels.tolist() == [0, 1, 0, 1, 0]
    assert json.loads((folder / "index.json").read_text())["labels"]["targets"][0] == "colour:class=attributes.colour"
    assert check_shards(folder, jobs=0).good
    before = (folder / "index.json").read_bytes()
    index_shards(folder, jobs=0)  # as it was told
    assert (folder / "index.json").read_bytes() == before


def test_several_keys_of_one_number(tmp_path):
    folder = tars(tmp_path / "t", {"w": 2, "h": 3, "p": {"q": [4, 5]}})
    assert indexed(folder, "size:number=w,h,p.q", place="cls").values("size").tolist() == [[2, 3, 4, 5]]


def test_where_there_is_no_class(tmp_path):
    folder = tars(tmp_path / "t", {"age": 1}, {"age": 2}, beside=())
    made = indexed(folder, "age:number", place="none")
    assert (made.classes, made.labels.tolist(), made.values("age").tolist()) == ((), [-1, -1], [[1], [2]])
    assert check_shards(folder, jobs=0).good
    assert index_shards(folder, jobs=0)["t"].digest == made.digest
    with pytest.raises(UserError, match="a list of classes, where there is no class"):
        indexed(folder, "age:number", place="none", classes=tmp_path / "names.txt")


def test_the_whole_path_of_folders(tmp_path):
    names = ["animal/dog/1", "animal/dog/poodle/2", "./plant/3"]
    tar_of(tmp_path / "t" / "0.tar", [(f"{name}.jpg", IMAGE) for name in names])
    made = indexed(tmp_path / "t", place="folders")
    assert made.classes == ("animal/dog", "animal/dog/poodle", "plant")
    assert made.labels.tolist() == [0, 1, 2]
    assert check_shards(tmp_path / "t", jobs=0).good
    assert [folders_of(name) for name in ("1.jpg", "../a/1.jpg", "/a//b/1.jpg", "C:/a/1.jpg")] == ["", "", "a/b", "a"]


def test_lists_of_classes(tmp_path):
    (tmp_path / "colours.txt").write_text("white\nred\nblue\n")
    folder = tars(tmp_path / "t", {"colour": "red"}, {"colour": "blue"})
    made = indexed(folder, "colour", target_classes={"colour": tmp_path / "colours.txt"})
    assert made.targets["colour"].classes == ("white", "red", "blue")
    assert made.values("colour").tolist() == [1, 2]
    # the list is kept, and may come from an index; numbers are positions in it
    assert indexed(folder, "colour").values("colour").tolist() == [1, 2]
    other = tars(tmp_path / "u", {"colour": 2}, {"colour": 0})
    made = indexed(other, "colour", target_classes={"colour": folder})
    assert made.values("colour").tolist() == [2, 0]
    assert check_shards(other, jobs=0).good
    tars(tmp_path / "u", {"colour": "green"}, {"colour": "red"})
    with pytest.raises(UserError, match=r'colour: "green" is not among the 3 classes of the earlier index') as caught:
        indexed(other, "colour")
    assert "--fresh" in caught.value.todo
    assert Manifest.open(other).values("colour").tolist() == [2, 0]  # the earlier index is as it was
    assert indexed(other, "colour", fresh=True).targets["colour"].classes == ("green", "red")
    with pytest.raises(UserError, match='no target "age" with classes'):
        indexed(other, "colour", target_classes={"age": folder})


@pytest.mark.parametrize(
    ("target", "said", "message"),
    [
        ("colour=attributes.color", {"attributes": {"colour": "red"}}, 'did you mean "attributes.colour"?'),
        ("colour=hue", {"a": 1}, 'no sample has the target colour, in its .json at "hue"; its keys: a'),
        ("tags:labels", None, 'no sample has the target tags, in its .json at "tags"'),
        ("colour", {"colour": ["red"]}, "0000: target colour: it is a list; colour:labels takes several"),
        ("colour", {"colour": 1.5}, "0000: target colour: 1.5 is neither a name nor a whole number"),
        ("colour", {"colour": True}, "neither a name nor a whole number"),
        ("colour", {"colour": " "}, "is empty, or holds characters"),
        ("age:number", {"age": "old"}, '0000: target age: "old" is no number'),
        ("age:number", {"age": True}, "true is no number"),
        ("age:number", {"age": []}, "the list of numbers is empty"),
        ("age:number", b'{"age": NaN}', "not finite in 32 bits"),
        ("age:number", b'{"age": 1e999}', "not finite in 32 bits"),
        ("age:number", {"age": 10**400}, "not finite in 32 bits"),
        ("age:number=a,b", {"a": 1}, "null is no number"),
        ("tags:labels", {"tags": "wet"}, "wet is no list of labels"),
        ("tags:labels", {"tags": {"wet": 2}}, 'the label "wet" is 2, not 1, 0 or null'),
        ("age:number", b"{", "0000: "),
    ],
)
def test_what_is_no_value(tmp_path, target, said, message):
    folder = tars(tmp_path / "t", said, said)
    with pytest.raises(UserError, match=re.escape(message)):
        indexed(folder, target)
    assert not (folder / "index.json").exists()


def test_numbers_of_different_counts(tmp_path):
    with pytest.raises(UserError, match="box: samples have 1 to 3 numbers"):
        indexed(tars(tmp_path / "t", {"box": 1}, {"box": [1, 2, 3]}), "box:number")


def test_summaries_by_hand(tmp_path):
    made = make_target_shards(
        tmp_path / "s",
        [
            (Target("colour", "class", ("red", "white")), np.array([0, 0, -1, 1])),
            (Target("tags", "labels", ("a", "b", "c")), np.array([[1, 1, 0], [1, 0, -1], [-1, -1, -1], [1, 1, 1]])),
            (Target("age", "number"), np.array([[1], [np.nan], [3], [8]])),
        ],
        samples=4,
        size=8,
    )
    colour, tags, age = summarise_targets(made)
    assert (colour.counts, colour.missing) == ({"red": 2, "white": 1}, 1)
    assert (tags.counts, tags.known, tags.missing) == ({"a": 3, "b": 2, "c": 1}, {"a": 3, "b": 3, "c": 2}, 1)
    assert tags.cardinality == 2.0  # 2, 1 and 3 of the three that are known
    assert tags.pairs == (Pair(("a", "b"), 2, 1.0), Pair(("a", "c"), 1, 1.0), Pair(("b", "c"), 1, 1.0))
    assert age.columns == (Column(1.0, 4.0, 8.0, pytest.approx((26 / 3) ** 0.5)),)
    assert age.missing == 1


def test_show(tmp_path):
    many = tuple(f"label {i:02d} {'x' * 40}" for i in range(25))
    applies = np.zeros((6, 25), np.int8)
    applies[:, 3], applies[:4, 4], applies[5] = 1, 1, -1
    targets = [
        (Target("colour", "class", ("red", "white")), np.array([0, 0, -1, 1, 1, 1])),
        (Target("tags", "labels", many), applies),
        (Target("box", "number", width=2), np.arange(12).reshape(6, 2)),
        (Target("none", "number"), np.full((6, 1), np.nan)),
    ]
    make_target_shards(tmp_path / "s" / "train", targets, samples=6, size=8, classes=0)
    shown = CliRunner().invoke(app, ["shards", "show", str(tmp_path / "s" / "train")], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    rows = [" ".join(line.split()) for line in shown.output.splitlines() if line.strip()]
    for row in (
        "colour (class) train",
        "red 2",
        "white 3",
        "missing 1 of 6",
        f"label 03 {'x' * 18}... 5",
        "... and 5 more",
        "labels per sample 1.80",
        f"label 03 {'x' * 10}... and label 04 {'x' * 10}...: 4, 100% of the rarer",
        "1: least, mean, most 0 5 10",
        "2: standard deviation 3.416",
        "missing 6 of 6",
        "train: 6 samples in 1 shard, 0.0 MB",
    ):
        assert row in rows, row
