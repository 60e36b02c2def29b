"""Which class a label is: one rule for folders, members of tars, CSV files and lists. And what people are warned of."""

from __future__ import annotations

import json

import pytest
from foreign_tars import samples, tar_of
from images import encoded, index_shards, make_folder, picture
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.shards import shards
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.shards.check import check_shards
from tlx.data.shards.class_warnings import class_warnings
from tlx.data.shards.index import index_folder, label_rule
from tlx.data.shards.labels import LabelRule
from tlx.data.shards.manifest import Manifest

NAMES, POSITIONS = LabelRule(numbers="names"), LabelRule(numbers="positions")
TWELVE = [str(i) for i in range(12)]


def in_folders(names):
    for i, name in enumerate(names):
        yield f"{name}/{i:04d}.jpg", encoded(picture(i % 3, size=16, seed=i))


def run(*arguments):
    return CliRunner().invoke(shards, [str(a) for a in arguments], catch_exceptions=False)


def as_before(folder, classes):
    """The index as earlier versions made it: another order of the same classes, by the folders' names."""
    (folder.parent / "names.txt").write_text("\n".join(classes), encoding="utf-8")
    return index_shards(folder, classes=folder.parent / "names.txt", labels=LabelRule("folder"), jobs=0)[folder.name]


# One rule


@pytest.mark.parametrize("kind", ["folder", "cls", "txt", "json", "csv"])
def test_twelve_numbers_are_the_same_classes_whatever_holds_them(tmp_path, kind):
    """0 to 11: by value, so that name and position are one; what was sorted as text gave ten wrong labels of twelve."""
    members = in_folders(TWELVE) if kind == "folder" else samples(TWELVE, kind)
    if kind == "csv":
        make_folder(tmp_path / "p", 12, 1, 16)
        rows = "".join(f"p/class{i}/0000.jpg,{i}\n" for i in range(12))
        (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
        build_shards(tmp_path / "list.csv", tmp_path / "s", BuildOptions(val=0, jobs=0))
        assert Manifest.open(tmp_path / "s" / "train").classes == tuple(TWELVE)
        return
    tar_of(tmp_path / "d" / "a.tar", members)
    manifest = index_shards(tmp_path / "d", jobs=0)["d"]
    assert manifest.classes == tuple(TWELVE)
    assert manifest.labels.tolist() == list(range(12))
    tar_of(tmp_path / "val" / "a.tar", samples([11, 3, 10]))
    val = index_shards(tmp_path / "val", classes=tmp_path / "d", jobs=0)["val"]
    assert (val.classes, val.labels.tolist()) == (manifest.classes, [11, 3, 10])


def test_an_earlier_index_keeps_its_order_and_what_follows_asks(tmp_path):
    """0, 1, 10, 11, 2 ...: a 2 in a .cls is the class 2, the fifth, or the class at position 2, which is 10."""
    tar_of(tmp_path / "train" / "a.tar", in_folders(TWELVE))
    train = as_before(tmp_path / "train", sorted(TWELVE))
    assert index_shards(tmp_path / "train", jobs=0)["train"].classes == tuple(sorted(TWELVE)) == train.classes
    assert index_shards(tmp_path / "train", jobs=0)["train"].digest == train.digest
    tar_of(tmp_path / "val" / "a.tar", samples(TWELVE))
    with pytest.raises(
        UserError,
        match=r'2 may be the class "2", or the one at position 2, which is "10"\n.*--numbers names, or --numbers pos',
    ):
        index_shards(tmp_path / "val", classes=tmp_path / "train", jobs=0)
    assert not (tmp_path / "val" / "index.json").exists()
    named = index_shards(tmp_path / "val", classes=tmp_path / "train", labels=NAMES, jobs=0)["val"]
    assert named.classes == train.classes
    assert named.labels.tolist() == train.labels.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
    assert check_shards(tmp_path / "val", jobs=0).good
    assert index_shards(tmp_path / "val", jobs=0)["val"].labels.tolist() == named.labels.tolist()  # it is remembered
    run("index", tmp_path / "val", "--classes", tmp_path / "train", "--numbers", "positions", "--jobs", 0)
    assert Manifest.open(tmp_path / "val").labels.tolist() == list(range(12))
    assert label_rule(tmp_path / "val") == POSITIONS
    assert check_shards(tmp_path / "val", jobs=0).good
    fresh = index_shards(tmp_path / "train", fresh=True, jobs=0)["train"]
    assert fresh.classes == tuple(TWELVE)


@pytest.mark.parametrize(
    ("known", "labels", "rule", "expected"),
    [
        (["rose", "iris"], [0, 1, 1], None, [0, 1, 1]),  # no name is a number: positions
        (["rose", "iris"], ["iris", "rose"], None, [1, 0]),
        (["2", "1"], [1, 2], None, [1, 0]),  # 2 is no position
        (["1", "2", "3"], [0, 2], None, [0, 2]),  # 0 is no name
        (["1", "2", "3"], [1, 2], None, '1 may be the class "1", or the one at position 1, which is "2"'),
        (["1", "2", "3"], [1, 2], "names", [0, 1]),
        (["1", "2", "3"], [1, 2], "positions", [1, 2]),
        (["0", "1", "x"], [1, 0], None, [1, 0]),  # both are one
        (["0", "1", "x"], [1, "x"], None, [1, 2]),
        (["rose", "iris"], [0, 2], None, "the label 2 is not among the 2 classes"),
        (["rose", "iris"], ["rose", "Iris"], None, 'the label Iris is not among the 2 classes.*did you mean "iris"'),
        (["rose", "iris"], [0], "names", "the label 0 is not among the 2 classes"),
        (["rose", "iris"], ["rose"], "positions", "the label rose is not among the 2 classes"),
        (None, [1, 2], None, "labels go from 1 to 2, but none is 0"),
        (None, [1, 2, 10], "names", [0, 1, 2]),
        (None, [1, 3], "positions", [1, 3]),
        (None, ["b", 0], "names", [1, 0]),
        (None, ["007", "08"], "names", [0, 1]),
        (None, ["1", "01", "0"], None, "two labels are one number: 0, 01, 1"),
        (None, [-1, "x"], None, [0, 1]),
        (None, [2_000_000_000], "positions", "too large for a position"),
    ],
)
def test_a_number_is_a_name_or_a_position(tmp_path, known, labels, rule, expected):
    tar_of(tmp_path / "d" / "a.tar", samples(labels))
    classes = None
    if known:
        classes = tmp_path / "names.txt"
        classes.write_text("\n".join(known))
    rule = LabelRule(numbers=rule) if rule else None
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            index_shards(tmp_path / "d", classes=classes, labels=rule, jobs=0)
        return
    manifest = index_shards(tmp_path / "d", classes=classes, labels=rule, jobs=0)["d"]
    assert manifest.labels.tolist() == expected
    assert known is None or manifest.classes == tuple(known)
    assert check_shards(tmp_path / "d", jobs=0).good


def test_the_name_of_a_folder_is_a_name(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", in_folders(["1", "2"]))
    (tmp_path / "names.txt").write_text("rose\niris\ntulip\n")
    with pytest.raises(UserError, match=r"the label 1 is not among the 3 classes[\s\S]*--numbers positions, if"):
        index_shards(tmp_path / "d", classes=tmp_path / "names.txt", jobs=0)
    manifest = index_shards(tmp_path / "d", classes=tmp_path / "names.txt", labels=POSITIONS, jobs=0)["d"]
    assert manifest.labels.tolist() == [1, 2]
    assert json.loads((tmp_path / "d" / "index.json").read_text())["labels"] == {
        "from": "folder",
        "numbers": "positions",
    }
    assert index_shards(tmp_path / "d", fresh=True, jobs=0)["d"].classes == ("1", "2")


def built(tmp_path, names):
    """Shards of ours, whose .cls hold positions; of each class as many pictures as 4 and its place here."""
    for place, name in enumerate(names):
        make_folder(tmp_path / "p", 1, 4 + place, 16, names=[name])
    build_shards(tmp_path / "p", tmp_path / "s", BuildOptions(val=0.25, jobs=0))
    return tmp_path / "s"


def test_our_own_shards_hold_positions(tmp_path):
    shards_of = built(tmp_path, ["1", "2", "3", "x"])
    assert Manifest.open(shards_of / "val").classes == ("1", "2", "3", "x")
    before = Manifest.open(shards_of / "train")
    assert label_rule(shards_of / "train") == POSITIONS  # a 1 in a .cls is the class 2
    assert index_shards(shards_of / "train", jobs=0)["train"].digest == before.digest
    assert index_shards(shards_of / "train", fresh=True, jobs=0)["train"].digest == before.digest
    header = json.loads((shards_of / "train" / "index.json").read_text())
    del header["labels"]  # as an earlier version wrote it
    (shards_of / "train" / "index.json").write_text(json.dumps(header))
    assert index_shards(shards_of / "train", jobs=0)["train"].labels.tolist() == before.labels.tolist()
    assert check_shards(shards_of, jobs=0).good


def test_an_index_of_ours_says_nothing_of_numbers_without_need(tmp_path):
    assert "labels" not in json.loads((built(tmp_path, ["0", "1", "2"]) / "train" / "index.json").read_text())


def test_a_list_in_another_order_than_the_build_is_not_taken_by_position(tmp_path):
    folder = built(tmp_path, ["ant", "bee"])
    (tmp_path / "names.txt").write_text("bee\nant\n")
    with pytest.raises(UserError, match=r'"ant" is at position 0 in the earlier index or build, at 1 in --classes'):
        index_shards(folder / "train", classes=tmp_path / "names.txt", jobs=0)
    turned = index_shards(folder / "train", classes=tmp_path / "names.txt", labels=POSITIONS, jobs=0)["train"]
    assert turned.classes == ("bee", "ant")
    (tmp_path / "names.txt").write_text("Ant\nBee\n")  # other names for the same positions
    assert index_shards(folder / "val", classes=tmp_path / "names.txt", jobs=0)["val"].classes == ("Ant", "Bee")


def test_a_list_in_another_order_than_the_earlier_list_is_not_taken_by_position(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", samples([0, 1, 1]))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    assert counts(index_shards(tmp_path / "d", classes=names, jobs=0)["d"]) == {"ant": 1, "bee": 2}
    names.write_text("bee\nant\n")
    with pytest.raises(UserError, match='"ant" is at position 0 in the earlier index or build, at 1 in --classes'):
        index_shards(tmp_path / "d", classes=names, jobs=0)
    assert counts(index_shards(tmp_path / "d", classes=names, fresh=True, jobs=0)["d"]) == {"bee": 1, "ant": 2}


def counts(manifest):
    return dict(zip(manifest.classes, manifest.counts().tolist(), strict=True))


def test_what_was_remembered_of_numbers_is_not_said_of_a_new_list(tmp_path):
    """The build remembers that a 1 in a .cls is a position, in its own list: x, 1, 2, 3 would be wrong throughout."""
    train = built(tmp_path, ["1", "2", "3", "x"]) / "train"
    right = {"1": 3, "2": 4, "3": 4, "x": 5}  # 4 to 7 less a quarter for validation
    assert counts(Manifest.open(train)) == right
    for listed in (["x", "1", "2", "3"], ["1", "2", "more", "3", "x"]):
        (tmp_path / "names.txt").write_text("\n".join(listed))
        for fresh in (False, True):
            with pytest.raises(UserError, match=r"the labels are positions, and [\s\S]* --numbers positions, if"):
                index_shards(train, classes=tmp_path / "names.txt", fresh=fresh, jobs=0)
    (tmp_path / "names.txt").write_text("1\n2\n3\nx\ny\n")  # what there was keeps its place
    assert counts(index_shards(train, classes=tmp_path / "names.txt", jobs=0)["train"]) == {**right, "y": 0}
    (tmp_path / "names.txt").write_text("x\n1\n2\n3\n")
    said = index_shards(train, classes=tmp_path / "names.txt", labels=POSITIONS, jobs=0)["train"]
    assert counts(said) == {"x": 3, "1": 4, "2": 4, "3": 5}


def test_a_list_by_value_for_a_build_that_was_sorted_as_text(tmp_path):
    """In the list 0 to 11 name and position are one; in the build, by an earlier version, position 2 is class 10."""
    tar_of(tmp_path / "s" / "train" / "a.tar", samples(range(12)))
    (tmp_path / "s" / "build.json").write_text(json.dumps({"classes": sorted(TWELVE)}))
    before = index_shards(tmp_path / "s" / "train", jobs=0)["train"]
    assert [before.classes[i] for i in before.labels[:4]] == ["0", "1", "10", "11"]
    (tmp_path / "names.txt").write_text("\n".join(TWELVE))
    with pytest.raises(UserError, match='"10" is at position 2 in the earlier index or build, at 10 in --classes'):
        index_shards(tmp_path / "s" / "train", classes=tmp_path / "names.txt", jobs=0)
    again = index_shards(tmp_path / "s" / "train", jobs=0)["train"]
    assert (again.classes, again.labels.tolist()) == (before.classes, before.labels.tolist())


# A list that is wrong


def test_a_misspelt_class_of_an_earlier_index(tmp_path):
    tar_of(tmp_path / "d" / "a.tar", in_folders(["rose", "tulip", "tulpi"]))
    assert index_shards(tmp_path / "d", jobs=0)["d"].classes == ("rose", "tulip", "tulpi")
    tar_of(tmp_path / "d" / "a.tar", in_folders(["rose", "tulip", "tulip"]))
    kept = index_folder(tmp_path / "d", jobs=0)
    assert (kept.manifests["d"].classes, kept.kept) == (("rose", "tulip", "tulpi"), ("tulpi",))
    said = run("index", tmp_path / "d", "--jobs", 0)
    assert (
        'warning: 1 class without a sample kept from the earlier index or build; --fresh makes a new list: "tulpi"'
        in (said.output)
    )
    fresh = run("index", tmp_path / "d", "--fresh", "--jobs", 0)
    assert (fresh.exit_code, "without a sample" in fresh.output) == (0, False)
    assert Manifest.open(tmp_path / "d").classes == ("rose", "tulip")
    tar_of(tmp_path / "d" / "a.tar", in_folders(["rose", "tulipa"]))
    with pytest.raises(UserError, match=r'tulipa is not among .*did you mean "tulip"\?[\s\S]*--fresh'):
        index_shards(tmp_path / "d", jobs=0)


def test_fresh_forgets_where_the_labels_were(tmp_path):
    members = [(f"{c}/{i}.{e}", d) for c in "ab" for i in "01" for e, d in (("jpg", PIXELS), ("cls", i.encode()))]
    tar_of(tmp_path / "d" / "a.tar", members)
    index_shards(tmp_path / "d", labels=LabelRule("folder"), jobs=0)
    assert index_shards(tmp_path / "d", jobs=0)["d"].labels.tolist() == [0, 0, 1, 1]
    assert index_shards(tmp_path / "d", fresh=True, jobs=0)["d"].labels.tolist() == [0, 1, 0, 1]
    assert label_rule(tmp_path / "d") == LabelRule()


PIXELS = encoded(picture(0, size=16))

# Warnings


@pytest.mark.parametrize(
    ("counts", "warnings"),
    [
        ({"train": {"a": 9, "b": 9}, "val": {"a": 3, "b": 3}}, []),
        ({"train": dict.fromkeys(map(str, range(1, 103)), 9)}, []),
        ({"train": {"tench, Tinca tinca": 9, "goldfish, Carassius auratus": 9}}, []),
        (
            {"d": {"a": 1, "b": 1, "c": 1}},
            ["3 classes for 3 samples: is the label a name or a number of each picture?"],
        ),
        ({"d": {"a": 5, "b": 0}}, ["there is only one class; a classifier needs two or more"]),
        ({"d": {"null": 5, "b": 9, "<NA>": 5}}, ['looks like a missing label: "null", "<NA>"']),
        (
            {"d": {"cat": 9, "dog": 9, "cat,dog": 9, "[1]": 9}},
            ['looks like several labels, of which a sample has one here: "cat,dog", "[1]"'],
        ),
        ({"d": {"0.5": 9, "3e1": 9, "2": 9}}, ['looks like a measured number, not a class: "0.5", "3e1"']),
        ({"d": {"rose": 9, "7": 9}}, ['looks like a number among names: "7"']),
        (
            {"d": {"3": 9, "1990": 9, "2020": 9}},
            ["numbers with gaps, from 3 to 2020, for classes: are they measured, or do they count?"],
        ),
        ({"d": {"Rose": 9, "rose": 9}}, ['differ only by capitals or Unicode normalisation: "Rose" and "rose"']),
        (
            {"d": {"\xe9": 9, "e\u0301": 9}},
            [r"differ only by capitals or Unicode normalisation: '\xe9' and 'e\u0301'"],
        ),
        (
            {"Train": {"a": 9, "b": 9, "c": 0}, "validation": {"a": 9, "b": 0, "c": 1}},
            [
                '1 of 3 classes have no sample in validation: "b"',
                '1 of 3 classes have no sample in training: "c"',
            ],
        ),
        ({}, []),
        ({"d": {}}, []),
    ],
)
def test_classes_that_were_hardly_meant(counts, warnings):
    assert class_warnings(counts) == warnings


def test_the_commands_warn_of_classes(tmp_path):
    make_folder(tmp_path / "p" / "train", 3, 3, 16, names=["Rose", "rose", "null"])
    make_folder(tmp_path / "p" / "val", 2, 2, 16, names=["Rose", "rose"])
    said = run("build", tmp_path / "p", tmp_path / "s", "--jobs", 0)
    for output in (
        said.output,
        run("check", tmp_path / "s", "--jobs", 0).output,
        run("index", tmp_path / "s", "--jobs", 0).output,
    ):
        assert 'warning: classes: looks like a missing label: "null"' in output
        assert 'warning: classes: differ only by capitals or Unicode normalisation: "Rose" and "rose"' in output
        assert 'warning: classes: 1 of 3 classes have no sample in val: "null"' in output


def test_a_build_by_the_columns_of_others(tmp_path):
    make_folder(tmp_path / "p", 2, 2, 16)
    rows = "".join(
        f"p\\class{i}\\000{j}.jpg;{'ab'[i]};{s};x\n" for i in (0, 1) for j, s in enumerate(("Train", "Test"))
    )
    (tmp_path / "list.csv").write_text(f"image;species;part;more\n{rows}", encoding="utf-8-sig")
    options = ["--path-column", "image", "--label-column", "species", "--split-column", "part", "--separator", ";"]
    said = run("build", tmp_path / "list.csv", tmp_path / "s", *options, "--jobs", 0)
    assert said.exit_code == 0, said.output
    assert "left out, column that is not used: 1 (more)" in said.output
    assert "nothing done" in run("build", tmp_path / "list.csv", tmp_path / "s", *options, "--jobs", 0).output
    manifest = Manifest.open(tmp_path / "s" / "test")
    assert (manifest.classes, sorted(manifest.labels.tolist())) == (("a", "b"), [0, 1])
