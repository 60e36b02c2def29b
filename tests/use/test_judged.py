"""Metrics of a classification and their intervals, against scikit-learn and numbers written by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch.nn.functional import cross_entropy

import tlx.use.judged as judging
from tlx.use.evaluation_text import _metrics
from tlx.use.judged import Classified, Resamples, drawn, fitted_temperature, largest_confusions


def made(n=300, classes=5, seed=0, missing=True):
    """Logits with many ties; of the last class there is no picture."""
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - missing, (n,), generator=drawn)
    logits = torch.randn(n, classes, generator=drawn).double()
    logits[torch.arange(n), labels] += 1
    return Classified(((logits * 4).round() / 4).contiguous(), labels, 3, 1.7)


def test_points_are_those_of_scikit_learn():
    judged = made()
    y, p = judged.labels.numpy(), judged.logits.softmax(1).numpy()
    told, there = judged.told.numpy(), range(4)
    found = judged.scalars()
    wanted = {
        "top1": sk.accuracy_score(y, told),
        "precision": sk.precision_score(y, told, average="macro", zero_division=0),
        "f1": sk.f1_score(y, told, average="macro"),
        "balanced_accuracy": np.mean([sk.recall_score(y == c, told == c) for c in there]),
        "auroc": np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in there]),
        "average_precision": np.mean([sk.average_precision_score(y == c, p[:, c]) for c in there]),
        "loss": sk.log_loss(y, p, labels=range(5)),
        "brier": np.mean(np.sum((p - np.eye(5)[y]) ** 2, 1)),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    scaled = (judged.logits / 1.7).softmax(1).numpy()
    assert found["loss_scaled"] == pytest.approx(sk.log_loss(y, scaled, labels=range(5)))
    by_class = judged.by_class()
    for name, score in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        each = score(y, told, average=None, labels=range(5), zero_division=0)
        assert by_class[name][:4].tolist() == pytest.approx(each[:4].tolist(), abs=1e-6)
        assert math.isnan(by_class[name][4])
    assert (judged.confusion().numpy() == sk.confusion_matrix(y, told, labels=range(5))).all()


def test_the_calibration_error_by_hand():
    """Eight pictures told with 0.75, five of them right; two with 0.55, both right."""
    p = torch.tensor([[0.75, 0.25]] * 8 + [[0.55, 0.45]] * 2).double()
    labels = torch.tensor([0] * 5 + [1] * 3 + [0] * 2)
    found = Classified(p.log(), labels, 5).scalars()
    assert found["ece"] == pytest.approx(0.8 * (0.75 - 5 / 8) + 0.2 * (1 - 0.55), abs=1e-6)
    assert found["brier"] == pytest.approx((5 * 2 * 0.25**2 + 3 * 2 * 0.75**2 + 2 * 2 * 0.45**2) / 10, abs=1e-6)


@pytest.mark.parametrize("missing", [True, False])
def test_each_resample_is_judged_as_if_it_were_the_data(missing):
    """Rare classes are missing from many."""
    judged = made(n=40, classes=8, missing=missing)
    values = Resamples(judged, 30).scalars()
    (blocks,) = drawn(40, 30)
    lacking = 0
    for b, places in enumerate(blocks):
        own = Classified(judged.logits[places], judged.labels[places], 3, 1.7)
        lacking += int((own.counts == 0).sum())
        wanted = own.scalars()
        assert {name: float(of[b]) for name, of in values.items()} == pytest.approx(wanted, abs=1e-6), b
    assert lacking > 5


def test_intervals_are_percentiles_of_the_same_draws():
    judged = made(n=200)
    one, again = judged.intervals(400), judged.intervals(400)
    assert one == again
    spread = math.sqrt(one["top1"].value * (1 - one["top1"].value) / 200)
    assert one["top1"].high - one["top1"].low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert all(of.low <= of.value <= of.high for name, of in one.items() if not name.startswith("ece"))
    assert math.isnan(judged.intervals(0)["f1"].low)


def test_areas_of_large_data_are_of_fewer_resamples_and_say_so(monkeypatch):
    monkeypatch.setattr(judging, "_RANKING", 60 * 200 * 5)
    found = made(n=200).intervals(400)
    assert {name: of.resamples for name, of in found.items() if of.resamples != 400} == {
        "auroc": 60,
        "average_precision": 60,
    }
    metrics = {name: found[name].data() for name in ("top1", "auroc")}
    said = list(_metrics({"bootstrap": {"resamples": 400}, "metrics": metrics, "per_class": {}}))
    assert [line.endswith(" *") for line in said] == [False, False, True, False]
    assert said[-1].startswith("  * of 60 resamples")


def test_the_temperature_is_the_one_with_the_least_loss():
    """Classes are drawn by the probabilities that logits say; logits are then told three times as large."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20_000, 4, generator=generator).double()
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = fitted_temperature(3 * logits, labels)
    assert found == pytest.approx(3, rel=0.04)
    tried = [float(cross_entropy(3 * logits / t, labels)) for t in (found, 0.99 * found, 1.01 * found)]
    assert min(tried) == tried[0]
    sure = torch.eye(2).double() * 5
    assert 1 / 50 <= fitted_temperature(sure, torch.tensor([0, 1])) < 1  # nothing to lose: bounded


def test_the_largest_confusions_come_first():
    found = largest_confusions(torch.tensor([[5, 2, 0], [3, 7, 3], [0, 1, 9]]), dict(enumerate("abc")))
    assert [tuple(one.values()) for one in found] == [
        ("b", "a", 3, 13),
        ("b", "c", 3, 13),
        ("a", "b", 2, 7),
        ("c", "b", 1, 10),
    ]
