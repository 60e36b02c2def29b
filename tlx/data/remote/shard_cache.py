"""Shards from elsewhere on this machine: fetched once per node, whole or not at all, the least recently used ones leave
first. Elsewhere is a remote folder, or one on a disk that nodes share.

Under the cache's folder each of these has one of its own: ``index.json``, ``index.npy`` (and ``targets/NAME.npy``)
and its tars, under names that begin with their hash, which is verified while they come. Of shards without a hash in the
index they begin with the hash of their layout, and whether such a one is still what lies there is asked once per start
(see `kept`). ``NAME.part`` is a file that is arriving. Whoever fetches it holds a lock on that very file, which goes
with the process that holds it; everybody else waits for the lock.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, NoReturn

from tlx.base.errors import UserError
from tlx.base.files import sha256_of, write_whole
from tlx.base.location import folder_name, is_remote, shown
from tlx.base.locks import locked
from tlx.base.terminal import say
from tlx.data.remote import files as remote
from tlx.data.remote.cache_room import MARK, TARGETS, CacheSpec, default_folder, limit_of, no_room, part_of, reserve
from tlx.data.remote.files import IndexUnavailable, ShardUnavailable
from tlx.data.remote.prefetch import LOOK_S, Ahead, Wanted
from tlx.data.remote.shard_version import Kept, read_kept

__all__ = ["CacheSpec", "ShardCache", "default_folder"]


HEADER = 64 << 20
"""Bytes of an ``index.json``: more than 500,000 shards, or a million classes, need."""


class ShardCache:
    """Files of one folder elsewhere on this machine; for threads, and for processes that were forked or spawned."""

    def __init__(self, location: str, spec: CacheSpec, version: int | None = None, began: float | None = None) -> None:
        """
        Args:
            version: of a folder's shards; by default what the folder is at now.
            began: when it was opened, in seconds since the epoch; by default now. What the other side has said since
                then counts; it is not asked again.
        """
        self.location, self.spec = location, spec
        named = location if is_remote(location) else f"file:{os.path.abspath(location)}"
        self.folder = spec.folder / folder_name(named)
        self._version = self._found() if version is None and not is_remote(location) else version
        self._began = time.time() if began is None else began
        self._ahead: tuple[int, Ahead] | None = None

    def __reduce__(self) -> tuple[Callable[..., ShardCache], tuple[str, CacheSpec, int | None, float]]:
        return ShardCache, (self.location, self.spec, self._version, self._began)

    def _found(self) -> int | None:
        """When the index of a folder was written, or of a folder that is gone, the index that was kept: shards that
        were built anew may have the layout of the former ones, and other pictures."""
        for folder in (Path(self.location), self.folder):
            with suppress(OSError):
                return (folder / "index.json").stat().st_mtime_ns
        return None

    # The index

    def header(self) -> tuple[bytes, str | None]:
        """``index.json``: fetched anew, or the cached one and why.

        Raises:
            IndexUnavailable: neither is to be had, or the other side refuses to give it.
        """
        self._make()
        cached = self.kept_header()
        try:
            return remote.read(self.location, "index.json", limit=HEADER, tries=4 if cached is None else 2), None
        except remote.TransferError as error:
            if cached is None or error.refused:
                self._no_index(error.reason)
            self._began = -math.inf  # it cannot be reached: what is here is used, and nobody is asked
            return cached, error.reason

    def kept_header(self) -> bytes | None:
        """The ``index.json`` that was kept, if one was."""
        path = self.folder / "index.json"
        return path.read_bytes() if path.exists() else None

    def keep_header(self, text: bytes) -> None:
        """Keeps ``index.json``, once its arrays are there."""
        path = self.folder / "index.json"
        try:
            if self.kept_header() != text:
                write_whole(path, text)
            if self._version is not None:
                os.utime(path, ns=(self._version, self._version))
        except OSError as error:
            self._cannot_write(error)

    def remove_others(self, names: Collection[str]) -> None:
        """Removes arrays ``targets/NAME.npy`` but these: those of targets that the index has no more."""
        for path in (self.folder / TARGETS).glob("*.npy"):
            if f"{TARGETS}/{path.name}" not in names:
                path.unlink(missing_ok=True)

    def array(self, name: str, sha256: str, limit: int) -> Path:
        """``index.npy`` or ``targets/NAME.npy`` of this hash and at most `limit` bytes, fetched if the cached one is
        another.

        Raises:
            IndexUnavailable: it does not come, or it is not the one that ``index.json`` was written for.
        """
        path = self.folder / name

        def there(ask: bool) -> bool:
            with path.open("rb") as file:
                return sha256_of(file) == sha256

        def fetch(file: IO[bytes]) -> None:
            try:
                remote.download(self.location, name, file, limit=limit, sha256=sha256, tries=4)
            except remote.TransferError as error:
                self._no_index(f"{name}: {error.reason}")

        return self._bring(path, there, fetch)

    # The shards

    def path(self, shard: Wanted) -> Path:
        """Where a shard is or would be."""
        layout = shard.layout
        if self._version is not None and shard.sha256 is None:
            layout = hashlib.blake2b(f"{layout} {self._version}".encode(), digest_size=6).hexdigest()
        return self.folder / f"{layout}-{shard.name}"

    def shard(self, shard: Wanted) -> Path:
        """A shard as a local file, fetched if need be.

        Raises:
            ShardUnavailable: it does not come, or not with its length and hash.
            UserError: the limit or the disk is too small for it; it was replaced there while it was in use here.
        """
        path = self._fetched(shard)
        with suppress(FileNotFoundError):
            os.utime(path, ns=(time.time_ns(), time.time_ns()))  # finer than the kernel's own clock for files
        return path

    def forget(self, shard: Wanted) -> None:
        """Removes a shard that was damaged here, so that it is fetched anew."""
        self.path(shard).unlink(missing_ok=True)

    def ahead(self, shards: Sequence[Wanted]) -> None:
        """Begins to fetch these in the background (see `Ahead`)."""
        pid = os.getpid()
        if self._ahead is None or self._ahead[0] != pid:  # threads do not survive a fork
            self._ahead = (pid, Ahead(self._fetched, lambda: limit_of(self.spec)))
        self._ahead[1].go_on_with(shards)

    def _fetched(self, shard: Wanted) -> Path:
        path, what = self.path(shard), shown(self.location, shard.name)

        def there(ask: bool) -> bool:
            return path.stat().st_size == shard.bytes and self._is_current(path, shard, ask=ask)

        def fetch(file: IO[bytes]) -> Kept:
            while not reserve(self.spec, file, shard.bytes, path, what):
                time.sleep(LOOK_S)
            try:
                came = remote.download(self.location, shard.name, file, size=shard.bytes, sha256=shard.sha256)
            except remote.TransferError as error:
                raise ShardUnavailable(
                    f"{what}: cannot be fetched: {error.reason}\n"
                    "  -> start the same command again when it can; what has been fetched stays in the cache. If the "
                    "shards were changed there, index them again"
                ) from None
            kept = Kept(came.version, came.sha256, time.time()).after(read_kept(path))
            if shard.sha256 is None:
                self._refuse_replaced(kept, what)
            return kept

        return self._bring(path, there, fetch)

    def _is_current(self, path: Path, shard: Wanted, *, ask: bool) -> bool:
        """Whether a shard that is here is the one that lies there, as far as is known.

        Args:
            ask: the other side, where that was not done since the beginning.
        """
        if shard.sha256 is not None:  # which is in its name
            return True
        kept = read_kept(path)
        if kept is not None:
            self._refuse_replaced(kept, shown(self.location, shard.name))
        if self._began == -math.inf or (kept is not None and kept.checked >= self._began):
            return True
        if not ask:
            return False
        kept = kept or Kept("", "", 0.0)  # of an earlier tlx: nobody knows which version it is
        try:
            now = remote.version(self.location, shard.name, kept.version)
        except remote.TransferError as error:
            if not error.refused:
                say(f"warning: {error}: shards in the cache are used as they are", error=True)
                self._began = -math.inf
            now = ""
        if now and now != kept.version:
            return False
        replace(kept, checked=time.time()).write(path)
        return True

    def _refuse_replaced(self, kept: Kept, what: str) -> None:
        if kept.replaced and kept.replaced_checked >= self._began > -math.inf:
            raise UserError(
                f"it was replaced there while it was in use: SHA-256 {kept.sha256}, before {kept.replaced}",
                where=what,
                todo="bring the former file back, or begin anew with one version of all (tlx train --fresh)",
            )

    def _bring(self, path: Path, there: Callable[[bool], bool], fetch: Callable[[IO[bytes]], Kept | None]) -> Path:
        """The file, fetched by one process while the others wait."""
        part = part_of(path)
        while True:
            try:
                if _holds(there, ask=False):
                    return path
                self._make()
                path.parent.mkdir(exist_ok=True)  # of targets
                with locked(part) as file:
                    if file is None:
                        continue
                    if _holds(there, ask=True):
                        part.unlink()
                        return path
                    try:
                        kept = fetch(file)
                        file.flush()
                        os.fsync(file.fileno())
                        os.replace(part, path)
                        if kept is not None:
                            kept.write(path)
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
                    return path
            except OSError as error:
                self._cannot_write(error)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark = self.folder / MARK
            if not mark.exists():
                write_whole(mark, f"{shown(self.location)}\n")
        except OSError as error:
            self._cannot_write(error)

    # What is said when it does not work

    def _no_index(self, reason: str) -> NoReturn:
        raise IndexUnavailable(
            f"the index cannot be fetched: {reason}",
            where=shown(self.location),
            todo="is it the folder with index.json, index.npy and the tars? tlx shards index makes the first two, "
            "where the tars are on a disk",
        ) from None

    def _cannot_write(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            no_room(self.spec, str(error.strerror))
        locks = error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        raise UserError(
            "this file system has no file locks" if locks else f"cannot be written: {error.strerror or error}",
            where=str(self.folder),
            todo="set data.cache.folder (or TLX_CACHE) to a folder on a disk of this machine",
        ) from error


def _holds(there: Callable[[bool], bool], *, ask: bool) -> bool:
    try:
        return there(ask)
    except FileNotFoundError:
        return False
