"""Questions of many, answered together by one thread."""

from __future__ import annotations

import threading
import time

import pytest

from tlx.serve.batching import Batching
from tlx.serve.service import Batches


def doubled(batches, gate=None):
    def answer(asked):
        if gate is not None:
            gate.wait(10)
        batches.append(list(asked))
        return [2 * one for one in asked]

    return answer


def test_who_is_alone_does_not_wait():
    batching = Batching(doubled([]), most=8, wait_s=5.0)
    began = time.monotonic()
    assert batching.ask(3).result(10) == 6
    assert time.monotonic() - began < 1
    batching.close()


def test_those_that_wait_go_together_and_get_their_own_answers():
    batches, gate = [], threading.Event()
    batching = Batching(doubled(batches, gate), most=4, wait_s=0)
    futures = [batching.ask(i) for i in range(1, 8)]
    gate.set()
    assert [future.result(10) for future in futures] == [2, 4, 6, 8, 10, 12, 14]
    assert sorted(one for batch in batches for one in batch) == list(range(1, 8))
    assert max(map(len, batches)) == 4
    batching.close()


def test_what_is_coming_is_waited_for():
    batches = []
    batching = Batching(doubled(batches), most=2, wait_s=5.0)
    batching.coming = 1
    first = batching.ask(1)
    time.sleep(0.2)
    assert not first.done()
    assert batching.ask(2).result(10) == 4
    assert batches == [[1, 2]]
    batching.close()


def test_a_question_that_is_taken_back_costs_nothing():
    batches, gate = [], threading.Event()
    batching = Batching(doubled(batches, gate), most=1, wait_s=0)
    first, second, third = (batching.ask(i) for i in (1, 2, 3))
    assert second.cancel()
    gate.set()
    assert (first.result(10), third.result(10)) == (2, 6)
    assert batches == [[1], [3]]
    batching.close()


def test_a_fault_is_told_to_all_of_its_batch_and_the_next_one_is_answered():
    seen = []

    def answer(asked):
        if "bad" in asked:
            raise ValueError("no such answer")
        return asked

    batching = Batching(answer, most=1, wait_s=0, seen=lambda count, seconds: seen.append(count))
    with pytest.raises(ValueError, match="no such answer"):
        batching.ask("bad").result(10)
    assert not batching.is_well
    assert batching.ask("good").result(10) == "good"
    assert batching.is_well
    assert seen == [1, 1] or seen == [1]  # the second is told after its answer
    batching.close()


def test_sizes_are_few():
    assert Batches(8).sizes == [1, 2, 4, 8]
    assert Batches(6).sizes == [1, 2, 4, 6]
    assert Batches(1).sizes == [1]
    assert Batches(8, is_fixed=True).sizes == [8]
    assert [Batches(6).size_of(count) for count in (1, 2, 3, 5, 6)] == [1, 2, 4, 6, 6]
