"""The order of samples and the dealing of batches: properties, and the very order that ORDER_VERSION stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlx.data import order
from tlx.data.order import ORDER_VERSION, EpochOrder, derive, micro_batches, permutation, share
from tlx.errors import UserError

shards = st.lists(st.integers(0, 12), max_size=9)
windows = st.none() | st.integers(1, 10)


def whole(epoch: EpochOrder) -> list[int]:
    return epoch.ids(0, len(epoch)).tolist()


@given(shards, windows, st.integers(0, 2**40), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation(sizes, window, seed, epoch):
    assert sorted(whole(EpochOrder(sizes, seed=seed, epoch=epoch, window=window))) == list(range(sum(sizes)))


@given(shards, windows, st.data())
@settings(deadline=None, max_examples=60)
def test_any_slice_is_that_slice_of_the_whole(sizes, window, data):
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    fresh = EpochOrder(sizes, seed=5, epoch=2, window=window)
    assert fresh.ids(start, stop).tolist() == whole(EpochOrder(sizes, seed=5, epoch=2, window=window))[start:stop]
    assert fresh.ids(start, stop).dtype == np.int64


def test_a_window_holds_whole_shards_and_mixes_them():
    ids = EpochOrder([10] * 8, seed=1, epoch=0, window=2).ids(0, 80)
    assert all(len(set(ids[at : at + 20] // 10)) == 2 for at in range(0, 80, 20))
    assert len(set(ids[:10] // 10)) == 2  # and not one after the other
    full = EpochOrder([10] * 8, seed=1, epoch=0).ids(0, 80)
    assert len(set(full[:20] // 10)) > 4


def test_seed_and_epoch_change_shards_and_samples():
    orders = [
        tuple(whole(EpochOrder([6] * 6, seed=seed, epoch=epoch, window=1))) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert len({tuple(i // 6 for i in o) for o in orders}) == 4
    assert len({tuple(i % 6 for i in o if i // 6 == 0) for o in orders}) == 4


def test_one_window_is_computed_for_a_position(monkeypatch):
    made = []
    monkeypatch.setattr(order, "permutation", lambda key, n: made.append(n) or permutation(key, n))
    epoch = EpochOrder([10] * 1000, seed=0, epoch=0, window=4)
    epoch.ids(9720, 9728)
    epoch.ids(9728, 9736)
    assert made == [1000, 40]  # the order of shards, one window


def test_a_straddled_window_is_kept(monkeypatch):
    epoch, made = EpochOrder([10] * 10, seed=0, epoch=0, window=1), []
    monkeypatch.setattr(order, "permutation", lambda key, n: made.append(n) or permutation(key, n))
    for _ in range(5):
        epoch.ids(15, 25)
    assert made == [10, 10]


def test_the_order_of_version_1():
    """A change here changes every resumed run: raise ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert derive(0, "shards", 0) == 5791929410336083201
    assert whole(EpochOrder([3, 5, 2], seed=0, epoch=0)) == [1, 4, 6, 9, 7, 8, 5, 2, 3, 0]
    assert whole(EpochOrder([3, 5, 2], seed=7, epoch=3, window=1)) == [1, 2, 0, 9, 8, 3, 7, 6, 5, 4]


def test_positions_outside_an_epoch():
    with pytest.raises(IndexError, match="epoch of 4"):
        EpochOrder([4], seed=0, epoch=0).ids(2, 5)
    with pytest.raises(UserError, match="window of 0"):
        EpochOrder([4], seed=0, epoch=0, window=0)


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
