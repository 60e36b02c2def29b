"""Which pictures go into which shard: a function of the source and a seed, whoever writes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tlx.data.build.sources import Picture, Source
from tlx.data.stream.order import derive, permutation

_BLOCK, _RECORD = 512, 10240  # what tar rounds members and whole files up to
_END = 2 * _BLOCK


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        split: the folder that it goes to.
        name: of its file there.
        first: place in the split of its first picture.
    """

    split: str
    name: str
    first: int
    pictures: tuple[Picture, ...]


def shard_tasks(source: Source, *, seed: int, samples: int, size: int) -> Iterator[ShardTask]:
    """The shards of a source: its pictures shuffled, then cut where a shard is full.

    Args:
        seed: of the shuffle.
        samples, size: a shard ends before it holds more pictures or more bytes; one picture always fits.
    """
    for split, pictures in source.splits.items():
        order = permutation(derive(seed, f"shuffle {split}"), len(pictures))
        first = 0
        for number, part in enumerate(_cut([pictures[i] for i in order], samples, size)):
            yield ShardTask(split, f"{number:06d}.tar", first, tuple(part))
            first += len(part)


def _cut(pictures: Sequence[Picture], samples: int, most_bytes: int) -> Iterator[list[Picture]]:
    shards = -(-len(pictures) // samples)
    most = -(-len(pictures) // max(shards, 1))  # as even as the limit allows, not a small one at the end
    part: list[Picture] = []
    size = _END
    for picture in pictures:
        more = 3 * _BLOCK + -(-picture.bytes // _BLOCK) * _BLOCK  # two headers, the label, the picture
        if picture.targets:
            more += _BLOCK + -(-len(picture.targets.encode()) // _BLOCK) * _BLOCK
        if part and (len(part) == most or _padded(size + more) > most_bytes):
            yield part
            part, size = [], _END
        part.append(picture)
        size += more
    if part:
        yield part


def _padded(size: int) -> int:
    return -(-size // _RECORD) * _RECORD
