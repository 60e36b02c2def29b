"""Targets in batches: those of the samples that are shown; what they weigh, on any number of ranks."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from images import TARGETS, make_target_shards

from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.data.pixels.transforms import eval_transform
from tlx.data.shards.manifest import write_index
from tlx.data.shards.targets import Target
from tlx.data.stream.mix import MixSpec
from tlx.data.stream.stream import ShardStream, evaluation_batches

VIEW = eval_transform(InputSpec(size=(16, 16)))
NAMES = ("label", *(t.name for t in TARGETS))
MIX = MixSpec(mixup=0.4, prob=0.8)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """24 samples with a target of each kind."""
    return make_target_shards(tmp_path_factory.mktemp("targets") / "train", size=16)


def steps(manifest, first=0, last=4, *, world=1, **settings):
    """By step, the micro-batches of all ranks in order."""
    made = {}
    for rank in range(world):
        stream = ShardStream(
            manifest, **{"batch": 7, "seed": 1, "transform": VIEW, "targets": NAMES} | settings, rank=rank, world=world
        )
        for batch in stream.batches(first, last):
            made.setdefault(batch.step, []).append(batch)
    return made


def same(one, other):
    return torch.equal(torch.nan_to_num(one, -9), torch.nan_to_num(other, -9))


def test_by_hand(tmp_path):
    tags = np.array([[1, 0], [-1, 1], [0, -1]], np.int8)
    age = np.array([[3.5], [np.nan], [-2.0]], np.float32)
    colour = np.array([1, -1, 0], np.int32)
    manifest = make_target_shards(
        tmp_path / "s",
        [
            (Target("colour", "class", ("red", "white")), colour),
            (Target("tags", "labels", ("a", "b")), tags),
            (Target("age", "number"), age),
        ],
        samples=3,
        size=16,
    )
    (batch,) = evaluation_batches(manifest, batch=5, transform=VIEW, targets=("age", "colour", "tags"))
    assert list(batch.targets) == ["age", "colour", "tags"]
    assert {n: t.dtype for n, t in batch.targets.items()} == {
        "age": torch.float32,
        "colour": torch.int64,
        "tags": torch.int8,
    }
    assert batch.targets["colour"].tolist() == [1, -1, 0]
    assert batch.targets["tags"].tolist() == [[1, 0], [-1, 1], [0, -1]]
    assert same(batch.targets["age"], torch.tensor([[3.5], [torch.nan], [-2.0]]))
    assert batch.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, None), (1, 2), (2, None), (3, 2)])
def test_targets_are_those_of_the_samples_on_any_number_of_ranks(train, world, micro_batch):
    made = steps(train, world=world, micro_batch=micro_batch, mix=MIX)
    whole = {step: torch.cat([b.ids for b in own if not b.idle]) for step, own in steps(train).items()}
    for step, own in made.items():
        place = 0
        for batch in own:
            for name in NAMES:
                assert same(
                    batch.targets[name],
                    torch.from_numpy(np.array(train.values(name)[batch.ids.numpy()])).to(batch.targets[name].dtype),
                )
            assert batch.targets["label"] is batch.labels
            if batch.idle:
                continue
            for at, lam in enumerate(batch.mix.lam.tolist()):
                slot = place + at
                partner = int(whole[step][slot ^ 1 if lam < 1 else slot])
                for name in NAMES:
                    expected = torch.from_numpy(np.array(train.values(name)[[partner]]))
                    assert same(batch.mix.partner_targets[name][at : at + 1], expected.to(batch.targets[name].dtype))
            place += len(batch.ids)
            assert torch.equal(batch.mix.partner_targets["label"], batch.mix.partner_labels)
        assert place == len(whole[step])


def test_without_being_asked_for_there_is_the_label_alone(train):
    batch = steps(train, 0, 1, targets=("label",), mix=MIX)[0][0]
    assert list(batch.targets) == list(batch.mix.partner_targets) == ["label"]
    assert batch.scales is None
    with pytest.raises(UserError, match=r'no target "colours"; did you mean "colour"\?'):
        steps(train, targets=("colours",))
    with pytest.raises(UserError, match="no target"):
        next(evaluation_batches(train, batch=2, transform=VIEW, targets=("x",)))


def known(values):
    """Two parts: whether there is a colour, and how many tags are known."""
    return np.stack([values["colour"] >= 0, (values["tags"] >= 0).sum(1)], axis=1).astype(np.float64)


def colour_alone(values):
    return np.where(values["colour"] >= 0, np.array([0.5, 1.0, 4.0])[values["colour"]], 0.0)[:, None]


@pytest.mark.parametrize("mix", [None, MIX])
def test_totals_and_scales_are_of_the_global_batch(train, mix):
    weights = np.array([0.5, 1.0, 4.0])
    for world, micro_batch in ((1, None), (2, 2), (3, None)):
        one = steps(train, world=world, micro_batch=micro_batch, mix=mix, weigh=colour_alone)
        two = steps(train, world=world, micro_batch=micro_batch, mix=mix, weigh=known)
        for step in one:
            sums = np.zeros(3)
            for batch in two[step]:
                if batch.idle:
                    continue
                own = [known({n: t.numpy() for n, t in batch.targets.items()})]
                own.append(colour_alone({n: t.numpy() for n, t in batch.targets.items()}))
                rows = np.concatenate(own, axis=1)
                if mix:
                    other = {n: t.numpy() for n, t in batch.mix.partner_targets.items()}
                    lam = batch.mix.lam.double().numpy()[:, None]
                    rows = lam * rows + (1 - lam) * np.concatenate([known(other), colour_alone(other)], axis=1)
                sums += rows.sum(0)
            count = 7 if step < 3 else 3
            assert {b.total for b in two[step]} == {float(count)}
            assert len({tuple(b.scales.tolist()) for b in two[step]}) == 1
            assert two[step][0].scales.dtype == torch.float32
            assert two[step][0].scales.tolist() == pytest.approx((count / sums[:2]).tolist(), rel=1e-5)
            assert len({b.total for b in one[step]}) == 1
            assert one[step][0].total == pytest.approx(sums[2], rel=1e-6)
            assert one[step][0].scales is None
    assert weights.sum() == 5.5


@pytest.mark.parametrize("mix", [None, MIX])
def test_class_weights_and_the_same_by_weigh_are_one_to_the_bit(train, mix):
    weights = [0.3, 1.1, 1 / 7]
    by_class = steps(train, mix=mix, class_weights=weights)
    by_weigh = steps(train, mix=mix, weigh=lambda values: np.array(weights)[values["label"]][:, None])
    assert [b.total for own in by_class.values() for b in own] == [b.total for own in by_weigh.values() for b in own]
    if mix is None:
        first = by_class[0][0]
        assert first.total == float(np.sum(np.array(weights)[first.labels.numpy()]))


def test_weights_of_nothing(train):
    batch = steps(train, 0, 1, weigh=lambda values: None)[0][0]
    assert (batch.total, batch.scales) == (7.0, None)
    batch = steps(train, 0, 1, weigh=lambda values: np.zeros((7, 1)))[0][0]
    assert (batch.total, batch.counts) == (0.0, False)
    batch = steps(train, 0, 1, weigh=lambda values: np.array([[0.0, 2.0]] * 7))[0][0]
    assert (batch.total, batch.scales.tolist()) == (7.0, [0.0, 0.5])
    with pytest.raises(UserError, match=r"shape \[6, 1\]; expected \[7, parts\]"):
        steps(train, 0, 1, weigh=lambda values: np.ones((6, 1)))


def test_what_is_weighed_are_the_values_of_the_whole_batch_whoever_asks(train):
    seen = {}

    def weigh(values):
        seen.setdefault(rank, []).append({n: (v.dtype.str, v.shape, v.tobytes()) for n, v in values.items()})
        return

    for rank in range(3):
        stream = ShardStream(
            train, batch=7, seed=1, transform=VIEW, targets=("tags", "age"), weigh=weigh, rank=rank, world=3
        )
        list(stream.batches(0, 2))
    assert seen[0] == seen[1] == seen[2]
    assert {n: about[:2] for n, about in seen[0][0].items()} == {
        "label": ("<i8", (7,)),
        "tags": ("|i1", (7, 4)),
        "age": ("<f4", (7, 1)),
    }


def test_batches_with_targets_move(train):
    batch = steps(train, 0, 1, mix=MIX, weigh=known)[0][0]
    moved = batch.to("meta")
    tensors = [*moved.targets.values(), *moved.mix.partner_targets.values(), moved.scales]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.targets["label"] is moved.labels


def test_a_replacement_shows_its_own_targets(tmp_path):
    manifest = make_target_shards(tmp_path / "s", samples=12, size=16)
    broken(manifest, 4)
    batches = [b for own in steps(manifest, 0, 2, skip_bad=True, batch=6).values() for b in own]
    (bad,) = (b for batch in batches for b in batch.bad)
    assert bad.id == 4
    assert bad.replaced_by % 3 == 1
    for batch in batches:
        assert 4 not in batch.ids
        assert batch.targets["colour"].tolist() == manifest.values("colour")[batch.ids.numpy()].tolist()


def broken(manifest, *samples):
    for sample in samples:
        tar, offset, size = manifest.locate(sample)
        with open(tar, "r+b") as file:
            os.pwrite(file.fileno(), bytes(size), offset)


@pytest.mark.parametrize(("world", "micro_batch"), [(1, None), (1, 3), (2, None), (3, 1)])
def test_a_mixed_sample_gets_the_targets_of_the_picture_that_is_mixed_in(tmp_path, world, micro_batch):
    """The age of a picture is its mean: the mean of a mixed one is what is made of both ages, replaced or not."""
    made = make_target_shards(tmp_path / "s", [], classes=0, samples=8, size=16)
    (all_of_them,) = evaluation_batches(made, batch=8, transform=VIEW)
    age = (Target("age", "number"), all_of_them.images.float().mean((1, 2, 3))[:, None].numpy())
    manifest = write_index(made.path, classes=(), shards=made.shards, records=np.array(made.records), targets=[age])
    broken(manifest, 2, 5)
    mixing = {"batch": 8, "mix": MixSpec(mixup=1.0), "world": world, "micro_batch": micro_batch, "skip_bad": True}
    batches = [b for own in steps(manifest, 0, 6, targets=("age",), **mixing).values() for b in own]
    for batch in batches:
        if batch.idle:
            continue
        ages, lam = (batch.targets["age"], batch.mix.partner_targets["age"]), batch.mix.lam[:, None]
        means = batch.mix.apply(batch.images.float()).mean((1, 2, 3))
        assert torch.allclose(means, (lam * ages[0] + (1 - lam) * ages[1])[:, 0], atol=0.01)
    assert {b.id for batch in batches for b in batch.bad} == {2, 5}


def test_without_a_class(tmp_path):
    manifest = make_target_shards(tmp_path / "s", classes=0, samples=9, size=16)
    broken(manifest, 3)
    (whole,) = steps(manifest, 0, 1, batch=9, skip_bad=True, targets=("colour",), mix=MIX)[0]
    assert whole.labels.tolist() == whole.mix.partner_labels.tolist() == [-1] * 9
    assert list(whole.targets) == ["colour"]
    assert whole.bad[0].replaced_by not in (None, 3)  # any other one
    from tlx.data.stream.sampling import Sampling

    with pytest.raises(UserError, match="cannot be chosen by class: these shards have no class"):
        steps(manifest, sampling=Sampling("balanced"))
    assert ShardStream(manifest, batch=3, seed=0, transform=VIEW).distinct_samples == 9
