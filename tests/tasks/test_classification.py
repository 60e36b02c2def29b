"""A class that samples may lack: what mixed samples lose, and that it is what the index says they weigh."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from task_data import make, of_class

from tlx.tasks import Truth

OWN, PARTNER = torch.tensor([0, 0, -1, -1]), torch.tensor([1, -1, 1, -1])
LAM = torch.full((4,), 0.75)
LOGITS = torch.tensor([[math.log(3), -math.log(3)]] * 4)
HIT, MISS = (
    math.log(4 / 3),
    math.log(4),
)  # of each of the two logits, where it is told right, and where it is told wrong


def loss_of(objective, rows, output=LOGITS, lam=LAM):
    task = make("classification", of_class("red", "blue", name="colour"), objective=objective)
    return task.loss(output[rows], Truth({"colour": OWN[rows]}, {"colour": PARTNER[rows]}, lam[rows]))


@pytest.mark.parametrize(
    ("objective", "both"),
    [
        ({"name": "bce", "target_threshold": 0.2}, HIT + MISS),  # of the mixture each class is above 0.2
        ({"name": "bce", "target_threshold": 0.3}, 2 * HIT),
        ("bce", 0.75 * 2 * HIT + 0.25 * 2 * MISS),
    ],
)
def test_a_mixture_of_two_classes_is_one_target(objective, both):
    found = [float(loss_of(objective, slice(i, i + 1))) for i in range(4)]
    assert found == pytest.approx([both, 0.75 * 2 * HIT, 0.25 * 2 * MISS, 0], abs=1e-6)
    assert float(loss_of(objective, slice(0, 4))) == pytest.approx(sum(found), rel=1e-6)


def test_a_mixed_sample_weighs_as_much_as_the_two_that_are_in_it():
    """By class weights; at logits of 0 a loss is log 2 times what the sample weighs."""
    task = make(
        "classification",
        of_class("red", "blue", name="colour"),
        objective={"name": "cross_entropy", "class_weights": [3.0, 0.5]},
    )
    own, partner = (task.weights({"colour": values.numpy()})[:, 0] for values in (OWN, PARTNER))
    assert own.tolist() == [3, 3, 0, 0]
    weighed = 0.75 * own + 0.25 * partner
    assert weighed.tolist() == [2.375, 2.25, 0.125, 0]
    found = task.loss(torch.zeros(4, 2), Truth({"colour": OWN}, {"colour": PARTNER}, LAM))
    assert float(found) == pytest.approx(np.log(2) * weighed.sum(), rel=1e-6)


def test_what_lacks_the_class_has_no_gradient_whatever_its_output():
    output = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [math.inf, math.nan]], requires_grad=True)
    loss_of("cross_entropy", slice(0, 4), output).backward()
    assert output.grad[3].tolist() == [0, 0]
    assert output.grad.isfinite().all()
