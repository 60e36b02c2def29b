"""The folders of runs and shards: there, writable, room, speed, locks, and what kind of file system they are on."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlx.doctor.findings import Finding, fault, of_error, ok, warning
from tlx.doctor.needs import Needs
from tlx.doctor.shown import gib

if TYPE_CHECKING:
    from tlx.plan.config import Config

_BLOCK = 4 << 20
_MOST = 64 << 20  # bytes that are written and read to measure
_LONGEST_S = 2.0
_SLOW = 20e6  # bytes per second of reading
_PAGES = 16  # places of a file that are asked for in the page cache
_IN_MEMORY = ("tmpfs", "ramfs")
_NETWORK = re.compile(
    r"nfs4?|lustre|gpfs|beegfs|ceph|cifs|smb3?|9p|afs|pvfs2|orangefs|wekafs|panfs|glusterfs|daos|virtiofs|"
    r"fuse\.(?!fuse-overlayfs|fuseblk|lxcfs|squashfuse).+"
)


@dataclass(frozen=True)
class FileSystem:
    """Of a folder: its type, and whether it is of the network or in memory."""

    kind: str

    @property
    def network(self) -> bool:
        return _NETWORK.fullmatch(self.kind) is not None

    def __str__(self) -> str:
        if self.network:
            return f"{self.kind}, a network file system"
        return f"{self.kind}, in memory" if self.kind in _IN_MEMORY else f"{self.kind}, local"


def file_system(path: Path, table: Path = Path("/proc/self/mountinfo")) -> FileSystem | None:
    """Of the nearest mount above `path`; None where the system does not tell."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    best, kind = -1, None
    whole = path.resolve()
    for line in lines:
        left, dash, right = line.partition(" - ")
        words = left.split()
        if not dash or len(words) < 5:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), words[4]))
        # of two mounts at one place the later one is seen
        if (point == whole or point in whole.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return FileSystem(kind) if kind else None


def nearest(path: Path) -> Path:
    """The folder itself, or where it would be made."""
    path = path.absolute()
    return next((p for p in (path, *path.parents) if p.exists() or p.is_symlink()), path)


def _probe(folder: Path) -> Path:
    """A name that :meth:`tlx.runs.run_folder.RunFolder.prepare` removes, should this process not come to it."""
    return folder / f".doctor-{socket.gethostname()}-{os.getpid()}.tmp"


def writable(folder: Path, name: str, what: str) -> Finding | None:
    """A fault where no file can be made in a folder, or where it would be made.

    Args:
        what: the setting that names another folder.
    """
    here = nearest(folder)
    if not here.is_dir():
        said = "a link that leads nowhere" if here.is_symlink() else "a file, not a folder"
        return fault(name, f"{here} is {said}", f"remove it, or set {what} to another folder")
    probe = _probe(here)
    try:
        with probe.open("wb") as file:
            file.write(b"tlx doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        todo = f"make it writable, or set {what} to another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            todo = f"free some room, or set {what} to another disk"
        return fault(name, f"{here} cannot be written: {error.strerror}", todo)
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def run_folder(folder: Path, *, needs: Needs | None, measure: bool) -> Iterator[Finding]:
    """
    Args:
        measure: whether to measure its speed, too.
    """
    name = "run folder"
    broken = writable(folder, name, "run")
    if broken is not None:
        yield broken
        return
    here = nearest(folder)
    system = file_system(here)
    there = str(folder) if here == folder.absolute() else f"{folder} (not there yet; {here} is)"
    said = f"{there} can be written" + (f"; {system}" if system else "")
    if system is not None and system.kind in _IN_MEMORY:
        yield warning(name, f"{said}: what is there is gone with the machine", "set run to a folder on a disk")
    else:
        yield ok(name, said)
    yield from room(shutil.disk_usage(here).free, needs, there=_size(folder / "checkpoints"))
    yield from locks(here)
    if measure:
        yield write_speed(here, needs)


def _size(folder: Path) -> int:
    """Bytes of all files in it; what goes meanwhile counts for nothing."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            about = file.lstat()
            size += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return size


def room(free: int, needs: Needs | None, *, there: int = 0) -> Iterator[Finding]:
    """Free bytes of the disk against what checkpoints will take; quotas are not seen.

    Args:
        there: bytes of the run's checkpoints so far, which new ones replace.
    """
    if needs is None:
        yield ok("room for checkpoints", f"{gib(free)} free (a quota may be smaller)")
        return
    said = f"{gib(free)} free (a quota may be smaller); checkpoints take about {gib(needs.checkpoints)}"
    said += f", of which {gib(there)} are there already" if there else ""
    todo = "free some room, keep fewer (checkpoint.keep), or set run to another disk"
    if free < 2 * needs.checkpoint:
        yield fault("room for checkpoints", f"{said}, a single one {gib(needs.checkpoint)}", todo)
    elif free + there < needs.checkpoints:
        yield warning("room for checkpoints", said, todo)
    else:
        yield ok("room for checkpoints", said)


def locks(folder: Path) -> Iterator[Finding]:
    """Whether flock keeps a second training out."""
    probe = _probe(folder)
    first = second = -1
    try:
        first = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        second = os.open(probe, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            works = False
        except BlockingIOError:
            works = True
    except OSError:
        works = False
    finally:
        for handle in (first, second):
            if handle >= 0:
                os.close(handle)
        with suppress(OSError):
            probe.unlink()
    if works:
        yield ok("locks", "flock works in the run folder")
    else:
        yield warning(
            "locks",
            "flock does not work in the run folder: a second training there is noticed only at a checkpoint",
            "mount it with locks (NFS 4; Lustre with -o flock), or see to it that one job at a time has the folder",
        )


def write_speed(folder: Path, needs: Needs | None) -> Finding:
    """Up to 64 MiB that do not compress, flushed to the disk."""
    block, probe, written = os.urandom(_BLOCK), _probe(folder), 0
    most = min(_MOST, shutil.disk_usage(folder).free // 4)
    start = time.monotonic()
    try:
        with probe.open("wb", buffering=0) as file:
            while written < most and time.monotonic() - start < _LONGEST_S:
                written += file.write(block)
                os.fsync(file.fileno())
        took = max(time.monotonic() - start, 1e-6)
    finally:
        with suppress(OSError):
            probe.unlink()
    rate = written / took
    said = f"{rate / 1e6:.0f} MB/s with fsync"
    if needs is None or not rate:
        return ok("write speed", said)
    takes = needs.checkpoint / rate
    said = f"{said}: a checkpoint of {gib(needs.checkpoint)} takes about {max(takes, 0.1):.1f} s"
    if takes > 60:
        return warning("write speed", said, "save less often (checkpoint.every), or set run to a faster disk")
    return ok("write speed", said)


def shards(config: Config, *, measure: bool) -> Iterator[Finding]:
    """Opened as training opens them, which compares them with each other and with what the configuration expects."""
    from tlx.base.errors import UserError
    from tlx.base.location import is_remote
    from tlx.train.data import cache_of, open_sets

    cache = cache_of(config)
    if cache is not None:
        broken = writable(cache.folder, "shard cache", "data.cache.folder (or TLX_CACHE)")
        yield broken or ok("shard cache", f"{cache.folder}, {gib(shutil.disk_usage(nearest(cache.folder)).free)} free")
        if broken:
            return
    try:
        sets = open_sets(config, staged=False)
    except UserError as error:
        yield of_error("shards", error, "tlx shards build, or tlx shards index")
        return
    for key, manifest in (("data.train", sets.train), ("data.val", sets.val)):
        if manifest is None:
            continue
        size = sum(shard.bytes for shard in manifest.shards)
        system = None if is_remote(manifest.location) else file_system(Path(manifest.location))
        about = f"{len(manifest):,} samples in {len(manifest.shards)} shards, {gib(size)}"
        yield ok(key, f"{manifest.location}: {about}" + (f"; {system}" if system else ""))
    if measure and not sets.train.remote and sets.train.shards:
        largest = max(range(len(sets.train.shards)), key=lambda n: sets.train.shards[n].bytes)
        yield read_speed(sets.train.tar(largest))


def read_speed(tar: Path) -> Finding:
    """A piece of up to 64 MiB from somewhere in a shard."""
    size = tar.stat().st_size
    start = random.randrange(max(size - _MOST, 0) + 1)
    length = min(size, _MOST)
    handle = os.open(tar, os.O_RDONLY)
    try:
        kept = cached_share(handle, start, length)
        got, began = 0, time.monotonic()
        while got < length and time.monotonic() - began < _LONGEST_S:
            piece = os.pread(handle, min(_BLOCK, length - got), start + got)
            if not piece:
                break
            got += len(piece)
        took = max(time.monotonic() - began, 1e-6)
    finally:
        os.close(handle)
    return judge_read(tar.name, got, took, kept)


def judge_read(name: str, got: int, took: float, kept: float | None) -> Finding:
    """
    Args:
        name: of the shard.
        got: bytes that were read in `took` seconds.
        kept: the share of them that was in the page cache; None where that is not known.
    """
    if got < _BLOCK and took < _LONGEST_S:
        return ok("read speed", f"{gib(got)} of {name} are too small to measure")
    said = f"{got / took / 1e6:,.0f} MB/s ({gib(got)} of {name})"
    if got / took < _SLOW and (kept is None or kept < 0.5):
        return warning(
            "read speed", f"{said}: slow for a training", "data.cache.stage=true, or shards on a faster disk"
        )
    if kept is None:
        return ok("read speed", f"{said}; whether from the page cache is not known here")
    if kept:
        return ok("read speed", f"{said}; {kept:.0%} of it was in the page cache, so the disk may be slower")
    return ok("read speed", f"{said}, not from the page cache")


def cached_share(handle: int, start: int, length: int) -> float | None:
    """Of a piece of a file, about how much is in the page cache; None where the file system does not tell."""
    if not hasattr(os, "RWF_NOWAIT") or not length:
        return None
    there = 0
    for n in range(_PAGES):
        try:
            os.preadv(handle, [bytearray(1)], start + n * (length - 1) // _PAGES, os.RWF_NOWAIT)
            there += 1
        except BlockingIOError:
            pass
        except OSError:
            return None
    return there / _PAGES
