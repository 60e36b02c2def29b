"""Folders, CSV files and torchvision data sets: what is read, and every way in which people's folders are odd."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from types import ModuleType

import pytest
from images import make_folder, picture
from PIL import Image, ImageFile
from torchvision import datasets

from tlx.base.errors import UserError
from tlx.data.build import sources
from tlx.data.build.datasets import TORCHVISION, read_items, read_torchvision
from tlx.data.build.sources import Reading, split_of
from tlx.data.build.specs import read_source
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels import decode, heif
from tlx.data.shards.passed_over import HIDDEN, LINK, OUTSIDE, SYSTEM, PassedOver, told


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "src", per_class=10, size=16)


def split_sizes(source):
    return {split: len(pictures) for split, pictures in source.splits.items()}


def test_a_folder_per_class_with_a_share_for_validation(folder):
    source = read_source(str(folder), val=0.2, seed=1)
    assert source.classes == ("class0", "class1", "class2")
    assert split_sizes(source) == {"train": 24, "val": 6}
    assert [p.label for p in source.splits["val"]] == [0, 0, 1, 1, 2, 2]
    everything = {p.origin for pictures in source.splits.values() for p in pictures}
    assert len(everything) == 30
    assert all(source.classes[p.label] in p.origin for pictures in source.splits.values() for p in pictures)
    assert read_source(str(folder), val=0.2, seed=1) == source
    assert read_source(str(folder), val=0.2, seed=2).splits["val"] != source.splits["val"]
    assert split_sizes(read_source(str(folder), val=0)) == {"train": 30}


def test_a_class_of_two_is_on_both_sides_and_a_class_of_one_trains(folder):
    for name, keep in (("class0", 2), ("class1", 1)):
        for file in sorted((folder / name).iterdir())[keep:]:
            file.unlink()
    source = read_source(str(folder), val=0.1)
    assert [p.label for p in source.splits["val"]] == [0, 2]
    assert sorted(p.label for p in source.splits["train"]) == [0, 1] + [2] * 9


def test_no_validation_split_has_to_be_asked_for(folder):
    with pytest.raises(UserError, match=r"no validation split[\s\S]*--val 0.2"):
        read_source(str(folder))


def left_out(source):
    """Kind and last part of the name of what was passed over."""
    return [(passed.kind, os.path.basename(passed.name)) for passed in source.left_out]


@pytest.mark.parametrize(
    ("train", "name"),
    [("train", "val"), ("Train", "Val"), ("training", "validation"), ("TRAIN", "valid"), ("training_set", "val_set")],
)
def test_split_folders(tmp_path, train, name):
    make_folder(tmp_path / train, 3, 4, 16)
    make_folder(tmp_path / name, 2, 2, 16)
    make_folder(tmp_path / "test", 3, 1, 16)
    source = read_source(str(tmp_path))
    assert split_sizes(source) == {"train": 12, "val": 4, "test": 3}
    assert source.classes == ("class0", "class1", "class2")
    with pytest.raises(UserError, match="its own validation split"):
        read_source(str(tmp_path), val=0.1)


def test_what_a_split_may_be_called():
    names = ["Validation", "dev", "testing", "test-set", "training data", "settings", "trainer", "set", "data"]
    assert [split_of(name) for name in names] == ["val", "val", "test", "test", "train", None, None, None, None]


@pytest.mark.parametrize("name", ["test", "train", "Training"])
def test_a_class_may_be_called_as_a_split(folder, name):
    """By what it holds: pictures, not class folders."""
    (folder / "class1").rename(folder / name)
    assert read_source(str(folder), val=0.1).classes == tuple(sorted(["class0", "class2", name]))


@pytest.mark.parametrize("name", ["val", "test", "Validation"])
def test_a_split_beside_classes_is_none_of_them(tmp_path, name):
    """Whose folders have the names of its neighbours; a class with folders of its own in it stays a class."""
    make_folder(tmp_path / "a", 2, 2, 16, names=["cats", "dogs"])
    make_folder(tmp_path / "a" / name, 2, 2, 16, names=["cats", "dogs"])
    with pytest.raises(UserError, match=rf'"cats" beside "{name}" is no split[\s\S]*--no-splits'):
        read_source(str(tmp_path / "a"), val=0)
    assert len(read_source(str(tmp_path / "a"), val=0, reading=Reading(splits=False)).classes) == 3
    make_folder(tmp_path / "b", 2, 2, 16, names=["cats", "dogs"])
    make_folder(tmp_path / "b" / name, 2, 2, 16, names=["day", "night"])
    assert set(read_source(str(tmp_path / "b"), val=0).classes) == {"cats", "dogs", name}


def test_splits_may_be_classes(tmp_path):
    make_folder(tmp_path, 2, 4, 16, names=["train", "test"])
    with pytest.raises(UserError, match=r"no class folders here, but 4 loose pictures[\s\S]*--no-splits"):
        read_source(str(tmp_path))
    source = read_source(str(tmp_path), val=0.5, reading=Reading(splits=False))
    assert source.classes == ("test", "train")
    assert split_sizes(source) == {"train": 4, "val": 4}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["0", "1", "2", "10", "11"], ("0", "1", "2", "10", "11")),
        (["3", "-1", "007", "20"], ("-1", "3", "007", "20")),
        (["3", "20", "x"], ("20", "3", "x")),
        (["Zoo", "ant", "Ämter", "bee"], ("Zoo", "ant", "bee", "Ämter")),
    ],
)
def test_classes_are_sorted_by_value_or_as_text(tmp_path, names, classes):
    make_folder(tmp_path / "p", len(names), 2, 16, names=names)
    folder = read_source(str(tmp_path / "p"), val=0)
    assert folder.classes == classes
    assert all(classes[p.label] == os.path.basename(os.path.dirname(p.path)) for p in folder.splits["train"])
    (tmp_path / "list.csv").write_text(
        "path,label\n" + "".join(f"p/{name}/0000.jpg,{name}\n" for name in names), encoding="utf-8"
    )
    assert read_source(str(tmp_path / "list.csv"), val=0).classes == classes


def test_what_lies_around_is_left_out_and_named(folder):
    (folder / "class0" / "notes.txt").write_text("x")
    (folder / "class0" / ".DS_Store").write_text("x")
    (folder / "class0" / "deeper").mkdir()
    os.rename(folder / "class0" / "0000.jpg", folder / "class0" / "deeper" / "0000.JPG")
    os.symlink(folder / "class0", folder / "class0" / "deeper" / "back")
    (folder / ".git").mkdir()
    (folder / "README.md").write_text("x")
    source = read_source(str(folder), val=0)
    assert split_sizes(source) == {"train": 30}
    assert left_out(source) == [
        (HIDDEN, ".git"),
        ("no picture (.md)", "README.md"),
        (SYSTEM, ".DS_Store"),
        ("no picture (.txt)", "notes.txt"),
        (LINK, "back"),
    ]


@pytest.mark.parametrize(
    "name", ["@eaDir", "lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints"]
)
def test_folders_that_a_system_makes_are_no_classes(folder, name):
    for place in (folder, folder / "class1"):
        (place / name).mkdir()
        (place / name / "0.jpg").write_bytes(b"x")
    for file in ("Thumbs.db", "desktop.ini", "._0000.jpg"):
        (folder / "class2" / file).write_bytes(b"x")
    source = read_source(str(folder), val=0)
    assert source.classes == ("class0", "class1", "class2")
    assert split_sizes(source) == {"train": 30}
    files = ["._0000.jpg", "Thumbs.db", "desktop.ini"]
    assert left_out(source) == [(SYSTEM, name), (SYSTEM, name), *((SYSTEM, file) for file in files)]


def test_pictures_outside_of_the_class_folders_are_counted(tmp_path):
    make_folder(tmp_path / "train", 2, 3, 16)
    make_folder(tmp_path / "val", 2, 1, 16)
    (tmp_path / "train" / "loose.jpg").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("x")
    assert left_out(read_source(str(tmp_path))) == [("no picture (.csv)", "labels.csv"), (OUTSIDE, "loose.jpg")]


def test_what_is_passed_over_is_told_by_kind():
    many = [PassedOver(HIDDEN, f".{i}") for i in range(7)]
    assert told([*many, PassedOver("no picture (.txt)", "a\x1b.txt"), PassedOver(HIDDEN, ".0")]) == [
        "left out, hidden: 8 (.0 2 times, .1, .2, .3, .4 and 2 more)",
        "left out, no picture (.txt): 1 (a\\x1b.txt)",
    ]


def linked(tmp_path, link, target):
    """Two classes of three pictures, one more picture elsewhere, and a link of that name to there."""
    src = make_folder(tmp_path / "src", 2, 3, 16)
    (tmp_path / "pool" / "more").mkdir(parents=True)
    (tmp_path / "pool" / "more" / "9.jpg").write_bytes((src / "class0" / "0000.jpg").read_bytes())
    (src / link).symlink_to(target)
    return src


@pytest.mark.parametrize("target", ["..", "../class1", "../..", "/", "../../src", "../../alias"])
def test_a_link_brings_no_pictures_of_other_classes(tmp_path, target):
    (tmp_path / "alias").symlink_to(tmp_path / "src")
    source = read_source(str(linked(tmp_path, "class0/link", target)), val=0)
    assert [(p.label, "class0" in p.path) for p in source.splits["train"]] == [(0, True)] * 3 + [(1, False)] * 3
    assert left_out(source) == [(LINK, "link")]


def test_a_link_within_a_class_brings_nothing_twice(tmp_path):
    src = make_folder(tmp_path / "src", 2, 3, 16)
    (src / "class0" / "sub").mkdir()
    (src / "class0" / "0000.jpg").rename(src / "class0" / "sub" / "0000.jpg")
    (src / "class0" / "link").symlink_to("sub")
    (src / "class0" / "sub" / "back").symlink_to("../../class0")
    source = read_source(str(src), val=0)
    assert [p.path.removeprefix(f"{src}/class0/") for p in source.splits["train"][:3]] == [
        "0001.jpg",
        "0002.jpg",
        "sub/0000.jpg",
    ]
    assert len(source.splits["train"]) == 6
    assert left_out(source) == [(LINK, "link"), (LINK, "back")]


def test_a_link_into_the_other_split_is_not_followed(tmp_path):
    make_folder(tmp_path / "train", 2, 3, 16)
    make_folder(tmp_path / "val", 2, 2, 16)
    (tmp_path / "train" / "class0" / "more").symlink_to(tmp_path / "val" / "class0")
    source = read_source(str(tmp_path))
    assert split_sizes(source) == {"train": 6, "val": 4}
    assert left_out(source) == [(LINK, "more")]


def test_links_to_elsewhere_are_followed(tmp_path):
    source = read_source(str(linked(tmp_path, "class0/link", "../../pool")), val=0)
    assert [p.label for p in source.splits["train"]] == [0, 0, 0, 0, 1, 1, 1]
    assert source.left_out == ()
    class_link = read_source(str(linked(tmp_path / "b", "class2", "../pool")), val=0)
    assert class_link.classes == ("class0", "class1", "class2")
    assert [p.label for p in class_link.splits["train"]] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("class0", '"class0" and "class2" are one, by a link'),
        ("class0/deep", '"class2" and "class0" are one, by a link'),
    ],
)
def test_two_class_folders_that_are_one(tmp_path, target, message):
    src = make_folder(tmp_path / "src", 2, 3, 16)
    (src / "class0" / "deep").mkdir()
    (src / "class2").symlink_to(src / target)
    with pytest.raises(UserError, match=message):
        read_source(str(src), val=0)


def test_a_class_folder_that_is_a_link_to_the_whole(tmp_path):
    src = linked(tmp_path, "class2", ".")
    source = read_source(str(src), val=0)
    assert (source.classes, left_out(source)) == (("class0", "class1"), [(LINK, "class2")])
    make_folder(tmp_path / "splits" / "train", 2, 1, 16)
    make_folder(tmp_path / "splits" / "val", 2, 1, 16)
    (tmp_path / "splits" / "train" / "class2").symlink_to("../val")
    with pytest.raises(UserError, match="this class folder is a link to class folders"):
        read_source(str(tmp_path / "splits"))


def test_pictures_of_every_kind_are_taken(folder):
    endings = ["JPG", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "TIFF", "ppm", "pgm"]
    endings += ["mpo", "MPO", "heic", "HEIF", "hif"]
    for i, ending in enumerate(endings):
        (folder / "class0" / f"my.{i} été.日本.{ending}").write_bytes(b"x")
    (folder / "class0" / "a.cr2").write_bytes(b"x")
    source = read_source(str(folder), val=0)
    assert split_sizes(source) == {"train": 30 + len(endings)}
    assert left_out(source) == [("no picture (.cr2)", "a.cr2")]


@pytest.mark.parametrize("name", ["été", "a b", "../up", "100%", "日本", "-x", "a,b", "'; rm"])
def test_odd_class_names_are_kept(tmp_path, name):
    if "/" not in name:
        make_folder(tmp_path / "src", 2, 3, 16, names=[name, "z"])
        assert name in read_source(str(tmp_path / "src"), val=0.3).classes
    make_folder(tmp_path / "pictures", 2, 1, 16)
    table = tmp_path / "list.csv"
    table.write_text(
        f'path,label\npictures/class0/0000.jpg,"{name}"\npictures/class1/0000.jpg,other\n', encoding="utf-8"
    )
    assert name in read_source(str(table), val=0).classes


def broken(tmp_path, kind):
    src = make_folder(tmp_path / "src", per_class=3, size=16)
    if kind == "one class":
        src = make_folder(tmp_path / "one", classes=1, per_class=3, size=16)
    elif kind == "empty":
        (src := tmp_path / "empty").mkdir()
    elif kind == "loose":
        src = src / "class0"
    elif kind == "empty class":
        (src / "nothing").mkdir()
    elif kind == "control characters":
        (src / "class0").rename(src / "bad\nname")
    elif kind == "unknown split":
        for name in ("train", "vall"):
            make_folder(tmp_path / "splits" / name, 2, 1, 16)
        src = tmp_path / "splits"
    elif kind == "class missing from train":
        make_folder(tmp_path / "splits" / "train", 2, 1, 16)
        make_folder(tmp_path / "splits" / "val", 3, 1, 16)
        src = tmp_path / "splits"
    elif kind == "two names of one split":
        for name in ("train", "val", "valid"):
            make_folder(tmp_path / "splits" / name, 2, 1, 16)
        src = tmp_path / "splits"
    elif kind == "missing":
        src = tmp_path / "nowhere"
    elif kind == "no table":
        (src := tmp_path / "x.zip").write_bytes(bytes(range(256)))
    return src


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("one class", "two classes or more; here: class0"),
        ("empty", "no class folders here"),
        ("loose", "no class folders here, but 3 loose pictures"),
        ("empty class", '1 of 4 classes have no training pictures: "nothing"'),
        ("control characters", r"the class name 'bad\\nname'"),
        ("unknown split", r'"vall" beside "train" is no split; did you mean "val"'),
        ("class missing from train", '1 of 3 classes have no training pictures: "class2"'),
        ("two names of one split", "two folders for one split"),
        ("missing", "no such file or folder"),
        ("no table", "neither a folder nor a CSV file"),
    ],
)
def test_folders_that_are_refused(tmp_path, kind, message):
    src = broken(tmp_path, kind)
    with pytest.raises(UserError, match=message) as caught:
        read_source(str(src), val=None if kind in ("unknown split", "class missing from train") else 0.2)
    assert str(src) in caught.value.where


def table(tmp_path, text):
    make_folder(tmp_path / "p", 3, 2, 16)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    return str(tmp_path / "list.csv")


def test_a_csv_with_splits(tmp_path):
    rows = "label,path,split\n cat ,p/class0/0000.jpg,train\ndog,p/class1/0000.jpg,train\ncat,p/class0/0001.jpg,valid\n"
    source = read_source(table(tmp_path, "\ufeff" + rows))
    assert source.classes == ("cat", "dog")
    assert split_sizes(source) == {"train": 2, "val": 1}
    assert source.splits["val"][0].path == str(tmp_path / "p/class0/0001.jpg")


ROWS = [("p/class0/0000.jpg", "cat", "x"), ("p/class1/0000.jpg", "dog", "y")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", [("path", "label", "id"), ("Path", "LABEL", "")])
def test_separators_and_further_columns(tmp_path, separator, header):
    lines = [separator.join(cells) for cells in (header, *ROWS)]
    source = read_source(table(tmp_path, "\n".join([*lines[:2], "", lines[2], separator * 2, ""])), val=0)
    assert source.classes == ("cat", "dog")
    assert left_out(source) == [
        ("column that is not used", header[2] or "column 3"),
        ("empty row", "list.csv:3"),
        ("empty row", "list.csv:5"),
    ]


def test_columns_of_other_names(tmp_path):
    text = "file;class;subset\np/class0/0000.jpg;cat;train\np/class1/0000.jpg;dog;train\n"
    text += "p/class1/0001.jpg;dog;Validation\n"
    path = table(tmp_path, text)
    with pytest.raises(
        UserError, match=r"the columns are file, class, subset\n.*--path-column file --label-column class"
    ):
        read_source(path)
    reading = Reading(path_column="file", label_column="class")
    with pytest.raises(UserError, match=r'the column "subset" holds Validation, train\n.*--split-column subset'):
        read_source(path, reading=reading)
    source = read_source(path, reading=Reading(path_column="file", label_column="class", split_column="subset"))
    assert (source.classes, split_sizes(source)) == (("cat", "dog"), {"train": 2, "val": 1})
    source = read_source(path, val=0, reading=Reading(path_column="file", label_column="class", split_column=""))
    assert split_sizes(source) == {"train": 3}


def test_a_separator_that_has_to_be_said(tmp_path):
    path = table(tmp_path, "path^label\np/class0/0000.jpg^cat\np/class1/0000.jpg^dog\n")
    with pytest.raises(UserError, match=r"the columns are path\^label\n.*--separator"):
        read_source(path, val=0)
    assert read_source(path, val=0, reading=Reading(separator="^")).classes == ("cat", "dog")
    tabbed = table(tmp_path, "path\tlabel\np/class0/0000.jpg\tcat\np/class1/0000.jpg\tdog\n")
    assert read_source(tabbed, val=0, reading=Reading(separator="tab")).classes == ("cat", "dog")
    with pytest.raises(UserError, match="'::' is no separator"):
        read_source(tabbed, val=0, reading=Reading(separator="::"))


def test_backslashes_in_a_csv(tmp_path):
    source = read_source(table(tmp_path, "path,label\np\\class0\\0000.jpg,a\np/class1/0000.jpg,b\n"), val=0)
    assert [p.path for p in source.splits["train"]] == [f"{tmp_path}/p/class{i}/0000.jpg" for i in (0, 1)]
    with pytest.raises(UserError, match="listed twice"):
        read_source(table(tmp_path, "path,label\np\\class0\\0000.jpg,a\np/class0/./0000.jpg,b\n"), val=0)


def test_a_csv_in_utf_16(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.jpg,b\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"its text is UTF-16[\s\S]*UTF-8"):
        read_source(str(tmp_path / "list.csv"), val=0)


def test_heic_without_its_package_is_told(folder, monkeypatch):
    """The first bytes of a phone's picture; Pillow alone says nothing of what they are."""
    monkeypatch.setattr(heif, "register", lambda: False)
    monkeypatch.setattr(decode, "_known", lambda: ("JPEG", "PNG"))
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (folder / "class1" / "IMG_1.HEIC").write_bytes(data)
    with pytest.raises(UserError, match=r"1 unreadable picture:\n.*IMG_1\.HEIC: HEIC .*pip install \"tlx\[heif\]"):
        build_shards(str(folder), folder.parent / "out", BuildOptions(val=0, jobs=0))
    rows = "path,label\nclass1/IMG_1.HEIC,a\nclass1/0000.jpg,b\n"
    (folder / "class1" / "IMG_1.HEIC").rename(folder / "IMG_1")  # by its content
    (folder / "list.csv").write_text(rows.replace("class1/IMG_1.HEIC", "IMG_1"))
    with pytest.raises(UserError, match=r"IMG_1: HEIC .*pip install"):
        build_shards(str(folder / "list.csv"), folder.parent / "out2", BuildOptions(val=0, jobs=0))
    assert not heif.is_heif(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif")
    assert not heif.is_heif(b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif")


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("file,label\n", "the columns are file, label", ":1"),
        ("path,label,splt\n", "the columns are path, label, splt", ":1"),
        ("", "the columns are none", ":1"),
        ("path,label\n", "no rows", ""),
        ("path,label\np/class0/0000.jpg,\n", "needs a path and a label", ":2"),
        ("path,label\np/class0/0000.jpg,a,b\n", "no more than the header names", ":2"),
        ("path,label,split\np/class0/0000.jpg,a,tarin\n", 'unknown split "tarin"; did you mean "train"', ":2"),
        ("path,label\np/class0/0000.jpg,a\np/class0/0000.jpg,b\n", "listed twice", ":3"),
        ("path,label\nnope.jpg,a\np/class0/0000.jpg,b\n", r"1 of 2 files are missing:\n  line 2: nope.jpg", ""),
    ],
)
def test_tables_that_are_refused(tmp_path, text, message, where):
    path = table(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        read_source(path, val=0)
    assert caught.value.where == path + where


class Pairs:
    """A data set object as torchvision's are: pictures and labels by position."""

    classes = ("a", "b")

    def __init__(self, count, labels=None):
        self.count, self.made = count, labels

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        if not 0 <= place < self.count:
            raise IndexError
        return picture(place % 2, size=8, seed=place), self.made[place] if self.made else place % 2


def test_data_set_objects():
    source = read_items({"train": Pairs(6), "test": Pairs(3)}, Pairs.classes)
    assert split_sizes(source) == {"train": 6, "test": 3}
    assert [p.label for p in source.splits["train"]] == [0, 1, 0, 1, 0, 1]
    assert source.splits["test"][2].place == ("test", 2)
    with pytest.raises(UserError, match="has the label"):
        read_items({"train": Pairs(2, [0, "x"])})
    with pytest.raises(UserError, match="labels go from 0 to 5 for 2 class names"):
        read_items({"train": Pairs(2, [0, 5])}, Pairs.classes)


class Flowers102:
    """torchvision's, without its files: ten classes' worth of the official sizes, and its `loader` argument."""

    classes = ("rose", "iris")

    def __init__(self, root, split="train", transform=None, download=False, loader=None):
        self.root, self.split, self.loader = root, split, loader
        self._labels = [i % 2 for i in range({"train": 4, "val": 6, "test": 20}[split])]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, place):
        return self.loader(os.path.join(self.root, self.split, f"{place}.jpg")), self._labels[place]


def test_flowers_official_and_as_in_the_article(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "Flowers102", Flowers102)
    official = read_source("torchvision:Flowers102", root=tmp_path)
    assert split_sizes(official) == {"train": 4, "val": 6, "test": 20}
    assert official.classes == ("rose", "iris")
    assert official.splits["val"][3].path == str(tmp_path / "val" / "3.jpg")  # a file, to be copied as it is
    article = read_source("torchvision:Flowers102", root=tmp_path, variant="article")
    assert split_sizes(article) == {"train": 20, "val": 10}
    assert {os.path.basename(os.path.dirname(p.path)) for p in article.splits["val"]} == {"train", "val"}
    with pytest.raises(UserError, match='no variant "articel"'):
        read_source("torchvision:Flowers102", root=tmp_path, variant="articel")


def test_every_name_in_the_table_is_torchvisions():
    assert not [name for name in TORCHVISION if not hasattr(datasets, name)]


def test_torchvision_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match='did you mean "Flowers102"'):
        read_torchvision("Flower102", root=tmp_path)
    with pytest.raises(UserError, match=r"--root FOLDER"):
        read_source("torchvision:CIFAR10")
    with pytest.raises(UserError, match=r"CIFAR10.*not found[\s\S]*--download lets it fetch"):
        read_source("torchvision:CIFAR10", root=tmp_path, val=0.1)
    with pytest.raises(UserError, match="cannot be imported"):
        read_torchvision("__doc__", root=tmp_path)
    with pytest.raises(UserError, match="for torchvision data sets"):
        read_source(str(tmp_path), root=tmp_path)


def test_a_folder_that_cannot_be_read_is_not_left_out(folder, monkeypatch):
    closed = folder / "class1" / "deeper"
    closed.mkdir()
    scandir = os.scandir

    def guarded(path="."):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # root may read whatever its mode says
    with pytest.raises(UserError, match="this folder cannot be read: Permission denied") as caught:
        read_source(str(folder), val=0)
    assert caught.value.where == str(closed)


class FromAPhone(ImageFile.ImageFile):
    """What pillow-heif makes known to Pillow, as far as it matters here: four red pixels after a header of 24 bytes."""

    format = "HEIF"

    def _open(self):
        self._mode, self._size = "RGB", (2, 2)
        self.tile = [("raw", (0, 0, 2, 2), 24, ("RGB", 0, 1))]


def test_heic_with_its_package(folder, monkeypatch):
    package = ModuleType("pillow_heif")
    accept = lambda start: heif.is_heif(start)  # noqa: E731
    package.register_heif_opener = lambda: Image.register_open("HEIF", FromAPhone, accept)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    Image.init()  # what registers itself while the copy stands would be gone afterwards
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\xff\0\0" * 4
    (folder / "class1" / "IMG_1.HEIF").write_bytes(data)
    for cached in (heif.register, decode._known):
        cached.cache_clear()
    try:
        assert decode.decode(data).tolist() == [[[255, 255]] * 2, [[0, 0]] * 2, [[0, 0]] * 2]
        made = build_shards(str(folder), folder.parent / "out", BuildOptions(val=0, jobs=0))
    finally:
        for cached in (heif.register, decode._known):
            cached.cache_clear()
    assert made.statistics["train"].formats == {"heif": 1, "jpeg": 30}
    with tarfile.open(folder.parent / "out" / "train" / "000000.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()].count("heic") == 1


def numbered(tmp_path):
    return make_folder(tmp_path / "p", 12, 4, 16, names=[str(i) for i in range(12)])


def test_a_build_of_an_earlier_version_keeps_its_order_of_classes(tmp_path, monkeypatch):
    """Earlier versions sorted folders called 0 to 11 as text: finished or interrupted, the same build goes on."""
    src, out, options = numbered(tmp_path), tmp_path / "out", BuildOptions(val=0.25, shard_samples=12, jobs=0)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "in_order", lambda names, order: tuple(sorted(names)))
        made = build_shards(str(src), out, options)
    assert made.classes[:4] == ("0", "1", "10", "11")
    again = build_shards(str(src), out, options)
    assert (again.already, again.classes) == (True, made.classes)
    files = {f: f.read_bytes() for f in sorted(out.glob("*/*.tar"))}
    state = json.loads((out / "build.json").read_text())
    (out / "build.json").write_text(json.dumps({**state, "state": "building"}))
    for file in list(files)[1:]:
        file.unlink()
    assert build_shards(str(src), out, options).classes == made.classes
    assert {f: f.read_bytes() for f in sorted(out.glob("*/*.tar"))} == files
    fresh = build_shards(str(src), tmp_path / "new", options)
    assert fresh.classes == tuple(str(i) for i in range(12))
