"""Folders, CSV files and torchvision data sets: what is read, and every way in which people's folders are odd."""

from __future__ import annotations

import os

import pytest
from images import make_folder, picture
from torchvision import datasets

from tlx.data.datasets import TORCHVISION, read_items, read_torchvision
from tlx.data.specs import read_source
from tlx.errors import UserError


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


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_split_folders(tmp_path, name):
    make_folder(tmp_path / "train", 3, 4, 16)
    make_folder(tmp_path / name, 2, 2, 16)
    make_folder(tmp_path / "test", 3, 1, 16)
    source = read_source(str(tmp_path))
    assert split_sizes(source) == {"train": 12, "val": 4, "test": 3}
    assert source.classes == ("class0", "class1", "class2")
    with pytest.raises(UserError, match="its own validation split"):
        read_source(str(tmp_path), val=0.1)


def test_a_class_may_be_called_test(folder):
    (folder / "class1").rename(folder / "test")
    assert read_source(str(folder), val=0.1).classes == ("class0", "class2", "test")


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
    assert [os.path.basename(p) for p in source.left_out] == [".DS_Store", "notes.txt"]


def test_pictures_of_every_kind_are_taken(folder):
    endings = ["JPG", "jpeg", "jpe", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "TIFF", "ppm", "pgm"]
    for i, ending in enumerate(endings):
        (folder / "class0" / f"my.{i} été.日本.{ending}").write_bytes(b"x")
    (folder / "class0" / "a.heic").write_bytes(b"x")
    source = read_source(str(folder), val=0)
    assert split_sizes(source) == {"train": 30 + len(endings)}
    assert [os.path.basename(p) for p in source.left_out] == ["a.heic"]


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


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path):
    source = read_source(table(tmp_path, "path,label\np/class0/0000.jpg,10\np/class1/0000.jpg,9\n"), val=0)
    assert source.classes == ("9", "10")


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
