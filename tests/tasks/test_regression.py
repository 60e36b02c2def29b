"""Regression: losses of standardised values, metrics in the target's own units."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from images import make_target_shards
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from task_data import NAN, evaluated, make, of_class, of_numbers

from tlx.base.errors import UserError
from tlx.data.shards.targets import Target
from tlx.data.stream.sampling import Sampling
from tlx.tasks import Truth
from tlx.tasks.summaries import summaries

AGE = of_numbers("age", [10.0], [2.0])
BOX = of_numbers("box", [0.0, 100.0], [1.0, 10.0])


def test_a_column_without_values_is_known_from_the_index(tmp_path):
    box = Target("box", "number", width=2), np.array([[1.0, NAN], [3.0, NAN], [NAN, NAN]])
    shards = make_target_shards(tmp_path / "s", [box], samples=3, size=8)
    summary = summaries(shards, Sampling(), 0)["box"]
    assert (summary.known, summary.samples, summary.mean[0]) == ((2, 0), 2, 2.0)
    with pytest.raises(UserError, match=r"no value in columns \[1\]"):
        make("regression", summary, standardise=False)


def column(*values):
    return torch.tensor(values).reshape(-1, 1)


def test_naming_a_task_needs_no_torch():
    code = "import sys, tlx.tasks.kinds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_loss_is_of_standardised_values_and_a_missing_one_weighs_nothing():
    task = make("regression", AGE)
    values = column(12.0, 8.0, NAN)  # 1 and -1 in standard deviations
    assert float(task.loss(column(0.0, 1.0, 5.0), Truth({"age": values}))) == 1 + 4
    assert task.weights({"age": values.numpy()}).tolist() == [[1], [1], [0]]
    assert (task.outputs, task.heads, task.metric, task.lists) == (("age",), {"": 1}, "mae", {})


def test_values_far_from_0_keep_their_differences():
    time = of_numbers("time", [16777217.0], [0.5])  # 2 ** 24 + 1: no float32
    assert float(make("regression", time).loss(column(0.0), Truth({"time": column(16777218.0)}))) == 4


def test_a_sample_has_the_mean_of_the_columns_that_it_knows():
    task = make("regression", BOX, standardise=False)
    values = torch.tensor([[1.0, NAN], [1.0, 3.0], [NAN, NAN]])
    output = torch.tensor([[0.0, 50.0], [0.0, 0.0], [7.0, NAN]], requires_grad=True)
    loss = task.loss(output, Truth({"box": values}))
    assert float(loss.detach()) == 1 + (1 + 9) / 2
    loss.backward()
    assert output.grad.tolist() == [[-2, 0], [-1, -3], [0, 0]]
    assert task.weights({"box": values.numpy()}).tolist() == [[1], [1], [0]]
    assert task.outputs == ("box_0", "box_1")


@pytest.mark.parametrize(
    ("given", "near", "far"),
    [
        ({}, 0.16, 9),
        ({"loss": "mae"}, 0.4, 3),
        ({"loss": "huber"}, 0.08, 2.5),
        ({"loss": "huber", "delta": 2}, 0.08, 4),
        ({"loss": "smooth_l1"}, 0.08, 2.5),
        ({"loss": "smooth_l1", "beta": 0.5}, 0.16, 2.75),
    ],
)
def test_losses_by_hand(given, near, far):
    task = make("regression", AGE, standardise=False, **given)
    losses = [float(task.loss(column(y), Truth({"age": column(0.0)}))) for y in (0.4, -3.0)]
    assert losses == pytest.approx([near, far])


def test_auxiliary_outputs_add_to_the_loss():
    task, truth = make("regression", AGE, aux_weight=0.25), Truth({"age": column(10.0)})
    assert float(task.loss((column(1.0), column(2.0), None), truth)) == 1 + 0.25 * 4


def test_mixed_pictures_have_mixed_values():
    task = make("regression", AGE, standardise=False)
    truth = Truth({"age": column(0.0, 0.0, 5.0)}, {"age": column(4.0, NAN, 9.0)}, torch.tensor([0.25, 0.25, 1.0]))
    # 3 and not 0.75 * 16 of mixed losses; a quarter of the own one where the partner has none; a plain sample
    assert float(task.loss(column(0.0, 2.0, 0.0), truth)) == 9 + 0.25 * 4 + 25


def test_of_a_column_that_one_of_two_mixed_samples_has_its_share_counts():
    task, lam = make("regression", BOX, standardise=False), torch.tensor([0.25])
    truth = Truth({"box": torch.tensor([[0.0, NAN]])}, {"box": torch.tensor([[NAN, 0.0]])}, lam)
    assert float(task.loss(torch.tensor([[2.0, 4.0]]), truth)) == 0.25 * 4 + 0.75 * 16


def test_a_mixed_sample_weighs_as_much_as_the_two_that_are_in_it():
    """With an error of 1 everywhere the sum is the sum of weights, which the index knows."""
    task = make("regression", BOX, standardise=False, loss="mae")
    own = torch.tensor([[1.0, 1.0], [1.0, NAN], [NAN, NAN], [NAN, 1.0], [NAN, NAN]])
    partner = torch.tensor([[NAN, 1.0], [NAN, 1.0], [1.0, 1.0], [NAN, NAN], [NAN, NAN]])
    lam = torch.tensor([0.7, 0.25, 0.6, 0.9, 0.5])
    weights = [task.weights({"box": values.numpy()})[:, 0] for values in (own, partner)]
    expected = lam.double().numpy() @ weights[0] + (1 - lam.double().numpy()) @ weights[1]
    assert expected == pytest.approx(1 + 1 + 0.4 + 0.9)
    assert float(task.loss(torch.zeros(5, 2), Truth({"box": own}, {"box": partner}, lam))) == pytest.approx(expected)


def test_metrics_are_scikit_learns_in_the_targets_own_units():
    task, random = make("regression", BOX), np.random.default_rng(0)
    values = random.normal((0, 100), (1, 10), (41, 2)).astype(np.float32)
    output = random.normal(0, 1, (41, 2)).astype(np.float32)
    predicted = output.astype(np.float64) * (1, 10) + (0, 100)
    values[random.random((41, 2)) < 0.2] = NAN
    values[3] = NAN
    result = evaluated(task, torch.tensor(output), torch.tensor(values))
    known = ~np.isnan(values)
    pairs = [(values[known[:, c], c].astype(np.float64), predicted[known[:, c], c]) for c in (0, 1)]
    maes, r2s = ([of(*pair) for pair in pairs] for of in (mean_absolute_error, r2_score))
    assert result["mae"] == pytest.approx(np.mean(maes), rel=1e-12)
    assert result["rmse"] == pytest.approx(np.mean([root_mean_squared_error(*pair) for pair in pairs]), rel=1e-12)
    assert result["r2"] == pytest.approx(np.mean(r2s), rel=1e-12)
    assert result["mae_by_column"] == pytest.approx(maes)
    assert result["r2_by_column"] == pytest.approx(r2s)
    squares = np.nansum(((predicted - values) / (1, 10)) ** 2, 1)[known.any(1)] / known.sum(1)[known.any(1)]
    assert result["loss"] == pytest.approx(squares.mean(), rel=1e-6)
    assert result["samples"] == 41 > known.any(1).sum()
    assert {*task.metrics} | {*task.lists} | {"samples"} == {*result}
    for ranks in (2, 3):
        assert repr(evaluated(task, torch.tensor(output), torch.tensor(values), ranks)) == repr(result)
    shown = sum(np.nanmean(np.abs(predicted - values)[i]) for i in range(41) if known[i].any())
    assert float(task.hits(torch.tensor(output), {"box": torch.tensor(values)})[0]) == pytest.approx(shown, rel=1e-6)


def test_metrics_by_hand():
    result = evaluated(make("regression", AGE), column(0.0, 1.0, -1.0, 9.0), column(10.0, 16.0, 8.0, NAN))
    # predicted 10, 12, 8: errors 0, -4, 0; in standard deviations 0, -2, 0; values spread around 34 / 3
    spread = sum((y - 34 / 3) ** 2 for y in (10, 16, 8))
    wanted = {"mae": 4 / 3, "rmse": math.sqrt(16 / 3), "r2": 1 - 16 / spread, "loss": 4 / 3, "samples": 4}
    assert result == pytest.approx(wanted)


def test_values_that_are_all_the_same_have_the_r2_of_scikit_learn():
    task = make("regression", AGE)
    assert evaluated(task, column(0.0, 0.0), column(10.0, 10.0))["r2"] == r2_score([10, 10], [10, 10]) == 1
    assert evaluated(task, column(0.0, 1.0), column(10.0, 10.0))["r2"] == r2_score([10, 10], [10, 12]) == 0
    assert math.isnan(evaluated(task, column(0.0), column(10.0))["r2"])  # a single value


def test_what_no_sample_tells_about_is_no_number():
    task = make("regression", BOX)
    assert evaluated(task, torch.zeros(0, 2), torch.zeros(0, 2), ranks=2) == {"samples": 0}
    nothing = evaluated(task, torch.zeros(2, 2), torch.full((2, 2), NAN))
    assert all(math.isnan(nothing[name]) for name in task.metrics)
    assert (nothing["samples"], nothing["mae_by_column"]) == (2, [None, None])
    half = evaluated(task, torch.zeros(2, 2), torch.tensor([[1.0, NAN], [3.0, NAN]]))
    assert (half["mae"], half["mae_by_column"], half["r2_by_column"]) == (2, [2, None], [pytest.approx(-4), None])


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_outputs_that_are_not_finite_are_counted_and_leave_no_metric(bad):
    task = make("regression", AGE)
    result = evaluated(task, column(0.0, bad), column(10.0, 10.0), ranks=2)
    assert (result["nonfinite"], result["samples"]) == (1, 2)
    assert all(math.isnan(result[name]) for name in task.metrics)
    without = evaluated(task, column(0.0, bad), column(10.0, NAN))  # it lacks the target
    assert (without["nonfinite"], without["mae"], without["loss"]) == (1, 0, 0)


def test_predictions_are_in_the_targets_own_units():
    assert make("regression", AGE).rows(column(0.5, -1.0), {}) == [{"age": 11}, {"age": 8}]
    assert make("regression", BOX).rows(torch.tensor([[2.0, -1.0]]), {}) == [{"box_0": 2, "box_1": 90}]


@pytest.mark.parametrize(
    ("summary", "given", "says"),
    [
        (AGE, {"delta": 1}, "delta: is of loss huber; the loss is mse"),
        (AGE, {"loss": "huber", "beta": 1}, "beta: is of loss smooth_l1"),
        (AGE, {"loss": "huber", "delta": 0}, "delta"),
        (of_numbers("age", [3.0], [0.0]), {}, "is the same in all training samples: .*standardise=false"),
        (of_numbers("box", [3.0, 1.0], [1.0, 0.0]), {}, r"in columns \[1\]"),
        (of_numbers("age", [NAN], [NAN], known=0), {"standardise": False}, "has no value in any training sample"),
        (of_numbers("box", [1.0, 0.0], [1.0, 0.0], (9, 0)), {"standardise": False}, r"no value in columns \[1\]"),
        (AGE, {"target": "aeg"}, 'no target "aeg"; did you mean "age"'),
        (AGE, {"target": "label"}, '"label" is of kind class'),
    ],
)
def test_refused(summary, given, says):
    with pytest.raises(UserError, match=f"(?s){says}"):
        make("regression", of_class("a", "b"), summary, **given)


def test_the_only_target_of_its_kind_is_taken_and_of_several_one_is_named():
    assert tuple(make("regression", of_class("a"), AGE).targets) == ("age",)
    assert tuple(make("regression", AGE, BOX, target="box").targets) == ("box",)
    with pytest.raises(UserError, match=r"2 targets of kind number: age, box"):
        make("regression", AGE, BOX)
    with pytest.raises(UserError, match=r"no target of kind number, .* it has label \(class\)"):
        make("regression", of_class("a"))
    assert make("regression", of_numbers("age", [3.0], [0.0]), standardise=False).std == (1,)
