"""Classes that have an order: losses of thresholds, and metrics that know how far apart ranks are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error
from task_data import NAN, evaluated, make, of_class, of_numbers

from tlx.base.errors import UserError
from tlx.tasks import Truth

ORDER = ["low", "medium", "high", "severe"]
SIZES = of_class("high", "low", "medium", "severe")  # as an index sorts names
RANK_OF = [2, 0, 1, 3]
BOTH = pytest.mark.parametrize("loss", ["corn", "thresholds"])


def sized(**given):
    return make("ordinal", SIZES, order=ORDER, **given)


def drawn(count=23):
    random = np.random.default_rng(1)
    return torch.tensor(random.normal(0, 2, (count, 3)), dtype=torch.float32), torch.tensor(
        random.integers(0, 4, count)
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def corn(logits, ranks):
    """Equation 6 of Shi, Cao & Raschka 2021 before it is divided by the sum of subset sizes."""
    total = 0.0
    for j in range(logits.shape[1]):
        subset = [i for i, rank in enumerate(ranks) if rank > j - 1]
        f = sigmoid(logits[subset, j])
        above = np.array([ranks[i] > j for i in subset])
        total -= (np.log(f) * above + np.log(1 - f) * ~above).sum()
    return total


def thresholds(logits, ranks):
    """Niu et al. 2016: K - 1 binary classifiers, all of which see every sample."""
    f, above = sigmoid(logits), np.array(ranks)[:, None] > np.arange(logits.shape[1])
    return -(np.log(f) * above + np.log(1 - f) * ~above).sum()


@pytest.mark.parametrize("formula", [corn, thresholds])
def test_the_loss_is_that_of_the_paper(formula):
    output, target = drawn()
    loss = float(sized(loss=formula.__name__).loss(output, Truth({"label": target})))
    assert loss == pytest.approx(formula(output.numpy(), [RANK_OF[c] for c in target]), rel=1e-6)


def test_the_loss_of_corn_is_the_likelihood_of_the_class():
    task = make("ordinal", of_class("1", "2", "3"))
    output = torch.tensor([[math.log(3), 0.0]])  # 3/4 and 1/2: 1/4, 3/8 and 3/8 by class
    losses = [float(task.loss(output, Truth({"label": torch.tensor([c])}))) for c in range(3)]
    assert losses == pytest.approx([math.log(4), math.log(8 / 3), math.log(8 / 3)])
    assert task.rows(output, {}) == [{"label": "2", "rank": 1, "probability": pytest.approx(3 / 8)}]


@pytest.mark.parametrize(("loss", "asked"), [("corn", [True, True, False]), ("thresholds", [True, True, True])])
def test_a_sample_teaches_corn_the_outputs_up_to_its_rank(loss, asked):
    output = torch.zeros(2, 3, requires_grad=True)
    sized(loss=loss).loss(output, Truth({"label": torch.tensor([2, -1])})).backward()  # medium
    assert (output.grad != 0).tolist() == [asked, [False] * 3]
    assert output.grad[0, :2].tolist() == [-0.5, 0.5]


@BOTH
def test_missing_classes_weigh_nothing_and_extreme_outputs_have_a_finite_loss(loss):
    task, target = sized(loss=loss), torch.tensor([0, -1, 1, 3])
    output = torch.tensor([[1e4, -1e4, 1e4], [NAN, math.inf, 0], [1e4, 1e4, 1e4], [-1e4, 1e4, -1e4]])
    output.requires_grad_()
    total = task.loss(output, Truth({"label": target}))
    total.backward()
    assert bool(total.isfinite())
    assert bool(output.grad.isfinite().all())
    assert task.weights({"label": target.numpy().astype(np.int32)}).tolist() == [[1], [0], [1], [1]]


def test_mixed_and_auxiliary_losses():
    task, (output, target) = sized(aux_weight=0.5), drawn(4)
    lam, partner = torch.tensor([0.25, 1.0, 0.5, 0.75]), torch.tensor([3, 2, -1, 0])
    own, other = (task.each(output, t) for t in (target, partner))
    mixed = (lam * own + (1 - lam) * other).sum()
    truth = Truth({"label": target}, {"label": partner}, lam)
    assert float(other[2]) == 0
    assert float(task.loss(output, truth)) == pytest.approx(float(mixed))
    assert float(task.loss((output, output, None), truth)) == pytest.approx(1.5 * float(mixed))


@BOTH
def test_probabilities_fall_from_rank_to_rank_and_add_up(loss):
    task, (output, _) = sized(loss=loss), drawn(50)
    above = task.above(output)
    assert bool((above.diff(dim=1) <= 0).all())
    assert task.predicted(output).tolist() == (above > 0.5).sum(1).tolist()
    by_rank = [1 - above[:, 0], above[:, 0] - above[:, 1], above[:, 1] - above[:, 2], above[:, 2]]
    for i, row in enumerate(task.rows(output, {})):
        assert row["label"] == ORDER[row["rank"]]
        assert row["probability"] == pytest.approx(float(by_rank[row["rank"]][i]))


def test_thresholds_that_contradict_each_other_count_as_in_the_paper():
    output = torch.tensor([[2.0, -1.0, 1.0]])  # above low and above high, but not above medium: two of three
    first, second = sigmoid(1.0), sigmoid(-1.0)
    row = {"label": "high", "rank": 2, "probability": pytest.approx(first - second)}
    assert sized(loss="thresholds").rows(output, {}) == [row]
    assert sized(loss="corn").rows(output, {})[0]["rank"] == 1


@BOTH
def test_metrics_are_scikit_learns_on_any_number_of_ranks(loss):
    task, (output, target) = sized(loss=loss), drawn()
    target[[3, 8]] = -1
    result = evaluated(task, output, target)
    known = (target >= 0).numpy()
    truth = np.array([RANK_OF[c] for c in target[known]])
    f = sigmoid(output.numpy())[known]
    predicted = ((np.cumprod(f, 1) if loss == "corn" else f) > 0.5).sum(1)
    assert result["mae"] == pytest.approx(mean_absolute_error(truth, predicted))
    assert result["top1"] == pytest.approx(accuracy_score(truth, predicted))
    kappa = cohen_kappa_score(truth, predicted, labels=range(4), weights="quadratic")
    assert result["kappa"] == pytest.approx(kappa)
    formula = {"corn": corn, "thresholds": thresholds}[loss]
    assert result["loss"] == pytest.approx(formula(output.numpy()[known], truth) / 21, rel=1e-6)
    assert result["per_class"] == pytest.approx([(predicted[truth == r] == r).mean() for r in range(4)])
    assert (result["samples"], {*task.metrics} | {*task.lists} | {"samples"}) == (23, {*result})
    for ranks in (2, 3):
        assert repr(evaluated(task, output, target, ranks)) == repr(result)
    assert float(task.hits(output, {"label": target})[0]) == np.abs(truth - predicted).sum()


def test_metrics_by_hand():
    task = make("ordinal", of_class("1", "2", "3"), loss="thresholds")
    output = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # a, c, b, c
    result = evaluated(task, output, torch.tensor([0, 0, 1, 2]))
    assert (result["mae"], result["top1"], result["per_class"]) == (0.5, 0.75, [0.5, 1, 1])
    # cost 4 of 4 samples; expected of independent ones: 2 a and 1 b and 1 c against 1 a, 1 b, 2 c
    assert result["kappa"] == pytest.approx(1 - 4 / ((2 * (1 + 8) + (1 + 2) + (4 + 1)) / 4))


@pytest.mark.parametrize("ranks", [1, 3])
def test_outputs_that_are_not_finite_count_as_the_farthest_rank(ranks):
    task = sized()
    output = torch.tensor([[NAN, 9.0, 9.0], [9.0, 9.0, math.inf], [9.0, 9.0, 9.0], [NAN, NAN, NAN]])
    target = torch.tensor([1, 0, 3, -1])  # low, high, severe
    result = evaluated(task, output, target, ranks)
    assert (result["mae"], result["nonfinite"], result["samples"]) == ((3 + 2 + 0) / 3, 3, 4)
    assert result["per_class"] == [0, None, 0, 1]
    assert math.isnan(result["loss"])
    assert float(task.hits(output, {"label": target})[0]) == 5
    sure = evaluated(task, torch.tensor([[-9.0, 9.0, math.inf], [9.0, 9.0, 9.0]]), torch.tensor([1, 3]), ranks)
    assert (math.isnan(sure["loss"]), sure["nonfinite"]) == (True, 1)


def test_what_no_sample_tells_about_is_no_number():
    task = sized()
    assert evaluated(task, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), ranks=2) == {"samples": 0}
    for output, target in ((0.0, -1), (NAN, 0)):  # without a class; without any answer
        result = evaluated(task, torch.full((2, 3), output), torch.full((2,), target))
        assert all(math.isnan(result[name]) for name in task.metrics)
        assert (result["samples"], result["per_class"]) == (2, [None] * 4)
    one = evaluated(task, torch.full((2, 3), -9.0), torch.tensor([1, 1]))  # all low, and said to be
    assert (one["mae"], one["top1"], math.isnan(one["kappa"])) == (0, 1, True)


def test_the_order_is_told():
    task = sized()
    assert task.order == tuple(ORDER)
    assert task.outputs == ("above low", "above medium", "above high")
    assert (task.heads, task.lists) == ({"": 3}, {"per_class": tuple(ORDER)})
    assert make("ordinal", of_class("1", "2", "10")).order == ("1", "2", "10")
    assert make("ordinal", of_class("1", "10", "2"), order=[1, 2, 10]).order == ("1", "2", "10")
    assert make("ordinal", of_class("no", "yes"), order=["no", "yes"]).heads == {"": 1}


@pytest.mark.parametrize(
    ("summary", "given", "says"),
    [
        (of_class("only"), {}, "the index has 1"),
        (SIZES, {}, "task.order: the order of these classes is not known: high, low, medium, severe"),
        (of_class("1", "2", "nan"), {}, "is not known: 1, 2, nan"),
        (of_class("1", "10", "2"), {}, r"their order in the index is another: 1, 10, 2.*task.order: \[1, 2, 10\]"),
        (SIZES, {"order": ORDER[:3]}, "without severe"),
        (SIZES, {"order": [*ORDER, "huge"]}, "with huge, which are no classes"),
        (SIZES, {"order": [*ORDER, "low"]}, "names a class twice"),
        (of_numbers("age", [1.0], [1.0]), {}, "no target of kind class"),
    ],
)
def test_refused(summary, given, says):
    with pytest.raises(UserError, match=f"(?s){says}"):
        make("ordinal", summary, **given)


def test_the_class_of_the_index_is_taken_before_others():
    grade, sizes = of_class("1", "2", name="grade"), of_class("10", "20")
    assert tuple(make("ordinal", grade, sizes).targets) == ("label",)
    assert tuple(make("ordinal", grade, sizes, target="grade").targets) == ("grade",)
    assert tuple(make("ordinal", grade, of_numbers("age", [1.0], [1.0])).targets) == ("grade",)
