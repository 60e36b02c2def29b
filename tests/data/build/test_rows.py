"""Parquet files and data sets of Hugging Face: what is read of them, and that their pictures stay what they are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile

import datasets
import pyarrow as pa
import pytest
from built import assert_same_files, options
from commands import environment, tlx
from hub import serve
from images import encoded, make_folder, picture
from pyarrow import parquet

from tlx.base.errors import UserError
from tlx.data.build.build_parts import Part
from tlx.data.build.sources import Reading
from tlx.data.build.specs import read_source
from tlx.data.build.write import SourceChanged, build_part, build_shards
from tlx.data.shards.manifest import Manifest
from tlx.init import pictures as of_init

NAMES = ["zebra", "ant"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
COMMIT = "f" * 40


def rows(count, first=0):
    """JPEGs of two classes in turn; the names that they had lead elsewhere."""
    jpegs = [encoded(picture(i % 2, size=16, seed=first + i)) for i in range(count)]
    return [{"image": {"bytes": jpeg, "path": "../../x.jpg"}, "label": i % 2} for i, jpeg in enumerate(jpegs)]


TRAIN, VAL = rows(14), rows(4, 100)


def write(path, rows, features=FEATURES, *, group=4):
    """A parquet file with groups of so many rows; `features`: what Hugging Face notes in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = features.arrow_schema if features else None
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


@pytest.fixture
def src(tmp_path):
    write(tmp_path / "src" / "data" / "train-00000-of-00002.parquet", TRAIN[:9])
    write(tmp_path / "src" / "data" / "train-00001-of-00002.parquet", TRAIN[9:])
    write(tmp_path / "src" / "data" / "validation-00000-of-00001.parquet", VAL)
    return tmp_path / "src"


def save(path, **splits):
    found = {name: datasets.Dataset.from_list(rows, features=FEATURES) for name, rows in splits.items()}
    datasets.DatasetDict(found).save_to_disk(path)
    return path


def stored(folder):
    """Picture -> label, as the tars of a split have them."""
    found = {}
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as opened:
            for member in opened:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = opened.extractfile(member).read()
    return {sample["jpg"]: int(sample["cls"]) for sample in found.values()}


def as_given(rows):
    return {row["image"]["bytes"]: row["label"] for row in rows}


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_pictures_keep_their_bytes_and_classes_their_order(src, tmp_path, kind):
    src = src if kind == "parquet" else save(tmp_path / "saved", train=TRAIN, validation=VAL)
    made = build_shards(str(src), tmp_path / "out", options(val=None, shard_samples=5, jobs=2))
    assert made.classes == ("zebra", "ant")
    assert stored(tmp_path / "out" / "train") == as_given(TRAIN)
    assert stored(tmp_path / "out" / "val") == as_given(VAL)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"build.json", "train", "val"}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        ([10, 9, 10, 2], ("2", "9", "10")),
    ],
)
def test_classes_without_a_list_are_those_of_a_csv(tmp_path, labels, classes):
    plain = [{"bild": row["image"]["bytes"], "species": label} for row, label in zip(TRAIN, labels, strict=False)]
    file = write(tmp_path / "x.parquet", plain, None)
    source = read_source(str(file), val=0, reading=Reading(label_column="Species"))
    assert source.classes == classes
    assert [classes[p.label] for p in source.splits["train"]] == list(map(str, labels))
    assert source.splits["train"][2].origin == f"{file} row 2"
    data = datasets.Dataset.from_list(plain)
    data.save_to_disk(tmp_path / "one")
    saved = read_source(str(tmp_path / "one"), val=0.25, reading=Reading(label_column="species"))
    assert (saved.classes, {s: len(p) for s, p in saved.splits.items()}) == (classes, {"train": 3, "val": 1})


def test_other_splits_columns_and_splits_without_labels_are_named(tmp_path):
    unlabelled = [{**row, "label": -1} for row in VAL]
    save(tmp_path / "saved", train=TRAIN, dev=VAL, extra=VAL, test=unlabelled)
    source = read_source(str(tmp_path / "saved"))
    assert {s: len(p) for s, p in source.splits.items()} == {"train": 14, "val": 4}
    assert [(p.kind, p.name.rpartition(" ")[2]) for p in source.left_out] == [
        ("split that is none of train, val and test", "extra"),
        ("split without labels", "test"),
    ]
    write(tmp_path / "p" / "train.parquet", TRAIN, None)  # numbers without names
    write(tmp_path / "p" / "test.parquet", unlabelled, None)
    source = read_source(str(tmp_path / "p"), val=0)
    assert ("test" in source.splits, source.classes) == (False, ("0", "1"))
    assert [p.kind for p in source.left_out] == ["split without labels"]
    table = [{**row, "Split": "val" if i < 4 else "training", "by": "me"} for i, row in enumerate(TRAIN)]
    source = read_source(str(write(tmp_path / "x.parquet", table, None)))
    assert {s: len(p) for s, p in source.splits.items()} == {"val": 4, "train": 10}
    assert [p.name for p in source.left_out] == ["by"]


def test_targets_are_columns(tmp_path):
    tags = datasets.ClassLabel(names=["wet", "old"])
    features = datasets.Features(
        {**FEATURES, "tags": datasets.List(tags), "age": datasets.Value("float32"), "hue": tags}
    )
    given = [{**row, "tags": [i % 2], "age": i / 2, "hue": i % 2} for i, row in enumerate(TRAIN)]
    file = write(tmp_path / "x.parquet", given, features)
    build_shards(str(file), tmp_path / "out", options(targets=("tags:labels", "age:number", "hue")))
    train = Manifest.open(tmp_path / "out" / "train")
    assert train.targets["hue"].classes == train.targets["tags"].classes == ("wet", "old")
    ages = {i / 2: [i % 2 == 0, i % 2 == 1] for i in range(14)}
    assert all(
        ages[age] == tags for age, tags in zip(train.values("age")[:, 0], train.values("tags").tolist(), strict=True)
    )


def test_a_row_without_a_picture_is_a_bad_picture(src, tmp_path):
    """Also one that only names a file, which is not opened, whatever lies there."""
    secret = make_folder(tmp_path / "p", 1, 1, 16) / "class0" / "0000.jpg"
    odd = [{"bytes": None, "path": str(secret)}, None, {"bytes": TRAIN[0]["image"]["bytes"][:300], "path": None}]
    file = write(src / "data" / "train-3.parquet", [{"image": image, "label": 0} for image in odd])
    saved = save(tmp_path / "saved", train=TRAIN + [{"image": i, "label": 0} for i in odd[1:]], val=VAL)
    for folder, count in ((src, 3), (saved, 2)):
        with pytest.raises(
            UserError, match=rf"{count} unreadable pictures:[\s\S]*there is no picture in this row[\s\S]*--skip"
        ):
            build_shards(str(folder), tmp_path / f"{count}", options(val=None))
        made = build_shards(str(folder), tmp_path / f"{folder.name}-out", options(val=None, skip_bad=True))
        assert (len(made.bad), made.splits["train"]["samples"]) == (count, 14)
    made = build_shards(str(src), tmp_path / "src-out", options(val=None, skip_bad=True))
    assert f"{file} row 1: there is no picture in this row" in made.bad


def test_it_is_built_again_only_where_a_file_is_another_one(src, tmp_path):
    asked = options(val=None, shard_samples=5)
    build_shards(str(src), tmp_path / "out", asked)
    assert build_shards(os.path.relpath(src), tmp_path / "out", asked).already
    for part in (1, 2):
        build_part(str(src), tmp_path / "parts", Part(part, 2), asked)
    left = tmp_path / "parts" / f".0.rows.{socket.gethostname()}-999999999.tmp"  # by one that was killed
    left.write_bytes(b"x")
    build_shards(str(src), tmp_path / "parts", asked)
    assert_same_files(tmp_path / "parts", tmp_path / "out")
    os.utime(src / "data" / "validation-00000-of-00001.parquet", (1, 1))
    with pytest.raises(SourceChanged):
        build_shards(str(src), tmp_path / "out", asked)


def test_init_builds_a_folder_of_parquet_files(src, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = of_init.build(src, of_init.Wishes())
    assert (built.counts("train"), built.counts("val")) == (14, 4)


def test_parquet_files_beside_class_folders_are_none_of_the_pictures(tmp_path):
    make_folder(tmp_path / "photos", 2, 2, 16)
    write(tmp_path / "photos" / "labels.parquet", [{"label": 1}], None)
    source = read_source(str(tmp_path / "photos"), val=0)
    assert (source.classes, len(source.left_out)) == (("class0", "class1"), 1)


def test_memory_does_not_grow_with_a_file(tmp_path):
    """96 MB of pictures in groups of 1 MB, read in a process of its own."""
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with parquet.ParquetWriter(tmp_path / "x.parquet", schema, compression="none", use_dictionary=False) as file:
        for _ in range(96):
            file.write_table(
                pa.table({"image": [os.urandom(1 << 17) for _ in range(8)], "label": [0] * 8}, schema=schema)
            )
    script = """
import resource, sys
from pathlib import Path
from tlx.data.build.row_tables import parquet_tables
(table,), _ = parquet_tables(Path(sys.argv[1]) / "x.parquet")
list(table.batches(["label"]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pictures = table.pictures("image")
with pictures.unpack(range(768), Path(sys.argv[1]) / "rows"):
    assert len(pictures.bytes_of(767)) == 1 << 17
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    words = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 40
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


BYTES = TRAIN[0]["image"]["bytes"]


@pytest.mark.parametrize(
    ("given", "reading", "message"),
    [
        (
            [{"image": BYTES, "label": 0}],
            {"path_column": "imag"},
            r'no column "imag"; did you mean "image"\? the columns',
        ),
        ([{"image": BYTES, "lable": 0}], {}, r'no column "label"; did you mean "lable"[\s\S]*--label-column'),
        (
            [{"image": BYTES, "klass": 0}],
            {"label_column": "kind"},
            r'no column "kind"; the columns are image \(binary\)',
        ),
        ([{"image": BYTES, "label": 0}], {"path_column": "label"}, r'"label" holds no pictures, but int64[\s\S]*image'),
        ([{"image": "a.jpg", "label": 0}], {}, r"no column holds bytes of pictures; the columns are image \(string\)"),
        ([{"a": BYTES, "img": BYTES, "label": 0}], {}, r"several columns hold bytes: a, img[\s\S]*--path-column img"),
        ([{"image": BYTES, "label": 0.5}], {}, 'the column "label" holds double, and no class'),
        ([{"image": BYTES, "label": 0}, {"image": BYTES, "label": None}], {}, "x.parquet row 1: there is no label"),
        ([{"image": BYTES, "label": 0}], {"split_column": "part"}, 'there is no column "part"'),
        (
            [{"image": BYTES, "label": 0, "split": "vall"}],
            {},
            'x.parquet row 0: unknown split "vall"; did you mean "val"',
        ),
        ([{"image": BYTES, "label": 0}], {"label_column": ""}, "neither a class nor a target"),
        ([{"image": {"bytes": BYTES, "path": ""}, "label": 2}], None, "row 0: the label 2 is none of the 2 classes"),
    ],
)
def test_files_that_are_refused(tmp_path, given, reading, message):
    """None for `reading`: with the classes that Hugging Face has noted."""
    file = write(tmp_path / "x.parquet", given, FEATURES if reading is None else None)
    with pytest.raises(UserError, match=message) as caught:
        read_source(str(file), val=0, reading=Reading(**reading or {}))
    assert str(tmp_path) in caught.value.where


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("damaged", r"train-00001-of-00002.parquet: this parquet file cannot be read"),
        ("damaged within", r"train-00001-of-00002.parquet: this parquet file cannot be read"),
        ("no train", "there is no split train, but .*validation-00000"),
        ("odd name", r'"vall-1.parquet" beside files of splits is of none; did you mean "val"'),
        ("other classes", r'validation-.*: "label" has other classes than in .*train-00000'),
        ("other columns", r'validation-.*: the column "label" is another one than in .*train-00000'),
        ("nested", "--nested is for folders of pictures"),
        ("saved, damaged", "datasets cannot read this"),
        ("no datasets", r'datasets reads this, and is not installed[\s\S]*pip install "tlx\[hf\]"'),
        ("no pyarrow", r'pyarrow reads this, and is not installed[\s\S]*pip install "tlx\[parquet\]"'),
        ("no hub", r"this names no data set of the hub[\s\S]*hf:OWNER/NAME"),
    ],
)
def test_sources_that_are_refused(src, tmp_path, monkeypatch, kind, message):
    second, val = src / "data" / "train-00001-of-00002.parquet", src / "data" / "validation-00000-of-00001.parquet"
    if kind == "damaged":
        second.write_bytes(second.read_bytes()[:-20])
    elif kind == "damaged within":
        content = bytearray(second.read_bytes())
        content[4:200] = b"\xff" * 196
        second.write_bytes(content)
    elif kind == "no train":
        for file in src.rglob("train*"):
            file.unlink()
    elif kind == "odd name":
        write(src / "data" / "vall-1.parquet", VAL)
    elif kind == "other classes":
        write(val, VAL, datasets.Features({**FEATURES, "label": datasets.ClassLabel(names=NAMES[::-1])}))
    elif kind == "other columns":
        write(val, [{**row, "label": "x"} for row in VAL], None)
    elif kind in ("saved, damaged", "no datasets"):
        src = save(tmp_path / "saved", train=TRAIN)
        next(src.rglob("*.arrow")).write_bytes(b"x" * 100)
    if kind.startswith("no "):
        for name in {"no datasets": ["datasets"], "no pyarrow": ["pyarrow", "pyarrow.parquet"]}.get(kind, ()):
            monkeypatch.setitem(sys.modules, name, None)
    spec = "hf:food" if kind == "no hub" else str(src)
    with pytest.raises(UserError, match=message):
        build_shards(spec, tmp_path / "out", options(val=None, nested=kind == "nested"))


# The hub


@pytest.fixture
def hub(src, tmp_path):
    with serve() as server:
        server.commit = COMMIT
        for file in (src / "data").iterdir():
            server.put_data("me/My_Photos", f"data/{file.name}", file.read_bytes())
        yield server


def env(hub, tmp_path, **more):
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**here, "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_XET": "1", **more}


BUILDS = """
import json, sys
from tlx.base.errors import UserError
from tlx.data.build.write import BuildOptions, build_shards
for spec, out in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        made = build_shards(spec, out, BuildOptions(jobs=0))
        print(json.dumps([made.commit, made.already]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def built(hub, tmp_path, *specs_and_folders, **more):
    """What builds in one process give or say: the libraries read once where the hub is."""
    words = [f"hf:{word}" if i % 2 == 0 else str(tmp_path / word) for i, word in enumerate(specs_and_folders)]
    done = subprocess.run(
        [sys.executable, "-c", BUILDS, *words],
        env=environment(**env(hub, tmp_path, **more)), capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_data_set_of_the_hub_and_without_network_what_was_fetched(hub, tmp_path):
    assert built(hub, tmp_path, *("me/My_Photos", "out") * 2) == [[COMMIT, False], [COMMIT, True]]
    assert stored(tmp_path / "out" / "train") == as_given(TRAIN)
    nobody = "http://127.0.0.1:9"
    words = ["me/My_Photos", "again", f"me/My_Photos@{COMMIT}", "third", "me/My_Photos@v1", "v1", "me/My_Photos", "out"]
    *found, refused, there = built(hub, tmp_path, *words, HF_ENDPOINT=nobody)
    assert found == [[COMMIT, False]] * 2
    assert f"not on this machine, and {nobody} does not answer" in refused
    assert there == [COMMIT, True]
    assert_same_files(tmp_path / "again" / "val", tmp_path / "out" / "val")
    hub.commit = "e" * 40
    hub.put_data("me/My_Photos", "data/train-0.parquet", b"")
    (changed,) = built(hub, tmp_path, "me/My_Photos", "out")
    assert "these shards are of commit ffffffffffff, and the hub has eeeeeeeeeeee now" in changed


def test_what_the_hub_refuses_and_that_no_code_of_it_is_run(hub, tmp_path):
    ran = tmp_path / "ran"
    hub.put_data("me/code", "code.py", f"open({str(ran)!r}, 'w')".encode())
    hub.put_data("me/code", "train.parquet", next(tmp_path.rglob("train-*")).read_bytes())
    hub.put_data("me/gated", "train.parquet", b"")
    hub.gated.add("me/gated")
    specs = ["me/nothing", "me/My_Photos@v9", "me/gated", "me/My_Photos:other", "me/code"]
    absent, revision, gated, config, code = built(hub, tmp_path, *(word for spec in specs for word in (spec, "out")))
    assert "no such repository, or a private one\n  -> if it is private, hf auth login" in absent
    assert "no such revision" in revision
    assert "a gated repository: its terms must be accepted first" in gated
    assert "BuilderConfig 'other' not found. Available: ['default']" in config
    assert "datasets cannot load it: Dataset scripts are no longer supported" in code
    assert not ran.exists()


def test_files_of_a_data_set_of_the_hub_are_copied(hub, tmp_path):
    """A repository of loose pictures in folders: the library keeps them as files, and stores where."""
    for i, row in enumerate(TRAIN):
        hub.put_data("me/folders", f"train/{NAMES[row['label']]}/{i}.jpg", row["image"]["bytes"])
    words = ("hf:me/folders", tmp_path / "out", "--val", "0", "--jobs", "0")
    done = tlx("shards", "build", *words, **env(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"commit {COMMIT}\n2 classes" in done.stdout
    assert stored(tmp_path / "out" / "train") == {jpeg: 1 - label for jpeg, label in as_given(TRAIN).items()}
