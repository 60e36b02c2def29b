"""A run keeps what was told of each validation picture."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from composed import composer, finished, raw_of
from images import make_shards
from simulated_ranks import on_ranks

from tlx.data.shards.manifest import Manifest
from tlx.data.shards.targets import Target
from tlx.runs.predictions import Part, Predictions, file_of, read, read_file, write
from tlx.tasks import told
from tlx.tasks.classification import Classification
from tlx.tasks.multilabel import MultiLabel, bce
from tlx.tasks.multitask import MultiTask
from tlx.tasks.regression import Regression
from tlx.tasks.told import About
from tlx.train.answers import Answers, _in_order
from tlx.train.loop import fit

PHASES = {"each": {"lr": 0.02}, "feature_extraction": {"duration": "3ep"}, "fine_tuning": {"duration": "3ep"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 6, "val": 5}, size=24)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    raw = raw_of(shards, tmp_path_factory.mktemp("run") / "run", phases=PHASES, loop={"ema": {"decay": 0.5}})
    return finished(raw)


def test_best_and_last_of_each_phase_are_those_of_the_result(run, shards):
    result = json.loads((run / "result.json").read_text())
    val = Manifest.open(shards / "val")
    for phase, about in result["phases"].items():
        best, last, average = read(run, phase), read(run, phase, "last"), read(run, phase, "last.ema")
        assert best.matches(about["best"])
        assert (last.step, last.weights, average.step, average.weights) == (about["stop"], "raw", about["stop"], "ema")
        ends = ((last, about["last"]["val/top1"]), (average, about["last"]["ema/val/top1"]))
        for found, top1 in ((best, about["best"]["val/top1"]), *ends):
            [part] = found.parts
            assert part.right.mean() == pytest.approx(found.metrics["val/top1"]) == pytest.approx(top1)
            assert part.truth.tolist() == val.labels.tolist()
            assert (found.digest, found.samples, len(found.ids)) == (val.digest, 15, 15)
            assert part.names == val.classes
            assert part.confidence == pytest.approx(part.probabilities.max(1))
            loss = -np.log(part.of_truth.astype(float)).mean()
            assert loss == pytest.approx(found.metrics["val/loss"], abs=1e-3)


def test_a_run_that_stopped_and_went_on_has_those_of_one_that_did_not(run, shards, tmp_path, monkeypatch):
    usual = {"phases": PHASES, "loop": {"ema": {"decay": 0.5}}, "checkpoint": {"every": "1ep"}}
    compose = composer(shards, tmp_path / "run", monkeypatch, **usual)
    part = compose()
    monkeypatch.setattr(part.stop, "asked", lambda look=True: part.progress.step >= 12)
    assert not fit(part)
    part.saver.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "latest", ignore_errors=True)
    assert fit(compose())
    for phase in ("feature_extraction", "fine_tuning"):
        for which in ("best", "last", "last.ema"):
            assert file_of(run, phase, which).read_bytes() == file_of(tmp_path / "run", phase, which).read_bytes()


def test_what_cannot_be_written_is_told_and_the_training_goes_on(shards, tmp_path, monkeypatch):
    run = composer(shards, tmp_path / "run", monkeypatch, phases={"each": {"duration": "1ep"}})()
    (tmp_path / "run" / "predictions").write_text("in the way")
    assert fit(run)
    assert sum("predictions could not be written" in note for note in run.notes) >= 2


CLASS, TAGS, SIZE = (
    Target("kind", "class", ("a", "b", "c")),
    Target("tags", "labels", ("x", "y")),
    Target("size", "number"),
)
N = 7


def several():
    kind = Classification(CLASS, 5, None)  # no objective: nothing is trained
    tags = MultiLabel(TAGS, bce, None, 0.0, 0.4)
    size = Regression(SIZE, torch.nn.functional.mse_loss, (10.0,), (2.0,), 0.4)
    tasks = {"kind": kind, "tags": tags, "size": size}
    return MultiTask(tasks, dict.fromkeys(tasks, 1.0), learned=False, score={})


def answered(ranks, batches):
    logits = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
    logits[2, 1] = torch.nan
    own = {"kind": torch.tensor([0, 1, 2, -1, 0, 1, 2]), "tags": torch.tensor([[1, 0], [-1, 1]] * 3 + [[0, 0]])}
    own["size"] = torch.tensor([1.0, float("nan"), 3, 4, 5, 6, 7])[:, None]
    answers = Answers(several(), range(N))
    for batch in batches:
        answers.add(logits[batch], {k: v[batch] for k, v in own.items()}, torch.tensor([5, 3, 0, 1, 2, 4, 6])[batch])
    return _in_order([given for given in ranks.gather(answers.told()) if given[1]])


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
@pytest.mark.parametrize("most", [told.WHOLE, 1])
def test_every_form_is_the_same_on_any_number_of_ranks(ranks, most, tmp_path, monkeypatch):
    monkeypatch.setattr(told, "WHOLE", most)
    for ids, parts in on_ranks(ranks, answered, N):
        made = Predictions("p/1", "best", 3, "raw", "d", None, N, {"val/loss": 1.0}, ids, parts)
        write(tmp_path, made)
        found = read(tmp_path, "p/1")
        assert found.ids.tolist() == list(range(N))
        kind, tags, size = found.parts
        assert [part.about for part in found.parts] == [
            About("class", ("a", "b", "c"), "kind", "kind"),
            About("labels", ("x", "y"), "tags", "tags"),
            About("number", ("size",), "size", "size"),
        ]
        assert kind.is_whole is (most > 1)
        assert kind.truth.tolist() == [2, -1, 0, 1, 1, 0, 2]  # of ids 0, 1 ...
        assert kind.told[0] == -1  # not finite
        assert not kind.right[:2].any()
        assert np.isnan(kind.confidence[0])
        assert np.isnan(kind.of_truth[1])
        assert (kind.confidence[1:] > 1 / 3).all()
        assert ((kind.of_truth == kind.confidence)[2:] == kind.right[2:]).all()
        assert tags.truth.tolist()[0] == [1, 0]
        assert tags.told.dtype == bool
        assert size.known.sum() == N - 1
        assert size.told.shape == (N, 1)


def test_what_is_torn_odd_or_pickled_is_nothing(tmp_path):
    part = Part(About("class", ("a", "b"), "label"), {"truth": np.zeros(2, np.int32), "told": np.ones(2, np.int32)})
    whole = {**part.arrays, "probabilities": np.full((2, 2), 0.5, np.float16)}

    def made(**arrays):
        own = (Part(part.about, {**whole, **arrays}),)
        return Predictions("p", "best", 1, "raw", "d", None, 2, {}, np.arange(2), own)

    write(tmp_path, made())
    file = file_of(tmp_path, "p", "best")
    assert read_file(file).parts[0].told.tolist() == [1, 1]
    assert read(tmp_path, "other") is None
    file.write_bytes(file.read_bytes()[:300])
    assert read_file(file) is None
    for odd in (
        {"truth": np.array([0, 2], np.int32)},
        {"told": np.zeros(3, np.int32)},
        {"truth": np.array(["a", "b"])},
    ):
        write(tmp_path, made(**odd))
        assert read_file(file) is None, odd
    np.savez(file, about=np.array([{"format": 1}], dtype=object))
    assert read_file(file) is None
