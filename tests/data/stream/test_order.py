"""The order of samples and the dealing of batches: properties, and the very order that ORDER_VERSION stands for."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlx.base.errors import UserError
from tlx.data.stream import order
from tlx.data.stream.order import (
    ORDER_VERSION,
    EpochOrder,
    Shuffle,
    derive,
    micro_batches,
    permutation,
    permuted,
    share,
)

shards = st.lists(st.integers(0, 12), max_size=9)
windows = st.none() | st.integers(1, 10)
PARTED = [7, 5, 1, 2, 13, 6, 3, 0, 9, 12, 4, 8, 11, 10]  # versions 1 of both, as they came out first
LARGE = [417564, 973585, 936847, 655274, 711066]


def whole(epoch: EpochOrder) -> list[int]:
    return epoch.ids(0, len(epoch)).tolist()


@given(shards, windows, st.integers(0, 2**40), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation(sizes, window, seed, epoch):
    assert sorted(whole(EpochOrder(sizes, Shuffle(seed, window), epoch))) == list(range(sum(sizes)))


@given(shards, windows, st.data())
@settings(deadline=None, max_examples=60)
def test_any_slice_is_that_slice_of_the_whole(sizes, window, data):
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    fresh = EpochOrder(sizes, Shuffle(5, window), 2)
    assert fresh.ids(start, stop).tolist() == whole(EpochOrder(sizes, Shuffle(5, window), 2))[start:stop]
    assert fresh.ids(start, stop).dtype == np.int64


def test_a_window_holds_whole_shards_and_mixes_them():
    ids = EpochOrder([10] * 8, Shuffle(1, 2), 0).ids(0, 80)
    assert all(len(set(ids[at : at + 20] // 10)) == 2 for at in range(0, 80, 20))
    assert len(set(ids[:10] // 10)) == 2  # and not one after the other
    full = EpochOrder([10] * 8, Shuffle(1), 0).ids(0, 80)
    assert len(set(full[:20] // 10)) > 4


def test_seed_and_epoch_change_shards_and_samples():
    orders = [tuple(whole(EpochOrder([6] * 6, Shuffle(seed, 1), epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert len({tuple(i // 6 for i in o) for o in orders}) == 4
    assert len({tuple(i % 6 for i in o if i // 6 == 0) for o in orders}) == 4


def test_one_window_is_computed_for_a_position(monkeypatch):
    made = []
    monkeypatch.setattr(order, "permutation", lambda key, n: made.append(n) or permutation(key, n))
    epoch = EpochOrder([10] * 1000, Shuffle(0, 4), 0)
    epoch.ids(9720, 9728)
    epoch.ids(9728, 9736)
    assert made == [1000, 40]  # the order of shards, one window


def test_a_straddled_window_is_kept(monkeypatch):
    epoch, made = EpochOrder([10] * 10, Shuffle(0, 1), 0), []
    monkeypatch.setattr(order, "permutation", lambda key, n: made.append(n) or permutation(key, n))
    for _ in range(5):
        epoch.ids(15, 25)
    assert made == [10, 10]


def test_the_order_of_version_1():
    """A change here changes every resumed run: raise ORDER_VERSION."""
    assert ORDER_VERSION == 2
    assert derive(0, "shards", 0) == 5791929410336083201
    assert whole(EpochOrder([3, 5, 2], Shuffle(0), 0)) == [1, 4, 6, 9, 7, 8, 5, 2, 3, 0]
    assert whole(EpochOrder([3, 5, 2], Shuffle(7, 1), 3)) == [1, 2, 0, 9, 8, 3, 7, 6, 5, 4]
    assert whole(EpochOrder([3, 5, 2, 4], Shuffle(7, 2, parts=3, batch=5), 3)) == PARTED
    assert EpochOrder([1 << 20, 1000], Shuffle(7), 3).ids(0, 5).tolist() == LARGE


def test_positions_outside_an_epoch():
    for ask in (EpochOrder.ids, EpochOrder.turns, EpochOrder.shards_for):
        with pytest.raises(IndexError, match="epoch of 4"):
            ask(EpochOrder([4], Shuffle(0), 0), 2, 5)


def test_shuffles_that_cannot_be():
    with pytest.raises(UserError, match="window of 0"):
        Shuffle(0, window=0)
    with pytest.raises(UserError, match="0 parts"):
        Shuffle(0, parts=0)
    with pytest.raises(UserError, match="5 parts cannot share the slots of a global batch of 4"):
        Shuffle(0, parts=5, batch=4)
    with pytest.raises(UserError, match="None"):
        Shuffle(0, parts=2)


# Large windows: a permutation nobody has to make


NEAR_POWERS = [2**k + d for k in range(1, 17) for d in (-1, 0, 1)]


@pytest.mark.parametrize("count", [1, 6, 10, 97, 1000, 65521, 300007, *NEAR_POWERS])
def test_permuted_is_a_permutation(count):
    assert np.array_equal(np.sort(permuted(derive(3, "test", count), count, np.arange(count))), np.arange(count))


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**45), st.data())
@settings(deadline=None, max_examples=40)
def test_permuted_is_the_cipher_one_number_at_a_time(key, count, data):
    positions = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    expected = [cipher(key, count, position) for position in positions]
    assert permuted(key, count, np.array(positions, dtype=np.int64)).tolist() == expected


def cipher(key: int, count: int, value: int) -> int:
    """The same in Python's integers, from the paper."""
    mask, a = 2**64 - 1, math.isqrt(count - 1) + 1
    b = -(-count // a)

    def mixed(half: int, number: int) -> int:
        z = (half * 0x9E3779B97F4A7C15 + key + number * 0xC2B2AE3D27D4EB4F) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    while True:
        left, right = value % a, value // a
        for number in range(0, 12, 2):
            left = (left + mixed(right, number) // 2) % a
            right = (right + mixed(left, number + 1) // 2) % b
        value = right * a + left
        if value < count:
            return value


def test_one_key_per_position():
    keys, counts = np.array([5, 5, 9, 9], dtype=np.uint64), np.array([100, 7, 100, 7])
    alone = [int(permuted(int(k), int(n), np.array([6]))[0]) for k, n in zip(keys, counts, strict=True)]
    assert permuted(keys, counts, np.full(4, 6)).tolist() == alone
    assert alone[0] != alone[2]


@pytest.mark.parametrize("count", [1000, 100_003, 2**20 + 7])
@pytest.mark.parametrize("make", ["permuted", "sorted"])
def test_large_windows_are_as_random_as_sorted_ones(count, make):
    key = derive(1, "statistics", count)
    values = permuted(key, count, np.arange(count)) if make == "permuted" else permutation(key, count)
    assert max(abs(score) for score in scores(values).values()) < 4, scores(values)


def scores(values) -> dict[str, float]:
    """Standard scores of what is 0 on average for a true shuffle; 4 and more come once in 16,000."""
    count, places = len(values), np.arange(len(values))

    def chi(cells, kinds, freedom):
        found = np.bincount(cells, minlength=kinds)
        expected = len(cells) / kinds
        return float((((found - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))

    def pairs(first, second, bins=16):
        return chi(first * bins // count * bins + second * bins // count, bins * bins, (bins - 1) ** 2)

    return {
        "correlation of neighbours": float(np.corrcoef(values[:-1], values[1:])[0, 1]) * math.sqrt(count),
        "displacement": (np.abs(values - places).mean() / count - 1 / 3) * math.sqrt(18 * count),
        "positions": pairs(places, values),
        "neighbours": pairs(values[:-1], values[1:]),
        "neighbours but one": pairs(values[:-2], values[2:]),
        "steps": chi((values[1:] - values[:-1]) % count * 64 // count, 64, 63),
        "fixed points": float((values == places).sum() - 1),
    }


def test_keys_give_unrelated_permutations():
    count, at = 5000, np.arange(5000)
    first, second = (permuted(key, count, at) for key in (2**40, 2**40 + 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(count)
    keys = np.repeat(np.arange(24 * 400, dtype=np.uint64), 4)  # and all of a small one's are as frequent
    orders = permuted(keys, 4, np.tile(np.arange(4), 24 * 400)).reshape(-1, 4)
    found = np.unique(orders @ (4 ** np.arange(4)), return_counts=True)[1]
    assert len(found) == 24
    assert ((found - 400.0) ** 2 / 400).sum() < 23 + 4 * math.sqrt(46)


def test_a_window_beyond_the_table_mixes_everything_and_takes_no_memory():
    sizes = [1 << 19] * 200  # 100 million samples
    tracemalloc.start()
    epoch = EpochOrder(sizes, Shuffle(0), 1)
    ids = epoch.ids(60_000_000, 60_004_096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert len(set(ids)) == 4096
    assert len(set(ids >> 19)) == 200
    assert np.array_equal(ids[100:200], epoch.ids(60_000_100, 60_000_200))


def test_a_window_just_beyond_the_table_holds_every_sample_once():
    epoch = EpochOrder([1 << 19, 1 << 19, 3, 1 << 19], Shuffle(0, 3), 0)  # a window of each kind
    ids = np.concatenate([epoch.ids(at, min(at + 99_999, len(epoch))) for at in range(0, len(epoch), 99_999)])
    assert np.array_equal(np.sort(ids), np.arange(3 * 2**19 + 3))


# Parts: which shards belong to which slots


@st.composite
def parted(draw):
    sizes, batch = draw(shards), draw(st.integers(1, 12))
    return sizes, Shuffle(draw(st.integers(0, 99)), draw(windows), draw(st.integers(1, batch)), batch)


@given(parted(), st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=100)
def test_parts_show_every_sample_once_in_any_slices(case, epoch, data):
    sizes, shuffle = case
    ids = whole(EpochOrder(sizes, shuffle, epoch))
    assert sorted(ids) == list(range(sum(sizes)))
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    assert EpochOrder(sizes, shuffle, epoch).ids(start, stop).tolist() == ids[start:stop]


def test_a_batch_without_parts_changes_nothing():
    assert whole(EpochOrder([5, 0, 9, 4], Shuffle(3, 2), 1)) == whole(EpochOrder([5, 0, 9, 4], Shuffle(3, 2, 1, 4), 1))


def shards_by_slot(epoch: EpochOrder, size: int, parts: int) -> list[set[int]]:
    """Which shards of `size` samples each part's slots see in an epoch."""
    batch = epoch.shuffle.batch
    assert batch
    ids = epoch.ids(0, len(epoch))
    slots = np.arange(len(epoch)) % batch
    return [set((ids[np.isin(slots, share(batch, parts, p))] // size).tolist()) for p in range(parts)]


@pytest.mark.parametrize("window", [None, 1, 12])
def test_a_part_reads_its_own_shards_in_every_epoch(window):
    shuffle = Shuffle(4, window, parts=4, batch=30)
    seen = [shards_by_slot(EpochOrder([100] * 42, shuffle, epoch), 100, 4) for epoch in (0, 1)]
    assert seen[0] == seen[1]
    assert sum(map(len, seen[0])) <= 42 + 3  # neighbours share a shard at most
    assert set.union(*seen[0]) == set(range(42))
    assert whole(EpochOrder([100] * 42, shuffle, 0)) != whole(EpochOrder([100] * 42, shuffle, 1))
    assert seen[0] != shards_by_slot(EpochOrder([100] * 42, Shuffle(5, window, 4, 30), 0), 100, 4)


def test_without_parts_every_slot_sees_everything():
    assert all(len(s) == 42 for s in shards_by_slot(EpochOrder([100] * 42, Shuffle(4, None, 1, 30), 0), 100, 4))


def test_more_parts_than_shards():
    seen = shards_by_slot(EpochOrder([80] * 3, Shuffle(0, 1, 8, 8), 0), 80, 8)
    assert max(map(len, seen)) <= 2
    assert sum(map(len, seen)) <= 3 + 7


def test_a_part_mixes_its_share_of_the_window():
    ids = EpochOrder([100] * 64, Shuffle(0, 16, 4, 40), 0).ids(0, 1600)
    slots = np.arange(1600) % 40
    own = ids[slots < 10] // 100  # 400 samples of this part, which are one window of 16 / 4 shards
    assert 4 <= len(set(own)) <= 5  # the first run may be the shard at the border
    assert len(set(own[:20])) == 4
    assert len(set(ids[:160] // 100)) >= 16  # and all parts together, a window's


# Which shards are needed when


@given(parted(), st.data())
@settings(deadline=None, max_examples=100)
def test_shards_are_those_of_the_samples_in_order_of_need(case, data):
    sizes, shuffle = case
    epoch = EpochOrder(sizes, shuffle, 1)
    start = data.draw(st.integers(0, len(epoch)))
    stop = data.draw(st.integers(start, len(epoch)))
    low = data.draw(st.integers(0, shuffle.batch))
    slots = data.draw(st.none() | st.integers(low, shuffle.batch).map(lambda high: range(low, high)))
    expected = []
    for position in range(start, stop):
        if slots is None or position % shuffle.batch in slots:
            shard = int(np.searchsorted(np.cumsum(sizes), whole(epoch)[position], side="right"))
            expected += [shard] if shard not in expected else []
    assert epoch.shards_for(start, stop, slots) == expected


@given(parted(), st.integers(1, 30), st.data())
@settings(deadline=None, max_examples=100)
def test_far_shards_come_by_windows_and_none_is_missing(case, near, data):
    sizes, shuffle = case
    epoch = EpochOrder(sizes, shuffle, 1)
    start = data.draw(st.integers(0, len(epoch)))
    low = data.draw(st.integers(0, shuffle.batch))
    slots = range(low, data.draw(st.integers(low, shuffle.batch)))
    exact = epoch.shards_for(start, len(epoch), slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_NEAR", near)
        found = epoch.shards_for(start, len(epoch), slots)
    assert len(set(found)) == len(found)
    assert set(found) >= set(exact)
    assert {sizes[s] > 0 for s in found} <= {True}
    first = epoch.shards_for(start, min(start + near, len(epoch)), slots)
    assert found[: len(first)] == first


def test_far_shards_leave_out_windows_that_are_over(monkeypatch):
    monkeypatch.setattr(order, "_NEAR", 5)
    epoch = EpochOrder([10] * 12, Shuffle(0, 3), 0)
    by_window = [set((epoch.ids(at, at + 30) // 10).tolist()) for at in (0, 30, 60, 90)]
    found = epoch.shards_for(35, 120)
    assert [set(found[at : at + 3]) for at in (0, 3, 6)] == by_window[1:]
    assert set(epoch.shards_for(35, 61)) == by_window[1] | by_window[2]
    parts = EpochOrder([10] * 12, Shuffle(0, 6, 2, 4), 0)
    own = parts.shards_for(60, 120, range(2, 4))
    assert len(own) == 3
    assert set(own) == set((parts.ids(0, 120)[60:][np.arange(60) % 4 >= 2] // 10).tolist())


def test_far_shards_leave_out_empty_ones(monkeypatch):
    monkeypatch.setattr(order, "_NEAR", 2)
    assert sorted(EpochOrder([4, 0, 4, 0, 4], Shuffle(0), 0).shards_for(0, 12)) == [0, 2, 4]


@pytest.mark.parametrize("shuffle", [Shuffle(0), Shuffle(0, 1, 2, 4)])
def test_one_shard_is_shuffled_anew_in_every_epoch(shuffle):
    assert whole(EpochOrder([20], shuffle, 0)) != whole(EpochOrder([20], shuffle, 1))


def test_slots_that_are_none():
    with pytest.raises(ValueError, match="no slots"):
        EpochOrder([4], Shuffle(0), 0).shards_for(0, 4, range(2))
    with pytest.raises(ValueError, match="no slots"):
        EpochOrder([4], Shuffle(0, batch=4), 0).shards_for(0, 4, range(3, 5))


# Entries: samples that come several times, or not at all


@given(parted(), st.data())
@settings(deadline=None, max_examples=100)
def test_entries_come_once_each_and_turns_tell_them_apart(case, data):
    sizes, shuffle = case
    times = data.draw(st.lists(st.integers(0, 3), min_size=sum(sizes), max_size=sum(sizes)))
    entries = np.repeat(np.arange(sum(sizes)), times)
    epoch = EpochOrder(sizes, shuffle, 1, entries=entries)
    assert len(epoch) == len(entries)
    assert sorted(whole(epoch)) == entries.tolist()
    shown = list(zip(whole(epoch), epoch.turns(0, len(epoch)).tolist(), strict=True))
    assert sorted(shown) == [(i, turn) for i, n in enumerate(times) for turn in range(n)]
    start = data.draw(st.integers(0, len(entries)))
    assert epoch.turns(start, len(entries)).tolist() == [turn for _, turn in shown[start:]]


@pytest.mark.parametrize("shuffle", [Shuffle(1), Shuffle(1, 2), Shuffle(1, 3, 2, 5)])
def test_entries_that_are_all_samples_change_nothing(shuffle):
    sizes = [5, 0, 9, 4]
    assert whole(EpochOrder(sizes, shuffle, 0, entries=np.arange(18))) == whole(EpochOrder(sizes, shuffle, 0))
    assert EpochOrder(sizes, shuffle, 0).turns(3, 8).tolist() == [0] * 5


def test_entries_stay_in_the_windows_of_their_shards():
    entries = np.repeat(np.arange(40), [5, 0, 1, 2] * 10)
    ids = EpochOrder([10] * 4, Shuffle(0, 1), 0, entries=entries).ids(0, len(entries))
    assert (np.diff(ids // 10) != 0).sum() == 3
    assert EpochOrder([10] * 4, Shuffle(0, 1), 0, entries=np.array([3, 4, 35])).shards_for(0, 3) in ([0, 3], [3, 0])


def test_no_entries_and_wrong_entries():
    assert whole(EpochOrder([4], Shuffle(0), 0, entries=np.zeros(0, np.int64))) == []
    for wrong in ([2, 1], [-1, 2], [3, 4]):
        with pytest.raises(ValueError, match="ascend"):
            EpochOrder([4], Shuffle(0), 0, entries=np.array(wrong))


@given(st.integers(0, 5000), st.integers(1, 70))
def test_shares_cover_everything_once_evenly(count, parts):
    shares = [share(count, parts, p) for p in range(parts)]
    assert [i for s in shares for i in s] == list(range(count))
    sizes = [len(s) for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 300), st.integers(1, 20), st.none() | st.integers(1, 40))
def test_micro_batches_fit_on_every_rank(count, world, micro):
    micros = micro_batches(count, world, micro)
    pieces = [len(share(len(share(count, world, r)), micros, m)) for r in range(world) for m in range(micros)]
    assert sum(pieces) == count
    assert micro is None or max(pieces) <= micro
    assert micros == (1 if micro is None else math.ceil(math.ceil(count / world) / micro))


def test_seeds_do_not_collide():
    seeds = {derive(s, p, e, i) for s in range(3) for p in ("sample", "mix") for e in range(4) for i in range(500)}
    assert len(seeds) == 3 * 2 * 4 * 500
    assert derive(1, "a", 23) != derive(12, "a", 3)
