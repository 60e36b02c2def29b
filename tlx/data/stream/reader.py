"""Bytes of one sample, read at the place the index names, and what is said about one that cannot be read."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from tlx.base.errors import TlxError
from tlx.data.remote.files import ShardUnavailable
from tlx.data.shards.manifest import Manifest

MACHINES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
"""What an OSError says that is this machine's trouble, and not a file's."""

_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_OPEN = 64  # files kept open per process; the usual limit is 1024, and shared-memory tensors need some too
_AGAIN = 10  # a remote shard may leave the cache, for others', between being fetched and being opened


class ReadError(TlxError):
    """The bytes of a sample are not where the index says."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read: which, where, why, and which sample took its place (None: a black picture,
    or, in an evaluation, nothing)."""

    id: int
    where: str
    reason: str
    replaced_by: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class ShardReader:
    """Reads samples at random. Safe to hand to other processes: each opens the tars itself, when it first reads."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: dict[int, tuple[int, int]] = {}  # shard -> descriptor, length

    def __getstate__(self) -> Manifest:
        return self.manifest

    def __setstate__(self, manifest: Manifest) -> None:
        self.__init__(manifest)  # type: ignore[misc]

    def __del__(self) -> None:
        for file, _ in getattr(self, "_files", {}).values():
            os.close(file)

    def read(self, sample: int) -> bytes:
        """The encoded picture of a sample.

        Raises:
            ReadError: the tar is missing, shorter or longer than when it was indexed, or cannot be read.
            ShardUnavailable: a remote one that cannot be fetched; UserError: there is no room for it.
        """
        shard = self.manifest.shard_of(sample)
        record = self.manifest.records[sample]
        offset, size = int(record["offset"]), int(record["size"])
        try:
            # pread takes its own position, so processes that inherited one open file do not disturb each other
            file, length = self._file(shard)
            if offset + size > length:
                left = max(length - offset, 0)
                raise ReadError(f"the tar is truncated: {left} of {size} bytes are left of this picture")
            data = os.pread(file, size, offset)
        except OSError as error:
            if error.errno in MACHINES:
                raise
            raise ReadError(f"the tar cannot be read: {error}") from error
        if len(data) != size:
            raise ReadError(f"the tar was cut while it was read: {len(data)} of {size} bytes came of this picture")
        return data

    def _file(self, shard: int) -> tuple[int, int]:
        if shard not in self._files:
            self._files[shard] = self._open(shard)
            if len(self._files) > _OPEN:
                oldest = next(iter(self._files))
                os.close(self._files.pop(oldest)[0])
        return self._files[shard]

    def _open(self, shard: int) -> tuple[int, int]:
        known = self.manifest.shards[shard]
        file = self._open_tar(shard)
        about = os.fstat(file)
        length = about.st_size
        if not stat.S_ISREG(about.st_mode):
            os.close(file)
            raise ReadError("this is no file")
        if length > known.bytes:
            os.close(file)
            raise ReadError(
                f"the tar has grown from {known.bytes} to {length} bytes since it was indexed; "
                f"run tlx shards index {self.manifest.location}"
            )
        return file, length

    def _open_tar(self, shard: int) -> int:
        for _ in range(_AGAIN):
            try:
                # not blocking: a named pipe, which is refused later, would be waited for
                return os.open(self.manifest.tar(shard), _READ)
            except FileNotFoundError:
                if not self.manifest.remote:
                    raise
        raise ShardUnavailable(
            f"{self.manifest.describe_shard(shard)}: is removed from the cache before it can be read\n"
            "  -> raise data.cache.limit; a window of shards, and a few more per process, should fit"
        )
