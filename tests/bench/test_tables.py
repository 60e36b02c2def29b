"""What tests/bench/tasks.py and ranking.py make of pictures and values, by hand. What they train on is no part of the
repository."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bench.ranking import agreement
from bench.tasks import COLOURS, SPECIES, TREES, Size, difference, hidden, interval, seeds_of, split, write_tables


def folder_of(path, pictures):
    path.mkdir(parents=True)
    for i in range(pictures):
        (path / f"{i:02d}.jpg").touch()
    return path


def test_pictures_are_in_one_part_and_the_same_again(tmp_path):
    pairs = [(folder_of(tmp_path / f"train{c}", 9), folder_of(tmp_path / f"test{c}", 3)) for c in range(2)]
    chosen = list(split(pairs, Size(4, 2)))
    assert chosen == list(split(pairs, Size(4, 2)))
    assert len({file for *_, file in chosen}) == len(chosen) == 2 * (4 + 2 + 3)
    assert [sum(part == name for _, part, _ in chosen) for name in ("train", "val", "test")] == [8, 4, 6]
    with pytest.raises(SystemExit, match="has 9 pictures, 10 are wanted"):
        list(split(pairs, Size(8, 2)))


def test_a_third_of_the_training_pictures_lack_a_target(tmp_path):
    for place in range(1, 18):
        for part in ("train", "test"):
            folder_of(tmp_path / f"17flowers/{part}/c{place}", 3)
    for name in ("ants", "bees"):
        for part in ("train", "val"):
            folder_of(tmp_path / f"hymenoptera/{part}/{name}", 3)
    tables = write_tables(tmp_path, tmp_path, Size(2, 1))
    rows = [line.split(",") for line in tables["flowers"].read_text().splitlines()[1:]]
    lacking = [row for row in rows if not row[3]]
    assert len(lacking) == len(hidden(34)) == 11
    assert {row[1] for row in lacking} == {"train"}
    assert lacking[0][4] == ";".join([lacking[0][2], *(f"?{name}" for name in COLOURS)])
    fewer = [line.split(",") for line in tables["fewer"].read_text().splitlines()[1:]]
    assert [row[0] for row in fewer if not row[2]] == [row[0] for row in lacking]
    assert all(set(levels) == {name for name, *_ in SPECIES} | {"ants", "bees"} for levels in TREES.values())


def test_intervals_by_hand():
    mean, half = interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert np.isnan(interval([1])[1])
    rows = {"first": {"a": [1.0, 2.0]}, "other": {"a": [1.5, 2.5], "b": [0.0, 0.0]}}
    assert difference(rows, "other", "a") == (0.5, 0.0)
    assert difference(rows, "first", "a") is difference(rows, "other", "b") is None
    assert seeds_of("0-4") == seeds_of("0,1,2,3,4")


def test_kendalls_tau_by_hand():
    def told(share):
        return [np.arange(1000) % 10 < share, np.arange(1000) % 10 < share]  # of two seeds

    right = [told(2), told(6), told(4)]
    tau, low, high = agreement([0.1, 0.2, 0.3], right, resamples=50)  # two of three pairs agree
    assert (tau, low, high) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert agreement([1, 3, 2], right, resamples=50)[0] == pytest.approx(1)
    _, low, high = agreement([0.1, 0.2, 0.3], [told(2), told(4), told(4)], resamples=50)
    assert low <= high
