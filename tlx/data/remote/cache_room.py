"""Room for shards from elsewhere: how much they may take together, and who leaves for whom.

Of a tar in the cache, mtime is when it was used or fetched, which decides who leaves; atime is when it was used. A tar
that is arriving has its whole length from the start, so that what it will need counts already.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.locks import locked
from tlx.base.paths import expanded_path

SHARE = 0.8
"""Of the room on the disk, what shards may take where no limit is set."""
MARK = ".tlx-shards"
"""In every folder that is ours; nothing is ever removed from another one."""

TARGETS = "targets"
"""The folder of an index's arrays of targets."""

_OURS = re.compile(r"[0-9a-f]{12}-.+", re.DOTALL)


def default_folder() -> Path:
    """TLX_CACHE, or ``~/.cache/tlx/shards``."""
    return expanded_path(environment().get("TLX_CACHE") or "~/.cache/tlx/shards", where="TLX_CACHE")


@dataclass(frozen=True)
class CacheSpec:
    """Where shards from elsewhere are kept, and how much of them.

    The limit is on the tars of all such folders in the cache, those that are arriving included. A tar that was
    removed while a process still has it open keeps its room on the disk until it is closed. The arrays of targets count
    and stay, so that tars may take what they leave; ``index.npy`` does not count.

    Attributes:
        limit: bytes; None is `SHARE` of what the disk would have free without the cache.
        stage: shards that lie in a folder of this machine, which may be a slow shared one, are kept here, too.
    """

    folder: Path = field(default_factory=default_folder)
    limit: int | None = None
    stage: bool = False


@dataclass(frozen=True)
class _File:
    path: Path
    bytes: int
    on_disk: int
    used: int


def part_of(path: Path) -> Path:
    """What a file is called while it arrives."""
    return path.with_name(f"{path.name}.part")


def limit_of(spec: CacheSpec) -> int:
    """Bytes that tars may take: what arrays of targets leave."""
    return _limit(spec, [f for files in _found(spec.folder) for f in files])


def reserve(spec: CacheSpec, file: IO[bytes], size: int, path: Path, what: str) -> bool:
    """Makes `file`, which will be `path`, so long, once what was used least recently has made room for it.

    Args:
        what: what people know the file by.

    Returns:
        Whether it has; false where only what is arriving elsewhere stands in the way.

    Raises:
        UserError: the limit or the disk is too small.
    """
    os.ftruncate(file.fileno(), 0)  # what a killed process has left
    with locked(spec.folder / ".room") as lock:
        if lock is None:
            return False
        tars, arriving = _found(spec.folder)
        arriving = [f for f in arriving if f.path != part_of(path)]
        limit = _limit(spec, [*tars, *arriving])
        if size > limit:
            _too_small(spec, size, limit, what)
        coming = sum(f.bytes for f in arriving)
        if coming + size > limit:
            return False
        held = coming + sum(f.bytes for f in tars)
        free = _free(spec.folder) - sum(f.bytes - f.on_disk for f in arriving)
        for tar in sorted(tars, key=lambda f: f.used):
            if held + size <= limit and free >= size:
                break
            tar.path.unlink(missing_ok=True)
            held, free = held - tar.bytes, free + tar.on_disk
        if free >= size:
            os.ftruncate(file.fileno(), size)
        elif not arriving:
            no_room(spec, f"{what} needs {in_words(size)}, and there are {in_words(max(free, 0))}")
        return free >= size


def no_room(spec: CacheSpec, why: str) -> NoReturn:
    raise UserError(
        f"there is no room on the disk: {why}",
        where=str(spec.folder),
        todo="free some, or set data.cache.folder (or TLX_CACHE) to a folder on another disk",
    )


def _too_small(spec: CacheSpec, size: int, limit: int, what: str) -> NoReturn:
    if spec.limit is None:
        no_room(spec, f"{what} needs {in_words(size)}, and shards may take {in_words(limit)} of the disk")
    raise UserError(
        f"{what} is {in_words(size)} long, more than data.cache.limit, {in_words(spec.limit)}"
        + (f", less what arrays of targets take there: {in_words(limit)}" if limit < spec.limit else ""),
        where=str(spec.folder),
        todo="raise data.cache.limit; a whole window of shards should fit",
    )


def _limit(spec: CacheSpec, files: Sequence[_File]) -> int:
    arrays = _of_arrays(spec.folder)
    whole = spec.limit
    if whole is None:
        whole = int(SHARE * (_free(spec.folder) + sum(f.on_disk for f in files) + arrays))
    return max(whole - arrays, 0)


def _of_arrays(folder: Path) -> int:
    """Bytes of the arrays of targets in all remote folders, those that are arriving included."""
    total = 0
    for mark in folder.glob(f"*/{MARK}"):
        for path in (mark.parent / TARGETS).glob("*.npy*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _found(folder: Path) -> tuple[list[_File], list[_File]]:
    """The tars of all remote folders, and those that are arriving; what killed processes left behind is removed."""
    tars, arriving = [], []
    for mark in folder.glob(f"*/{MARK}"):
        for entry in os.scandir(mark.parent):
            if not _OURS.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                stat = entry.stat(follow_symlinks=False)
                file = _File(Path(entry.path), stat.st_size, stat.st_blocks * 512, stat.st_mtime_ns)
                if not entry.name.endswith(".part"):
                    tars.append(file)
                elif not _remove_if_left(file.path):
                    arriving.append(file)
    return tars, arriving


def _remove_if_left(part: Path) -> bool:
    try:
        with locked(part, wait=False) as file:
            if file is not None:
                part.unlink()
            return True
    except BlockingIOError:
        return False


def in_words(size: int) -> str:
    """A number of bytes, for people."""
    if size < 1e4:
        return f"{size} bytes"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
