"""Scores that are gathered over ranks do not tell how many there were."""

from __future__ import annotations

import math

import pytest
import torch
from simulated_ranks import on_ranks

from tlx.tasks import Ranks
from tlx.tasks.gathered import Gathered, mean

OUTPUT = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
OWN = {"label": torch.arange(7) % 3, "size": torch.arange(14.0).reshape(7, 2)}
IDS = torch.tensor([40, 10, 20, 60, 0, 50, 30])


def gathered(ranks, batches):
    scores = Gathered(ranks)
    for batch in batches:
        scores.add(OUTPUT[batch], {name: values[batch] for name, values in OWN.items()}, IDS[batch])
    return scores.all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])  # of nine, two have no sample
def test_samples_stand_by_id(ranks):
    for output, own, ids in on_ranks(ranks, gathered, len(IDS)):
        assert ids.tolist() == [0, 10, 20, 30, 40, 50, 60]
        order = [4, 1, 2, 6, 0, 5, 3]
        assert torch.equal(output, OUTPUT[order])
        assert own["label"].tolist() == [1, 1, 2, 0, 0, 2, 0]
        assert torch.equal(own["size"], OWN["size"][order])


def test_nothing_at_all():
    for scores in on_ranks(2, gathered, 0):
        assert (tuple(scores.output.shape), scores.own, len(scores.ids)) == ((0, 0), {}, 0)
        assert scores.finite().tolist() == []


def test_what_is_kept_is_float32_and_needs_no_gradient():
    scores = Gathered(Ranks())
    scores.add(torch.tensor([[1.0, math.inf], [1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True), {}, IDS[:2])
    scores.add(torch.zeros(0, 2), {}, IDS[:0])
    kept = scores.all()
    assert (kept.output.dtype, kept.output.requires_grad) == (torch.float32, False)
    assert kept.finite().tolist() == [True, False]  # by id: 10, then 40


def test_a_mean_of_those_that_are_known():
    known = torch.tensor([True, False, True])
    assert mean(torch.tensor([1.0, math.nan, 2.0]), known) == 1.5
    assert math.isnan(mean(torch.ones(3), ~known & known))
