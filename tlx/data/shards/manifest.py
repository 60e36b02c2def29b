"""The index over a folder of tars, here or elsewhere: exact counts, byte positions, labels, class names.

Two files beside the tars. ``index.npy`` is a structured array (`RECORD`), one record per sample in tar order,
memory-mapped. ``index.json`` holds the format version, the class names, the shards with the hash (SHA-256) of each, and
the hash of ``index.npy``; it is written last, so an index is whole or it is not there. Of a remote folder, or a staged
one, the index is fetched when it is opened, a tar when it is wanted; both are kept by `tlx.data.remote.shard_cache`.

``index.npy`` is hashed at each opening, also where it is large: 100 million samples are 1.6 GB and cost about a second,
beside the pass over all labels that follows in any case, and nothing has to be remembered or trusted. Processes that a
manifest is handed to map the file without hashing it again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import TlxError, UserError
from tlx.base.files import scratch, sha256_of
from tlx.base.launcher import rank
from tlx.base.location import address, is_remote, shown
from tlx.base.parsing import from_json
from tlx.base.terminal import escaped, say
from tlx.data.remote.prefetch import Wanted
from tlx.data.shards.tars import open_regular, read_members

if TYPE_CHECKING:
    from tlx.data.remote.shard_cache import CacheSpec, ShardCache

FORMAT = 2
"""With a hash of each shard; an index without any is of format 1, as all were before."""
LARGEST = 1 << 50
"""Bytes of a tar: more than any disk or object store takes as one file."""
_PART = 1 << 20
_GROUP = 1024  # shards whose samples are looked at together
_SHA256 = re.compile(r"[0-9a-f]{64}")
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: where its picture's bytes start in its tar, how many there are, its class."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar.

    Attributes:
        name: of its file.
        samples: how many it holds.
        bytes: its length.
        sha256: of all its bytes, in hexadecimal digits; None in an index that was made without.
    """

    name: str
    samples: int
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True, eq=False)
class Manifest:
    """An opened index. A sample's id is its place in tar order, over all shards.

    Attributes:
        path: the folder that holds the tars; of a remote or staged one, where its index and some of its tars are kept.
        location: what people know the folder by: its path or URL, without credentials.
        classes: names; a label is a position in it.
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
        text = _read_header(folder)
        header = _parse(str(folder), text)
        _refuse_missing(folder, _missing(folder, header), len(header["shards"]))
        records = _map(folder / "index.npy", str(folder), header["sha256"])
        manifest = _manifest(folder, text, header, records)
        _verify(manifest)
        return manifest

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[Path, str, str, ShardCache | None]]:
        # a memory map would be pickled as a copy of all its bytes
        return _reopen, (self.path, self.location, self._written, self._cache)

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
        """How many samples each class has, int64 [classes]."""
        found = np.zeros(len(self.classes), dtype=np.int64)
        for start in range(0, len(self), _PART):  # bincount makes an int64 copy of what it is given
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
    labels: Mapping[str, str | bool] | None = None,
) -> Manifest:
    """Writes both files beside, and once both are on the disk renames them, the json last; and opens the result.

    So a full disk leaves an earlier index as it was.

    Args:
        labels: where the labels were found (`tlx.data.shards.labels.LabelRule.header`), kept for those who look again.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(records, dtype=RECORD), allow_pickle=False)
    header = {
        "format": FORMAT if any(s.sha256 for s in shards) else 1,
        "classes": list(classes),
        **({"labels": dict(labels)} if labels else {}),
        "samples": len(records),
        "shards": [_entry(s) for s in shards],
        "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
    }
    text = _as_text(header)
    with scratch(folder / "index.npy") as array, scratch(folder / "index.json") as said:
        for path, content in ((array, buffer.getbuffer()), (said, text)):
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(array, folder / "index.npy")
        os.replace(said, folder / "index.json")
    return Manifest.open(folder)


def other_bytes(found: str | None, expected: str | None) -> str:
    """What is said of a shard whose bytes have another hash."""
    return f"its bytes were changed: their SHA-256 is {found}, expected {expected}"


def _entry(shard: Shard) -> dict[str, Any]:
    said = {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes}
    return {**said, "sha256": shard.sha256} if shard.sha256 else said


def _as_text(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, indent=1, ensure_ascii=False).encode()


def _digest(header: Mapping[str, Any], text: bytes) -> str:
    """Of what the index would say without hashes of shards, so that adding them makes no other data of it."""
    if header["format"] == 1:
        return hashlib.sha256(text).hexdigest()
    plain = {k: header[k] for k in ("classes", "labels", "samples", "shards", "sha256") if k in header}
    plain["shards"] = [{k: s[k] for k in ("name", "samples", "bytes")} for s in header["shards"]]
    return hashlib.sha256(_as_text({"format": 1, **plain})).hexdigest()


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


def _read_header(folder: Path) -> bytes:
    try:
        return (folder / "index.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError as error:
        raise UserError("no folder can have this name", where=ascii(str(folder))) from error
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "there is no such folder"
        raise UserError(what, where=str(folder), todo="make shards with tlx shards build SRC OUT")
    inside = sorted(p.parent.name for p in folder.glob("*/index.json"))
    if inside:
        raise UserError(
            f"this folder holds splits: {', '.join(inside)}", where=str(folder), todo=f"use {folder / inside[0]}"
        )
    refuse_unfinished(folder)
    if any(folder.glob("*.tar")):
        raise UserError("these tars have no index", where=str(folder), todo=f"tlx shards index {folder}")
    raise UserError("this folder holds no shards", where=str(folder), todo="make them with tlx shards build SRC OUT")


def refuse_unfinished(folder: Path) -> None:
    """
    Raises:
        UserError: a build of shards has begun here, or in the folder above, and has not come to its end.
    """
    for place in (folder, folder.parent):
        try:
            state = from_json((place / "build.json").read_bytes())["state"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if state == "building":
            raise UserError(
                "these tars have no index: the build of this folder is unfinished",
                where=str(place),
                todo="the same tlx shards build goes on with it (--skip-bad leaves unreadable pictures out)",
            )


def _open_remote(location: str, cache: CacheSpec | None) -> Manifest:
    from tlx.data.remote.shard_cache import CacheSpec, ShardCache

    kept = ShardCache(location, cache or CacheSpec())
    text, trouble = kept.header()
    header = _parse(shown(location), text)
    for shard in header["shards"]:
        address(location, shard["name"])
    return _kept(kept, text, header, trouble)


def _open_staged(folder: Path, cache: CacheSpec) -> Manifest:
    from tlx.data.remote.shard_cache import ShardCache

    kept = ShardCache(str(folder), cache)
    known = None if folder.is_dir() else kept.kept_header()
    text = known or _read_header(folder)
    header = _parse(str(folder), text)
    manifest = _kept(kept, text, header, "the folder is not there any more" if known else None)
    missing = [] if known else _missing(folder, header)
    if missing:  # there, and perhaps not here
        place = {shard.name: i for i, shard in enumerate(manifest.shards)}
        missing = [name for name in missing if not manifest._here(place[name]).exists()]
        _refuse_missing(folder, missing, len(place))
    return manifest


def _kept(kept: ShardCache, text: bytes, header: dict[str, Any], trouble: str | None) -> Manifest:
    """A folder elsewhere, once its index is in the cache.

    Args:
        trouble: why the header comes from the cache; None where it was read anew.
    """
    location = shown(kept.location)
    path = kept.records(header["sha256"], len(_npy(np.zeros(0, RECORD))) + RECORD.itemsize * (header["samples"] + 1))
    kept.keep_header(text)
    manifest = _manifest(kept.folder, text, header, _map(path, location, None), location, kept)
    _verify(manifest)
    if trouble is not None and rank() == 0:
        say(f"warning: {location}: its index cannot be fetched ({trouble}), the one in the cache is used", error=True)
    return manifest


def _reopen(folder: Path, location: str, written: str, cache: ShardCache | None) -> Manifest:
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
    header = _parse(location, text)
    manifest = _manifest(folder, text, header, _map(folder / "index.npy", location, None), location, cache)
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
    digest = _digest(header, text)
    return Manifest(folder, location or str(folder), classes, shards, records, digest, cache, written)


def _parse(where: str, text: bytes) -> dict[str, Any]:
    try:
        header = from_json(text)
        version = header["format"]
    except (ValueError, KeyError, TypeError):
        _damaged(where, "index.json is not an index of tlx")
    if version not in (1, FORMAT):
        raise UserError(
            f"the index has format {str(version)[:40]}; this tlx reads 1 and {FORMAT}",
            where=where,
            todo=_make_again(where),
        )
    if not _whole(header):
        _damaged(where, "index.json lacks something, or holds something else in its place")
    names = [s["name"] for s in header["shards"]]
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
        _damaged(where, "it names a tar outside its folder")
    if len(set(names)) < len(names):
        _damaged(where, "it names a tar twice")
    for shard in header["shards"]:
        if shard["bytes"] > LARGEST:
            _damaged(where, f"it says that {escaped(shard['name'])[:200]} has {shard['bytes']:,} bytes; no file has")
    if sum(s["samples"] for s in header["shards"]) != header["samples"]:
        _damaged(where, "its shards and its samples do not add up")
    return header  # type: ignore[no-any-return]


def _whole(header: dict[str, Any]) -> bool:
    """Whether it has all that is read of it, each of its type."""
    classes, shards = header.get("classes"), header.get("shards")
    return (
        isinstance(classes, list)
        and all(isinstance(c, str) for c in classes)
        and isinstance(shards, list)
        and all(isinstance(s, dict) and isinstance(s.get("name"), str) for s in shards)
        and all(_is_count(s.get("samples")) and _is_count(s.get("bytes")) for s in shards)
        and all(s.get("sha256") is None or _is_sha256(s["sha256"]) for s in shards)
        and _is_count(header.get("samples"))
        and isinstance(header.get("sha256"), str)
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _missing(folder: Path, header: dict[str, Any]) -> list[str]:
    return sorted({s["name"] for s in header["shards"]} - set(os.listdir(folder)))


def _refuse_missing(folder: Path, missing: Sequence[str], of: int) -> None:
    if missing:
        shortened = [escaped(name)[:200] for name in missing[:3]]
        listed = ", ".join(shortened) + (" ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {of} tars are missing: {listed}",
            where=str(folder),
            todo=f"bring them back, or index what is there: tlx shards index {folder}",
        )


def _map(path: Path, where: str, sha256: str | None) -> NDArray[np.void]:
    """The records, mapped; of this hash, unless it is known already."""
    nothing: NDArray[np.void] = np.zeros(0, RECORD)
    try:
        with path.open("rb") as file:
            if sha256 is not None and sha256_of(file) != sha256:
                _damaged(where, "index.npy is not the one that index.json was written for")
        # numpy cannot map an array without elements; of anything else that small it would take what its header claims
        if path.stat().st_size <= len(_npy(nothing)):
            if path.read_bytes() != _npy(nothing):
                _damaged(where, "index.npy holds something else")
            return nothing
        records: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # numpy reads the header as Python's literals, which fail in many ways
        _damaged(where, f"index.npy cannot be read: {error}")
    if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.ndim != 1:
        _damaged(where, "index.npy holds something else")
    return records


def _npy(array: NDArray[np.void]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _fixed(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array.flags.writeable = False
    return array


def _verify(manifest: Manifest) -> None:
    _add_up(manifest)
    labels = manifest.labels.view(np.uint32)  # where what is below zero is large: one pass over the file, not two
    if len(labels) and int(labels.max()) >= len(manifest.classes):
        _damaged(manifest.location, "it holds labels without a class name")
    shard = _misplaced(manifest)
    if shard is not None:
        name = escaped(manifest.shards[shard].name)[:200]
        _damaged(manifest.location, f"it has a sample of {name} at a place that is not in that tar")


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
        _damaged(manifest.location, "its shards and its samples do not add up")


def _damaged(where: str, why: str) -> NoReturn:
    raise UserError(f"the index is damaged: {why}", where=where, todo=_make_again(where))


def _make_again(where: str) -> str:
    if is_remote(where):
        return "index the tars where they lie on a disk, with tlx shards index FOLDER, and bring both files here"
    return f"make it again: tlx shards index {where}"
