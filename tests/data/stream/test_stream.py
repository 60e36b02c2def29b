"""Training and evaluation batches: the same samples and pixels for every number of ranks, micro-batches and workers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from textwrap import dedent

import numpy as np
import psutil
import pytest
import torch
from images import make_folder, make_shards

from tlx.base.errors import TlxError, UserError
from tlx.base.inputs import InputSpec
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.mix import MixSpec
from tlx.data.stream.reader import ShardReader
from tlx.data.stream.stream import Batch, ShardStream, evaluation_batches

INPUT = InputSpec(size=(24, 24))
PARTS = [
    ("random_resized_crop", {"scale": (0.3, 1.0)}),
    ("rotation", {"degrees": 20}),
    ("color_jitter", {"brightness": 0.3, "hue": 0.1}),
    ("horizontal_flip", {}),
    ("random_erasing", {}),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """59 training pictures in six shards of ten and less, 37 for validation in three."""
    path = tmp_path_factory.mktemp("stream") / "shards"
    folder = make_folder(path.parent / "pictures" / "train", 3, 20, seed=1)
    (folder / "class0" / "0019.jpg").unlink()
    make_folder(path.parent / "pictures" / "val", 3, 13, seed=2)
    for name in ("class1", "class2"):
        (path.parent / "pictures" / "val" / name / "0012.jpg").unlink()
    from tlx.data.build.write import BuildOptions, build_shards

    build_shards(str(path.parent / "pictures"), path, BuildOptions(shard_samples=13, jobs=0))
    return path


@pytest.fixture(scope="module")
def train(data):
    return Manifest.open(data / "train")


@pytest.fixture(scope="module")
def val(data):
    return Manifest.open(data / "val")


def stream(manifest, **settings):
    return ShardStream(
        manifest, **{"batch": 8, "seed": 3, "transform": train_transform(PARTS, INPUT), "window": 2} | settings
    )


def gathered(manifest, start, stop, *, world=1, own=lambda b: b.images[: len(b.labels)], **settings):
    """Global batches as all ranks together see them: step -> (ids, labels, pictures)."""
    steps = {step: [] for step in range(start, stop)}
    for rank in range(world):
        for batch in stream(manifest, rank=rank, world=world, **settings).batches(start, stop):
            if not batch.idle:
                steps[batch.step].append((batch.ids, batch.labels, own(batch)))
    return {step: [torch.cat(parts) for parts in zip(*pieces, strict=True)] for step, pieces in steps.items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for step in left for a, b in zip(left[step], right[step], strict=True)
    )


@pytest.fixture(scope="module")
def reference(train):
    """More than an epoch: 8 steps, the last of them short, and two more."""
    return gathered(train, 0, 10)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_same_pixels_on_any_number_of_ranks(train, reference, world, micro_batch):
    assert same(gathered(train, 0, 10, world=world, micro_batch=micro_batch), reference)


@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 1), (2, 3)])
def test_same_pixels_with_any_number_of_workers(train, reference, workers, world):
    assert same(gathered(train, 0, 10, workers=workers, world=world, micro_batch=3), reference)


def test_every_sample_once_an_epoch_and_otherwise_in_the_next(train):
    steps = stream(train).steps_per_epoch
    epochs = [
        torch.cat([ids for ids, _, _ in gathered(train, e * steps, (e + 1) * steps).values()]).tolist() for e in (0, 1)
    ]
    assert steps == 8
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(59))
    assert epochs[0] != epochs[1]


def test_an_epoch_is_seen_with_other_pixels(train):
    both = gathered(train, 0, 16)
    first, second = (
        {int(i): x for s in part for i, x in zip(both[s][0], both[s][2], strict=True)}
        for part in (range(8), range(8, 16))
    )
    assert sum(torch.equal(first[i], second[i]) for i in first) == 0


def test_labels_are_those_of_the_pictures(train, reference):
    for ids, labels, _ in reference.values():
        assert labels.tolist() == train.labels[ids.numpy()].tolist()


def test_resume_is_arithmetic(train, reference, monkeypatch):
    read, plain = [], ShardReader.read
    monkeypatch.setattr(ShardReader, "read", lambda self, sample: read.append(sample) or plain(self, sample))
    resumed = gathered(train, 7, 10)
    assert same(resumed, {step: reference[step] for step in (7, 8, 9)})
    assert read == torch.cat([resumed[step][0] for step in (7, 8, 9)]).tolist()  # 3 + 8 + 8, and nothing before
    assert len(read) == 19


def test_the_training_process_does_not_notice(train):
    def noisy(image):
        shade = int(torch.randint(0, 50, ()) + np.random.randint(50) + random.randrange(50))
        return torch.full((3, 4, 4), shade, dtype=torch.uint8)

    seen = {}
    for workers in (0, 2):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        before = torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()
        seen[workers] = []
        for batch in stream(train, transform=noisy, workers=workers, mix=MixSpec(mixup=0.3)).batches(0, 3):
            seen[workers].append(batch.images)
            assert torch.equal(torch.get_rng_state(), before[0])
            assert (pickle.dumps(np.random.get_state()), random.getstate()) == before[1:]
        for _ in evaluation_batches(train, batch=30, transform=noisy, workers=workers):
            pass
        assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[2]))
    assert len(torch.cat(seen[0])[:, 0, 0, 0].unique()) > 10


@pytest.mark.parametrize(("world", "sizes"), [(1, [32]), (2, [16, 16]), (3, [11, 11, 10])])
def test_dealing(train, world, sizes):
    got = [len(next(stream(train, batch=32, rank=r, world=world).batches(0, 1)).labels) for r in range(world)]
    assert got == sizes


def test_all_ranks_make_the_same_number_of_micro_batches(train):
    """3 of the last short batch on 2 ranks, one at a time: 2 and 1, so one of the four is idle."""
    batches = [list(stream(train, rank=r, world=2, micro_batch=1).batches(7, 8)) for r in range(2)]
    assert [[(b.micro, b.micros, b.idle) for b in rank] for rank in batches] == [
        [(0, 2, False), (1, 2, False)],
        [(0, 2, False), (1, 2, True)],
    ]
    idle = batches[1][1]
    assert idle.images.shape == (1, 3, 24, 24)
    assert idle.total == 3.0
    assert idle.labels.tolist() == train.labels[idle.ids.numpy()].tolist()


def test_a_last_batch_of_one_on_two_ranks(train):
    first, second = (next(stream(train, batch=29, rank=r, world=2).batches(2, 3)) for r in range(2))
    assert (first.idle, len(first.labels), first.total) == (False, 1, 1.0)
    assert (second.idle, second.total) == (True, 1.0)


def test_drop_last(train):
    dropping = stream(train, drop_last=True)
    assert dropping.steps_per_epoch == 7
    batches = list(dropping.batches(0, 14))
    assert {len(b.labels) for b in batches} == {8}
    assert len({int(i) for b in batches[:7] for i in b.ids}) == 56
    assert dropping.samples_before(14) == 112
    assert stream(train).samples_before(17) == 2 * 59 + 8


@pytest.mark.parametrize("mix", [None, MixSpec(mixup=0.4, cutmix=1.0)])
def test_totals_with_class_weights_are_what_the_ranks_sum_up_to(train, mix):
    weights = [0.5, 1.0, 4.0]
    for step in (0, 7):
        summed, totals = 0.0, set()
        for rank in range(3):
            for b in stream(train, rank=rank, world=3, micro_batch=2, class_weights=weights, mix=mix).batches(
                step, step + 1
            ):
                totals.add(b.total)
                if b.idle:
                    continue
                own = torch.tensor(weights, dtype=torch.float64)[b.labels]
                if b.mix:
                    other = torch.tensor(weights, dtype=torch.float64)[b.mix.partner_labels]
                    own = b.mix.lam * own + (1 - b.mix.lam) * other
                summed += float(own.sum())
        assert len(totals) == 1
        assert totals.pop() == pytest.approx(summed, rel=1e-6)


@pytest.mark.parametrize("mix", [MixSpec(mixup=0.4), MixSpec(cutmix=1.0), MixSpec(mixup=0.2, cutmix=1.0, prob=0.7)])
def test_mixed_pictures_do_not_depend_on_ranks_or_micro_batches(train, mix):
    def mixed(batch):
        return batch.mix.apply(batch.images.float())

    alone = gathered(train, 6, 9, mix=mix, own=mixed)
    plain = gathered(train, 6, 9)
    assert not same(alone, plain)
    for world, micro_batch, workers in ((1, 1, 0), (2, None, 0), (3, 2, 0), (8, None, 0), (3, None, 2)):
        assert same(
            gathered(train, 6, 9, mix=mix, own=mixed, world=world, micro_batch=micro_batch, workers=workers), alone
        )


def test_every_step_mixes_differently(train):
    steps = list(stream(train, mix=MixSpec(mixup=1.0)).batches(0, 9))
    assert len({tuple(b.mix.lam.tolist()) for b in steps}) == 9


def test_37_validation_samples_are_counted_once_in_the_same_batches(val):
    assert len(val) == 37
    for world in (1, 2, 3, 40):
        for workers in (0, 1) if world < 3 else (0,):
            ids = [
                b.ids.tolist()
                for rank in range(world)
                for b in evaluation_batches(
                    val, batch=5, transform=eval_transform(INPUT), rank=rank, world=world, workers=workers
                )
            ]
            assert ids == [list(range(at, min(at + 5, 37))) for at in range(0, 37, 5)]
    assert list(evaluation_batches(val, batch=5, transform=eval_transform(INPUT), rank=39, world=40)) == []


def test_evaluation_totals_and_pixels(val):
    batches = list(evaluation_batches(val, batch=16, transform=eval_transform(INPUT)))
    assert [b.total for b in batches] == [16.0, 16.0, 5.0]
    again = torch.cat([b.images for b in evaluation_batches(val, batch=7, transform=eval_transform(INPUT), workers=2)])
    assert torch.equal(torch.cat([b.images for b in batches]), again)


def test_fewer_shards_than_readers(val):
    assert len(val.shards) == 3
    seen = gathered(val, 0, 5, world=2, workers=2)
    assert sorted(torch.cat([ids for ids, _, _ in seen.values()]).tolist()) == list(range(37))


def test_one_shard(tmp_path):
    manifest = Manifest.open(make_shards(tmp_path / "s", per_class=4, shard_samples=99) / "train")
    assert len(manifest.shards) == 1
    assert sorted(torch.cat([b.ids for b in stream(manifest, batch=5).batches(0, 3)]).tolist()) == list(range(12))


def test_a_stream_survives_pickling(train, reference):
    clone = pickle.loads(pickle.dumps(stream(train)))
    batch = next(clone.batches(2, 3))
    assert torch.equal(batch.images, reference[2][2])
    assert len(pickle.dumps(train)) < 1000  # not its index


def test_batches_move(train):
    batch = next(stream(train, mix=MixSpec(mixup=1.0)).batches(0, 1))
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.images, moved.labels, moved.ids, moved.mix.lam, moved.mix.partner)} == {
        "meta"
    }
    assert moved.total == batch.total
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.dtype == torch.uint8


def die(image):
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return image


def test_a_killed_worker_is_an_error_in_words(train):
    words = r"a data worker died: killed by signal 9[\s\S]*out of memory[\s\S]*at .*\.tar: \d+\.jpg"
    with pytest.raises(TlxError, match=words):
        next(stream(train, workers=1, transform=die).batches(0, 1))


def test_workers_outlive_a_request_to_stop(train, born):
    """A scheduler signals the whole process group; the training process still wants to finish its step."""
    batches = stream(train, workers=2).batches(0, 8)
    next(batches)
    workers = born()
    assert len(workers) >= 2
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(w.pid) for w in workers)], check=True)
    assert len(list(batches)) == 7
    assert not psutil.wait_procs(workers, timeout=20)[1]


@pytest.mark.slow
def test_a_batch_left_lying_does_not_keep_the_process(data):
    """An error holds its frames, and they a stream's workers; the process ends all the same."""
    lines = f"""
        import sys
        from tlx.data.shards.manifest import Manifest
        from tlx.data.stream.stream import ShardStream
        batches = ShardStream(Manifest.open({str(data / "train")!r}), batch=2, seed=0, workers=2,
                              transform=lambda image: image).batches(0, 30)
        next(batches)
        sys.kept = batches
        raise SystemExit(7)
    """
    assert subprocess.run([sys.executable, "-c", dedent(lines)], timeout=60).returncode == 7


def broken(image):
    if torch.initial_seed():  # not the one that tells the shape
        raise ZeroDivisionError("oh")
    return image


def test_failing_transforms_name_the_picture(train):
    for workers in (0, 1):
        with pytest.raises(TlxError, match=r"\.tar: \d+\.jpg: the transforms fail .* 48 x 48 pixels: oh"):
            next(stream(train, transform=broken, workers=workers).batches(0, 1))


def test_workers_end_with_an_error_and_do_not_wait_for_it_to_be_forgotten(train, born):
    with pytest.raises(TlxError) as caught:
        next(stream(train, transform=broken, workers=2).batches(0, 1))
    assert caught.tb  # which holds on to the iterator over the workers
    assert psutil.wait_procs(born(), timeout=20)[1] == []


def test_transforms_of_changing_size_are_refused(train):
    with pytest.raises(TlxError, match="different shapes"):
        next(stream(train, transform=lambda i: i[:, : int(torch.randint(5, 20, ()))]).batches(0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "at least 1"),
        ({"micro_batch": 0}, "at least 1"),
        ({"world": 9, "batch": 8}, "9 ranks cannot share a global batch of 8"),
        ({"batch": 60, "drop_last": True}, "leaves nothing of 59"),
        ({"class_weights": [1.0, 2.0]}, "2 class weights for 3 classes"),
        ({"rank": 2, "world": 2}, "no rank 2 of 2"),
        ({"window": 0}, "window of 0"),
    ],
)
def test_sizes_that_do_not_fit(train, settings, message):
    with pytest.raises(UserError, match=message):
        stream(train, **settings)


@pytest.mark.parametrize("broken", [torch.float32, torch.int16])
def test_transforms_that_do_not_give_bytes_are_refused(train, broken):
    for transform in (lambda i: i[:, :8, :8].to(broken), lambda i: i[:, :8, :8].to(broken) if i.sum() % 2 else i):
        with pytest.raises(TlxError, match=f"give {broken}; they must give torch.uint8|different shapes"):
            list(stream(train, transform=transform).batches(0, 8))


def test_a_step_does_not_wait_for_the_next_ones_pictures():
    from tlx.train.step import by_step

    said = []

    def batches():
        for step in range(3):
            for micro in range(2):
                said.append(("made", step))
                yield Batch(step, micro, 2, *[torch.zeros(1)] * 3, 1.0)

    for step, own in by_step(batches()):
        assert [b.step for b in own] == [step, step]
        said.append(("taken", step))
    assert said == [e for s in range(3) for e in (("made", s), ("made", s), ("taken", s))]
