"""Notes that a good colleague would make: each where it holds, and not where it does not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from told_runs import classified, labelled, numbered, told_run
from written_runs import finish, write_run

from tlx.report import notes
from tlx.report.chance import Difference, difference, wilson
from tlx.report.classes import by_class
from tlx.report.verdict import verdict
from tlx.runs.history import read_history
from tlx.runs.predictions import Predictions


def history_of(folder, val_loss, *, train_loss=None, accuracies=None):
    """A finished run of one phase; an evaluation an epoch."""
    count = len(val_loss)
    run = write_run(folder, phases=(("fine_tuning", count, "all"),), accuracies=())
    lines = []
    for i in range(count):
        row = {"step": 4 * (i + 1), "epoch": i + 1.0, "phase": "fine_tuning", "val/loss": val_loss[i]}
        row["train/loss"] = train_loss[i] if train_loss else 1 / (i + 1)
        row["val/top1"] = accuracies[i] if accuracies else 0.5
        lines.append(json.dumps(row))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    top = max(range(count), key=lambda i: accuracies[i] if accuracies else -i)
    best = {"metric": "val/top1", "value": accuracies[top] if accuracies else 0.5, "step": 4 * (top + 1)}
    own = {"step": best["step"], "weights": "raw", "val/top1": best["value"]}
    phases = {"fine_tuning": {"start": 0, "stop": 4 * count, "best": own, "last": own}}
    finish(run, best={**best, "phase": "fine_tuning", "weights": "raw"}, phases=phases)
    return read_history(run)


def test_overfitting_is_a_rise_of_validation_loss_while_training_loss_falls(tmp_path):
    said = notes.overfitting(history_of(tmp_path / "a", [1.0, 0.8, 0.9, 1.0, 1.1, 1.2]))
    assert "since epoch 2 validation loss has risen from 0.8 to 1.15" in said
    assert notes.overfitting(history_of(tmp_path / "b", [1.0, 0.8, 0.7, 0.65, 0.64, 0.64])) is None
    flat = [0.5] * 6
    assert notes.overfitting(history_of(tmp_path / "c", [1.0, 0.8, 0.9, 1.0, 1.1, 1.2], train_loss=flat)) is None


def test_still_improving_is_a_last_evaluation_that_is_the_best(tmp_path):
    rising = history_of(tmp_path / "a", [1.0] * 4, accuracies=[0.4, 0.5, 0.6, 0.7])
    assert "50.00 % to 70.00 %" in notes.still_improving(rising)
    assert notes.still_improving(history_of(tmp_path / "b", [1.0] * 4, accuracies=[0.4, 0.7, 0.6, 0.6])) is None
    assert notes.still_improving(history_of(tmp_path / "c", [1.0] * 4, accuracies=[0.6, 0.6995, 0.6999, 0.7])) is None


def told(part, digest="d"):
    return Predictions("p", "best", 1, "raw", digest, None, len(part.truth), {}, np.arange(len(part.truth)), (part,))


TRUTH = np.arange(400) % 4
NAMES = ("a", "b", "c", "d")


def test_a_difference_over_the_same_pictures_is_that_of_accuracies_and_covers_its_bootstrap():
    one, other = classified(NAMES, TRUTH, right=0.6), classified(NAMES, TRUTH, right=0.8, seed=1)
    found = difference(told(one), told(other))
    each = other.right.astype(float) - one.right.astype(float)
    assert found.value == pytest.approx(each.mean())
    rng = np.random.default_rng(1)
    means = [each[rng.integers(0, 400, 400)].mean() for _ in range(2000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)
    assert found.gained - found.lost == round(400 * found.value)
    assert not found.is_chance


def test_no_difference_is_told_of_other_pictures_and_none_is_chance():
    part = classified(NAMES, TRUTH)
    assert difference(told(part), told(part, digest="other")) is None
    same = difference(told(part), told(part))
    assert (same.value, same.is_chance, same.high) == (0.0, True, 3 / 400)


@pytest.mark.parametrize("make", [labelled, numbered])
def test_labels_and_numbers_have_differences_too(make):
    one, other = make(("x", "y"), 100), make(("x", "y"), 100)
    better = {"told": (one.truth + 0.1)} if make is numbered else {"probabilities": (one.truth == 1).astype(np.float16)}
    other = type(other)(other.about, {**one.arrays, **better})
    found = difference(told(one), told(other))
    assert found.value > 0
    assert not found.is_chance


def test_tuning_that_did_not_help_is_told_with_the_interval():
    said = notes.tuning("head", "all", Difference(0.004, -0.01, 0.018, 500, "accuracy"))
    assert "did not help measurably" in said
    assert "+0.4 points (95 %: -1.0 points to +1.8 points) on the same 500" in said
    assert "made it worse" in notes.tuning("head", "all", Difference(-0.05, -0.08, -0.02, 500, "accuracy"))
    assert notes.tuning("head", "all", Difference(0.05, 0.02, 0.08, 500, "accuracy")) is None


def test_a_class_that_was_never_predicted():
    part = classified(NAMES, TRUTH, right=1.0)
    assert notes.never(by_class(part)) is None
    part.told[part.told == 2] = 1
    assert "A class was never predicted: c (100 validation pictures)" in notes.never(by_class(part))


def test_few_validation_pictures_cannot_show_small_differences():
    few, many = classified(NAMES, TRUTH[:100]), classified(NAMES, np.arange(4000) % 4)
    said = notes.too_few(few)
    low, high = wilson(int(few.right.sum()), 100)
    assert f"between {100 * low:.1f} and {100 * high:.1f} %" in said
    assert notes.too_few(many) is None
    assert "every class has fewer than 10" in notes.small_classes(by_class(classified(NAMES, TRUTH[:20])))


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0
    assert all(math.isnan(v) for v in wilson(0, 0))


def test_test_data_that_were_looked_at_again():
    assert notes.looked(1, "shards/test") is None
    assert "looked at 3 times" in notes.looked(3, "shards/test")


def test_a_verdict_is_two_sentences(tmp_path):
    part = classified(("daisy", "fern", "rose"), np.arange(300) % 3)
    run = told_run(tmp_path / "run", [part])
    gain = ("feature_extraction", "fine_tuning", Difference(0.3, 0.25, 0.35, 300, "accuracy", 95, 5))
    said = verdict(read_history(run), told(part), gain, backbone="toys:small")
    assert said.startswith(
        "toys:small, trained from pretrained weights, tells 3 classes apart, right in 80.00 % of cases"
    )
    assert "fine_tuning gained 30.0 points of accuracy (95 %: +25.0 to +35.0)" in said
    unfinished = read_history(write_run(tmp_path / "going"))
    assert "is not done" in verdict(unfinished, None, None, backbone="toys:small")
