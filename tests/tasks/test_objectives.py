"""Losses by name: their numbers, what mixing and weights make of them, and that they are sums over samples."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm.loss
import torch
from torch.nn.functional import cross_entropy as torchs
from updates import classifying

from tlx.base.errors import UserError
from tlx.tasks import objectives
from tlx.tasks.objectives import bce, cross_entropy, focal, logit_adjustment, poly
from tlx.train.part_checks import check_objective, check_training_output

COUNTS = [6, 3, 1]
LABELS = torch.tensor([0, 1, 2, 0, 1])
OTHERS = torch.tensor([1, 1, 0, 2, 0])
LAM = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.1])
MIX = SimpleNamespace(partner_labels=OTHERS, lam=LAM)
LOGITS = 3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
WEIGHTS = [1.0, 3.0, 0.0]
MADE = [
    cross_entropy(COUNTS, label_smoothing=0.1),
    bce(COUNTS, label_smoothing=0.1),
    bce(COUNTS, target_threshold=0.2, sum_classes=False),
    focal(COUNTS),
    focal(COUNTS, gamma=0.5),
    focal(COUNTS, gamma=0.0),
    poly(COUNTS, label_smoothing=0.1),
    poly(COUNTS, epsilon=-1.0),
    logit_adjustment(COUNTS, label_smoothing=0.1),
]
MADE += [make(COUNTS, class_weights=WEIGHTS) for make in (cross_entropy, bce, focal, poly)]
every = pytest.mark.parametrize("objective", MADE, ids=map(str, range(len(MADE))))


def probabilities(logits):
    raised = np.exp(logits.double().numpy())
    return raised / raised.sum(1, keepdims=True)


def of_label(logits, labels):
    """The probability of each label, in float64."""
    return probabilities(logits)[np.arange(len(labels)), labels.numpy()]


def test_each_is_a_part():
    assert {type(getattr(objectives, name)(COUNTS)) for name in objectives.__all__} == {objectives.Summed}


@every
@pytest.mark.parametrize("mixed", [False, True])
def test_it_passes_the_check_of_objectives(objective, mixed):
    check_objective(objective, 3, mixed=mixed, label="it")
    check_training_output(classifying(objective), (LOGITS, LOGITS, None), mixed=mixed, label="it")


@every
def test_a_batch_is_the_sum_of_its_parts(objective):
    whole = objective.loss(LOGITS, LABELS, MIX)
    parts = [
        objective.loss(LOGITS[part], LABELS[part], SimpleNamespace(partner_labels=OTHERS[part], lam=LAM[part]))
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    aux = objective.loss((LOGITS, None, 2 * LOGITS), LABELS, MIX)
    assert float(aux) == pytest.approx(float(whole + 0.4 * objective.loss(2 * LOGITS, LABELS, MIX)), rel=1e-6)


@every
@pytest.mark.parametrize("mix", [None, MIX], ids=["plain", "mixed"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_gradients_are_finite(objective, mix, size):
    logits = (size * torch.tensor([[1.0, -1, -1], [1, -1, -1], [1, 1, 1], [-1, 1, -1], [-1, -1, 1]])).requires_grad_()
    loss = objective.loss(logits, LABELS, mix)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@every
def test_evaluations_are_by_cross_entropy(objective):
    plain = -np.log(of_label(LOGITS, LABELS)).sum()
    assert float(objective.evaluation_loss(LOGITS, LABELS)) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("make", [cross_entropy, bce, focal, poly])
def test_class_weights(make):
    """Those of the sample's class; 0 leaves it out, and a mixed sample weighs the mixture."""
    plain, weighted = make(COUNTS), make(COUNTS, class_weights=WEIGHTS)
    for n, label in enumerate(LABELS.tolist()):
        one, own = LOGITS[n : n + 1], LABELS[n : n + 1]
        expected = WEIGHTS[label] * float(plain.loss(one, own, None))
        assert float(weighted.loss(one, own, None)) == pytest.approx(expected, rel=1e-6)
        alike = SimpleNamespace(partner_labels=own, lam=LAM[n : n + 1])
        assert float(weighted.loss(one, own, alike)) == pytest.approx(expected, rel=1e-6)
    assert weighted.class_weights == WEIGHTS
    assert make(COUNTS, class_weights="balanced").class_weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    with pytest.raises(UserError, match="2 class weights for 3 classes"):
        make(COUNTS, class_weights=[1.0, 2.0])
    with pytest.raises(UserError, match="no balanced weight"):
        make([1, 0], class_weights="balanced")


@pytest.mark.parametrize("make", [cross_entropy, bce, focal, poly])
def test_class_weights_of_mixed_samples(make):
    """Each label weighs by its share in the picture."""
    one, own, other = LOGITS[:1], torch.tensor([0]), torch.tensor([1])
    mix = SimpleNamespace(partner_labels=other, lam=torch.tensor([0.75]))
    loss = float(make(COUNTS, class_weights=WEIGHTS).loss(one, own, mix))
    if make is bce:  # of the mixed target
        assert loss == pytest.approx((0.75 * 1 + 0.25 * 3) * float(bce(COUNTS).loss(one, own, mix)), rel=1e-6)
    else:
        plain = make(COUNTS)
        shares = 0.75 * 1 * float(plain.loss(one, own, None)) + 0.25 * 3 * float(plain.loss(one, other, None))
        assert loss == pytest.approx(shares, rel=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.5])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_bce_is_timms(threshold, sum_classes):
    loss = timm.loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold, sum_classes=sum_classes)
    objective = bce(COUNTS, target_threshold=threshold, sum_classes=sum_classes)
    assert float(objective.loss(LOGITS, LABELS, None)) == pytest.approx(5 * float(loss(LOGITS, LABELS)), rel=1e-6)
    hot, other = torch.eye(3)[LABELS], torch.eye(3)[OTHERS]
    mixed = LAM[:, None] * hot + (1 - LAM[:, None]) * other
    assert float(objective.loss(LOGITS, LABELS, MIX)) == pytest.approx(5 * float(loss(LOGITS, mixed)), rel=1e-6)


def test_smooth_bce_is_timms():
    loss = timm.loss.BinaryCrossEntropy(smoothing=0.1)
    objective = bce(COUNTS, label_smoothing=0.1, sum_classes=False)
    assert float(objective.loss(LOGITS, LABELS, None)) == pytest.approx(5 * float(loss(LOGITS, LABELS)), rel=1e-6)


def test_bce_by_hand():
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    loss = bce([1, 1]).loss(logits, torch.tensor([0, 1]), None)
    # both at 1/2; then -log(1 - sigmoid(2)) = 2.126928 and -log sigmoid(-1) = 1.313262
    assert float(loss) == pytest.approx(2 * math.log(2) + 2.126928 + 1.313262, rel=1e-6)


def test_a_threshold_undoes_smoothing():
    with pytest.raises(UserError, match="not smooth"):
        bce(COUNTS, label_smoothing=0.1, target_threshold=0.2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal(gamma):
    p = of_label(LOGITS, LABELS)
    expected = (-((1 - p) ** gamma) * np.log(p)).sum()
    assert float(focal(COUNTS, gamma=gamma).loss(LOGITS, LABELS, None)) == pytest.approx(expected, rel=1e-5)


def test_focal_of_two_classes_is_torchvisions():
    """The softmax of two logits is the sigmoid of their difference."""
    from torchvision.ops import sigmoid_focal_loss

    labels = torch.tensor([0, 1, 1, 0, 1])
    two = LOGITS[:, :2]
    other = sigmoid_focal_loss(two[:, 1] - two[:, 0], labels.float(), alpha=-1, gamma=2, reduction="sum")
    assert float(focal([1, 1]).loss(two, labels, None)) == pytest.approx(float(other), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_poly(smoothing, weights):
    p, target = probabilities(LOGITS), np.eye(3)[LABELS.numpy()] * (1 - smoothing) + smoothing / 3
    expected = ((weights or np.ones(3)) * target * (-np.log(p) + 2 * (1 - p))).sum()
    objective = poly(COUNTS, epsilon=2.0, label_smoothing=smoothing, class_weights=weights)
    assert float(objective.loss(LOGITS, LABELS, None)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_logit_adjustment(tau):
    prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    expected = torchs(LOGITS.double() + tau * prior.log(), LABELS, reduction="sum")
    objective = logit_adjustment(COUNTS, tau=tau)
    assert float(objective.loss(LOGITS, LABELS, None)) == pytest.approx(float(expected), rel=1e-6)


def test_a_class_without_samples_has_the_prior_of_one():
    given = [objective.loss(LOGITS, LABELS, None) for objective in map(logit_adjustment, ([6, 3, 0], [6, 3, 1]))]
    assert given[0] == given[1]


def test_equal_classes_need_no_adjustment():
    loss = logit_adjustment([4, 4, 4]).loss(LOGITS, LABELS, MIX)
    assert float(loss) == pytest.approx(float(cross_entropy([4, 4, 4]).loss(LOGITS, LABELS, MIX)), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("make", [cross_entropy, bce, poly, logit_adjustment])
def test_mixing_is_the_loss_by_the_mixed_target(make, smoothing):
    """For those that are linear in the target: against the gradient by the logits, which a soft target gives."""
    logits = LOGITS.clone().requires_grad_()
    make(COUNTS, label_smoothing=smoothing).loss(logits, LABELS, MIX).backward()
    soft = LAM[:, None] * torch.eye(3)[LABELS] + (1 - LAM[:, None]) * torch.eye(3)[OTHERS]
    soft = (1 - smoothing) * soft + smoothing / 3
    by_hand = LOGITS.clone().requires_grad_()
    shifted = by_hand + (torch.tensor([0.6, 0.3, 0.1]).log() if make is logit_adjustment else 0)
    if make is bce:
        loss = timm.loss.BinaryCrossEntropy(smoothing=0.0, sum_classes=True)(by_hand, soft) * len(soft)
    else:
        loss = torchs(shifted, soft, reduction="sum")
    if make is poly:
        loss = loss + (soft * (1 - by_hand.softmax(1))).sum()
    loss.backward()
    assert torch.allclose(logits.grad, by_hand.grad, atol=1e-6)


def test_cross_entropy_has_the_bits_it_had():
    """torch's own, sample by sample, and shares of two of them."""
    weights = torch.tensor(WEIGHTS)
    own, other = (torchs(LOGITS, y, weight=weights, reduction="none", label_smoothing=0.1) for y in (LABELS, OTHERS))
    objective = cross_entropy(COUNTS, class_weights=WEIGHTS, label_smoothing=0.1)
    assert torch.equal(objective.loss(LOGITS, LABELS, None), own.sum())
    assert torch.equal(objective.loss(LOGITS, LABELS, MIX), (LAM * own + (1 - LAM) * other).sum())
