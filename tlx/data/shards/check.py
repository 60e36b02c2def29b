"""What shards hold, and whether all of it can be read.

``check_shards(folder, jobs=None, progress=False) -> CheckReport``
``describe_shards(folder) -> dict[split, SplitCounts]``
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlx.base.errors import UserError
from tlx.base.location import is_remote
from tlx.base.parsing import from_json
from tlx.data.build.progress import in_processes
from tlx.data.remote.files import ShardUnavailable
from tlx.data.shards.class_names import may_be_position
from tlx.data.shards.duplicates import Copy, Duplicates, find_duplicates
from tlx.data.shards.index import (
    Scan,
    folders_in,
    has_tars,
    label_rule,
    passed_over_beside,
    scan_tar,
    split_folders,
    target_array,
)
from tlx.data.shards.index_file import refuse_unfinished
from tlx.data.shards.manifest import Manifest, other_bytes
from tlx.data.shards.passed_over import PassedOver, merged
from tlx.data.shards.target_summary import TargetSummary, summarise_targets
from tlx.data.stream.reader import BadSample, ReadError, ShardReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tlx.data.shards.statistics import Statistics


@dataclass(frozen=True)
class SplitCounts:
    """One folder of shards.

    Attributes:
        counts: class name -> samples, in the order of labels.
        targets: those beside the class.
    """

    path: Path
    samples: int
    shards: int
    bytes: int
    counts: dict[str, int]
    targets: tuple[TargetSummary, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON can say it."""
        said = {**asdict(self), "path": str(self.path)}
        return said if self.targets else {name: value for name, value in said.items() if name != "targets"}


@dataclass(frozen=True)
class CheckReport:
    """Everything read and decoded.

    Attributes:
        splits: folder name -> what it holds.
        bad: every sample that cannot be read, and why.
        stale: tars whose members are not where the index says, or whose bytes have another hash.
        unhashed: tars of which the index has no hash.
        passed_over: what in the tars, and beside them, is no sample.
        statistics: folder name -> what its readable pictures are like.
        duplicates: pictures with the same content, by their places in the tars.
    """

    splits: dict[str, SplitCounts]
    bad: tuple[BadSample, ...]
    stale: tuple[str, ...]
    statistics: dict[str, Statistics] = field(default_factory=dict)
    duplicates: Duplicates = field(default_factory=Duplicates)
    unhashed: int = 0
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.splits.values())

    @property
    def good(self) -> bool:
        """Nothing is wrong. Duplicates are no fault of the shards."""
        return not (self.bad or self.stale)

    def plain(self) -> dict[str, Any]:
        """All of it, as JSON can say it."""
        return {
            "good": self.good,
            "samples": self.samples,
            "splits": {name: split.plain() for name, split in self.splits.items()},
            "bad": [asdict(b) for b in self.bad],
            "stale": list(self.stale),
            "unhashed": self.unhashed,
            "statistics": {name: asdict(said) for name, said in self.statistics.items()},
            "duplicates": self.duplicates.plain(),
            "passed_over": [asdict(p) for p in self.passed_over],
        }


def describe_shards(location: str | os.PathLike[str]) -> dict[str, SplitCounts]:
    """What a folder of indexed shards, a URL of one, or each folder in it, holds; from the index alone.

    Raises:
        UserError: no shards, or no index.
    """
    return {m.name: _counts(m) for m in _open(location)}


def built_statistics(splits: Mapping[str, SplitCounts]) -> dict[str, Statistics]:
    """What the build of these folders noted of their pictures; nothing for tars that were made elsewhere."""
    from tlx.data.shards.statistics import Statistics

    found = {}
    for name, split in splits.items():
        try:
            said = from_json((split.path.parent / "build.json").read_bytes())["statistics"][name]
            statistics = Statistics.read(said)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if statistics.samples == split.samples:
            found[name] = statistics
    return found


def check_shards(location: str | os.PathLike[str], *, jobs: int | None = None, progress: bool = False) -> CheckReport:
    """Reads and decodes every sample of a folder of shards, a URL of one, or each folder in it; see `examine`.

    Raises:
        UserError: no shards, or no index.
    """
    from tlx.data.shards.statistics import chosen_for_measuring, summarise  # describing shards needs no torch

    manifests = _open(location)
    tasks = [(m, shard) for m in range(len(manifests)) for shard in range(len(manifests[m].shards))]
    measured = [chosen_for_measuring(m.name, len(m)) for m in manifests]
    titled = "checking shards" if progress else None
    found = list(in_processes(partial(_check, manifests, measured), tasks, jobs=jobs, title=titled))
    records: dict[str, NDArray[np.void]] = {}
    statistics: dict[str, Statistics] = {}
    for place, manifest in enumerate(manifests):
        own = [f for task, f in zip(tasks, found, strict=True) if task[0] == place]
        records[manifest.name] = np.concatenate([f.records for f in own])
        said = summarise(records[manifest.name], [f.pixels for f in own], manifest.classes)
        if said:
            statistics[manifest.name] = said
    beside = [] if is_remote(location) else passed_over_beside(Path(location))
    return CheckReport(
        {m.name: _counts(m) for m in manifests},
        tuple(b for f in found for b in f.bad),
        tuple(s for f in found for s in f.stale),
        statistics,
        _named(manifests, records),
        sum(shard.sha256 is None for m in manifests for shard in m.shards),
        merged((*beside, *(p for f in found for p in f.passed_over))),
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found in one shard."""

    bad: list[BadSample]
    stale: list[str]
    records: NDArray[np.void]
    pixels: tuple[float, ...]
    passed_over: tuple[PassedOver, ...] = ()


def _check(manifests: list[Manifest], measured: list[frozenset[int]], task: tuple[int, int]) -> _Found:
    from tlx.data.pixels.decode import DecodeError
    from tlx.data.pixels.one_picture import at_picture, no_memory
    from tlx.data.shards.examine import examine
    from tlx.data.shards.statistics import Facts

    manifest, chosen, shard = manifests[task[0]], measured[task[0]], task[1]
    reader, bad, facts = ShardReader(manifest), [], Facts()
    first = int(manifest.samples_per_shard[:shard].sum())
    own = range(first, first + manifest.shards[shard].samples)
    labels = manifest.labels[own.start : own.stop].tolist()
    try:
        manifest.tar(shard)
    except (ShardUnavailable, UserError) as error:  # a remote one; the others are checked all the same
        return _Found([], [str(error).partition("\n")[0]], *facts.packed())
    for sample, label in zip(own, labels, strict=True):
        try:
            data = reader.read(sample)
            with at_picture(partial(manifest.describe, sample)):
                facts.add(sample, label, len(data), examine(data, measured=sample in chosen))
        except (ReadError, DecodeError) as error:
            bad.append(BadSample(sample, manifest.describe(sample), str(error)))
        except MemoryError as error:
            raise no_memory(manifest.describe(sample), "fewer --jobs") from error
    stale, scan = _stale(manifest, shard, own)
    return _Found(bad, [stale] if stale else [], *facts.packed(), scan.passed_over if scan else ())


def _named(manifests: Sequence[Manifest], records: dict[str, NDArray[np.void]]) -> Duplicates:
    by_name = {m.name: m for m in manifests}

    def copy(split: str, row: int) -> Copy:
        manifest, sample = by_name[split], int(records[split]["place"][row])
        label = manifest.classes[int(manifest.labels[sample])] if manifest.classes else ""
        return Copy(split, label, manifest.describe(sample))

    return Duplicates(tuple(tuple(copy(*place) for place in group) for group in find_duplicates(records)))


def _stale(manifest: Manifest, shard: int, own: range) -> tuple[str | None, Scan | None]:
    """What is other in a tar than the index says, and what the tar holds."""
    path, where, expected = manifest.tar(shard), manifest.describe_shard(shard), manifest.shards[shard].sha256
    # all of it was just read, so that its hash costs no second reading from the disk
    scan = scan_tar(path, label_rule(manifest.path), hashed=expected is not None) if path.exists() else None
    if scan is None or scan.problems:
        return f"{where}: {scan.problems[0].removeprefix(f'{path}: ') if scan else 'missing'}", scan
    records = manifest.records[own.start : own.stop]
    again = f"tlx shards index {manifest.location}"
    known = list(zip(records["offset"].tolist(), records["size"].tolist(), strict=True))
    if list(scan.places) == known and _are_labels(scan.labels, records["label"].tolist(), manifest.classes):
        if scan.sha256 == expected and (odd := _other_targets(manifest, scan, own)):
            return f"{where}: its targets are not what the index says ({', '.join(odd)}); {again}", scan
        if scan.sha256 == expected:
            return None, scan
        todo = f"remove the cached copy, {path}" if manifest.remote else "bring the former file back"
        return f"{where}: {other_bytes(scan.sha256, expected)}; {todo}, or tlx shards index {manifest.location}", scan
    there, indexed = Counter(scan.places), Counter(known)
    more, fewer = (there - indexed).total(), (indexed - there).total()
    said = f" ({more:,} more, {fewer:,} fewer samples)" if more or fewer else ""
    return f"{where}: its members or labels are not what the index says{said}; {again}", scan


def _other_targets(manifest: Manifest, scan: Scan, own: range) -> list[str]:
    """Targets that the index was told where to find, and of which the tar says something else."""
    rule, odd = label_rule(manifest.path), []
    for place, spec in enumerate(rule.targets):
        target = manifest.targets.get(spec.name)
        there = None if target is None else target_array(target, place, [scan])
        if there is None or not _are_equal(there, manifest.values(spec.name)[own.start : own.stop]):
            odd.append(spec.name)
    return odd


def _are_equal(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _are_labels(labels: Sequence[str], numbers: Sequence[int], classes: Sequence[str]) -> bool:
    """Whether labels as they are written are these classes: all by name, or all by position; where there are no classes
    there is nothing to compare."""
    if not classes:
        return True
    pairs = list(zip(labels, numbers, strict=True))
    by_name = all(label == classes[number] for label, number in pairs)
    return by_name or all(may_be_position(label) and int(label) == number for label, number in pairs)


def _counts(manifest: Manifest) -> SplitCounts:
    counts = dict(zip(manifest.classes, manifest.counts().tolist(), strict=True))
    size = sum(s.bytes for s in manifest.shards)
    return SplitCounts(manifest.path, len(manifest), len(manifest.shards), size, counts, summarise_targets(manifest))


def _open(location: str | os.PathLike[str]) -> list[Manifest]:
    if is_remote(location):
        return [Manifest.open(location)]
    folder = Path(location)
    if (folder / "index.json").exists() or (folder.is_dir() and has_tars(folder)):
        return [Manifest.open(folder)]
    inside = folders_in(folder) if folder.is_dir() else []
    bare = [f for f in inside if has_tars(f) and not (f / "index.json").exists()]
    found = [f for f in inside if (f / "index.json").exists()]
    if not found or bare:
        refuse_unfinished(folder)
    if not found:
        split_folders(folder)  # says what is there instead
        raise UserError("these shards have no index", where=str(folder), todo=f"tlx shards index {folder}")
    if bare:
        raise UserError(
            f"these shards have no index: {', '.join(f.name for f in bare)}",
            where=str(folder),
            todo=f"tlx shards index {folder}",
        )
    return [Manifest.open(f) for f in found]
