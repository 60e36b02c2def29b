"""Targets beside the class: arrays of the index, whole or not there, and verified when it is opened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from images import TARGETS, make_target_shards, target_values

from tlx.base.errors import TlxError, UserError
from tlx.data.shards import index_file, manifest, target_arrays
from tlx.data.shards.check import check_shards, describe_shards
from tlx.data.shards.manifest import Manifest, write_index
from tlx.data.shards.targets import Target

COLOUR, TAGS, AGE, BOX = TARGETS


@pytest.fixture
def made(tmp_path):
    """24 samples in three tars, a target of each kind."""
    return make_target_shards(tmp_path / "train", size=8)


def again(opened, *targets, **settings):
    """The index written anew, with these targets."""
    known = {"classes": opened.classes, "shards": opened.shards, "records": np.array(opened.records)}
    return write_index(opened.path, **known | settings, targets=targets)


def saved(array):
    from io import BytesIO

    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def rewrite(folder, name, content):
    """An array of this content, of which index.json has the hash."""
    (folder / f"targets/{name}.npy").write_bytes(content)
    header = json.loads((folder / "index.json").read_text())
    for target in header["targets"]:
        if target["name"] == name:
            target["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "index.json").write_text(json.dumps(header))


def test_what_is_written_is_read(made):
    opened = Manifest.open(made.path)
    assert opened.targets == {"label": Target("label", "class", opened.classes), **{t.name: t for t in TARGETS}}
    for target, dtype, shape in (
        (COLOUR, np.int32, (24,)),
        (TAGS, np.int8, (24, 4)),
        (AGE, np.float32, (24, 1)),
        (BOX, np.float32, (24, 4)),
    ):
        values = opened.values(target.name)
        assert (values.dtype, values.shape, values.flags.writeable) == (dtype, shape, False)
        assert np.array_equal(values, target_values(target, 24), equal_nan=target.kind == "number")
        assert isinstance(values.base, np.memmap)
    assert opened.values("label").tolist() == [i % 3 for i in range(24)]
    header = json.loads((made.path / "index.json").read_text())
    assert header["format"] == 3
    assert [(t["name"], t.get("width")) for t in header["targets"]] == [
        ("colour", None), ("tags", None), ("age", 1), ("box", 4)
    ]  # fmt: skip
    assert np.load(made.path / "targets/age.npy").shape == (24, 1)
    with pytest.raises(UserError, match=r'no target "colours"; did you mean "colour"\?'):
        opened.values("colours")


def test_an_index_without_targets_is_what_it_was(made):
    """Format 2 with hashes of shards, 1 without, byte for byte; and no folder of arrays."""
    opened = again(made)
    assert opened.targets.keys() == {"label"}
    assert not (made.path / "targets").exists()
    shards = [{"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in made.shards]
    header = {
        "format": 2,
        "classes": ["class0", "class1", "class2"],
        "samples": 24,
        "shards": shards,
        "sha256": hashlib.sha256((made.path / "index.npy").read_bytes()).hexdigest(),
    }
    assert (made.path / "index.json").read_text() == json.dumps(header, indent=1)
    for shard in shards:
        del shard["sha256"]
    old = json.dumps({**header, "format": 1}, indent=1)
    assert opened.digest == hashlib.sha256(old.encode()).hexdigest()
    (made.path / "index.json").write_text(old)
    assert Manifest.open(made.path).digest == opened.digest


def test_targets_are_part_of_what_an_index_is(made):
    plain = [(t, target_values(t, 24)) for t in TARGETS]
    others = target_values(AGE, 24) + 1
    digests = [again(made, *targets).digest for targets in (plain, plain[:3], [], [plain[0], (AGE, others)])]
    assert len({*digests, made.digest}) == 4
    assert digests[0] == made.digest
    shards = [s.__class__(s.name, s.samples, s.bytes) for s in made.shards]
    assert again(made, *plain, shards=shards).digest == made.digest  # hashes of tars are not


def test_stale_arrays_leave_and_those_of_others_stay(made):
    (made.path / "targets/mine.npy").write_bytes(b"x")
    again(made, (AGE, target_values(AGE, 24)))
    assert sorted(p.name for p in (made.path / "targets").iterdir()) == ["age.npy", "mine.npy"]


@pytest.mark.parametrize(
    "odd",
    [
        Target("age", "number", width=1 << 17),
        Target("age", "class", ("a", "a")),
        Target("age", "class"),
        Target("a.b", "number"),
    ],
)
def test_a_target_that_no_index_can_have_leaves_the_earlier_index(made, odd):
    before = {p: p.read_bytes() for p in made.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"the target {odd.name} cannot be written"):
        again(made, (odd, np.zeros((24, odd.width) if odd.kind == "number" else 24)))
    assert {p: p.read_bytes() for p in made.path.rglob("*") if p.is_file()} == before


def test_without_a_class(tmp_path):
    opened = make_target_shards(tmp_path / "s", [AGE], classes=0, samples=6, size=8)
    assert (opened.classes, list(opened.targets), opened.counts().tolist()) == ((), ["age"], [])
    assert opened.labels.tolist() == [-1] * 6
    records = np.array(opened.records)
    records["label"][2] = 0
    with pytest.raises(UserError, match="labels without a class name"):
        again(opened, (AGE, target_values(AGE, 6)), records=records)


def test_a_target_that_is_renamed_where_capitals_make_no_difference(made, monkeypatch):
    for module in (manifest, target_arrays):
        monkeypatch.setattr(module, "file_of", lambda name: f"targets/{name.casefold()}.npy")
    again(made, (Target("Age", "number"), np.zeros((24, 1))))
    opened = again(made, (Target("age", "number"), np.ones((24, 1))))
    assert opened.values("age").tolist() == [[1]] * 24
    assert [p.name for p in (made.path / "targets").iterdir()] == ["age.npy"]


def test_a_target_that_is_renamed_leaves_nothing(made):
    for name in ("Age", "age"):
        again(made, (Target(name, "number"), np.zeros((24, 1))))
        assert [p.name for p in (made.path / "targets").iterdir()] == [f"{name}.npy"]


def test_arrays_are_looked_at_in_parts():
    """Of 16 MiB: two rows of 8 MiB, whatever the number of rows is."""
    array = np.arange(5, dtype=np.int8)[:, None] + np.zeros(1 << 23, np.int8)
    assert [part[:, 0].tolist() for part in target_arrays.parts(array)] == [[0, 1], [2, 3], [4]]
    found = target_arrays.parts(array, np.array([4, 4, 1]))
    assert [part[:, 0].tolist() for part in found] == [[4, 4], [1]]
    assert [part.tolist() for part in target_arrays.parts(np.arange(3), np.array([2]))] == [[2]]
    assert [len(part) for part in target_arrays.parts(np.zeros((1, 1 << 25), np.int8))] == [1]
    assert list(target_arrays.parts(np.zeros((0, 3)))) == []


@pytest.mark.parametrize("at", ["targets/age.npy", "index.npy", "index.json"])
def test_a_full_disk_leaves_the_earlier_index(made, monkeypatch, at):
    before = {p: p.read_bytes() for p in sorted(made.path.rglob("*")) if p.is_file()}
    plain = os.fsync

    def full(file):
        if os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2].startswith(f".{at.rpartition('/')[2]}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(file)

    for module in (manifest, target_arrays):
        monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        again(made, (AGE, np.zeros((24, 1))), (Target("more", "number"), np.ones((24, 1))))
    assert {p: p.read_bytes() for p in sorted(made.path.rglob("*")) if p.is_file()} == before


def test_another_process_maps_without_hashing(made, monkeypatch):
    made.values("tags")
    text = pickle.dumps(made)
    assert len(text) < 1000
    hashed, plain = [], target_arrays.sha256_of
    monkeypatch.setattr(index_file, "sha256_of", None)
    monkeypatch.setattr(target_arrays, "sha256_of", lambda file: hashed.append(Path(file.name).stem) or plain(file))
    there = pickle.loads(text)
    assert there.targets == made.targets
    assert np.array_equal(there.values("tags"), made.values("tags"))
    assert hashed == []
    assert np.array_equal(there.values("age"), target_values(AGE, 24), equal_nan=True)
    assert hashed == ["age"]  # which nobody had asked for
    (made.path / "targets/tags.npy").write_bytes(b"short")
    with pytest.raises(TlxError, match=r"targets/tags.npy cannot be read"):
        pickle.loads(text).values("tags")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("age", b"nothing", r"age\.npy cannot be read"),
        ("age", saved(np.zeros((24, 2), np.float32)), r"age\.npy holds something else"),
        ("age", saved(np.zeros((24, 1), np.float64)), r"age\.npy holds something else"),
        ("age", saved(np.zeros((24, 1), np.float32))[:-4], r"age\.npy holds something else"),
        ("age", saved(np.full((24, 1), np.inf, np.float32)), "values that no number target has"),
        ("colour", saved(np.full(24, 3, np.int32)), "values that no class target has"),
        ("colour", saved(np.full(24, -2, np.int32)), "values that no class target has"),
        ("colour", saved(np.full(24, 2**31 - 1, np.int32)), "values that no class target has"),
        ("tags", saved(np.full((24, 4), 2, np.int8)), "values that no labels target has"),
        ("tags", saved(np.full((24, 4), -2, np.int8)), "values that no labels target has"),
        ("tags", saved(np.zeros((4, 24), np.int8).T), r"tags\.npy holds something else"),
    ],
)
def test_arrays_of_something_else(made, name, content, message):
    rewrite(made.path, name, content)
    with pytest.raises(UserError, match=f"the index is damaged: .*{message}"):
        Manifest.open(made.path).values(name)


@pytest.mark.parametrize(
    ("target", "values"),
    [(COLOUR, 3), (COLOUR, -2), (TAGS, 2), (AGE, np.inf)],
    ids=str,
)
def test_values_of_something_else_are_not_written(made, target, values):
    before = (made.path / "index.json").read_bytes()
    with pytest.raises(UserError, match=f"values that no {target.kind} target has"):
        again(made, (target, np.full_like(target_values(target, 24), values)))
    assert (made.path / "index.json").read_bytes() == before
    assert np.array_equal(Manifest.open(made.path).values("age"), target_values(AGE, 24), equal_nan=True)


def test_an_array_is_looked_at_when_it_is_asked_for(made, monkeypatch):
    """Hashed once, of a target that is learned; `tlx shards show` and `check` look at all of them."""
    hashed, plain = [], target_arrays.sha256_of
    monkeypatch.setattr(target_arrays, "sha256_of", lambda file: hashed.append(Path(file.name).stem) or plain(file))
    opened = Manifest.open(made.path)
    assert list(opened.targets) == ["label", "colour", "tags", "age", "box"]
    assert hashed == []
    assert opened.values("age") is opened.values("age")
    assert hashed == ["age"]
    hashed.clear()
    describe_shards(made.path)
    assert hashed == ["colour", "tags", "age", "box"]
    rewrite(made.path, "tags", saved(np.full((24, 4), 2, np.int8)))
    assert Manifest.open(made.path).values("colour").tolist() == target_values(COLOUR, 24).tolist()
    for look in (describe_shards, check_shards):
        with pytest.raises(UserError, match="values that no labels target has"):
            look(made.path)


def test_an_array_that_was_changed_or_is_missing(made):
    path = made.path / "targets/age.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"targets/age\.npy is not the one that index\.json was written for"):
        Manifest.open(made.path).values("age")
    path.unlink()
    with pytest.raises(UserError, match=r"targets/age\.npy cannot be read: .*No such file") as caught:
        Manifest.open(made.path).values("age")
    assert "tlx shards index" in caught.value.todo


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../age"},
        {"name": "a/b"},
        {"name": "age\n"},
        {"name": "-age"},
        {"name": "label"},
        {"name": "Colour"},  # a second one, on a file system that makes no difference
        {"name": "a" * 101},
        {"name": 3},
        {"kind": "image"},
        {"kind": ["number"]},
        {"kind": "class"},
        {"kind": "labels", "classes": []},
        {"kind": "labels", "classes": ["a", "a"]},
        {"classes": ["a"]},
        {"width": 0},
        {"width": True},
        {"width": 1 << 40},
        {"sha256": "x"},
    ],
)
def test_targets_that_are_none(made, change):
    header = json.loads((made.path / "index.json").read_text())
    header["targets"][2].update(change)
    (made.path / "index.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="the index is damaged"):
        Manifest.open(made.path)


def test_a_list_of_targets_is_needed(made):
    header = json.loads((made.path / "index.json").read_text())
    for targets in (None, {}, [3]):
        (made.path / "index.json").write_text(json.dumps({**header, "targets": targets}))
        with pytest.raises(UserError, match="does not say which targets"):
            Manifest.open(made.path)
