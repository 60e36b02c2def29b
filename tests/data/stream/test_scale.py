"""A data set of the size of ImageNet: 1.3 million samples in 1,300 shards, of which next to nothing is read or held.

The pictures are real, but all samples of a shard share one, so that the files stay small. tests/bench/scale.py measures
the same and 100 million samples; here is what must hold on any machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from bench.scale import label_entropy, write_data_set

from tlx.data.shards.manifest import Manifest
from tlx.data.stream.order import EpochOrder, Shuffle
from tlx.data.stream.sampling import Sampling, entries, targets
from tlx.data.stream.stream import ShardStream

SHARDS, CLASSES, BATCH = 1300, 1000, 256
SIZES = np.full(SHARDS, 1000)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("scale") / "large", SHARDS, 1000, CLASSES)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("scale") / "small", 2, 2, 2)


CHILD = """
import json, re, sys
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import ShardStream

def own():
    # what is mapped from the index is clean, and shared by all processes
    text = open("/proc/self/smaps_rollup").read()
    return int(re.search(r"Private_Dirty: +(\\d+)", text)[1]) / 1024

def read():
    return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])

def first_batch(folder, step, **options):
    manifest = Manifest.open(folder)
    opened = read()
    stream = ShardStream(manifest, seed=0, transform=lambda image: image, **options)
    batch = next(stream.batches(step, step + 1))
    return stream, batch, read() - opened

large, small, shuffles = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
first_batch(small, 0, batch=4, parts=2)  # loads what is loaded lazily
before, kept, found = own(), [], []
for window, parts in shuffles:
    stream, batch, content = first_batch(large, 2500, batch=256, window=window, parts=parts)
    kept.append(stream)
    found.append({"grown": own() - before, "read": content, "ids": batch.ids.tolist()})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_resumed_process_holds_and_reads_little(large, small):
    shuffles = [(None, 1), (1000, 1), (None, 8)]
    command = [sys.executable, "-c", CHILD, str(large), str(small), json.dumps(shuffles)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for (window, parts), found in zip(shuffles, json.loads(done.stdout), strict=True):
        assert found["grown"] < 18  # MiB, of all streams so far; a single index has 20
        assert found["read"] < 2**19  # bytes, after opening: 256 pictures of 0.6 kB, and the reading of memory figures
        order = EpochOrder(SIZES, Shuffle(0, window, parts, BATCH), 0)
        assert found["ids"] == order.ids(2500 * BATCH, 2501 * BATCH).tolist()


@pytest.mark.parametrize("shuffle", [Shuffle(3), Shuffle(3, 1200), Shuffle(3, 8), Shuffle(3, 64, 8, BATCH)])
def test_a_step_in_the_middle_is_that_of_a_whole_epoch(shuffle):
    walked = EpochOrder(SIZES, shuffle, 1)
    steps = [walked.ids(at, min(at + BATCH, len(walked))) for at in range(0, len(walked), BATCH)]
    assert np.array_equal(np.sort(np.concatenate(steps)), np.arange(1_300_000))
    for step in (0, 2539, 4000, len(steps) - 1):
        found = EpochOrder(SIZES, shuffle, 1).ids(step * BATCH, min((step + 1) * BATCH, 1_300_000))
        assert np.array_equal(found, steps[step])


@pytest.mark.parametrize(("shuffle", "most"), [(Shuffle(0), 1), (Shuffle(0, 100, 8, BATCH), 1), (Shuffle(0, 8), 1)])
def test_an_order_is_smaller_than_a_table_of_it(shuffle, most):
    tracemalloc.start()
    EpochOrder(SIZES, shuffle, 0).ids(650_000, 650_256)
    EpochOrder(SIZES, shuffle, 0).shards_for(650_000, 650_256)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < most  # MiB; a table of a window of 8 shards takes 0.03 and, while it is made, 0.2


def test_windows_mix_as_much_as_they_say():
    """Shards of one class each: a batch holds about as many classes as shards mix."""
    labels = np.repeat(np.arange(64), 500)

    def bits(window, parts=1):
        return label_entropy(EpochOrder([500] * 64, Shuffle(0, window, parts, BATCH), 0), labels, BATCH)

    assert label_entropy(EpochOrder([500] * 64, Shuffle(0, 1), 0), labels, 500) == 0
    assert abs(bits(8) - 3) < 0.2
    assert 5.7 < bits(None) < 6
    assert abs(bits(8, 8) - 3) < 0.3
    assert bits(1, 8) > 2.7  # a window per part
    assert abs(bits(None, 8) - bits(None)) < 0.1


def test_a_node_of_64_needs_a_64th_of_the_shards():
    order = EpochOrder(SIZES, Shuffle(0, None, 64, 4096), 0)
    needed = [order.shards_for(0, len(order), range(node * 64, node * 64 + 64)) for node in range(64)]
    assert sum(map(len, needed)) <= SHARDS + 63
    assert set().union(*needed) == set(range(SHARDS))
    everything = EpochOrder(SIZES, Shuffle(0, batch=4096), 0).shards_for(0, len(order), range(64))
    assert sorted(everything) == list(range(SHARDS))


@pytest.mark.parametrize("method", ["balanced", "sqrt", "repeat_factors"])
def test_sampling_of_a_thousand_classes(method):
    counts = np.maximum(1, 1_300_000 * 0.995 ** np.arange(CLASSES) / 200).astype(np.int64)
    labels = np.repeat(np.arange(CLASSES), counts).astype(np.int32)
    tracemalloc.start()
    own = entries(Sampling(method), labels, CLASSES, 0, 0)
    peak = tracemalloc.get_traced_memory()[1] / len(labels)
    tracemalloc.stop()
    assert np.array_equal(np.bincount(labels[own]), targets(Sampling(method), counts))
    assert peak < 40  # bytes per sample


def test_a_balanced_epoch_over_real_shards(large):
    manifest = Manifest.open(large)
    stream = ShardStream(
        manifest, batch=BATCH, seed=0, transform=lambda image: image, sampling=Sampling("balanced", limit=3), window=50
    )
    assert stream.samples_per_epoch == 3 * CLASSES
    labels = np.concatenate([batch.labels for batch in stream.batches(0, stream.steps_per_epoch)])
    assert np.bincount(labels).tolist() == [3] * CLASSES
