"""What predictions say by class agrees with scikit-learn and torchmetrics, and with what a person counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report
from told_runs import classified, labelled, numbered
from torchmetrics.functional.classification import multiclass_calibration_error

from tlx.report.classes import (
    BINS,
    by_class,
    by_column,
    confusion,
    largest_confusions,
    most_confused,
    never_told,
    reliability,
    similar_order,
)
from tlx.report.samples import galleries, suspects
from tlx.runs.predictions import Part

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def part():
    truth = np.random.default_rng(0).integers(0, 3, 200)  # d has no picture
    return classified(NAMES, truth)


def test_precision_recall_and_f1_are_those_of_scikit_learn(part):
    expected = classification_report(part.truth, part.told, labels=range(3), output_dict=True, zero_division=np.nan)
    for i, row in enumerate(by_class(part)[:3]):
        own = expected[str(i)]
        assert [row.precision, row.recall, row.f1] == pytest.approx([own["precision"], own["recall"], own["f1-score"]])
        assert row.support == own["support"]
    last = by_class(part)[3]
    assert (last.support, last.told > 0, np.isnan(last.f1)) == (0, True, True)


def test_of_labels_unknown_ones_count_for_nothing():
    part = labelled(("x", "y"), 50)
    known, yes = part.truth[:, 0] >= 0, part.truth[:, 0] == 1
    row = by_class(part)[0]
    assert (row.support, row.told) == (yes.sum(), (part.told[:, 0] & known).sum())


def test_confusions_by_hand():
    part = classified(NAMES, [0, 0, 1, 1, 2, -1], right=1.0)
    part.told[:] = [0, 1, 0, 1, 1, 0]  # the last has no truth
    assert confusion(part).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = [(c.truth, c.told, c.pictures, c.of) for c in largest_confusions(part, 2)]
    assert found == [("a", "b", 1, 2), ("b", "a", 1, 2)]
    assert never_told(by_class(part)) == ["c"]


def test_confused_classes_stand_together():
    matrix = np.diag([9] * 6)
    matrix[0, 5], matrix[5, 2], matrix[1, 4] = 5, 3, 4
    order = similar_order(matrix)
    assert sorted(order) == list(range(6))
    at = {c: order.index(c) for c in range(6)}
    assert abs(at[0] - at[5]) == abs(at[5] - at[2]) == abs(at[1] - at[4]) == 1
    pairs = np.diag([9] * 4)
    pairs[0, 1], pairs[2, 3], pairs[1, 2] = 8, 7, 5  # two chains, joined at their ends
    assert similar_order(pairs) in ([0, 1, 2, 3], [3, 2, 1, 0])


def test_of_very_many_classes_the_most_confused_are_chosen():
    matrix = np.diag([9] * 300)
    matrix[7, 200], matrix[200, 7], matrix[30, 31], matrix[31, 32] = 3, 3, 5, 1
    assert most_confused(matrix, 4).tolist() == [7, 30, 31, 200]
    assert most_confused(np.diag([9] * 3), 2).tolist() == [0, 1]


def test_calibration_error_is_that_of_torchmetrics(part):
    found = reliability(part)
    p = torch.from_numpy(part.probabilities.astype(np.float32))
    expected = multiclass_calibration_error(p, torch.from_numpy(part.truth).long(), 4, n_bins=BINS, norm="l1")
    assert found.ece == pytest.approx(float(expected), abs=1e-3)
    assert found.count.sum() == 200
    assert found.gap == pytest.approx(part.confidence.mean() - part.right.mean(), abs=1e-3)


def test_errors_by_column():
    row, other = by_column(numbered(("h", "w"), 40))
    assert (row.known, other.known) == (39, 40)
    assert row.mae < row.rmse < row.worst


def test_mistakes_come_by_confidence_and_hits_by_doubt(part):
    ids = np.arange(200) + 1000
    mistakes, hits = galleries(part, ids, most=5)
    wrong = np.flatnonzero(~part.right)
    assert mistakes.pictures[0].id == 1000 + wrong[part.confidence[wrong].argmax()]
    assert len(mistakes.pictures) == len(hits.pictures) == 5
    sure = [part.confidence[p.id - 1000] for p in hits.pictures]
    assert sure == sorted(sure)
    assert "told" in mistakes.pictures[0].lines[1]


def test_a_wrong_label_is_suspect():
    truth = np.repeat(np.arange(4), 50).astype(np.int32)
    p = np.full((200, 4), 0.01)
    p[np.arange(200), truth] = 0.97
    noted = truth.copy()
    noted[7] = 3
    part = Part(
        classified(NAMES, noted).about,
        {"truth": noted, "told": truth, "probabilities": p.astype(np.float16)},
    )
    count, gallery = suspects(part, np.arange(200))
    assert (count, gallery.pictures[0].id) == (1, 7)
    assert gallery.pictures[0].lines[0].startswith("is d")
