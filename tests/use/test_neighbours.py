"""`tlx neighbours`: near-duplicates and outliers, as a search over all pairs finds them, in blocks of any size."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from commands import invoke
from images import encoded
from PIL import Image
from typer.testing import CliRunner

from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.use.named_pictures import pictures_by_name
from tlx.use.neighbours import Pair, Search, groups_of
from tlx.use.vector_file import Embeddings


def made(count=60, *, width=8, seed=0, labels=None, name="x"):
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return Embeddings(name, [f"{name}{n}" for n in range(count)], labels or [None] * count, vectors)


def cosines(a, b):
    a, b = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1)[:, None] for v in (a, b))
    return a @ b.T


@pytest.mark.parametrize("block", [7, 60, 4096])
def test_pairs_and_distances_are_those_of_all_pairs(block):
    labels = [("a", "b", None)[n % 3] for n in range(60)]
    x = made(labels=labels)
    found = Search(x, threshold=0.6, k=4, block=block).run()
    every = cosines(x.vectors, x.vectors)
    wanted = {(i, j) for i in range(60) for j in range(i + 1, 60) if every[i, j] >= 0.6}
    assert {(pair.a, pair.b) for pair in found.pairs} == wanted
    assert [pair.cosine for pair in found.pairs] == sorted((pair.cosine for pair in found.pairs), reverse=True)
    np.testing.assert_allclose([p.cosine for p in found.pairs], [every[p.a, p.b] for p in found.pairs], atol=1e-5)
    for one in found.outliers:
        same = [j for j in range(60) if j != one.place and (labels[one.place] in (None, labels[j]))]
        assert one.distance == pytest.approx(1 - sorted(every[one.place, same])[-4], abs=1e-5)
    assert len(found.outliers) == 60
    assert [one.ratio for one in found.outliers] == sorted((one.ratio for one in found.outliers), reverse=True)


def test_against_others_nothing_is_left_out_as_itself():
    x, base = made(10), made(20, seed=1, name="y")
    base.vectors[3] = 2 * x.vectors[4]
    found = Search(x, base, threshold=0.99, k=1).run()
    assert [(pair.a, pair.b) for pair in found.pairs] == [(4, 3)]
    assert found.outliers[-1].place == 4
    assert found.outliers[-1].distance == pytest.approx(0, abs=1e-6)


def test_an_outlier_of_its_class_and_what_its_neighbours_are():
    rng = np.random.default_rng(0)
    centres = np.eye(8)[[0] * 20 + [1] * 20]
    vectors = (centres + 0.05 * rng.normal(size=(40, 8))).astype(np.float32)
    x = Embeddings("x", [str(n) for n in range(40)], ["a"] * 19 + ["b"] * 21, vectors)  # 19 lies among the a
    first = Search(x, k=3).run().outliers[0]
    assert (first.place, first.others) == (19, "a")
    assert first.ratio > 50


def test_pictures_without_a_vector_are_left_out():
    x = made(12)
    x.vectors[5], x.vectors[6] = np.nan, 0
    found = Search(x, threshold=-1, k=2).run()
    assert found.left_out == 2
    assert {5, 6} & {n for pair in found.pairs for n in (pair.a, pair.b)} == set()
    assert len(found.outliers) == 10


def test_fewer_neighbours_than_asked_for():
    alone = Embeddings("x", ["0", "1", "2"], ["a", "a", "b"], np.eye(3, dtype=np.float32))
    found = Search(alone, k=5).run()
    assert {one.place: one.distance for one in found.outliers} == {0: 1.0, 1: 1.0}


def test_groups():
    pairs = [Pair(4, 5, 1.0), Pair(0, 1, 1.0), Pair(1, 2, 0.9)]
    assert groups_of(pairs, across=False) == [[(0, 0), (0, 1), (0, 2)], [(0, 4), (0, 5)]]
    assert groups_of([Pair(0, 1, 1.0)], across=True) == [[(0, 0), (1, 1)]]


def test_too_many_pairs_are_refused(monkeypatch):
    monkeypatch.setattr("tlx.use.neighbours._MOST_PAIRS", 100)
    with pytest.raises(UserError, match="more than 100 pairs"):
        Search(made(), threshold=-1).run()


def test_vectors_of_another_network_are_refused():
    x, y = made(3), made(3)
    one, other = ({"weights": name, "layer": "l"} for name in "ab")
    with pytest.raises(UserError, match="of another network"):
        Search(x, made(3, width=9)).run()
    with pytest.raises(UserError, match="of another network"):
        Search(
            Embeddings("x", x.files, x.labels, x.vectors, one), Embeddings("y", y.files, y.labels, y.vectors, other)
        ).run()


# Pictures


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine pictures of coloured patches; of two of them a smaller copy, encoded anew."""
    folder, rng = tmp_path_factory.mktemp("p"), np.random.default_rng(0)
    for n in range(9):
        patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        whole = patches.resize((64, 64), Image.Resampling.BICUBIC)
        (folder / f"{n}.png").write_bytes(encoded(whole, "PNG"))
        if n in (2, 7):
            (folder / f"copy-of-{n}.jpg").write_bytes(encoded(whole.resize((48, 48)), "JPEG", quality=70))
    return folder


def test_planted_copies_are_the_closest_pairs(photos, tmp_path):
    file, out = tmp_path / "x.npz", tmp_path / "found"
    done = invoke("embed", "timm/test_resnet", photos, "--weights", "none", "--out", file, "--workers", 0)
    assert done.exception is None, done.stderr
    done = invoke("neighbours", file, "--threshold", 0.5, "--out", out, "--sheet", "--most", 3)
    assert done.exception is None, done.stdout
    rows = list(csv.DictReader((out / "pairs.csv").open()))
    names = [{row["file_a"].rpartition("/")[2], row["file_b"].rpartition("/")[2]} for row in rows[:2]]
    assert sorted(map(sorted, names)) == [["2.png", "copy-of-2.jpg"], ["7.png", "copy-of-7.jpg"]]
    said = json.loads((out / "neighbours.json").read_text())
    assert len(said["pairs"]) == len(rows)
    assert f"... and {len(rows) - 3} more" in done.stdout
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("pairs.png", "outliers.png"))
    assert len(list(csv.DictReader((out / "outliers.csv").open()))) == 11
    assert len(list(photos.iterdir())) == 11


def test_pictures_are_read_by_their_names(photos, shards):
    from tlx.data.shards.manifest import Manifest

    manifest = Manifest.open(shards / "train")
    inside, file = manifest.describe(11), str(photos / "1.png")
    tar, offset, size = manifest.locate(11)
    found = pictures_by_name([inside, file, "gone.jpg", "gone.tar: 1.jpg", f"{photos}"])
    assert found == {inside: tar.read_bytes()[offset : offset + size], file: (photos / "1.png").read_bytes()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gone.npy",), "gone.npy: it cannot be read: No such file"),
        (("x.txt",), "names no format"),
        (("bad.npz",), "it is no file of tlx embed"),
        (("bad.csv",), "it is no file of tlx embed: its columns are a, b"),
        (("bad.npz", "--sheet"), "--sheet draws into a folder"),
        (("bad.npz", "--out", "bad.npz"), "it is there already"),
    ],
)
def test_a_mistake_is_told(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=message):
        raise CliRunner().invoke(app, ["neighbours", *words]).exception
