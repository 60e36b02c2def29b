"""Which samples an epoch shows: exact counts per class, the same everywhere, resumable, and from counts alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlx.base.errors import UserError
from tlx.data.stream.order import EpochOrder, Shuffle, permutation
from tlx.data.stream.sampling import Sampling, entries, samples_per_epoch, targets

CLASSES = 6
REPEATING = ["balanced", "sqrt", "repeat_factors"]

DIGEST = "4fc7bafb33b75a4a"  # of the draws of version 1

labelled = st.lists(st.integers(0, CLASSES - 1), max_size=60).map(lambda x: np.array(x, dtype=np.int32))


@st.composite
def samplings(draw):
    method = draw(st.sampled_from(["all", *REPEATING]))
    threshold = draw(st.none() | st.floats(1e-4, 1)) if method == "repeat_factors" else None
    return Sampling(method, threshold, draw(st.none() | st.integers(1, 12)))


def long_tail(largest=400, classes=20):
    """Labels in a mixed order, of classes with `largest`, `largest` / 2, `largest` / 3 ... samples."""
    labels = np.repeat(np.arange(classes), [largest // (c + 1) for c in range(classes)]).astype(np.int32)
    return labels[permutation(1, len(labels))]


def shown(sampling, labels, classes, seed=0, epoch=0):
    """Every sample's number of turns in an epoch, [samples]."""
    ids = entries(sampling, labels, classes, seed, epoch)
    return np.bincount(np.arange(len(labels)) if ids is None else ids, minlength=len(labels))


@given(labelled, samplings(), st.integers(0, 2**40), st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_counts_are_exact_and_as_even_as_can_be(labels, sampling, seed, epoch):
    counts = np.bincount(labels, minlength=CLASSES)
    held = np.minimum(counts, sampling.limit or 99)
    times = shown(sampling, labels, CLASSES, seed, epoch)
    wanted = targets(sampling, counts)
    assert times.sum() == wanted.sum() == samples_per_epoch(sampling, counts)
    for label in range(CLASSES):
        own = np.sort(times[labels == label])[::-1][: held[label]]  # those beyond the limit come last, with 0
        assert own.sum() == wanted[label] == times[labels == label].sum()
        assert len(own) == 0 or own.max() - own.min() <= 1
        assert (wanted[label] > 0) == (counts[label] > 0)


@given(labelled, samplings(), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_entries_ascend_and_none_is_every_sample_once(labels, sampling, epoch):
    ids = entries(sampling, labels, CLASSES, 1, epoch)
    if ids is not None:
        assert ids.dtype == np.int64
        assert bool(np.all(ids[:-1] <= ids[1:]))
        assert not np.array_equal(ids, np.arange(len(labels)))


def test_balanced_is_every_class_equally_often():
    counts = np.array([700, 0, 20, 3, 1])
    assert targets(Sampling("balanced"), counts).tolist() == [181, 0, 181, 181, 181]
    assert targets(Sampling("balanced"), np.array([700, 0, 20, 2])).tolist() == [241, 0, 241, 240]
    assert targets(Sampling("balanced", limit=10), counts).tolist() == [6, 0, 6, 6, 6]


def test_sqrt_is_in_proportion_to_roots():
    assert targets(Sampling("sqrt"), np.array([900, 100, 0, 400])).tolist() == [700, 233, 0, 467]
    counts = np.bincount(long_tail())
    wanted = targets(Sampling("sqrt"), counts)
    assert wanted.sum() == counts.sum()
    assert np.abs(wanted - counts.sum() * np.sqrt(counts) / np.sqrt(counts).sum()).max() < 1


def test_repeat_factors_are_those_of_lvis():
    counts = np.array([9000, 900, 90, 10])
    frequency = counts / counts.sum()
    for threshold in (0.001, 0.05, 1.0):
        factors = [max(1, math.sqrt(threshold / f)) for f in frequency]
        expected = [math.floor(n * r + 0.5) for n, r in zip(counts, factors, strict=True)]
        assert targets(Sampling("repeat_factors", threshold), counts).tolist() == expected
    assert targets(Sampling("repeat_factors", 1e-6), counts).tolist() == counts.tolist()


def test_the_default_threshold_is_the_geometric_mean_with_the_mean_size():
    counts = np.array([9000, 900, 90, 10, 0])
    mean = 10000 / 4
    expected = [9000, *(math.floor(math.sqrt(n * mean) + 0.5) for n in (900, 90, 10)), 0]
    assert targets(Sampling("repeat_factors"), counts).tolist() == expected
    assert samples_per_epoch(Sampling("repeat_factors"), counts) == sum(expected)


def test_epochs_and_seeds_draw_others_and_again_the_same():
    labels = long_tail()
    drawn = [
        entries(Sampling("sqrt"), labels, 20, seed, epoch).tobytes()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0), (1, 1))
    ]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 4


def test_over_epochs_every_sample_of_a_class_gets_its_turn():
    labels = long_tail()
    sampling = Sampling("balanced")
    times = sum(shown(sampling, labels, 20, 0, epoch) for epoch in range(60))
    wanted = targets(sampling, np.bincount(labels)) * 60 / np.bincount(labels)
    large = labels == 0  # shown less than once an epoch: 72 of 400
    share = wanted[0] / 60
    assert 0 < share < 1
    assert np.abs(times[large] - wanted[0]).max() < 5 * math.sqrt(60 * share * (1 - share))
    assert (times[labels == 19] >= 60).all()


@pytest.mark.parametrize("method", ["all", *REPEATING])
def test_a_limit_keeps_the_same_subset_in_every_epoch(method):
    labels = long_tail()
    sampling = Sampling(method, limit=25)
    seen = [set(np.flatnonzero(shown(sampling, labels, 20, 3, epoch))) for epoch in range(30)]
    subset = set.union(*seen)
    assert np.bincount(labels[list(subset)]).tolist() == np.minimum(np.bincount(labels), 25).tolist()
    assert set(np.flatnonzero(shown(Sampling(limit=25), labels, 20, 3))) == subset  # and with every method
    assert set(np.flatnonzero(shown(Sampling(limit=25), labels, 20, 4))) != subset
    few = set(np.flatnonzero(shown(Sampling(limit=5), labels, 20, 3)))
    assert few < subset  # a smaller limit is part of a larger one, so curves over it compare


def test_nothing_to_draw():
    labels = long_tail()
    assert entries(Sampling(), labels, 20, 0, 0) is None
    assert entries(Sampling(limit=400), labels, 20, 0, 0) is None
    assert entries(Sampling("balanced"), np.repeat(np.arange(4), 5), 4, 0, 0) is None
    for sampling in [Sampling("balanced"), Sampling("sqrt"), Sampling("repeat_factors"), Sampling(limit=1)]:
        assert samples_per_epoch(sampling, np.zeros(3, np.int64)) == 0
        assert entries(sampling, np.zeros(0, np.int32), 3, 0, 0) is None
    assert not Sampling(limit=3).repeats
    assert all(Sampling(method).repeats for method in REPEATING)


def test_one_class_in_many_and_labels_that_do_not_fit_16_bits():
    labels = np.array([65_539, 70_000, 3, 70_000, 70_000, 3], dtype=np.int32)  # 65539 is 3 in 16 bits
    times = shown(Sampling("balanced"), labels, 70_001)
    assert [times[labels == c].sum() for c in (3, 65_539, 70_000)] == [2, 2, 2]


def test_labels_may_be_a_view_into_records():
    records = np.zeros(60, np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4")]))
    records["label"] = np.arange(60) % 7 % 3
    plain = entries(Sampling("sqrt"), records["label"].copy(), 3, 0, 0)
    assert np.array_equal(entries(Sampling("sqrt"), records["label"], 3, 0, 0), plain)


def test_an_order_over_entries_shows_them_and_resumes():
    labels = long_tail()
    own = entries(Sampling("balanced"), labels, 20, 0, 2)
    order = EpochOrder([100] * (len(labels) // 100) + [len(labels) % 100], Shuffle(0, 3), 2, entries=own)
    ids = order.ids(0, len(order))
    assert np.bincount(labels[ids]).tolist() == targets(Sampling("balanced"), np.bincount(labels)).tolist()
    assert len(set(zip(ids, order.turns(0, len(order)), strict=True))) == len(order)


def test_the_draws_of_the_first_version():
    """A change here changes every resumed run."""
    labels, digest = long_tail(), hashlib.sha256()
    for sampling in [Sampling("balanced"), Sampling("sqrt", limit=50), Sampling("repeat_factors"), Sampling(limit=7)]:
        digest.update(entries(sampling, labels, 20, 5, 9).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == DIGEST


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "balance"}, 'did you mean "balanced"'),
        ({"method": "sqrt", "threshold": 0.1}, "no threshold"),
        ({"method": "repeat_factors", "threshold": 0.0}, "above 0"),
        ({"method": "repeat_factors", "threshold": 1.5}, "1.5"),
        ({"method": "repeat_factors", "threshold": math.nan}, "nan"),
        ({"limit": 0}, "limit of 0"),
    ],
)
def test_samplings_that_cannot_be(wrong, words):
    with pytest.raises(UserError, match=words):
        Sampling(**wrong)
