"""Unreadable samples: named, counted, replaced or left out, never a crash and never a silent loss."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from images import make_shards

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.check import check_shards
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.mix import MixSpec
from tlx.data.stream.stream import ShardStream, evaluation_batches

VIEW = eval_transform(InputSpec(size=(16, 16)))
CORRUPT = (3, 11)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("bad") / "s", per_class={"train": 10, "val": 5}) / "train"


@pytest.fixture
def damaged(good, tmp_path):
    """30 samples in three tars: two pictures overwritten, the last tar cut in the middle of a picture."""
    folder = shutil.copytree(good, tmp_path / "train")
    manifest = Manifest.open(folder)
    for sample in CORRUPT:
        tar, offset, size = manifest.locate(sample)
        os.chmod(tar, 0o644)
        with open(tar, "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    tar, offset, size = manifest.locate(26)
    os.truncate(tar, offset + size // 2)
    return manifest


BAD = [3, 11, 26, 27, 28, 29]


def epoch(manifest, world=1, **settings):
    batches = []
    for rank in range(world):
        stream = ShardStream(manifest, **{"batch": 7, "seed": 2, "transform": VIEW} | settings, rank=rank, world=world)
        batches += list(stream.batches(0, stream.steps_per_epoch))
    return batches


def test_replaced_by_their_own_class_and_named(damaged):
    batches = epoch(damaged, skip_bad=True)
    bad = sorted((b for batch in batches for b in batch.bad), key=lambda b: b.id)
    assert [b.id for b in bad] == BAD
    assert "not a picture: it starts with b'\\x00" in str(bad[0])
    assert str(bad[0]).startswith(str(damaged.path / "000000.tar: 000000003.jpg: "))
    assert "the tar is truncated: " in bad[2].reason
    assert "the tar is truncated: 0 of " in bad[3].reason
    labels = damaged.labels
    assert [labels[b.replaced_by] for b in bad] == [labels[b.id] for b in bad]
    shown = torch.cat([batch.ids for batch in batches]).tolist()
    assert len(shown) == 30
    assert not set(shown) & set(BAD)
    assert set(shown) == set(range(30)) - set(BAD)
    for batch in batches:
        assert batch.labels.tolist() == labels[batch.ids.numpy()].tolist()
        assert (batch.images.float().std((1, 2, 3)) > 5).all()


@pytest.mark.parametrize(("world", "workers", "micro_batch"), [(3, 0, None), (2, 1, 2), (1, 2, 3)])
def test_the_same_replacements_everywhere(damaged, world, workers, micro_batch):
    def shown(batches):
        steps = {}
        for batch in batches:
            if not batch.idle:
                steps.setdefault(batch.step, []).append(batch)
        return (
            [torch.cat([b.ids for b in steps[s]]).tolist() for s in sorted(steps)],
            torch.cat([b.mix.apply(b.images.float()) for s in sorted(steps) for b in steps[s]]),
            sorted((b for batch in batches for b in batch.bad), key=lambda b: b.id),
        )

    mix = MixSpec(cutmix=1.0)  # a guest that is bad is replaced as its owner replaces it, and reported once
    alone = shown(epoch(damaged, skip_bad=True, mix=mix))
    parts = shown(epoch(damaged, world, skip_bad=True, mix=mix, workers=workers, micro_batch=micro_batch))
    assert parts[0] == alone[0]
    assert torch.equal(parts[1], alone[1])
    assert parts[2] == alone[2]


def test_without_leave_the_first_one_is_an_error(damaged):
    with pytest.raises(UserError, match=r"1 unreadable sample|\d unreadable samples") as caught:
        epoch(damaged)
    assert ".tar: 0" in str(caught.value)
    assert "tlx shards check" in caught.value.todo


def test_evaluation_leaves_them_out_and_reports(damaged):
    for world, workers in ((1, 0), (3, 0), (2, 1)):
        batches = [
            b
            for rank in range(world)
            for b in evaluation_batches(
                damaged, batch=4, transform=VIEW, rank=rank, world=world, workers=workers, skip_bad=True
            )
        ]
        assert torch.cat([b.ids for b in batches]).tolist() == [i for i in range(30) if i not in BAD]
        assert [b.id for batch in batches for b in batch.bad] == BAD
        assert sum(b.total for b in batches) == 24
        assert all(len(b.images) == len(b.labels) == b.total for b in batches)
    with pytest.raises(UserError, match="unreadable"):
        list(evaluation_batches(damaged, batch=4, transform=VIEW))


def test_an_evaluation_batch_of_bad_ones_only(damaged):
    (batch,) = [
        b for b in evaluation_batches(damaged, batch=1, transform=VIEW, skip_bad=True) if 11 in [x.id for x in b.bad]
    ]
    assert (batch.idle, batch.total, len(batch.images)) == (True, 0.0, 0)


def test_a_class_without_a_readable_sample_is_black(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "train")
    for tar in folder.glob("*.tar"):
        os.chmod(tar, 0o644)
        os.truncate(tar, 0)
    batches = epoch(Manifest.open(folder), skip_bad=True, workers=1)
    assert sum(len(b.bad) for b in batches) == 30
    assert {bad.replaced_by for b in batches for bad in b.bad} == {None}
    assert all(b.images.shape[1:] == (3, 16, 16) and b.images.sum() == 0 for b in batches)
    # an idle rank's stand-in is not reported
    second = ShardStream(Manifest.open(folder), batch=29, seed=0, transform=VIEW, skip_bad=True, rank=1, world=2)
    assert [(b.idle, b.bad) for b in second.batches(1, 2)] == [(True, ())]


def test_a_stand_in_is_readable(damaged):
    """The last batch of 1 on 2 ranks, for every seed: the idle rank always has a picture."""
    for seed in range(12):
        stream = ShardStream(damaged, batch=4, seed=seed, transform=VIEW, skip_bad=True, rank=3, world=4)
        batch = next(stream.batches(7, 8))
        assert batch.idle
        assert batch.images.float().std() > 5


def test_a_missing_tar_is_bad_a_grown_one_too(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "train")
    manifest = Manifest.open(folder)
    (folder / "000001.tar").unlink()
    os.chmod(folder / "000002.tar", 0o644)
    with open(folder / "000002.tar", "ab") as file:
        file.write(b"\0" * 512)
    reasons = {b.id: b.reason for batch in epoch(manifest, skip_bad=True) for b in batch.bad}
    assert sorted(reasons) == list(range(10, 30))
    assert "No such file" in reasons[10]
    assert "the tar has grown from" in reasons[20]
    with pytest.raises(UserError, match=r"1 of 3 tars are missing: 000001\.tar"):
        Manifest.open(folder)


def test_check_names_every_bad_sample(damaged, good):
    report = check_shards(damaged.path, jobs=2)
    assert not report.good
    assert [b.id for b in report.bad] == BAD
    assert report.samples == 30
    told = ["000000.tar: its bytes were changed", "000001.tar: its bytes were changed", "000002.tar: not a whole tar"]
    assert all(words in line for words, line in zip(told, report.stale, strict=True))
    assert check_shards(good, jobs=0).good


def test_check_notices_tars_that_were_made_anew(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "train")
    one, two = (folder / f"00000{i}.tar" for i in (0, 1))
    data = one.read_bytes()
    one.unlink()
    two.rename(one)
    two.write_bytes(data)
    report = check_shards(folder, jobs=0)
    assert len(report.stale) == 2
    assert "tlx shards index" in report.stale[0]


def test_one_readable_sample_stands_in_for_all_others_of_its_class(good, tmp_path):
    manifest = Manifest.open(shutil.copytree(good, tmp_path / "shards"))
    own = np.flatnonzero(manifest.labels == 0).tolist()
    for sample in own[:-1]:
        tar, offset, size = manifest.locate(sample)
        with open(tar, "r+b") as file:
            file.seek(offset)
            file.write(bytes(size))
    bad = [b for batch in epoch(manifest, skip_bad=True) for b in batch.bad]
    assert sorted(b.id for b in bad) == own[:-1]
    assert {b.replaced_by for b in bad} == {own[-1]}
