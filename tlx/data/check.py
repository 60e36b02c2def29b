"""What shards hold, and whether all of it can be read.

``check_shards(folder, jobs=None, progress=False) -> CheckReport``
``describe_shards(folder) -> dict[split, SplitCounts]``
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tlx.data.index import scan_tar, split_folders
from tlx.data.manifest import Manifest
from tlx.data.progress import in_processes
from tlx.data.reader import BadSample, ReadError, ShardReader
from tlx.errors import UserError


@dataclass(frozen=True)
class SplitCounts:
    """One folder of shards.

    Attributes:
        counts: class name -> samples, in the order of labels.
    """

    path: Path
    samples: int
    shards: int
    bytes: int
    counts: dict[str, int]


@dataclass(frozen=True)
class CheckReport:
    """Everything read and decoded.

    Attributes:
        splits: folder name -> what it holds.
        bad: every sample that cannot be read, and why.
        stale: tars whose members are not where the index says.
    """

    splits: dict[str, SplitCounts]
    bad: tuple[BadSample, ...]
    stale: tuple[str, ...]

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.splits.values())

    @property
    def good(self) -> bool:
        """Nothing is wrong."""
        return not (self.bad or self.stale)


def describe_shards(folder: str | os.PathLike[str]) -> dict[str, SplitCounts]:
    """What a folder of indexed shards, or each folder in it, holds; from the index alone.

    Raises:
        UserError: no shards, or no index.
    """
    return {m.path.name: _counts(m) for m in _open(Path(folder))}


def check_shards(folder: str | os.PathLike[str], *, jobs: int | None = None, progress: bool = False) -> CheckReport:
    """Reads and decodes every sample of a folder of shards, or of each folder in it.

    Raises:
        UserError: no shards, or no index.
    """
    manifests = _open(Path(folder))
    tasks = [(m, shard) for m in range(len(manifests)) for shard in range(len(manifests[m].shards))]
    titled = "checking shards" if progress else None
    found = list(in_processes(partial(_check, manifests), tasks, jobs=jobs, title=titled))
    return CheckReport(
        {m.path.name: _counts(m) for m in manifests},
        tuple(b for bad, _ in found for b in bad),
        tuple(s for _, stale in found for s in stale),
    )


def _check(manifests: list[Manifest], task: tuple[int, int]) -> tuple[list[BadSample], list[str]]:
    from tlx.data.decode import DecodeError, decode  # describing shards needs no torch

    manifest, shard = manifests[task[0]], task[1]
    reader, bad = ShardReader(manifest), []
    first = int(manifest.samples_per_shard[:shard].sum())
    own = range(first, first + manifest.shards[shard].samples)
    for sample in own:
        try:
            decode(reader.read(sample))
        except (ReadError, DecodeError) as error:
            bad.append(BadSample(sample, manifest.describe(sample), str(error)))
    stale = _stale(manifest, shard, own)
    return bad, [stale] if stale else []


def _stale(manifest: Manifest, shard: int, own: range) -> str | None:
    path = manifest.path / manifest.shards[shard].name
    scan = scan_tar(path) if path.exists() else None
    if scan is None or scan.problems:
        return f"{path}: {scan.problems[0].removeprefix(f'{path}: ') if scan else 'missing'}"
    records = manifest.records[own.start : own.stop]
    known = list(zip(records["offset"].tolist(), records["size"].tolist(), strict=True))
    labels = [manifest.classes[i] for i in records["label"]]
    same = all(
        label == (name if isinstance(label, str) else int(number))
        for label, name, number in zip(scan.labels, labels, records["label"], strict=False)
    )
    if list(scan.places) == known and same:
        return None
    return f"{path}: its members or labels are not what the index says; tlx shards index {manifest.path}"


def _counts(manifest: Manifest) -> SplitCounts:
    counts = dict(zip(manifest.classes, manifest.counts().tolist(), strict=True))
    size = sum(s.bytes for s in manifest.shards)
    return SplitCounts(manifest.path, len(manifest), len(manifest.shards), size, counts)


def _open(folder: Path) -> list[Manifest]:
    if (folder / "index.json").exists() or any(folder.glob("*.tar")):
        return [Manifest.open(folder)]
    found = sorted(p.parent for p in folder.glob("*/index.json"))
    if not found:
        split_folders(folder)  # says what is there instead
        raise UserError("these shards have no index", where=str(folder), todo=f"tlx shards index {folder}")
    return [Manifest.open(f) for f in found]
