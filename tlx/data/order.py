"""The order of samples and who gets which of them: arithmetic on (seed, epoch, position), without files or processes.

Everything random in the data path starts from `derive`, so nothing depends on how many processes there are or on
what ran before. `ORDER_VERSION` belongs into checkpoints: another version means another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tlx.errors import UserError

ORDER_VERSION = 1

Ids = NDArray[np.int64]


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 64-bit seed for one purpose, the same on every machine and in every version of Python and numpy."""
    text = f"{purpose}|{seed}|{','.join(str(int(n)) for n in numbers)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(key: int, count: int) -> Ids:
    """A permutation of 0..count-1 that `key` alone decides.

    From raw Philox words and a stable sort, since numpy does not promise that `Generator.permutation` stays the same
    between its versions.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable").astype(np.int64, copy=False)


def share(count: int, parts: int, part: int) -> range:
    """The consecutive items of `count` that go to `part` of `parts`: sizes differ by at most one, bigger ones first."""
    small, extra = divmod(count, parts)
    start = part * small + min(part, extra)
    return range(start, start + small + (part < extra))


def micro_batches(count: int, world: int, micro_batch: int | None) -> int:
    """Into how many micro-batches every rank splits its share of a global batch of `count` samples."""
    largest = -(-count // world)
    return -(-largest // micro_batch) if micro_batch else 1


class EpochOrder:
    """The order of one epoch: shards permuted, then samples permuted within a window of consecutive shards.

    A window is computed when it is asked for, so a position in the middle of an epoch costs one window and not the
    data set; the last two windows are kept.

    Args:
        samples_per_shard: how many samples each shard holds; ids count through them in this order.
        window: how many shards (in permuted order) mix with each other; None is all of them, a full shuffle.

    Raises:
        UserError: a window below one.
    """

    def __init__(
        self, samples_per_shard: Sequence[int] | Ids, *, seed: int, epoch: int, window: int | None = None
    ) -> None:
        if window is not None and window < 1:
            raise UserError(
                f"a shuffle window of {window} shards holds nothing", todo="1 or more, or null for all shards"
            )
        sizes = np.asarray(samples_per_shard, dtype=np.int64)
        self.seed, self.epoch, self.window = seed, epoch, window or max(len(sizes), 1)
        self._shards = permutation(derive(seed, "shards", epoch), len(sizes))
        self._sizes = sizes
        self._firsts = np.cumsum(sizes) - sizes
        starts = np.arange(0, len(sizes), self.window)
        self._ends = np.cumsum(np.add.reduceat(sizes[self._shards], starts)) if len(sizes) else np.zeros(0, np.int64)
        self._kept: dict[int, Ids] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def ids(self, start: int, stop: int) -> Ids:
        """The samples at positions start..stop-1 of this epoch, int64.

        Raises:
            IndexError: positions outside the epoch.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start} to {stop} of an epoch of {len(self)} samples")
        parts = []
        while start < stop:
            window = int(np.searchsorted(self._ends, start, side="right"))
            ids = self._ids_of(window)
            first = int(self._ends[window]) - len(ids)
            parts.append(ids[start - first : stop - first])
            start = int(self._ends[window])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _ids_of(self, window: int) -> Ids:
        if window not in self._kept:
            shards = self._shards[window * self.window : (window + 1) * self.window]
            ids = np.concatenate([np.arange(self._firsts[s], self._firsts[s] + self._sizes[s]) for s in shards])
            # a batch that straddles two windows asks for both again and again, for each of its micro-batches
            self._kept = {w: kept for w, kept in self._kept.items() if w == window - 1}
            self._kept[window] = ids[permutation(derive(self.seed, "window", self.epoch, window), len(ids))]
        return self._kept[window]
