"""Targets of pictures in a CSV file, classes by nested folders: from the source to the index, and back from tars."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from built import assert_same_files, options
from images import encoded, index_shards, make_folder, picture

from tlx.base.errors import UserError
from tlx.data.build.build_parts import Part
from tlx.data.build.write import build_part, build_shards
from tlx.data.shards.check import check_shards
from tlx.data.shards.index import index_folder
from tlx.data.shards.labels import LabelRule
from tlx.data.shards.manifest import Manifest
from tlx.data.shards.target_values import Labels, TargetSpec, as_json, from_cells, parse_specs

ALL = ("colour", "tags:labels", "age:number", "box:number=x,y", "pets:labels=cat,dog")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("targets") / "pictures", 2, 6, 12)


def table(pictures, path, header, rows, images=None):
    """A CSV file beside the pictures: one row for each, after its path."""
    files = images or sorted(str(p) for p in pictures.rglob("*.jpg"))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *header])
        writer.writerows([f, *row] for f, row in zip(files, rows, strict=False))
    return str(path)


def by_hand(pictures, path):
    """Twelve pictures of two classes."""
    header = ["label", "split", "colour", "tags", "age", "x", "y", "cat", "dog"]
    rows = [
        ["a", "train", "red", "wet;old", "3.5", "1", "2", "1", "0"],
        ["a", "train", "", "", "", "", "", "", ""],
        ["a", "train", "blue", "wet;?old", "-1e1", ".5", "2.", "no", "?"],
        ["b", "train", "10", "?", "7", "0", "0", "TRUE", "1.0"],
        ["b", "train", "9", "old;?", "+2", "3", "4", "0", "0"],
        ["b", "val", "red", "new", "1", "1", "1", "0", "1"],
        ["a", "val", "red", "?new", "2", "1", "1", "1", "1"],
    ]
    return table(pictures, path, header, rows)


def values(folder):
    """By key, the targets of each sample, from the .json and .cls of the tars alone."""
    found = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as opened:
            for member in opened:
                found.setdefault(member.name.partition(".")[0], {})[member.name.partition(".")[2]] = opened.extractfile(
                    member
                ).read()
    return found


def in_source_order(manifest, name):
    """Rows of a target, as the CSV has them: by age, which is different in each row of `by_hand`."""
    age = np.nan_to_num(manifest.values("age")[:, 0], nan=-99)
    return manifest.values(name)[np.argsort(age)].tolist()


def test_every_kind_by_hand(pictures, tmp_path):
    build_shards(by_hand(pictures, tmp_path / "t.csv"), tmp_path / "out", options(val=None, targets=ALL))
    train, val = (Manifest.open(tmp_path / "out" / split) for split in ("train", "val"))
    assert {n: t.classes for n, t in train.targets.items() if t.classes} == {
        "label": ("a", "b"),
        "colour": ("10", "9", "blue", "red"),
        "tags": ("new", "old", "wet"),
        "pets": ("cat", "dog"),
    }
    assert (train.targets, train.targets["box"].width) == (val.targets, 2)
    # rows by age: missing, -10, 2, 3.5, 7
    assert in_source_order(train, "colour") == [-1, 2, 1, 3, 0]
    assert in_source_order(train, "tags") == [[0, 0, 0], [0, -1, 1], [-1, 1, -1], [0, 1, 1], [-1, -1, -1]]
    assert in_source_order(train, "pets") == [[-1, -1], [0, -1], [0, 0], [1, 0], [1, 1]]
    box = np.array(in_source_order(train, "box"))
    assert np.isnan(box[0]).all()
    assert box[1:].tolist() == [[0.5, 2], [3, 4], [1, 2], [0, 0]]
    assert in_source_order(val, "tags") == [[1, 0, 0], [-1, 0, 0]]
    assert in_source_order(val, "label") == [1, 0]


def test_tars_say_it_alone(pictures, tmp_path):
    """Read by an index that knows nothing of the build, they give the same index."""
    build_shards(by_hand(pictures, tmp_path / "t.csv"), tmp_path / "out", options(val=None, targets=ALL))
    said = [json.loads(members["json"]) for members in values(tmp_path / "out" / "train").values()]
    first = next(one for one in said if one.get("age") == 3.5)
    assert first == {
        "colour": "red",
        "tags": ["wet", "old"],
        "age": 3.5,
        "box": [1.0, 2.0],
        "pets": {"cat": 1, "dog": 0},
    }
    assert {"tags": [], "pets": {"cat": None, "dog": None}} in said
    there = tmp_path / "there"
    shutil.copytree(
        tmp_path / "out",
        there,
        ignore=lambda _, names: [n for n in names if (not n.endswith(".tar") and "." in n) or n == "targets"],
    )
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    rule = LabelRule.make(targets=("colour", "tags:labels", "age:number", "box:number", "pets:labels"))
    made = index_folder(there, classes=names, labels=rule, jobs=0).manifests
    for split in ("train", "val"):
        assert_same_files(there / split, tmp_path / "out" / split)
    assert made["train"].digest == Manifest.open(tmp_path / "out" / "train").digest


def test_the_index_can_be_made_again_and_checked(pictures, tmp_path):
    out = tmp_path / "out"
    build_shards(by_hand(pictures, tmp_path / "t.csv"), out, options(val=None, targets=ALL))
    before = {p: p.read_bytes() for p in sorted(out.rglob("*.npy")) + sorted(out.rglob("index.json"))}
    report = check_shards(out, jobs=0)
    assert report.good
    assert report.passed_over == ()
    index_shards(out, jobs=0)
    assert {p: p.read_bytes() for p in before} == before
    for path in (*out.glob("*/index.*"), *out.glob("*/targets/*")):
        path.unlink()
    index_shards(out, jobs=0)  # by what the build says
    assert {p: p.read_bytes() for p in before} == before
    index_shards(out, jobs=0, fresh=True)
    assert {p: p.read_bytes() for p in before} == before


def test_a_check_tells_of_other_targets(pictures, tmp_path):
    out = tmp_path / "out"
    build_shards(by_hand(pictures, tmp_path / "t.csv"), out, options(val=None, targets=ALL))
    train = Manifest.open(out / "train")
    age = train.values("age") + 1
    header = json.loads((out / "train" / "index.json").read_text())
    from tlx.data.shards.manifest import write_index

    write_index(
        out / "train",
        classes=train.classes,
        shards=train.shards,
        records=np.array(train.records),
        labels=header["labels"],
        targets=[(t, age if n == "age" else train.values(n)) for n, t in train.targets.items() if n != "label"],
    )
    (told,) = check_shards(out, jobs=0).stale
    assert "000000.tar: its targets are not what the index says (age); tlx shards index" in told


def test_without_a_class(pictures, tmp_path):
    source = table(pictures, tmp_path / "t.csv", ["age"], [[i / 2] for i in range(12)])
    made = build_shards(source, tmp_path / "out", options(label_column="", targets=("age:number",), val=0.25))
    train = Manifest.open(tmp_path / "out" / "train")
    assert (made.classes, train.classes, list(train.targets)) == ((), (), ["age"])
    assert (len(train), len(Manifest.open(tmp_path / "out" / "val"))) == (9, 3)
    assert {tuple(sorted(m)) for m in values(tmp_path / "out" / "train").values()} == {("jpg", "json")}
    assert made.statistics["train"].counts == {}
    report = check_shards(tmp_path / "out", jobs=0)
    assert report.good
    json.dumps(report.plain())
    before = (tmp_path / "out" / "train" / "index.json").read_bytes()
    index_shards(tmp_path / "out", jobs=0)
    assert (tmp_path / "out" / "train" / "index.json").read_bytes() == before
    assert build_shards(source, tmp_path / "out", options(label_column="", targets=("age:number",), val=0.25)).already
    with pytest.raises(UserError, match="two classes or more; here: none"):
        build_shards(source, tmp_path / "other", options(label_column=""))


def test_a_class_that_has_few_pictures_is_split_by_class_as_before(pictures, tmp_path):
    rows = [["ab"[i % 2], i] for i in range(12)]
    source = table(pictures, tmp_path / "t.csv", ["label", "age"], rows)
    build_shards(source, tmp_path / "with", options(targets=("age:number",), val=0.34))
    build_shards(source, tmp_path / "without", options(val=0.34))
    for split in ("train", "val"):
        one, other = (Manifest.open(tmp_path / name / split) for name in ("with", "without"))
        assert one.counts().tolist() == other.counts().tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert "targets" not in json.loads((tmp_path / "without" / split / "index.json").read_text())
    said = json.loads((tmp_path / "without" / "build.json").read_text())
    assert not {"targets", "label_separator", "nested"} & {*said, *said["request"]}


def test_parts_and_a_second_time(pictures, tmp_path):
    source, how = by_hand(pictures, tmp_path / "t.csv"), options(val=None, targets=ALL, shard_samples=2)
    build_shards(source, tmp_path / "whole", how)
    for number in (2, 1):
        build_part(source, tmp_path / "parts", Part(number, 2), how)
    build_shards(source, tmp_path / "parts", how)
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    assert build_shards(source, tmp_path / "whole", how).already
    with pytest.raises(UserError, match=r"of another request \(targets: \['colour', .* there, \(\) now\)"):
        build_shards(source, tmp_path / "whole", options(val=None, shard_samples=2))
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace("3.5", "3.25"))
    with pytest.raises(UserError, match="the source has changed"):
        build_shards(source, tmp_path / "whole", how)


def test_an_interrupted_build_of_other_targets_is_begun_anew(pictures, tmp_path, monkeypatch, capsys):
    from tlx.data.build import write

    source, how = by_hand(pictures, tmp_path / "t.csv"), options(val=None, targets=ALL, shard_samples=2)
    monkeypatch.setattr(write, "_finish", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_shards(source, tmp_path / "out", how)
    monkeypatch.undo()
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace("3.5", "3.25"))
    build_shards(source, tmp_path / "out", how)
    assert "an interrupted build of other pictures is begun anew" in capsys.readouterr().err
    assert 3.25 in Manifest.open(tmp_path / "out" / "train").values("age")


@pytest.mark.parametrize(
    ("target", "cell", "message"),
    [
        ("age:number", "nan", 'target age: "nan" is no number'),
        ("age:number", "inf", '"inf" is no number'),
        ("age:number", "1_000", '"1_000" is no number'),
        ("age:number", "1,5", '"1,5" is no number'),
        ("age:number", "0x10", "is no number"),
        ("age:number", "1e39", "not finite in 32 bits"),
        ("age:number=age,other", "1", "1 of 2 numbers are missing; give all, or none"),
        ("age:labels=age,other", "-1", '"-1" does not say whether a label applies: 1, 0, or nothing for unknown'),
        ("age:labels=age,other", "2", '"2" does not say'),
        ("age:labels", "a;?a", 'the label "a" applies and is unknown'),
        ("age", "a\x07", "characters that cannot be shown"),
    ],
)
def test_cells_that_say_nothing_sensible(pictures, tmp_path, target, cell, message):
    source = table(pictures, tmp_path / "t.csv", ["label", "age", "other"], [["a", "", ""], ["b", cell, ""]])
    with pytest.raises(UserError, match=message.replace("?", r"\?").replace("(", r"\(")) as caught:
        build_shards(source, tmp_path / "out", options(val=0.5, targets=(target,)))
    assert str(caught.value).startswith(f"{source}:3: ")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("colr",), 'no column "colr" for a target; did you mean "colour"'),
        (("colour:klass",), 'no kind of target "klass"; did you mean "class"'),
        (("colour=",), "names no source"),
        (("a/b=colour",), "is no target: a name has letters"),
        (("../x=colour",), "is no target"),
        (("label=colour",), '"label" is the name of the class'),
        (("colour", "Colour=x"), 'the target "colour" is named twice'),
        (("box=x,y",), 'the class "box" has 2 sources'),
        (("empty",), "empty: every sample lacks it"),
        (("empty:number",), "empty: every sample lacks its number"),
        (("tags:labels=?,x",), 'the label "?" begins with ?'),
    ],
)
def test_targets_that_cannot_be(pictures, tmp_path, targets, message):
    header = ["label", "colour", "x", "y", "empty", "?"]
    source = table(pictures, tmp_path / "t.csv", header, [["a", "red", 1, 0, "", 1], ["b", "blue", 0, 1, "", 0]] * 2)
    import re

    with pytest.raises(UserError, match=re.escape(message)):
        build_shards(source, tmp_path / "out", options(val=0.5, targets=targets))


def test_other_sources_have_no_targets(pictures, tmp_path):
    with pytest.raises(UserError, match="targets are columns of a CSV file"):
        build_shards(str(pictures), tmp_path / "out", options(targets=("age",)))
    source = table(pictures, tmp_path / "t.csv", ["label"], [["a"], ["b"]])
    with pytest.raises(UserError, match="--nested is for folders"):
        build_shards(source, tmp_path / "out", options(nested=True))


def test_specs_say_themselves():
    for text in ("colour", "tags:labels", "box:number=x,y", 'odd=":a,b=c"', 'two:labels="a,b",c'):
        (spec,) = parse_specs([text])
        assert parse_specs([str(spec)]) == (spec,)
    assert TargetSpec.parse('two:labels="a,b",c').sources == ("a,b", "c")


def test_labels_with_another_separator_and_what_is_written_of_them():
    spec = TargetSpec.parse("tags:labels")
    value = from_cells(spec, ["a | b|| ? c |a"], "|")
    assert value == Labels(("a", "b"), (), ("c",))
    assert as_json([spec], [value]) == '{"tags": ["a", "b", "?c"]}'
    assert as_json([spec], [from_cells(spec, ["?"], ";")]) == "{}"
    assert as_json([spec], [from_cells(spec, [""], ";")]) == '{"tags": []}'


# Classes by nested folders


def tree(folder, *paths):
    for place, path in enumerate(paths):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(place % 3, size=12, seed=place)))
    return folder


def test_a_class_is_the_path_of_folders(tmp_path):
    source = tree(
        tmp_path / "p",
        "animal/dog/poodle/1.jpg",
        "animal/dog/poodle/2.jpg",
        "animal/dog/3.jpg",
        "animal/dog/4.jpg",
        "plant/5.jpg",
        "plant/6.jpg",
        "loose.jpg",
    )
    (source / "animal" / "empty").mkdir()
    made = build_shards(str(source), tmp_path / "out", options(val=0.5, nested=True))
    assert made.classes == ("animal/dog", "animal/dog/poodle", "plant")
    assert Manifest.open(tmp_path / "out" / "train").counts().tolist() == [1, 1, 1]
    assert [p.name for p in made.left_out] == [str(source / "loose.jpg")]
    assert sorted(p.name for p in (tmp_path / "out" / "train").iterdir()) == ["000000.tar", "index.json", "index.npy"]
    plain = build_shards(str(source), tmp_path / "plain", options(val=0.5))
    assert plain.classes == ("animal", "plant")


def test_nested_below_splits(tmp_path):
    source = tree(tmp_path / "p", *(f"{s}/a/{c}/1.jpg" for s in ("train", "val") for c in ("x", "y")), "val/a/x/2.jpg")
    made = build_shards(str(source), tmp_path / "out", options(val=None, nested=True))
    assert made.classes == ("a/x", "a/y")
    assert Manifest.open(tmp_path / "out" / "val").counts().tolist() == [2, 1]


def test_nested_links_are_not_read_as_two_classes(tmp_path):
    source = tree(tmp_path / "p", "a/x/1.jpg", "a/x/2.jpg", "a/y/3.jpg", "b/4.jpg")
    outside = tree(tmp_path / "elsewhere", "5.jpg", "in/6.jpg")
    os.symlink(source / "a" / "y", source / "a" / "x" / "to_y")
    os.symlink(source, source / "b" / "up")
    os.symlink(outside, source / "b" / "out")
    made = build_shards(str(source), tmp_path / "out", options(val=0, nested=True))
    assert made.classes == ("a/x", "a/y", "b", "b/out", "b/out/in")
    assert Manifest.open(tmp_path / "out" / "train").counts().tolist() == [2, 1, 1, 1, 1]
    assert {p.name for p in made.left_out} == {str(source / "a/x/to_y"), str(source / "b/up")}
