"""Whether tars are those that were indexed, and those that were trained on before: by length, time and hash."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from tlx.base.files import sha256_of
from tlx.data.shards.manifest import Manifest, other_bytes
from tlx.data.stream.threads import in_threads

_AT_ONCE = 16  # questions to a file server
_FEW = 32  # files that are asked after one by one


@dataclass(frozen=True)
class Seen:
    """A shard as a training has found it.

    Attributes:
        bytes: its length.
        modified: when it was written last, in nanoseconds since the epoch; None of a remote one.
        sha256: as the index says it; None where it does not.
    """

    bytes: int
    modified: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Suspect:
    """A shard to be read, and the hash that it should have."""

    shard: int
    sha256: str


def wrong_lengths(manifest: Manifest) -> list[str]:
    """A sentence for each tar of a folder that is not there, or not as long as the index says."""
    if manifest.remote:  # their lengths are verified when they come
        return []
    return [f"{manifest.describe_shard(i)}: {wrong}" for i, about in _look(manifest) if (wrong := _wrong(about))]


def look_at(manifest: Manifest) -> dict[str, Seen]:
    """Every shard as it is now, by name; a tar that cannot be seen is left out."""
    if manifest.remote:
        return {s.name: Seen(s.bytes, None, s.sha256) for s in manifest.shards}
    found = {}
    for i, about in _look(manifest):
        if isinstance(about.found, os.stat_result):
            shard = manifest.shards[i]
            found[shard.name] = Seen(about.found.st_size, about.found.st_mtime_ns, shard.sha256)
    return found


@dataclass(frozen=True)
class Compared:
    """What has become of shards since they were seen.

    Attributes:
        problems: a sentence for each that is another one.
        suspects: those that were written meanwhile, and may still have the same bytes.
        unknown: names of such ones of which nobody has a hash.
    """

    problems: tuple[str, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    unknown: tuple[str, ...] = ()


def compare(manifest: Manifest, before: Mapping[str, Seen], now: Mapping[str, Seen]) -> Compared:
    """Compares without reading them; only what was seen both times."""
    problems, suspects, unknown = [], [], []
    for i, shard in enumerate(manifest.shards):
        then, found = before.get(shard.name), now.get(shard.name)
        if then is None or found is None:
            continue
        expected = then.sha256 or found.sha256
        if then.bytes != found.bytes:
            problems.append(f"{manifest.describe_shard(i)}: it has {found.bytes} bytes, expected {then.bytes}")
        elif found.sha256 not in (None, expected):
            problems.append(f"{manifest.describe_shard(i)}: {other_bytes(found.sha256, expected)} (by the index)")
        elif then.modified == found.modified:
            continue
        elif expected is not None:
            suspects.append(Suspect(i, expected))
        else:
            unknown.append(manifest.describe_shard(i))
    return Compared(tuple(problems), tuple(suspects), tuple(unknown))


def read_and_compare(manifest: Manifest, suspect: Suspect) -> str | None:
    """Reads a shard that is on this machine, all of it; a sentence, where its bytes are others.

    One in the cache is removed then, to be fetched anew: nobody but this machine has damaged it.
    """
    where, path = manifest.describe_shard(suspect.shard), manifest.here(suspect.shard)
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            found = sha256_of(file)
    except OSError as error:
        return f"{where}: it cannot be read: {error.strerror or error}"
    if found == suspect.sha256:
        return None
    if manifest.remote:
        manifest.forget(suspect.shard)
        return None
    return f"{where}: {other_bytes(found, suspect.sha256)}"


@dataclass(frozen=True)
class _About:
    """What the file system says of a tar."""

    found: os.stat_result | OSError
    bytes: int


def _look(manifest: Manifest) -> list[tuple[int, _About]]:
    paths = [manifest.path / shard.name for shard in manifest.shards]
    threads = _AT_ONCE if len(paths) > _FEW else 1
    found = in_threads(_stat, paths, threads)
    return [(i, _About(about, manifest.shards[i].bytes)) for i, about in enumerate(found)]


def _stat(path: os.PathLike[str]) -> os.stat_result | OSError:
    try:
        return os.stat(path)
    except OSError as error:
        return error


def _wrong(about: _About) -> str | None:
    if isinstance(about.found, OSError):
        return f"it cannot be read: {about.found.strerror or about.found}"
    if not stat.S_ISREG(about.found.st_mode):
        return "this is no file"
    if about.found.st_size != about.bytes:
        return f"it has {about.found.st_size} bytes, and {about.bytes} in the index"
    return None
