"""Whether two sets of shards hold the same pictures, as far as their indexes and a few bytes tell."""

from __future__ import annotations

import hashlib

import numpy as np

from tlx.data.shards.manifest import Manifest
from tlx.data.stream.order import Ids

LOOKED_AT = 32
"""Pictures of a set that are looked for in the other."""

COMPARED = 64
"""Pictures of one length that one of them is compared with, at most."""


def shared_shards(a: Manifest, b: Manifest) -> int:
    """How many shards of `b` are also shards of `a`, by whatever name.

    Two shards are one where their samples have the same places, lengths and classes and, if both lie in a folder here,
    the last picture has the same bytes: in collections without compression all pictures have one length. Pictures that
    were written into other shards are not found here, see :func:`shared_pictures`.
    """
    sizes = {_size(a, i) for i in range(len(a.shards))} & {_size(b, j) for j in range(len(b.shards))}
    here = not (a.remote or b.remote)
    known = {_identity(a, i, here=here) for i in range(len(a.shards)) if _size(a, i) in sizes}
    return sum(_size(b, j) in sizes and _identity(b, j, here=here) in known for j in range(len(b.shards)))


def _size(manifest: Manifest, shard: int) -> tuple[int, int]:
    return manifest.shards[shard].bytes, manifest.shards[shard].samples


def _identity(manifest: Manifest, shard: int, *, here: bool) -> bytes:
    """A hash of the shard's index and, if it lies here, of its last picture."""
    end = int(manifest.ends[shard])
    own = manifest.records[end - manifest.shards[shard].samples : end]
    found = hashlib.blake2b(np.ascontiguousarray(own).tobytes())
    if here and len(own):
        try:
            found.update(_content(manifest, end - 1))
        except OSError:  # whoever reads the samples is told
            found.update(str(manifest.path).encode())
    return found.digest()


def shared_pictures(a: Manifest, b: Manifest) -> tuple[int, int]:
    """(How many pictures of `b` are also in `a`, byte by byte and as the same class; how many of `b` were looked at.)

    Looks at a few of `b`, evenly spaced, and compares those of `a` that have the same length; (0, 0) for shards that do
    not lie here.
    """
    if a.remote or b.remote or not len(a) or not len(b):
        return 0, 0
    looked = np.unique(np.linspace(0, len(b) - 1, LOOKED_AT).astype(np.int64))
    likely = np.flatnonzero(np.isin(a.records["size"], b.records["size"][looked]))
    try:
        return sum(_is_in(a, likely, b, int(sample)) for sample in looked), len(looked)
    except OSError:
        return 0, 0


def _is_in(a: Manifest, likely: Ids, b: Manifest, sample: int) -> bool:
    record, own = b.records[sample], a.records[likely]
    alike = likely[(own["size"] == record["size"]) & (own["label"] == record["label"])][:COMPARED]
    return len(alike) > 0 and _content(b, sample) in (_content(a, int(other)) for other in alike)


def _content(manifest: Manifest, sample: int) -> bytes:
    tar, offset, size = manifest.locate(sample)
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)
