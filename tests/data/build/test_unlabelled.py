"""Pictures without labels: built, indexed, checked, shown and planned; a task that needs labels says what to do."""

from __future__ import annotations

import shutil
import tarfile

import pytest
from built import options
from images import index_shards, make_folder
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.data.build.write import build_shards
from tlx.data.shards.check import check_shards
from tlx.data.shards.labels import LabelRule
from tlx.data.shards.manifest import Manifest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve, six of them in folders of folders, and a thirteenth by a link to its folder."""
    root = tmp_path_factory.mktemp("unlabelled") / "pictures"
    make_folder(root / "deep" / "er", 2, 3, 12)
    shutil.copytree(root / "deep" / "er" / "class0", root, dirs_exist_ok=True)
    make_folder(root / "other", 1, 3, 12, seed=5)
    (root / "again").symlink_to(root / "other")
    return root


def members(folder):
    return [m.name for tar in sorted(folder.glob("*.tar")) for m in tarfile.open(tar)]


def test_every_picture_below_a_folder_alone_in_the_tars(pictures, tmp_path):
    done = build_shards(str(pictures), tmp_path / "out", options(labels=False, val=0.25))
    assert {split: made["samples"] for split, made in done.splits.items()} == {"train": 9, "val": 3}
    assert all(name.endswith(".jpg") for split in ("train", "val") for name in members(tmp_path / "out" / split))
    manifest = Manifest.open(tmp_path / "out" / "train")
    assert (manifest.classes, dict(manifest.targets), manifest.labels.tolist()) == ((), {}, [-1] * 9)
    assert build_shards(str(pictures), tmp_path / "out", options(labels=False, val=0.25)).already
    report = check_shards(tmp_path / "out", jobs=0)
    assert report.good
    assert report.samples == 12


def test_tars_of_pictures_alone_are_indexed_when_it_is_said(pictures, tmp_path):
    build_shards(str(pictures), tmp_path / "out", options(labels=False, val=0))
    (tmp_path / "tars").mkdir()
    for tar in (tmp_path / "out" / "train").glob("*.tar"):
        shutil.copy(tar, tmp_path / "tars")
    with pytest.raises(UserError, match="--label-from none"):
        index_shards(tmp_path / "tars")
    manifest = index_shards(tmp_path / "tars", labels=LabelRule.make("none", None, None, None))["tars"]
    assert len(manifest) == 12
    assert not manifest.targets


def test_labels_of_a_csv_and_splits_of_folders_are_left_aside(pictures, tmp_path):
    lines = [f"{p},x" for p in sorted(pictures.rglob("*.jpg"))][:5]
    (tmp_path / "p.csv").write_text("\n".join(["path,label", *lines]))
    done = build_shards(str(tmp_path / "p.csv"), tmp_path / "csv", options(labels=False, val=0))
    assert (done.classes, done.splits["train"]["samples"]) == ((), 5)
    for split in ("train", "val"):
        make_folder(tmp_path / "split" / split, 1, 2, 12)
    done = build_shards(str(tmp_path / "split"), tmp_path / "s", options(labels=False, val=None))
    assert {split: made["samples"] for split, made in done.splits.items()} == {"train": 2, "val": 2}


def test_what_contradicts_it_is_refused_and_what_needs_labels_names_it(pictures, tmp_path):
    with pytest.raises(UserError, match="--no-labels"):
        build_shards(str(pictures), tmp_path / "a", options(labels=False, val=0, targets=("colour",)))
    make_folder(tmp_path / "one", 1, 3, 12)
    with pytest.raises(UserError, match="two classes"):
        build_shards(str(tmp_path / "one"), tmp_path / "b", options(val=0))
    build_shards(str(pictures), tmp_path / "c", options(labels=False, val=0))
    with pytest.raises(UserError, match="another request"):
        build_shards(str(pictures), tmp_path / "c", options(val=0))


def test_the_commands(pictures, tmp_path):
    out = tmp_path / "out"
    built = CliRunner().invoke(
        app, ["shards", "build", str(pictures), str(out), "--no-labels", "--val", "0", "--jobs", "0"]
    )
    assert built.exit_code == 0, built.output
    assert "12 samples" in built.output
    assert "no class" in built.output
    shown = CliRunner().invoke(app, ["shards", "show", str(out)])
    assert shown.exit_code == 0
    assert "12 samples" in shown.output
