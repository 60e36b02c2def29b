"""The index over a folder of tars, here or elsewhere: exact counts, byte positions, labels, class names.

Files beside the tars. ``index.npy`` is a structured array (`RECORD`), one record per sample in tar order,
memory-mapped; ``targets/NAME.npy`` are arrays of what else is known of each sample (`tlx.data.shards.targets`).
``index.json`` holds the format version, the class names, the targets, the shards with the hash (SHA-256) of each, and
the hashes of the arrays; it is written last, so an index is whole or it is not there. Of a remote folder, or a staged
one, the index is fetched when it is opened, a tar when it is wanted; both are kept by `tlx.data.remote.shard_cache`.

``index.npy`` is hashed at each opening, also where it is large: 100 million samples are 1.6 GB and cost about a second,
beside the pass over all labels that follows in any case, and nothing has to be remembered or trusted. The array of a
target is fetched, hashed and looked through when somebody first asks for it: those of other targets, which may be far
larger, cost nothing. Processes that a manifest is handed to map without hashing what was hashed here.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import TlxError, UserError, did_you_mean
from tlx.base.files import scratch
from tlx.base.launcher import rank
from tlx.base.location import address, is_remote, shown
from tlx.base.terminal import escaped, say
from tlx.data.remote.prefetch import Wanted
from tlx.data.shards.index_file import (
    RECORD,
    Shard,
    as_text,
    damaged,
    digest_of,
    format_of,
    map_records,
    missing_tars,
    npy,
    parse,
    read_header,
    refuse_missing,
    shard_entry,
    targets_of,
)
from tlx.data.shards.target_arrays import (
    arrays_beside,
    file_of,
    map_array,
    most_bytes,
    remove_arrays,
    verify_array,
)
from tlx.data.shards.targets import LABEL, Target
from tlx.data.shards.tars import open_regular, read_members

if TYPE_CHECKING:
    from tlx.data.remote.shard_cache import CacheSpec, ShardCache

__all__ = ["RECORD", "Manifest", "Shard", "other_bytes", "write_index"]

_PART = 1 << 20
_GROUP = 1024  # shards whose samples are looked at together


@dataclass(frozen=True, eq=False)
class Manifest:
    """An opened index. A sample's id is its place in tar order, over all shards.

    Attributes:
        path: the folder that holds the tars; of a remote or staged one, where its index and some of its tars are kept.
        location: what people know the folder by: its path or URL, without credentials.
        classes: names; a label is a position in it. Without any there is no class, and every label is -1.
        records: `RECORD` per sample, memory-mapped.
        digest: hash of everything the index says but the shards' hashes; the same for the same index wherever it lies,
            and the same whether it was made with hashes or without.
    """

    path: Path
    location: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    records: NDArray[np.void]
    digest: str
    _cache: ShardCache | None = field(default=None, repr=False)
    _written: str = field(default="", repr=False)  # hash of index.json as it is
    _targets: Mapping[str, tuple[Target, str]] = field(default_factory=dict, repr=False)  # and hashes of the arrays
    _verified: frozenset[str] = field(default=frozenset(), repr=False)  # targets, by who handed this over
    _arrays: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)  # of targets that were asked for

    @staticmethod
    def open(location: str | os.PathLike[str], cache: CacheSpec | None = None) -> Manifest:
        """Opens a folder of indexed tars.

        Args:
            location: its path; or a URL (see `tlx.data.remote`), or ``pipe:`` and a command that prints the file
                that stands in place of ``{}``.
            cache: where remote shards are kept, and those of folders if it says `stage`.

        Raises:
            UserError: no such folder, no index, an index of another format or a damaged one, a tar that is missing;
                `IndexUnavailable`, which is one, where a remote index cannot be fetched and is not in the cache.
        """
        if is_remote(location):
            return _open_remote(os.fspath(location), cache)
        folder = Path(location)
        if cache is not None and cache.stage:
            return _open_staged(folder, cache)
        text = read_header(folder)
        header = parse(str(folder), text)
        refuse_missing(folder, missing_tars(folder, header), len(header["shards"]))
        records = map_records(folder / "index.npy", str(folder), header["sha256"])
        manifest = _manifest(folder, text, header, records)
        _verify(manifest)
        return manifest

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[Any, ...]]:
        # a memory map would be pickled as a copy of all its bytes
        verified = self._verified.union(self._arrays)
        return _reopen, (self.path, self.location, self._written, self._cache, verified)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def remote(self) -> bool:
        """Whether the tars are fetched from elsewhere, be it a folder that is staged."""
        return self._cache is not None

    @property
    def name(self) -> str:
        """The folder's own, without what it lies in."""
        return self.location.rstrip("/").rpartition("/")[2] if self.remote else self.path.name

    @cached_property
    def content(self) -> str | None:
        """A hash of the hashes of all shards, in hexadecimal digits; None where the index lacks one."""
        hashes = [s.sha256 for s in self.shards]
        if None in hashes:
            return None
        return hashlib.sha256("\n".join(map(str, hashes)).encode()).hexdigest()

    @property
    def labels(self) -> NDArray[np.int32]:
        """Each sample's class, a view."""
        labels: NDArray[np.int32] = self.records["label"]
        return labels

    @cached_property
    def targets(self) -> Mapping[str, Target]:
        """Every target by name; the class is `label`, where there is one."""
        own = {LABEL: Target(LABEL, "class", self.classes)} if self.classes else {}
        return own | {name: target for name, (target, _) in self._targets.items()}

    def values(self, name: str) -> NDArray[Any]:
        """Each sample's value of a target, read-only; see `tlx.data.shards.targets`.

        Raises:
            UserError: there is no such target, or its array is damaged; `IndexUnavailable`, which is one, where it is
                elsewhere and cannot be fetched.
        """
        if name == LABEL:
            return self.labels
        if name not in self._targets:
            near = did_you_mean(name, self.targets) if self.targets else "; there are none"
            raise UserError(f'there is no target "{escaped(name)}"{near}', where=self.location)
        if name not in self._arrays:
            self._arrays[name] = self._array(name)
        return self._arrays[name]

    def _array(self, name: str) -> NDArray[Any]:
        (target, sha256), known = self._targets[name], name in self._verified
        if self._cache is not None and not known:  # which hashes it
            self._cache.array(file_of(name), sha256, most_bytes(target, len(self)))
        hashed = None if known or self._cache is not None else sha256
        array = map_array(self.path / file_of(name), self.location, target, len(self), hashed)
        if not known:
            verify_array(self.location, target, array)
        return array

    @cached_property
    def samples_per_shard(self) -> NDArray[np.int64]:
        """Read-only."""
        return _fixed(np.array([s.samples for s in self.shards], dtype=np.int64))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """For each shard, the id after its last sample's; read-only."""
        return _fixed(np.cumsum(self.samples_per_shard))

    def tar(self, shard: int) -> Path:
        """The local file of a shard; of one from elsewhere, once it is fetched.

        Raises:
            ShardUnavailable: it cannot be fetched.
            UserError: there is no room for it.
        """
        if self._cache is None:
            return self.path / self.shards[shard].name
        return self._cache.shard(self._wanted(shard))

    def ahead(self, shards: Sequence[int]) -> None:
        """Begins to fetch shards in the background, in this order, in place of what is left of an earlier call.

        Threads of this process fetch a few at a time, and only as far as the cache holds shards that nobody has used
        yet. What cannot be fetched is an error of :meth:`tar`, later.
        """
        if self._cache is not None:
            self._cache.ahead([self._wanted(int(s)) for s in shards])

    def _wanted(self, shard: int) -> Wanted:
        known, end = self.shards[shard], int(self.ends[shard])
        if known.sha256 is not None:
            return Wanted(known.name, known.bytes, known.sha256[:12], known.sha256)
        own = self.records[end - known.samples : end]
        layout = hashlib.blake2b(digest_size=6)
        layout.update(np.ascontiguousarray(own["offset"]).data)
        layout.update(np.ascontiguousarray(own["size"]).data)
        layout.update(np.ascontiguousarray(own["label"]).data)
        return Wanted(known.name, known.bytes, layout.hexdigest())

    def counts(self) -> NDArray[np.int64]:
        """How many samples each class has, int64 [classes]; of an index without classes nothing."""
        found = np.zeros(len(self.classes), dtype=np.int64)
        held = len(self) if self.classes else 0
        for start in range(0, held, _PART):  # bincount makes an int64 copy of what it is given
            found += np.bincount(self.labels[start : start + _PART], minlength=len(found))
        return found

    def shard_of(self, sample: int) -> int:
        """The position in `shards` of the tar that holds a sample."""
        return int(self.ends.searchsorted(sample, side="right"))

    def locate(self, sample: int) -> tuple[Path, int, int]:
        """(tar, offset, size) of a sample's picture; raises as :meth:`tar` does."""
        record = self.records[sample]
        return self.tar(self.shard_of(sample)), int(record["offset"]), int(record["size"])

    def describe(self, sample: int) -> str:
        """A sample in words a person can act on: ``data/train/000003.tar: 000123.jpg``."""
        shard, offset = self.shard_of(sample), int(self.records["offset"][sample])
        name = _member_at(self._here(shard), offset) or f"the picture at byte {offset} (sample {sample})"
        return f"{self.describe_shard(shard)}: {escaped(name)}"

    def describe_shard(self, shard: int) -> str:
        """Its path or URL, for people."""
        name = self.shards[shard].name
        return shown(self._cache.location, name) if self._cache is not None else str(self.path / name)

    def here(self, shard: int) -> Path | None:
        """The file of a shard on this machine; None of one from elsewhere that is not in the cache."""
        path = self._here(shard)
        return path if self._cache is None or path.exists() else None

    def forget(self, shard: int) -> None:
        """Removes the cached copy of a shard from elsewhere, because it is damaged."""
        if self._cache is not None:
            self._cache.forget(self._wanted(shard))

    def _here(self, shard: int) -> Path:
        """Where a shard is on this machine, if it is."""
        return self.tar(shard) if self._cache is None else self._cache.path(self._wanted(shard))


def write_index(
    folder: Path,
    *,
    classes: Sequence[str],
    shards: Sequence[Shard],
    records: NDArray[np.void],
    labels: Mapping[str, Any] | None = None,
    targets: Sequence[tuple[Target, NDArray[Any]]] = (),
) -> Manifest:
    """Writes all files beside, and once they are on the disk renames them, the json last; and opens the result.

    So a full disk leaves an earlier index as it was.

    Args:
        labels: where the labels were found (`tlx.data.shards.labels.LabelRule.header`), kept for those who look again.
        targets: those beside the class, and their arrays.
    """
    array, former = npy(np.ascontiguousarray(records, dtype=RECORD)), _targets_before(folder)
    with arrays_beside(folder, targets) as (said, moves):
        version = format_of(classes, shards, said)
        header = {
            "format": version,
            "classes": list(classes),
            **({"labels": dict(labels)} if labels else {}),
            **({"targets": said} if version == 3 else {}),
            "samples": len(records),
            "shards": [shard_entry(s) for s in shards],
            "sha256": hashlib.sha256(array).hexdigest(),
        }
        _place(folder, moves, array, as_text(header))
    now = {target.name for target, _ in targets}
    remove_arrays(folder, former - now, now)
    return Manifest.open(folder)


def _place(folder: Path, moves: Sequence[tuple[Path, Path]], array: bytes, text: bytes) -> None:
    with scratch(folder / "index.npy") as beside, scratch(folder / "index.json") as said:
        for path, content in ((beside, array), (said, text)):
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, name in (*moves, (beside, folder / "index.npy"), (said, folder / "index.json")):
            os.replace(path, name)


def _targets_before(folder: Path) -> set[str]:
    """Names of the targets of an earlier index."""
    try:
        return set(targets_of(parse(str(folder), (folder / "index.json").read_bytes())))
    except (OSError, UserError):
        return set()


def other_bytes(found: str | None, expected: str | None) -> str:
    """What is said of a shard whose bytes have another hash."""
    return f"its bytes were changed: their SHA-256 is {found}, expected {expected}"


def _member_at(tar: Path, offset: int) -> str | None:
    """The name of the member whose data start at `offset`, if its header can be read."""
    try:
        with open_regular(tar) as file:
            file.seek(max(offset - tarfile.BLOCKSIZE, 0))
            block = file.read(tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
        if len(name.encode("utf-8", "surrogateescape")) < 100:  # longer names are kept elsewhere in the tar
            return name
        return next((m.name for m in read_members(tar).members if m.offset_data == offset), name)
    except (OSError, ValueError, OverflowError, tarfile.TarError):  # a place that no file has
        return None


def _open_remote(location: str, cache: CacheSpec | None) -> Manifest:
    from tlx.data.remote.shard_cache import CacheSpec, ShardCache

    kept = ShardCache(location, cache or CacheSpec())
    text, trouble = kept.header()
    header = parse(shown(location), text)
    for shard in header["shards"]:
        address(location, shard["name"])
    return _kept(kept, text, header, trouble)


def _open_staged(folder: Path, cache: CacheSpec) -> Manifest:
    from tlx.data.remote.shard_cache import ShardCache

    kept = ShardCache(str(folder), cache)
    known = None if folder.is_dir() else kept.kept_header()
    text = known or read_header(folder)
    header = parse(str(folder), text)
    manifest = _kept(kept, text, header, "the folder is not there any more" if known else None)
    missing = [] if known else missing_tars(folder, header)
    if missing:  # there, and perhaps not here
        place = {shard.name: i for i, shard in enumerate(manifest.shards)}
        missing = [name for name in missing if not manifest._here(place[name]).exists()]
        refuse_missing(folder, missing, len(place))
    return manifest


def _kept(kept: ShardCache, text: bytes, header: dict[str, Any], trouble: str | None) -> Manifest:
    """A folder elsewhere, once its index is in the cache.

    Args:
        trouble: why the header comes from the cache; None where it was read anew.
    """
    location = shown(kept.location)
    samples = header["samples"]
    kept.array("index.npy", header["sha256"], len(npy(np.zeros(0, RECORD))) + RECORD.itemsize * (samples + 1))
    kept.keep_header(text)
    kept.remove_others([file_of(name) for name in targets_of(header)])
    records = map_records(kept.folder / "index.npy", location, None)
    manifest = _manifest(kept.folder, text, header, records, location, kept)
    _verify(manifest)
    if trouble is not None and rank() == 0:
        say(f"warning: {location}: its index cannot be fetched ({trouble}), the one in the cache is used", error=True)
    return manifest


def _reopen(folder: Path, location: str, written: str, cache: ShardCache | None, verified: frozenset[str]) -> Manifest:
    """In another process: maps what was checked already.

    Raises:
        TlxError: the index was changed meanwhile.
    """
    try:
        text = (folder / "index.json").read_bytes()
    except OSError as error:
        raise TlxError(f"{location}: the index cannot be read any more: {error}") from error
    if hashlib.sha256(text).hexdigest() != written:
        raise TlxError(f"{location}: the index was changed while it was in use\n  -> start again")
    header = parse(location, text)
    records = map_records(folder / "index.npy", location, None)
    manifest = replace(_manifest(folder, text, header, records, location, cache), _verified=verified)
    _add_up(manifest)
    return manifest


def _manifest(
    folder: Path,
    text: bytes,
    header: dict[str, Any],
    records: NDArray[np.void],
    location: str | None = None,
    cache: ShardCache | None = None,
) -> Manifest:
    shards = tuple(Shard(s["name"], s["samples"], s["bytes"], s.get("sha256")) for s in header["shards"])
    classes, written = tuple(header["classes"]), hashlib.sha256(text).hexdigest()
    digest, targets = digest_of(header, text), targets_of(header)
    return Manifest(folder, location or str(folder), classes, shards, records, digest, cache, written, targets)


def _fixed(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array.flags.writeable = False
    return array


def _verify(manifest: Manifest) -> None:
    _add_up(manifest)
    if manifest.classes:
        labels = manifest.labels.view(np.uint32)  # where what is below zero is large: one pass over the file, not two
        if len(labels) and int(labels.max()) >= len(manifest.classes):
            damaged(manifest.location, "it holds labels without a class name")
    elif len(manifest) and not (int(manifest.labels.min()) == int(manifest.labels.max()) == -1):
        damaged(manifest.location, "it holds labels without a class name")
    shard = _misplaced(manifest)
    if shard is not None:
        name = escaped(manifest.shards[shard].name)[:200]
        damaged(manifest.location, f"it has a sample of {name} at a place that is not in that tar")


def _misplaced(manifest: Manifest) -> int | None:
    """The first shard with a sample that begins where no member of a tar does, or ends behind the tar's end."""
    filled = np.flatnonzero(manifest.samples_per_shard)
    lengths = np.array([s.bytes for s in manifest.shards], dtype=np.uint64)
    starts = manifest.ends[filled] - manifest.samples_per_shard[filled]
    for at in range(0, len(filled), _GROUP):
        shards, first = filled[at : at + _GROUP], starts[at]
        own, parts = manifest.records[first : manifest.ends[shards[-1]]], starts[at : at + _GROUP] - first
        begin = own["offset"].astype(np.uint64)
        wrong = np.maximum.reduceat(begin, parts) >= lengths[shards]  # before it is added to: 64 bits may not hold that
        wrong |= np.maximum.reduceat(begin + own["size"], parts) > lengths[shards]
        wrong |= np.bitwise_or.reduceat(begin, parts) % tarfile.BLOCKSIZE != 0
        wrong |= np.minimum.reduceat(begin, parts) < tarfile.BLOCKSIZE  # a header comes first
        if wrong.any():
            return int(shards[wrong.argmax()])
    return None


def _add_up(manifest: Manifest) -> None:
    if sum(s.samples for s in manifest.shards) != len(manifest):
        damaged(manifest.location, "its shards and its samples do not add up")
