"""The order of samples and who gets which of them: arithmetic on (seed, epoch, position), without files or processes.

Everything random in the data path starts from `derive`, so nothing depends on how many processes there are or on
what ran before. `ORDER_VERSION` is stored in checkpoints: another version means another order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tlx.base.errors import UserError

ORDER_VERSION = 2

Ids = NDArray[np.int64]

_TABLE = 1 << 20  # samples of a window up to which its order is a table, of 4 bytes per sample
_NEAR = 1 << 18  # positions in which shards_for looks up every sample
_ROUNDS = 12  # of the Feistel network; 4 do for thousands of samples, a handful needs these


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


def permuted(key: int | NDArray[np.uint64], count: int | Ids, positions: Ids) -> Ids:
    """What a permutation of 0..count-1 has at `positions`, without making the rest of it.

    The generalised Feistel cipher with cycle walking of Black and Rogaway, Ciphers with Arbitrary Finite Domains
    (CT-RSA 2002): a number is a pair (left, right) out of a x b pairs, a x b being just above `count`, and every round
    adds a function of one half to the other. The function is the 64-bit mixer of SplitMix64 (Steele, Lea and Flood,
    OOPSLA 2014). It is another permutation than that of `permutation`. Time and memory go with the positions alone.

    Args:
        key: 64 bits that decide the permutation; or an array, one per position.
        count: how many there are, at least 1; or an array, one per position.
        positions: int64 [positions], each in 0..count-1.

    Returns:
        int64 [positions].
    """
    shape = positions.shape
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), shape)
    counts = np.broadcast_to(np.asarray(count, dtype=np.uint64), shape)
    values = _feistel(keys, counts, positions.astype(np.uint64))
    # pairs beyond the count, one in sqrt(count): on along the cycle until it comes back inside
    outside = np.flatnonzero(values >= counts)
    while len(outside):
        values[outside] = _feistel(keys[outside], counts[outside], values[outside])
        outside = outside[values[outside] >= counts[outside]]
    return values.astype(np.int64)


def share(count: int, parts: int, part: int) -> range:
    """The consecutive items of `count` that go to `part` of `parts`: sizes differ by at most one, bigger ones first."""
    small, extra = divmod(count, parts)
    start = part * small + min(part, extra)
    return range(start, start + small + (part < extra))


def micro_batches(count: int, world: int, micro_batch: int | None) -> int:
    """Into how many micro-batches every rank splits its share of a global batch of `count` samples."""
    largest = -(-count // world)
    return -(-largest // micro_batch) if micro_batch else 1


def micro_batch_sizes(batch: int, world: int, most: int | None) -> tuple[int, int]:
    """The smallest and the largest micro-batch that a global batch is dealt in; 0 where a rank goes without."""
    parts = micro_batches(batch, world, most)
    shares = [len(share(batch, world, rank)) for rank in (0, world - 1)]
    sizes = {len(share(size, parts, part)) for size in shares for part in (0, parts - 1)}
    return min(sizes), max(sizes)


@dataclass(frozen=True)
class Shuffle:
    """How samples are shuffled, in every epoch.

    Attributes:
        seed: decides everything that is random.
        window: how many shards mix with each other; None is all of them, a full shuffle.
        parts: into how many parts shards and slots of the global batch are dealt, so that a node that holds one part's
            slots reads (and stores) one part's shards. A part has its own windows, of window / parts shards, rounded
            up. 1 ties no slot to any shard.
        batch: samples of the global batch; needed for more than one part.

    Raises:
        UserError: a window below one; more parts than slots.
    """

    seed: int
    window: int | None = None
    parts: int = 1
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(
                f"a shuffle window of {self.window} shards holds nothing", todo="1 or more, or null for all shards"
            )
        if self.parts < 1:
            raise UserError(f"shards cannot be dealt into {self.parts} parts", todo="1 or more; 1 ties no node to any")
        if self.parts > 1 and (self.batch is None or self.parts > self.batch):
            raise UserError(
                f"{self.parts} parts cannot share the slots of a global batch of {self.batch}",
                todo="as many parts as nodes, and a global batch of at least one sample per part",
            )


class EpochOrder:
    """The order of one epoch: shards permuted, then samples permuted within a window of consecutive shards.

    Any position costs the same, in the middle of an epoch as at its start: a window of up to 2**20 samples is a table
    that is made when it is asked for, and the last two are kept; in a larger one, and with several parts, positions
    are computed one by one (`permuted`), and memory goes with the number of shards alone.

    With several parts, the slots of the global batch (position modulo `batch`) are dealt into ranges as `share` deals
    them, and the shards, permuted by the seed alone, are cut into runs of exactly as many samples as each part's slots
    need in an epoch. So a part holds the same shards in every epoch, and one shard at most is shared by two
    neighbours. Within a part, shards and samples are permuted anew in every epoch, as above.

    Args:
        samples_per_shard: how many samples each shard holds; ids count through them in this order.
        entries: the samples of this epoch, ascending and possibly repeated (see `sampling`); None is every
            sample once.

    Raises:
        ValueError: entries that do not ascend, or that are no samples.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | Ids,
        shuffle: Shuffle,
        epoch: int,
        *,
        entries: Ids | None = None,
    ) -> None:
        sizes = np.asarray(samples_per_shard, dtype=np.int64)
        if entries is not None:
            sizes = _entries_per_shard(entries, sizes)
        self.shuffle, self.epoch, self._entries = shuffle, epoch, entries
        self._total = int(sizes.sum())
        self._batch = shuffle.batch or max(self._total, 1)
        slots = [share(self._batch, shuffle.parts, part) for part in range(shuffle.parts)]
        self._first_slot = np.array([s.start for s in slots], dtype=np.int64)
        self._width = np.array([len(s) for s in slots], dtype=np.int64)
        needs = _ranks_before(self._total, self._batch, self._first_slot, self._width)
        self._part_stops = np.cumsum(needs)
        self._part_starts = self._part_stops - needs

        runs = _deal(sizes, shuffle, self._part_stops)
        order = permutation(derive(shuffle.seed, "shards", epoch), len(runs.size))
        order = order[np.argsort(runs.part[order], kind="stable")]
        # the line: the runs of part 0 in this epoch's order, those of part 1 and so on; windows follow each other on it
        part = runs.part[order]
        self._run_shard = runs.shard[order]
        self._run_stops = np.cumsum(runs.size[order])
        self._run_shift = runs.first[order] - (self._run_stops - runs.size[order])
        per_part = -(-shuffle.window // shuffle.parts) if shuffle.window else max(len(part), 1)
        within = np.arange(len(part)) - np.searchsorted(part, part)
        self._window_runs = np.append(np.flatnonzero(within % per_part == 0), len(part))
        self._window_stops = self._run_stops[self._window_runs[1:] - 1]
        self._window_starts = np.append(np.zeros(1, np.int64), self._window_stops)[:-1]
        self._tables: dict[int, NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return self._total

    def ids(self, start: int, stop: int) -> Ids:
        """The samples at positions start..stop-1 of this epoch, int64.

        Raises:
            IndexError: positions outside the epoch.
        """
        items = self._items(self._positions(start, stop))
        return items if self._entries is None else self._entries[items].astype(np.int64, copy=False)

    def turns(self, start: int, stop: int) -> Ids:
        """Which of its sample's entries each of positions start..stop-1 shows, int64: 0 for the first in tar order.

        So a sample that comes three times in an epoch has the turns 0, 1 and 2, in any order.

        Raises:
            IndexError: positions outside the epoch.
        """
        positions = self._positions(start, stop)
        if self._entries is None:
            return np.zeros(len(positions), np.int64)
        items = self._items(positions)
        return items - np.searchsorted(self._entries, self._entries[items])

    def shards_for(self, start: int, stop: int, slots: range | None = None) -> list[int]:
        """The shards that positions start..stop-1 need, in the order in which they are first needed.

        Exact for the first 2**18 of these positions. Then follow all other shards of the windows that the rest touches,
        window by window, so there may be a few too many, but never one too few.

        Args:
            slots: only positions in these slots of the global batch, such as those of one node's ranks; needs
                `Shuffle.batch`. None is all of them.

        Raises:
            IndexError: positions outside the epoch.
            ValueError: slots outside the global batch, or without one.
        """
        self._verify(start, stop)
        if slots is None:
            slots = range(self._batch)
        elif self.shuffle.batch is None or not 0 <= slots.start <= slots.stop <= self._batch or slots.step != 1:
            raise ValueError(f"{slots} are no slots of a global batch of {self.shuffle.batch}")
        far = min(stop, start + _NEAR)
        shards = self._run_shard[self._runs(self._places(_in_slots(start, far, slots, self._batch)))]
        if slots and far < stop:
            shards = np.concatenate([_distinct(shards), self._shards_touched(far, stop, slots)])
        return [int(s) for s in _distinct(shards)]

    def _positions(self, start: int, stop: int) -> Ids:
        self._verify(start, stop)
        return np.arange(start, stop, dtype=np.int64)

    def _verify(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start} to {stop} of an epoch of {len(self)} samples")

    def _items(self, positions: Ids) -> Ids:
        """Positions (ascending) to places in the entries, or sample ids where there are none."""
        places = self._places(positions)
        return places + self._run_shift[self._runs(places)]

    def _runs(self, places: Ids) -> Ids:
        return np.searchsorted(self._run_stops, places, side="right")

    def _places(self, positions: Ids) -> Ids:
        """Positions (ascending) to places on the line."""
        if self.shuffle.parts == 1:
            windows, firsts = np.unique(self._windows(positions), return_index=True)
            pieces = np.split(positions, firsts[1:]) if len(windows) else []
            mixed = [self._in_window(int(window), piece) for window, piece in zip(windows, pieces, strict=True)]
            return np.concatenate(mixed) if mixed else positions
        step, slot = positions // self._batch, positions % self._batch
        part = np.searchsorted(self._first_slot, slot, side="right") - 1
        places = self._part_starts[part] + step * self._width[part] + slot - self._first_slot[part]
        # all windows at once, since a batch asks for one of each part
        windows, which = np.unique(self._windows(places), return_inverse=True)
        keys = np.array([self._key(int(window)) for window in windows], dtype=np.uint64)
        starts = self._window_starts[windows]
        counts = self._window_stops[windows] - starts
        mixed_places: Ids = starts[which] + permuted(keys[which], counts[which], places - starts[which])
        return mixed_places

    def _windows(self, places: Ids) -> Ids:
        return np.searchsorted(self._window_stops, places, side="right")

    def _key(self, window: int) -> int:
        return derive(self.shuffle.seed, "window", self.epoch, window)

    def _in_window(self, window: int, places: Ids) -> Ids:
        start, stop = int(self._window_starts[window]), int(self._window_stops[window])
        if stop - start > _TABLE:
            return start + permuted(self._key(window), stop - start, places - start)
        if window not in self._tables:
            # a batch that straddles two windows asks for both again and again, for each of its micro-batches
            self._tables = {w: table for w, table in self._tables.items() if w == window - 1}
            self._tables[window] = permutation(self._key(window), stop - start).astype(np.int32)
        return start + self._tables[window][places - start].astype(np.int64)

    def _shards_touched(self, start: int, stop: int, slots: range) -> Ids:
        """All shards of all windows that positions start..stop-1 in `slots` touch, by when a window begins."""
        runs, begins = [], []
        first, last = np.searchsorted(self._first_slot, [slots.start, slots.stop - 1], side="right") - 1
        before = _ranks_before(start, self._batch, self._first_slot, self._width)
        after = _ranks_before(stop, self._batch, self._first_slot, self._width)
        for part in range(first, last + 1):
            if before[part] < after[part]:
                ends = self._part_starts[part] + np.array([before[part], after[part] - 1], dtype=np.int64)
                left, right = self._windows(ends)
                own = np.arange(self._window_runs[left], self._window_runs[right + 1])
                places = self._window_starts[np.searchsorted(self._window_runs, own, side="right") - 1]
                runs.append(own)
                begins.append((places - self._part_starts[part]) / self._width[part])
        if not runs:
            return np.zeros(0, np.int64)
        touched = np.concatenate(runs)[np.argsort(np.concatenate(begins), kind="stable")]
        held = np.diff(self._run_stops, prepend=0)[touched] > 0
        shards: Ids = self._run_shard[touched[held]]
        return shards


@dataclass(frozen=True)
class _Runs:
    """Consecutive samples (or entries) of one shard that belong to one part; int64 [runs] each."""

    shard: Ids
    first: Ids
    size: Ids
    part: Ids


def _deal(sizes: Ids, shuffle: Shuffle, part_stops: Ids) -> _Runs:
    """Every shard a run, and two or more where borders of parts cut it."""
    firsts = np.cumsum(sizes) - sizes
    if shuffle.parts == 1:
        return _Runs(np.arange(len(sizes)), firsts, sizes, np.zeros(len(sizes), np.int64))
    shards = permutation(derive(shuffle.seed, "parts"), len(sizes))
    stops = np.cumsum(sizes[shards])
    borders = np.unique(np.concatenate([np.zeros(1, np.int64), stops, part_stops]))
    starts = borders[:-1]
    at = np.searchsorted(stops, starts, side="right")
    shard = shards[at]
    first = firsts[shard] + starts - (stops[at] - sizes[shard])
    return _Runs(shard, first, np.diff(borders), np.searchsorted(part_stops, starts, side="right"))


def _entries_per_shard(entries: Ids, sizes: Ids) -> Ids:
    total = int(sizes.sum())
    ascending = bool(np.all(entries[:-1] <= entries[1:]))
    if len(entries) and not (ascending and entries[0] >= 0 and entries[-1] < total):
        raise ValueError(f"entries ascend, and none is below 0 or above {total - 1}")
    return np.diff(np.searchsorted(entries, np.cumsum(sizes)), prepend=0)


def _ranks_before(position: int, batch: int, first_slot: Ids, width: Ids) -> Ids:
    """How many of the positions before this one lie in each part's slots, int64 [parts]."""
    step, slot = divmod(position, batch)
    ranks: Ids = step * width + np.clip(slot - first_slot, 0, width)
    return ranks


def _in_slots(start: int, stop: int, slots: range, batch: int) -> Ids:
    """The positions of start..stop-1 that lie in `slots`."""
    if len(slots) == batch:
        return np.arange(start, stop, dtype=np.int64)
    steps = np.arange(start // batch, -(-stop // batch))
    positions = (steps[:, None] * batch + np.arange(slots.start, slots.stop)).ravel()
    return positions[(positions >= start) & (positions < stop)]


def _distinct(values: Ids) -> Ids:
    """Each value once, in the order of first appearance."""
    distinct: Ids = values[np.sort(np.unique(values, return_index=True)[1])]
    return distinct


def _feistel(keys: NDArray[np.uint64], counts: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over the a x b pairs, of which `counts` is the smallest such product with a = ceil(sqrt(count))."""
    a = np.ceil(np.sqrt(counts.astype(np.float64))).astype(np.uint64)
    b = (counts + a - np.uint64(1)) // a
    right, left = np.divmod(values, a)
    for number in range(0, _ROUNDS, 2):
        # halved, so that the sum does not run over 64 bits, which would map two numbers to one
        left = (left + (_mixed(right, keys, number) >> np.uint64(1))) % a
        right = (right + (_mixed(left, keys, number + 1) >> np.uint64(1))) % b
    result: NDArray[np.uint64] = right * a + left
    return result


def _mixed(values: NDArray[np.uint64], keys: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """64 bits from a value, a key and the number of the round; the constants of SplitMix64 and one of xxHash64."""
    offset = np.uint64(number * 0xC2B2AE3D27D4EB4F & 0xFFFFFFFFFFFFFFFF)
    bits = values * np.uint64(0x9E3779B97F4A7C15) + keys + offset
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return result
