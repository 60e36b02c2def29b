"""What the order of samples costs and what it is worth, on data sets of 1.3 million and 100 million samples.

``python tests/bench/scale.py [--quick] [--scratch DIR]`` writes tests/bench/SCALE.md. It needs 2 GB under DIR (/tmp)
and 6 GB of memory for some minutes; ``--quick`` leaves the 100 million out and prints the text instead.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tlx.data.shards.manifest import RECORD, Manifest, Shard, write_index
from tlx.data.stream.order import EpochOrder, Ids, Shuffle, share

RESULT = Path(__file__).with_name("SCALE.md")
PROCESSES = 4
BATCH = 4096


def label_entropy(order: EpochOrder, labels: NDArray[np.int32] | Ids, batch: int) -> float:
    """The mean entropy, in bits, of the labels of an epoch's whole batches; `labels` is each sample's class."""
    classes = int(labels.max()) + 1
    entropies = []
    for at in range(0, len(order) - batch + 1, batch):
        shares = np.bincount(labels[order.ids(at, at + batch)], minlength=classes) / batch
        shares = shares[shares > 0]
        entropies.append(-float((shares * np.log2(shares)).sum()))
    return float(np.mean(entropies))


def write_data_set(folder: Path, shards: int, per_shard: int, classes: int) -> Path:
    """Indexed shards, sorted by class. All samples of a shard share one small picture, so that the files stay small."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    contents = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        contents.append(buffer.getvalue())
    known = []
    for i in range(shards):
        content = contents[i % 8]
        name, length = f"{i:06d}.tar", 512 + len(content) + -len(content) % 512 + 1024
        with open(folder / name, "wb") as file:
            file.seek(512)
            file.write(content)
            file.truncate(length)
        known.append(Shard(name, per_shard, length))
    records = np.empty(shards * per_shard, RECORD)
    records["offset"] = 512
    records["label"] = np.arange(len(records)) // -(-len(records) // classes)
    for i in range(shards):
        records["size"][i * per_shard : (i + 1) * per_shard] = len(contents[i % 8])
    write_index(folder, classes=[f"class {i}" for i in range(classes)], shards=known, records=records)
    return folder


# How well it shuffles


def entropy_table() -> str:
    shards, classes, batch = 100, 100, 256
    labels = np.repeat(np.arange(classes), 1000)
    sizes = [1000] * shards
    rows = []
    for window in (1, 2, 4, 8, 16, 32, None):
        found = [
            np.mean(
                [
                    label_entropy(EpochOrder(sizes, Shuffle(0, window, parts, batch), e), labels, batch)
                    for e in (0, 1, 2)
                ]
            )
            for parts in (1, 8)
        ]
        rows.append([window or "all", *(f"{f:.2f}" for f in found)])
    random = np.random.default_rng(0)
    true = [np.bincount(labels[random.permutation(100_000)[:batch]], minlength=classes) / batch for _ in range(200)]
    bits = np.mean([-(p[p > 0] * np.log2(p[p > 0])).sum() for p in true])
    text = table(["window (shards)", "bits, parts = 1", "bits, parts = 8"], rows)
    return (
        text
        + f"\nnumpy's own shuffle of all samples: {bits:.2f} bits. All classes equally often: {np.log2(100):.2f}.\n"
    )


# What is read


def amplification_table(shards: int = 1300, epochs: int = 10) -> str:
    sizes = np.random.default_rng(0).integers(800, 1201, shards)  # as unequal as shards of a byte limit are
    rows = []
    for window in (None, 100):
        for nodes in (1, 2, 8, 64):
            row: list[object] = [window or "all", nodes]
            for parts in sorted({1, nodes}):
                one, held = read_by_nodes(sizes, Shuffle(0, window, parts, BATCH), nodes, epochs)
                row += [f"{one:.2f}", f"{held:.2f}"]
            rows.append(row + row[2:] if nodes == 1 else row)
    heads = ["window", "nodes"]
    for parts in ("parts = 1", "parts = nodes"):
        heads += [f"{parts}: 1 epoch", f"{parts}: {epochs} epochs"]
    return table(heads, rows)


def read_by_nodes(sizes: Ids, shuffle: Shuffle, nodes: int, epochs: int) -> tuple[float, float]:
    """Bytes of shards that all nodes download, over those of the data set: in one epoch, and until the last.

    From the very samples of every slot; a node keeps what it has. A shard's bytes go with its samples.
    """
    ends = np.cumsum(sizes)
    stops = np.array([share(BATCH, nodes, node).stop for node in range(nodes)])
    held = np.zeros((nodes, len(sizes)), bool)
    after: list[float] = []
    for epoch in range(epochs):
        order = EpochOrder(sizes, shuffle, epoch)
        shards = np.searchsorted(ends, order.ids(0, len(order)), side="right")
        held[np.searchsorted(stops, np.arange(len(order)) % BATCH, side="right"), shards] = True
        after.append(float((held @ sizes).sum() / sizes.sum()))
    return after[0], after[-1]


# What it costs


def measure(folder: Path, shuffle: dict[str, int | None], stream: bool) -> list[dict[str, float]]:
    """The same in several processes that are all open at once: times, and memory when all have done their part."""
    command = [sys.executable, __file__, "--child", str(folder), json.dumps(shuffle), str(int(stream))]
    children = []
    for _ in range(PROCESSES):
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        children.append((child, json.loads(child.stdout.readline())))  # one after the other, so that times are alone
    results = []
    for child, times in children:
        assert child.stdin is not None
        assert child.stdout is not None
        print("all are ready", file=child.stdin, flush=True)
        results.append(times | json.loads(child.stdout.readline()))
    for child, _ in children:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait() == 0
    return results


def measured_child(folder: Path, shuffle: Shuffle, stream: bool) -> None:
    from tlx.data.stream.stream import ShardStream  # what it loads is no part of the figures

    before, times = memory(), {}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        times[name] = time.perf_counter() - start
        return result

    manifest = timed("open", lambda: Manifest.open(folder))
    assert isinstance(manifest, Manifest)
    steps = len(manifest) // BATCH
    made: list[EpochOrder] = []

    def ids(step: int, epoch: int) -> Ids:
        made[:] = [EpochOrder(manifest.samples_per_shard, shuffle, epoch)]
        return made[0].ids(step * BATCH, (step + 1) * BATCH)

    timed("first ids", lambda: ids(0, 0))
    timed("next ids", lambda: made[0].ids(BATCH, 2 * BATCH))
    timed("resumed ids", lambda: ids(steps // 2, 1))
    needed = timed("shards ahead", lambda: made[0].shards_for(steps // 2 * BATCH, len(made[0]), range(BATCH // 64)))
    assert needed
    if stream:
        batches = ShardStream(
            manifest, batch=256, seed=0, transform=lambda image: image, window=shuffle.window, parts=shuffle.parts
        )
        timed("first batch", lambda: next(batches.batches(2500, 2501)))
    print(json.dumps(times), flush=True)
    sys.stdin.readline()
    after = memory()
    print(json.dumps({name: after[name] - before[name] for name in after}), flush=True)
    sys.stdin.readline()


def memory() -> dict[str, float]:
    """MiB of this process: its own, and what it shares with others, in files that are mapped."""
    text = Path("/proc/self/smaps_rollup").read_text()
    held = {name: int(size) / 1024 for name, size in re.findall(r"(\w+): +(\d+) kB", text)}
    return {
        "private": held["Private_Dirty"] + held["Private_Clean"],
        "shared": held["Shared_Clean"] + held["Shared_Dirty"],
    }


def cost_tables(scratch: Path, shards: int, classes: int, stream: bool) -> str:
    folder = write_data_set(scratch / f"{shards}", shards, 1000, classes)
    size = (folder / "index.npy").stat().st_size / 2**20
    times, rows = [], []
    for window, parts in ((None, 1), (1000, 1), (None, 64), (1000, 64)):
        found = measure(folder, {"seed": 0, "window": window, "parts": parts, "batch": BATCH}, stream)
        middle = {name: float(np.median([f[name] for f in found])) for name in found[0]}
        what = [window or "all", parts]
        names = ["open", "first ids", "next ids", "resumed ids", "shards ahead"] + ["first batch"] * stream
        times.append(what + [milliseconds(middle[name]) for name in names])
        rows.append([*what, f"{middle['private']:.0f}", f"{middle['shared']:.0f}"])
    shutil.rmtree(folder)
    heads = ["window", "parts", "open index", f"order, first {BATCH} ids", f"next {BATCH} ids"]
    heads += [f"resume in mid-epoch: order, {BATCH} ids", "shards of a node of 64"]
    heads += ["resume: first batch of 256 pictures"] * stream
    return (
        f"Index: {size:.0f} MiB.\n\n{table(heads, times)}\n"
        + table(["window", "parts", "own memory (MiB)", "shared memory (MiB)"], rows)
        + "\n"
    )


def milliseconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{seconds * 1000:.1f} ms"
        if seconds < 0.1
        else f"{seconds * 1000:.0f} ms"
    )


def table(heads: list[str], rows: list[list[object]]) -> str:
    lines = [heads, ["---:"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def report(quick: bool, scratch: Path) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    parts = [
        "# The order of samples at scale\n",
        f"Made by `python tests/bench/scale.py` on {datetime.date.today()}: {cpu[1] if cpu else platform.processor()}, "
        f"{os.cpu_count()} cores; Python {platform.python_version()}, numpy {version('numpy')}, torch "
        f"{version('torch')}. Other work ran on the same cores: times are orders of magnitude.\n",
        "## How well it shuffles\n",
        "Mean entropy of the labels in a batch of 256, over three epochs: 100 shards sorted by class, 1000 samples "
        "of one class each. With parts, every part has its own window, of window / parts shards, rounded up, so a "
        "small window holds at least one shard per part.\n",
        entropy_table(),
        "## What several nodes download\n",
        "Bytes of shards that all nodes together download, divided by the bytes of the data set: 1300 shards of 800 to "
        f"1200 samples, global batch {BATCH}, a node's slots consecutive. Counted from the samples themselves. A node "
        "keeps what it has downloaded, so the figure for 10 epochs is also what all disks together have to hold.\n",
        amplification_table(),
        "## What it costs\n",
        f"{PROCESSES} processes are open at once; medians over them. Memory is what a process has beyond that of its "
        "imports. Own: Private in /proc/self/smaps_rollup. Shared: the mapped index, once for all of them. The index "
        "lies in the page cache, and opening checks its hash.\n",
        "### 1.3 million samples in 1,300 shards\n",
        cost_tables(scratch, 1300, 1000, stream=True),
    ]
    if not quick:
        parts += ["### 100 million samples in 100,000 shards\n", cost_tables(scratch, 100_000, 10_000, stream=False)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, shuffle, stream = options.child
        measured_child(Path(folder), Shuffle(**json.loads(shuffle)), stream == "1")
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        text = report(options.quick, Path(scratch))
    if options.quick:
        print(text)
    else:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
