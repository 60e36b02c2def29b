"""The index over a folder of tars: exact counts, byte positions, labels, class names.

Two files beside the tars. ``index.npy`` is a structured array (`RECORD`), one record per sample in tar order,
memory-mapped. ``index.json`` holds the format version, the class names, the shards and the hash of ``index.npy``; it is
written last, so an index is whole or it is not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tlx.errors import UserError
from tlx.files import write_whole

FORMAT = 1
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])
"""One sample: where its picture's bytes start in its tar, how many there are, its class."""


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many samples it holds, how long it is in bytes."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """An opened index. A sample's id is its place in tar order, over all shards.

    Attributes:
        path: the folder that holds the tars.
        classes: names; a label is a position in it.
        records: `RECORD` per sample, memory-mapped.
        digest: hash of everything the index says; the same for the same data wherever it lies.
    """

    path: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    records: NDArray[np.void]
    digest: str

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Manifest:
        """Opens a folder of indexed tars.

        Raises:
            UserError: no such folder, no index, an index of another format or a damaged one, a tar that is missing.
        """
        folder = Path(path)
        text = _read_header(folder)
        header = _parse(folder, text)
        records = _map(folder, header["sha256"])
        shards = tuple(Shard(s["name"], s["samples"], s["bytes"]) for s in header["shards"])
        manifest = Manifest(folder, tuple(header["classes"]), shards, records, hashlib.sha256(text).hexdigest())
        _verify(manifest)
        return manifest

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[Path]]:
        return Manifest.open, (self.path,)  # a memory map would be pickled as a copy of all its bytes

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Each sample's class, a view."""
        labels: NDArray[np.int32] = self.records["label"]
        return labels

    @property
    def samples_per_shard(self) -> NDArray[np.int64]:
        return np.array([s.samples for s in self.shards], dtype=np.int64)

    def counts(self) -> NDArray[np.int64]:
        """How many samples each class has, int64 [classes]."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def shard_of(self, sample: int) -> int:
        """The position in `shards` of the tar that holds a sample."""
        return int(np.searchsorted(np.cumsum(self.samples_per_shard), sample, side="right"))

    def locate(self, sample: int) -> tuple[Path, int, int]:
        """(tar, offset, size) of a sample's picture."""
        record = self.records[sample]
        return self.path / self.shards[self.shard_of(sample)].name, int(record["offset"]), int(record["size"])

    def describe(self, sample: int) -> str:
        """A sample in words a person can act on: ``data/train/000003.tar: 000123.jpg``."""
        tar, offset, _ = self.locate(sample)
        name = _member_at(tar, offset) or f"the picture at byte {offset} (sample {sample})"
        return f"{tar}: {name if name.isprintable() else ascii(name)}"


def write_index(
    folder: Path, *, classes: Sequence[str], shards: Sequence[Shard], records: NDArray[np.void]
) -> Manifest:
    """Writes both files, each beside and then renamed, the json last; and opens the result."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(records, dtype=RECORD), allow_pickle=False)
    header = {
        "format": FORMAT,
        "classes": list(classes),
        "samples": len(records),
        "shards": [asdict(s) for s in shards],
        "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
    }
    write_whole(folder / "index.npy", buffer.getvalue())
    write_whole(folder / "index.json", json.dumps(header, indent=1, ensure_ascii=False).encode())
    return Manifest.open(folder)


def _member_at(tar: Path, offset: int) -> str | None:
    """The name of the member whose data start at `offset`, if its header can be read."""
    try:
        with open(tar, "rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            block = file.read(tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").name
        if len(name.encode("utf-8", "surrogateescape")) < 100:  # longer names are kept elsewhere in the tar
            return name
        with tarfile.open(tar, "r:") as members:
            return next((m.name for m in members if m.offset_data == offset), name)
    except (OSError, tarfile.TarError):
        return None


def _read_header(folder: Path) -> bytes:
    try:
        return (folder / "index.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), todo="make shards with tlx shards build SRC OUT")
    inside = sorted(p.parent.name for p in folder.glob("*/index.json"))
    if inside:
        raise UserError(
            f"this folder holds splits: {', '.join(inside)}", where=str(folder), todo=f"use {folder / inside[0]}"
        )
    if any(folder.glob("*.tar")):
        raise UserError("these tars have no index", where=str(folder), todo=f"tlx shards index {folder}")
    raise UserError("this folder holds no shards", where=str(folder), todo="make them with tlx shards build SRC OUT")


def _parse(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["format"]
    except (ValueError, KeyError, TypeError):
        _damaged(folder, "index.json is not an index of tlx")
    if version != FORMAT:
        raise UserError(
            f"the index has format {version}; this tlx reads {FORMAT}",
            where=str(folder),
            todo=f"tlx shards index {folder}",
        )
    names = [s["name"] for s in header["shards"]]
    if any(os.path.basename(name) != name or name in ("", ".", "..") for name in names):
        _damaged(folder, "it names a tar outside its folder")
    missing = sorted(set(names) - set(os.listdir(folder)))
    if missing:
        listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {len(names)} tars are missing: {listed}",
            where=str(folder),
            todo=f"bring them back, or index what is there: tlx shards index {folder}",
        )
    return header  # type: ignore[no-any-return]


def _map(folder: Path, sha256: str) -> NDArray[np.void]:
    path = folder / "index.npy"
    try:
        with open(path, "rb") as file:
            found = hashlib.sha256()
            while part := file.read(1 << 20):
                found.update(part)
        if found.hexdigest() != sha256:
            _damaged(folder, "index.npy is not the one that index.json was written for")
        # numpy cannot map an array without elements
        empty = path.stat().st_size <= len(_npy(np.zeros(0, RECORD)))
        records: NDArray[np.void] = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    except (OSError, ValueError) as error:
        _damaged(folder, f"index.npy cannot be read: {error}")
    if records.dtype != RECORD or records.ndim != 1:
        _damaged(folder, "index.npy holds something else")
    return records


def _npy(array: NDArray[np.void]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _verify(manifest: Manifest) -> None:
    if int(manifest.samples_per_shard.sum()) != len(manifest):
        _damaged(manifest.path, "its shards and its samples do not add up")
    labels = manifest.labels
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(manifest.classes):
        _damaged(manifest.path, "it holds labels without a class name")


def _damaged(folder: Path, why: str) -> NoReturn:
    raise UserError(f"the index is damaged: {why}", where=str(folder), todo=f"make it again: tlx shards index {folder}")
