"""What a stream can be told beyond the usual: rare classes more often, parts for nodes, cameras, memory kept."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from images import make_folder
from PIL import Image
from places import SUPPORT

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels import jpeg_region as regions
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.sampling import Sampling
from tlx.data.stream.stream import ShardStream, evaluation_batches
from tlx.data.stream.transfer import on_device

INPUT = InputSpec(size=(24, 24))
VIEW = [("random_resized_crop", {"scale": (0.3, 1.0)}), ("horizontal_flip", {})]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16, 4 and 1 training pictures of three classes, in seven shards."""
    place = tmp_path_factory.mktemp("dealing")
    folder = make_folder(place / "pictures" / "train", 3, 16, seed=1)
    for name, kept in (("class1", 4), ("class2", 1)):
        for picture in sorted((folder / name).iterdir())[kept:]:
            picture.unlink()
    make_folder(place / "pictures" / "val", 3, 4, seed=2)
    build_shards(str(place / "pictures"), place / "shards", BuildOptions(shard_samples=3, jobs=0))
    return place / "shards"


@pytest.fixture(scope="module")
def train(data) -> Manifest:
    return Manifest.open(data / "train")


def stream(manifest, *, parts=VIEW, **settings):
    said = {"batch": 4, "seed": 3, "transform": train_transform(parts, INPUT)}
    return ShardStream(manifest, **said | settings)


def shown(manifest, start, stop, *, world=1, **settings):
    """(step, sample, picture) over all ranks, in the order of the global batch."""
    found = []
    for rank in range(world):
        for batch in stream(manifest, rank=rank, world=world, **settings).batches(start, stop):
            if not batch.idle:
                found += zip([batch.step] * len(batch.ids), batch.ids.tolist(), batch.images, strict=True)
    return sorted(found, key=lambda row: row[0])


@pytest.mark.parametrize(
    ("sampling", "counts"),
    [
        (Sampling("balanced"), [7, 7, 7]),
        (Sampling("sqrt"), [12, 6, 3]),
        (Sampling("repeat_factors", threshold=0.3), [16, 5, 3]),
        (Sampling(limit=3), [3, 3, 1]),
    ],
    ids=str,
)
def test_classes_come_as_often_as_asked_in_every_epoch(train, sampling, counts):
    own = stream(train, sampling=sampling)
    assert own.samples_per_epoch == sum(counts)
    for epoch in (0, 1):
        first = epoch * own.steps_per_epoch
        rows = shown(train, first, first + own.steps_per_epoch, sampling=sampling)
        assert np.bincount(train.labels[[i for _, i, _ in rows]], minlength=3).tolist() == counts


def test_a_sample_that_comes_again_is_seen_otherwise_and_the_same_by_all(train):
    sampling = Sampling("balanced")
    rows = shown(train, 0, 6, sampling=sampling)
    lone = [picture for _, i, picture in rows if train.labels[i] == 2]
    assert len(lone) == 7
    assert len({picture.numpy().tobytes() for picture in lone}) == 7
    for settings in ({"world": 2}, {"world": 4, "workers": 1}, {"workers": 3, "micro_batch": 1}):
        again = shown(train, 0, 6, sampling=sampling, **settings)
        assert [row[:2] for row in rows] == [row[:2] for row in again]
        assert all(torch.equal(a[2], b[2]) for a, b in zip(rows, again, strict=True))
    resumed = shown(train, 4, 6, sampling=sampling)
    tail = [row for row in rows if row[0] >= 4]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(tail, resumed, strict=True))


def test_what_a_limit_leaves_out_replaces_nothing(train, tmp_path):
    """The three of class 0 that are left, two of them broken: the third stands in for both, in every epoch."""
    few = Sampling(limit=3)
    left = sorted({i for _, i, _ in shown(train, 0, 2, sampling=few) if train.labels[i] == 0})
    assert len(left) == 3
    broken = tmp_path / "broken"
    shutil.copytree(train.path, broken)
    damaged = Manifest.open(broken)
    for sample in left[:2]:
        tar, offset, size = damaged.locate(sample)
        with open(tar, "r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    rows = shown(damaged, 0, 8, sampling=few, skip_bad=True)
    assert {i for _, i, _ in rows if train.labels[i] == 0} == {left[2]}


def test_parts_show_every_sample_once_to_any_number_of_ranks(train):
    rows = shown(train, 0, 6)
    dealt = {world: shown_in_parts(train, world) for world in (1, 2, 4)}
    assert sorted(i for _, i, _ in dealt[1]) == sorted(i for _, i, _ in rows) == list(range(21))
    for world in (2, 4):
        assert [row[:2] for row in dealt[world]] == [row[:2] for row in dealt[1]]
    own = {i for batch in parts_stream(train, 0, 2).batches(0, 5) for i in batch.ids.tolist()}
    shards = {train.shard_of(i) for i in own}
    assert len(shards) <= 4  # of seven: its half, and the one on the border


def parts_stream(manifest, rank, world):
    return ShardStream(
        manifest, batch=4, seed=3, transform=train_transform(VIEW, INPUT), rank=rank, world=world, parts=2, window=4
    )


def shown_in_parts(manifest, world):
    batches = [b for rank in range(world) for b in parts_stream(manifest, rank, world).batches(0, 6) if not b.idle]
    return sorted(((b.step, int(i), 0) for b in batches for i in b.ids), key=lambda row: row[0])


def test_batches_that_are_kept_stay_as_they_were(train):
    """There are few slots; whoever keeps more batches than that gets copies."""
    for workers in (0, 2):
        kept = [b.images for b in stream(train, workers=workers).batches(0, 40)]
        for step in (0, 1, 17, 38, 39):
            one = next(stream(train).batches(step, step + 1))
            assert torch.equal(kept[step], one.images)


def test_batches_on_a_device(train):
    device = torch.device("cpu")
    moved = list(on_device(stream(train).batches(0, 9), device))
    assert [b.step for b in moved] == list(range(9))
    assert all(torch.equal(a.images, b.images) for a, b in zip(moved, stream(train).batches(0, 9), strict=True))


@pytest.mark.gpu
def test_batches_reach_a_gpu_whole(train):
    """Slots are recycled while copies are under way: what arrives must be what was in them."""
    device = torch.device("cuda")
    wanted = [b.images for b in stream(train).batches(0, 60)]
    for workers in (0, 2):
        arrived = []
        for batch in on_device(stream(train, workers=workers, pin=True).batches(0, 60), device):
            torch.cuda._sleep(2_000_000)
            arrived.append(batch.images.cpu())
        assert all(torch.equal(a, b) for a, b in zip(arrived, wanted, strict=True))


@pytest.fixture(scope="module")
def turned(tmp_path_factory) -> Manifest:
    """The same picture eight times, as cameras held in eight ways store it."""
    place = tmp_path_factory.mktemp("turned")
    y, x = np.mgrid[0:64, 0:96]
    pixels = np.stack([x * 2, y * 3, (x + y)], -1).astype(np.uint8)
    for name in ("a", "b"):
        (place / "pictures" / name).mkdir(parents=True)
    for orientation in range(1, 9):
        undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        turn(Image.fromarray(pixels), undo).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
        (place / "pictures" / "ab"[orientation % 2] / f"{orientation}.jpg").write_bytes(buffer.getvalue())
    build_shards(str(place / "pictures"), place / "shards", BuildOptions(val=0, jobs=0))
    return Manifest.open(place / "shards" / "train")


def turn(image: Image.Image, orientation: int) -> Image.Image:
    steps = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    return image if orientation == 1 else image.transpose(Image.Transpose(steps[orientation]))


@pytest.mark.parametrize("extension", [True, False])
def test_cameras_are_turned_unless_told_otherwise(turned, extension, monkeypatch):
    if not extension:
        monkeypatch.setattr(regions, "_jpeg", None)
    view = eval_transform(InputSpec(size=(48, 48)))
    images = next(evaluation_batches(turned, batch=8, transform=view)).images.float()
    assert (images - images[:1]).abs().max() < 12
    assert (images - images[:1]).abs().mean() < 1.5
    stored = next(evaluation_batches(turned, batch=8, transform=view, upright=False)).images.float()
    assert sum((stored[i] - stored[j]).abs().mean() > 10 for i in range(8) for j in range(i)) == 28
    loose = train_transform([("resize", {"size": (48, 48)}), ("color_jitter", {"hue": 0.0})], InputSpec(size=(48, 48)))
    for upright in (True, False):
        found = next(
            ShardStream(turned, batch=8, seed=0, transform=loose, upright=upright).batches(0, 1)
        ).images.float()
        alike = (found - found[:1]).abs().mean((1, 2, 3)) < 1.5
        assert alike.all() == upright


def test_a_limit_on_nothing_is_refused(train):
    with pytest.raises(UserError, match="leaves nothing"):
        Sampling(limit=0)
    with pytest.raises(UserError, match="parts"):
        ShardStream(train, batch=4, seed=0, transform=train_transform(VIEW, INPUT), parts=5)


@pytest.mark.slow
def test_processes_that_are_not_forked_show_the_same(data, train):
    lines = f"""
        import multiprocessing, sys, torch
        sys.path[:0] = {[str(Path(__file__).parent), str(SUPPORT)]!r}
        from test_dealing import Manifest, shown
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            train = Manifest.open({str(data / "train")!r})
            rows = shown(train, 0, 6, workers=2)
            multiprocessing.set_start_method("fork", force=True)
            again = shown(train, 0, 6)
            assert [r[:2] for r in rows] == [r[:2] for r in again]
            assert all(torch.equal(a[2], b[2]) for a, b in zip(rows, again))
            print("same")
    """
    done = subprocess.run([sys.executable, "-c", dedent(lines)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr
