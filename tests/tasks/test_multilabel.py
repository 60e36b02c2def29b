"""Multi-label classification: losses against formulas, metrics against scikit-learn, on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm.loss
import torch
from simulated_ranks import on_ranks
from sklearn.metrics import average_precision_score, f1_score
from torch.nn.functional import binary_cross_entropy_with_logits as torchs
from torchvision.ops import sigmoid_focal_loss

from tlx.base import plug
from tlx.base.errors import ConfigError, UserError
from tlx.data.shards.targets import Target
from tlx.tasks import Ranks, TargetSummary, TaskData, Truth
from tlx.tasks.kinds import multilabel
from tlx.tasks.multilabel import asymmetric, average_precision, best_threshold

NAMES = ("cat", "dog", "sofa")
LOGITS = 2 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
VALUES = torch.tensor([[1, 0, 0], [0, 1, 1], [1, -1, 0], [-1, -1, -1]], dtype=torch.int8)
FULL = VALUES.clamp(min=0)


def data(counts=(2, 1, 1), known=(3, 2, 3), names=NAMES, **others):
    summary = TargetSummary(Target("tags", "labels", names), counts, known)
    return TaskData({"tags": summary, **others}, 4, 5, lambda counts: None)


def truth(values, **mixed):
    return Truth({"tags": values}, **mixed)


def evaluation(logits, values, ids=None, ranks=None, batches=None, task=None):
    task = task or multilabel(data(names=tuple(map(str, range(logits.shape[1])))))
    meter = task.meter(torch.device("cpu"), ranks or Ranks())
    ids = torch.arange(len(logits)) if ids is None else ids
    for batch in [list(range(len(logits)))] if batches is None else batches:
        meter.update(logits[batch], {"tags": values[batch], "other": ids[batch]}, ids[batch])
    return meter.result()


# ---------------------------------------------------------------------------------------------------------- losses


def test_bce_is_torchs_times_the_labels():
    loss = multilabel(data()).loss(LOGITS, truth(FULL))
    assert float(loss / 4) == pytest.approx(3 * float(torchs(LOGITS, FULL.float())), rel=1e-6)


def test_unknown_labels_and_samples_teach_nothing():
    task, logits = multilabel(data()), LOGITS.clone().requires_grad_()
    loss = task.loss(logits, truth(VALUES))
    loss.backward()
    known = VALUES >= 0
    assert float(loss.detach()) == pytest.approx(
        float(torchs(LOGITS[known], VALUES[known].float(), reduction="sum")), rel=1e-6
    )
    assert not logits.grad[~known].any()
    assert task.weights({"tags": VALUES.numpy()}).tolist() == [[1.0], [1.0], [1.0], [0.0]]


@pytest.mark.parametrize("size", [0.0, 1e4])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"loss": "asymmetric"},
        {"loss": "asymmetric", "clip": 0.0, "gamma_negative": 0.5, "gamma_positive": 0.0},
        {"loss": "asymmetric", "gamma_negative": 0.5, "gamma_positive": 0.5},
        {"loss": "focal"},
        {"loss": "focal", "gamma": 0.5, "positive_weights": "balanced", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_gradients_are_finite(said, size):
    logits = (size * torch.tensor([[1.0, -1, 1], [1, -1, -1], [1, 1, 1], [1, 1, 1]])).requires_grad_()
    loss = multilabel(data(), **said).loss(logits, truth(VALUES))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def paper(p, y, gamma_negative, gamma_positive, clip):
    """Equations 4 to 7 of arXiv:2009.14119, in float64."""
    shifted = np.maximum(p - clip, 0)
    positive = -((1 - p) ** gamma_positive) * np.log(p)
    negative = -(shifted**gamma_negative) * np.log(1 - shifted)
    return np.where(y == 1, positive, negative)


@pytest.mark.parametrize("said", [{}, {"gamma_negative": 2.0, "gamma_positive": 0.0, "clip": 0.0}])
def test_the_asymmetric_loss_is_the_papers_and_timms(said):
    logits = LOGITS.clone().requires_grad_()
    loss = multilabel(data(), loss="asymmetric", **said).loss(logits, truth(FULL))
    wanted = {"gamma_negative": 4.0, "gamma_positive": 1.0, "clip": 0.05, **said}
    p = torch.sigmoid(LOGITS.double()).numpy()
    assert float(loss.detach()) == pytest.approx(paper(p, FULL.numpy(), **wanted).sum(), rel=1e-5)
    timms = timm.loss.AsymmetricLossMultiLabel(
        wanted["gamma_negative"], wanted["gamma_positive"], wanted["clip"], reduction="sum"
    )
    other = LOGITS.clone().requires_grad_()
    timms(other, FULL).backward()
    loss.backward()
    assert torch.allclose(logits.grad, other.grad, atol=1e-6)


def test_below_the_clip_there_is_no_gradient_unless_the_label_applies():
    logits = torch.tensor([[-3.0, -2.9], [-3.0, -2.9]], requires_grad=True)  # probabilities 0.047 and 0.052
    applies, not_ = asymmetric(logits, gamma_negative=1.0, gamma_positive=0.0, clip=0.05)
    (applies[0] + not_[1]).sum().backward()
    assert logits.grad[1].tolist() == [0.0, pytest.approx(2.0 * 0.00215 * 0.0494, rel=0.02)]  # 2 (p - c) p (1 - p)
    assert (logits.grad[0] < -0.9).all()


@pytest.mark.parametrize("alpha", [None, 0.4])
def test_the_focal_loss_is_torchvisions(alpha):
    loss = multilabel(data(), loss="focal", gamma=1.5, alpha=alpha).loss(LOGITS, truth(FULL))
    other = sigmoid_focal_loss(LOGITS, FULL.float(), alpha=alpha or 0.25, gamma=1.5, reduction="sum")
    assert float(loss) == pytest.approx(float(other), rel=1e-5)


@pytest.mark.parametrize(("given", "weights"), [("balanced", [0.5, 1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])])
def test_positive_weights(given, weights):
    loss = multilabel(data(), positive_weights=given).loss(LOGITS, truth(FULL))
    other = torchs(LOGITS, FULL.float(), pos_weight=torch.tensor(weights), reduction="sum")
    assert float(loss) == pytest.approx(float(other), rel=1e-6)


def test_balanced_weights_of_labels_that_always_or_never_apply_are_1():
    assert multilabel(data((0, 3, 1), (4, 3, 4)), positive_weights="balanced").positive_weights == (1.0, 1.0, 3.0)


def test_smooth_targets():
    loss = multilabel(data(), label_smoothing=0.2).loss(LOGITS, truth(FULL))
    assert float(loss) == pytest.approx(float(torchs(LOGITS, 0.8 * FULL + 0.1, reduction="sum")), rel=1e-6)


@pytest.mark.parametrize("name", ["bce", "asymmetric", "focal"])
def test_mixing_weighs_both_and_auxiliary_outputs_add(name):
    task, lam = multilabel(data(), loss=name), torch.tensor([1.0, 0.75, 0.5, 0.25])
    mixed = task.loss(LOGITS, truth(VALUES, partner={"tags": VALUES.flip(0)}, lam=lam))
    each = [
        float(lam[i] * task.loss(LOGITS[i : i + 1], truth(VALUES[i : i + 1])))
        + float((1 - lam[i]) * task.loss(LOGITS[i : i + 1], truth(VALUES[3 - i : 4 - i])))
        for i in range(4)
    ]
    assert float(mixed) == pytest.approx(sum(each), rel=1e-5)
    alone = task.loss(LOGITS, truth(VALUES))
    assert float(task.loss((LOGITS, LOGITS, None), truth(VALUES))) == pytest.approx(1.4 * float(alone), rel=1e-6)


def test_mixed_bce_is_that_of_the_mixed_target():
    lam = torch.tensor([1.0, 0.75, 0.5, 0.25])
    mixed = multilabel(data()).loss(LOGITS, truth(FULL, partner={"tags": FULL.flip(0)}, lam=lam))
    soft = lam[:, None] * FULL + (1 - lam[:, None]) * FULL.flip(0)
    assert float(mixed) == pytest.approx(float(torchs(LOGITS, soft, reduction="sum")), rel=1e-6)


def test_what_the_curve_shows():
    logits = torch.tensor([[1.0, -1, -1], [1, 1, 1], [1, -9, 1], [1, 1, 1], [1, math.nan, -1]])
    values = torch.cat([VALUES, VALUES[:1]])
    hits = multilabel(data()).hits(logits, {"tags": values})[0]  # 3 of 3, 2 of 3, 1 of 2, none known, no answer
    assert float(hits) == pytest.approx(1 + 2 / 3 + 1 / 2)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ({"gamma": 2.0}, "task.gamma: is of loss focal; the loss is bce"),
        ({"loss": "focal", "clip": 0.05}, "task.clip: is of loss asymmetric; the loss is focal"),
        ({"loss": "asymmetric", "alpha": 0.5}, "task.alpha: is of loss focal; the loss is asymmetric"),
        ({"positive_weights": [1.0, 2.0]}, "task.positive_weights: 2 positive weights for 3 labels"),
        ({"target": "tag"}, 'the index has no target "tag"'),
        ({"target": "label"}, "is of kind class"),
    ],
)
def test_arguments_that_do_nothing_are_refused(said, key):
    label = TargetSummary(Target("label", "class", ("a", "b")), (2, 2), 4)
    with pytest.raises(UserError, match=key):
        multilabel(data(label=label), **said)


def test_arguments_are_checked_as_those_of_any_part():
    given = {"loss": "asymmetric", "clip": "1/20", "label_smoothing": "0.1"}
    checked = plug.arguments(plug.find("task", "multilabel"), given, label="task multilabel")
    assert checked == {"loss": "asymmetric", "clip": 0.05, "label_smoothing": 0.1}
    with pytest.raises(ConfigError, match="positive_weights"):
        plug.arguments(multilabel, {"positive_weights": [0.0]}, label="task multilabel")


def test_a_network_needs_an_output_for_each_label():
    task = multilabel(data())
    assert (tuple(task.targets), task.heads, task.outputs, task.parts) == (("tags",), {"": 3}, NAMES, 1)
    assert task.metrics[task.metric] is True
    result = evaluation(LOGITS, VALUES, task=task)
    assert task.metrics.keys() | task.lists.keys() | {"samples"} == result.keys()
    assert all(len(result[name]) == len(labels) for name, labels in task.lists.items())


# ---------------------------------------------------------------------------------------------------------- metrics


def case(seed, samples=60, labels=5):
    """Scores with ties, a label without positives, one that always applies, and unknown values."""
    draw = np.random.default_rng(seed)
    logits = np.round(draw.normal(size=(samples, labels)), 1).astype(np.float32)
    values = (draw.random((samples, labels)) < 0.3).astype(np.int8)
    values[:, 0], values[:, 1] = 0, 1
    values[draw.random((samples, labels)) < 0.2] = -1
    values[3] = -1
    return logits, values


def by_scikit(logits, values):
    seen = [k for k in range(logits.shape[1]) if (values[:, k] == 1).any()]
    known = [values[:, k] >= 0 for k in seen]
    columns = [(values[m, k], logits[m, k]) for m, k in zip(known, seen, strict=True)]
    everything = values >= 0
    return {
        "map": np.mean([average_precision_score(y, s) for y, s in columns]),
        "f1_macro": np.mean([f1_score(y, s > 0) for y, s in columns]),
        "f1_micro": f1_score(values[everything], logits[everything] > 0),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns(seed):
    logits, values = case(seed)
    result = evaluation(torch.from_numpy(logits), torch.from_numpy(values))
    for name, value in by_scikit(logits, values).items():
        assert result[name] == pytest.approx(value, rel=1e-12), name
    known = values >= 0
    loss = torchs(torch.from_numpy(logits[known]).double(), torch.from_numpy(values[known]).double(), reduction="sum")
    assert result["loss"] == pytest.approx(float(loss) / known.any(1).sum(), rel=1e-12)
    assert result["ap_per_class"][0] is None
    assert result["ap_per_class"][1] == 1.0
    assert (result["samples"], result["thresholds"][0], result["f1_per_class"][0]) == (60, None, None)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_is_the_best_of_all(seed):
    logits, values = case(seed, samples=25)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    thresholds = evaluation(torch.from_numpy(logits), torch.from_numpy(values))["thresholds"]
    for k in range(1, 5):
        known = values[:, k] >= 0
        y, of = values[known, k], p[known, k]
        best = max(f1_score(y, of > t) for t in [0.0, *of])
        assert f1_score(y, of > thresholds[k]) == pytest.approx(best, rel=1e-12)


def test_a_threshold_is_half_way():
    p, y = np.array([0.9, 0.1, 0.6, 0.3, 0.3]), np.array([True, False, True, False, False])
    assert best_threshold(p, y) == pytest.approx(0.45)
    assert best_threshold(p, ~y) == pytest.approx(0.05)  # all five: 3 of 5 right, F1 3/4, and no cut is better
    close = np.nextafter(0.5, 1)
    assert best_threshold(np.array([close, 0.5]), np.array([True, False])) == 0.5
    assert best_threshold(p, np.zeros(5, bool)) is None
    assert average_precision(p, np.zeros(5, bool)) is None


def test_tuned_scores_are_cross_fitted():
    """Ids decide which half a sample is in. Here each half's best threshold is wrong on the other one."""
    p = torch.tensor([0.9, 0.7, 0.8, 0.1, 0.2, 0.6])
    values = torch.tensor([[1], [0], [1], [0], [0], [0]], dtype=torch.int8)  # even: cut at 0.5; odd: nothing applies
    result = evaluation(p.logit()[:, None], values)
    assert result["thresholds"] == [pytest.approx(0.75)]
    # even ones by 1/2: 0.9 and 0.8 right, 0.2 not told; odd ones by (0.8 + 0.2) / 2: 0.7 and 0.6 told, and wrong
    assert result["tuned_f1_macro"] == result["tuned_f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 2))
    other = evaluation(p.logit()[:, None], values, ids=torch.tensor([0, 1, 3, 2, 4, 5]))
    assert other["thresholds"] == [pytest.approx(0.75)]
    # even: 0.9, 0.1, 0.2, cut at 0.55; odd: 0.7, 0.8, 0.6, cut at 0.75: 0.7 and 0.6 are told wrongly again
    assert other["tuned_f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 2))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_not_show(ranks):
    logits, values = (torch.from_numpy(given) for given in case(7, samples=31))
    ids = torch.randperm(31, generator=torch.Generator().manual_seed(0)) * 3
    order = ids.argsort()
    alone = evaluation(logits[order], values[order], ids[order])
    given = on_ranks(ranks, lambda r, batches: evaluation(logits, values, ids, r, batches), 31)
    assert given == [alone] * ranks


def test_a_rank_without_samples_and_evaluations_of_one_and_none():
    logits, values = torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 0]], dtype=torch.int8)
    given = on_ranks(2, lambda r, batches: evaluation(logits, values, None, r, batches), 1)
    assert given[0] == given[1]
    assert (given[0]["map"], given[0]["f1_micro"], given[0]["tuned_f1_micro"]) == (1.0, 1.0, 1.0)
    assert given[0]["loss"] == pytest.approx(0.126928 + 0.313262, rel=1e-5)
    assert on_ranks(2, lambda r, batches: evaluation(logits, values, None, r, batches), 0) == [{"samples": 0}] * 2


def nans(result):
    return {name for name, value in result.items() if isinstance(value, float) and math.isnan(value)}


def test_without_a_known_label_nothing_is_told():
    task = multilabel(data())
    result = evaluation(LOGITS, torch.full_like(VALUES, -1), task=task)
    assert nans(result) == set(task.metrics)
    assert result["samples"] == 4
    assert all(result[name] == [None] * 3 for name in task.lists)


def test_outputs_that_are_not_finite_count_as_worst():
    logits = torch.tensor([[3.0, 1.0], [2.0, -1.0], [math.nan, -1.0], [-1.0, -math.inf]])  # -1 would be right
    values = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1]], dtype=torch.int8)
    result = evaluation(logits, values)
    assert result["nonfinite"] == 2
    assert nans(result) == {"loss"}
    # label 0: told 3.0, 2.0 right; the NaN is last of its ranking, the sample it does not apply to is first
    assert result["ap_per_class"][0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    assert result["f1_per_class"][0] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # label 1: first the NaN's sample, then 1.0, both not; then -1.0 and the infinite one, which it applies to
    assert result["ap_per_class"][1] == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert result["f1_per_class"][1] == 0.0


def test_no_finite_output_is_no_evaluation():
    task = multilabel(data())
    result = evaluation(LOGITS * math.nan, VALUES, task=task)
    assert nans(result) == set(task.metrics)
    assert (result["samples"], result["nonfinite"]) == (4, 4)


# ---------------------------------------------------------------------------------------------------------- predictions


def test_rows():
    task = multilabel(data())
    output = torch.tensor([[0.0, 1.0, -1.0]])
    (row,) = task.rows(output, {})
    assert row["labels"] == ["dog"]
    assert row["probabilities"] == pytest.approx({"cat": 0.5, "dog": 0.731059, "sofa": 0.268941}, abs=1e-6)
    (row,) = task.rows(output, {"thresholds": [0.4, None, 0.2]})
    assert row["labels"] == ["cat", "dog", "sofa"]
