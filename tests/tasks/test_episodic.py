"""Episodic training: which pictures an episode has, its loss by numbers written down, evaluations, what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from commands import rows, write_config
from composed import composer, raw_of
from images import make_shards
from safetensors.torch import load_file
from survival import Stage, Whole, chain
from task_data import evaluated, make, of_class

from tlx.base.errors import UserError
from tlx.data.stream.episodes import EpisodeOrder, Episodes, by_class, draw
from tlx.plan.config import parse
from tlx.tasks import Truth
from tlx.train.build import plan
from tlx.train.loop import fit
from tlx.train.step import Updater
from tlx.use.evaluate import Options, evaluate

SMALL = {"width": 2, "ways": 2, "shots": 2, "queries": 1, "val_episodes": 40}
TASK = {"name": "episodic", "width": 32, "ways": 2, "shots": 2, "queries": 2, "val_episodes": 40}
GROUPED = {"name": "toys:small", "weights": "none", "args": {"norm": "group"}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=4, per_class={"train": 7, "val": 5}, size=24)


def said(shards, **over):
    """Two episodes of 8 pictures a step, of everything but class3, which judges with class1."""
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 16, "workers": 0}
    plain = {
        "task": {**TASK, "novel": ["class1", "class3"]},
        "head": "features",
        "backbone": GROUPED,
        "unfreeze": "all",
        "phases": {"each": {"lr": 0.01, "duration": 7}},
        "evaluate": {"every": 3},
        "checkpoint": {"every": 2},
    }
    return {**plain, **over, "data": {**data, **over.get("data", {})}}


def order(epoch=0, seed=0, **over):
    wanted = {"ways": 2, "shots": 1, "queries": 2, "per_epoch": 5, **over}
    rows_of = by_class(np.arange(24) % 4, left_out=(1,))
    return EpisodeOrder(rows_of, Episodes(**wanted), seed, epoch, np.array([10, 20, 24]))


def test_an_episode_has_distinct_pictures_of_its_classes_class_by_class():
    shown = np.concatenate([order(epoch).ids(0, 30) for epoch in range(20)]).reshape(-1, 2, 3)
    assert (shown % 4 == shown[:, :, :1] % 4).all()
    assert (shown[:, 0, 0] % 4 != shown[:, 1, 0] % 4).all()
    assert all(len(set(episode.ravel().tolist())) == 6 for episode in shown)
    assert set((shown % 4).ravel().tolist()) == {0, 2, 3}
    assert len(set(shown.ravel().tolist())) == 18  # all pictures of these


def test_any_part_of_an_epoch_is_the_same_as_the_whole():
    whole = order(3).ids(0, 30)
    assert order(3).ids(7, 23).tolist() == whole[7:23].tolist()
    assert order(3).turns(4, 14).tolist() == [0, 0, *[1] * 6, 2, 2]
    assert order(3, seed=1).ids(0, 30).tolist() != whole.tolist()
    assert order(2).ids(0, 30).tolist() != whole.tolist()
    first = order(3).shards_for(0, 30)
    assert sorted(first) == [0, 1, 2]
    assert first[0] == np.searchsorted([10, 20, 24], whole[0], side="right")


def test_classes_and_pictures_are_equally_likely():
    rows_of = {c: np.arange(8) + 8 * c for c in range(5)}
    drawn = [draw(rows_of, 2, 2, seed=3, number=n) for n in range(2000)]
    classes = np.bincount(np.concatenate([one for one, _ in drawn]), minlength=5)
    pictures = np.bincount(np.concatenate([one.ravel() for _, one in drawn]), minlength=40)
    assert np.abs(classes - 800).max() < 4 * math.sqrt(800 * 0.6)
    assert np.abs(pictures - 200).max() < 4.5 * math.sqrt(200)


def test_the_loss_is_that_of_the_paper_by_numbers():
    task = make("episodic", of_class("a", "b", "c"), **SMALL)
    # prototypes (1, 0) and (0, 2); the queries (1, 1) and (0, 1)
    episode = [[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 3.0], [0.0, 1.0]]
    # squared distances: 1 and 2 of the first, 2 and 1 of the second, both right by a margin of 1
    one = -math.log(math.exp(-1) / (math.exp(-1) + math.exp(-2)))
    nothing = Truth({"label": torch.zeros(12, dtype=torch.int64)})
    assert task.loss(torch.tensor(episode), nothing).item() == pytest.approx(2 * one)
    other = [[x + 5, y - 3] for x, y in episode]  # distances do not change, and episodes do not meet
    assert task.loss(torch.tensor(episode + other), nothing).item() == pytest.approx(4 * one)
    assert task.weights({"label": np.zeros(12)})[:, 0].tolist() == [0, 0, 1] * 4
    assert task.hits(torch.tensor(episode + other), nothing.own).tolist() == [4, 4]
    swapped = [*episode[:2], episode[5], *episode[3:5], episode[2]]
    assert task.hits(torch.tensor(swapped), nothing.own).tolist() == [0, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_evaluation_is_the_mean_over_episodes_on_any_number_of_ranks(ranks):
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    output = torch.randn(40, 2) + 2 * torch.stack([labels == 1, labels == 3], 1)
    task = make("episodic", of_class("a", "b", "c", "d"), **SMALL, novel=["b", "d"], val_queries=3)
    found = evaluated(task, output, labels, ranks, ids=torch.arange(40))
    own = {c: np.flatnonzero(labels.numpy() == c) for c in (1, 3)}
    each, losses = [], []
    for number in range(40):
        _, places = draw(own, 2, 5, seed=0, number=number)
        support, queries = output[places[:, :2]].mean(1), output[places[:, 2:]].flatten(0, 1)
        logits = -torch.cdist(queries.double(), support.double()).square()
        truth = torch.tensor([0, 0, 0, 1, 1, 1])
        each.append(float((logits.argmax(1) == truth).double().mean()))
        losses.append(float(-logits.log_softmax(1)[range(6), truth].mean()))
    assert 0.6 < found["accuracy"] < 1
    assert found["accuracy"] == pytest.approx(np.mean(each))
    assert found["margin_of_error"] == pytest.approx(1.96 * np.std(each, ddof=1) / math.sqrt(40))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["samples"] == 40


def test_outputs_that_are_not_finite_are_wrong_and_too_few_pictures_no_answer():
    labels = torch.arange(12) % 2
    output = torch.stack([labels, labels], 1).float()
    task = make("episodic", of_class("a", "b"), **SMALL)
    assert evaluated(task, output, labels)["accuracy"] == 1
    output[labels == 1] = math.nan
    found = evaluated(task, output, labels)
    assert (found["accuracy"], found["nonfinite"]) == (0, 6)
    assert math.isnan(evaluated(task, output[:4], labels[:4])["accuracy"])


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"data": {"batch": 20}}, "20 pictures are no whole number of episodes of 8 pictures .*data.batch=16 or 24"),
        ({"loop": {"micro_batch": 4}}, r"micro-batches of 4 pictures split episodes.*one of 8, 16"),
        ({"world": {"device": "cpu", "size": 3}}, "2 episodes cannot be dealt to 3 ranks.*data.batch=24"),
        ({"mix": {"mixup": 0.2}}, "mix: .*a mixed picture is of two classes"),
        ({"data": {"sampling": {"method": "balanced"}}}, "data.sampling: "),
        ({"data": {"window": 2}}, "data.window: "),
        ({"head": "prototype"}, "head: .*begins as what is known of classes"),
        ({"objective": {"name": "cross_entropy", "class_weights": "balanced"}}, "objective: .*does not minimise it"),
        (
            {"task": {**TASK, "shots": 6, "val_shots": 2}, "data": {"batch": 32}},
            "8 pictures of a class: class0 7, class1 7",
        ),
        ({"task": {**TASK, "val_queries": 4}}, "data.val: .*6 pictures of a class: class0 5, .*task.val_shots"),
        ({"task": {**TASK, "novel": ["class1"]}}, "novel classes: an episode of 2 ways, and 1 class to draw from"),
        ({"task": {**TASK, "novel": ["clas1"]}}, 'no class "clas1"; did you mean "class1"'),
        ({"task": {**TASK, "episodes": 5}}, "task.episodes: 5 episodes are no whole number of steps.*4 or 6"),
        ({"task": {**TASK, "width": 31}}, "32 features, and the task asks for 31 outputs.*task.width=32"),
        ({"task": {"name": "multitask", "tasks": {"a": TASK, "b": "classification"}}}, "its batches are episodes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_do(shards, tmp_path, over, words):
    with pytest.raises(UserError) as refused:
        plan(parse(raw_of(shards, tmp_path / "run", **said(shards, **over))))
    assert re.search(words, " ".join(str(refused.value).split())), str(refused.value)


def test_the_plan_tells_episodes(shards, tmp_path):
    made, text = plan(parse(raw_of(shards, tmp_path / "run", **said(shards))))
    text = " ".join(text.split())
    assert made.steps_per_epoch == 1
    assert "an epoch is 2 episodes, 2 a step: 2-way 2-shot, 2 queries a class, drawn from 2 classes" in text
    assert "judged by 40 episodes: 2-way 2-shot, 2 queries a class, of 2 novel classes" in text
    _, text = plan(parse(raw_of(shards, tmp_path / "run", **said(shards, backbone={**GROUPED, "args": {}}))))
    assert "are of a batch of episodes" in " ".join(text.split())


def test_a_training_that_breaks_goes_on_to_the_same_bits_and_its_backbone_is_taken(shards, tmp_path, monkeypatch):
    own = said(shards)
    compose = composer(shards, tmp_path, monkeypatch, **own)
    whole = compose(tmp_path / "whole")
    labels = whole.stream.manifest.labels
    for batch in whole.stream.batches(0, 3):
        shown = labels[batch.ids.numpy()].reshape(2, 2, 4)
        assert (shown == shown[:, :, :1]).all()
        assert set(shown.ravel().tolist()) == {0, 2}
        assert batch.total == 8  # queries
    fit(whole)
    broken, update = compose(tmp_path / "broken"), Updater.update

    def breaks(self, phase_model, step, batches, **options):
        if step == 5:
            raise KeyboardInterrupt
        return update(self, phase_model, step, batches, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "update", breaks)
        with pytest.raises(KeyboardInterrupt):
            fit(broken)
    broken.saver.close()
    resumed = compose(tmp_path / "broken")
    fit(resumed)
    assert rows(resumed.folder) == rows(whole.folder)
    after = whole.net.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in resumed.net.state_dict().items())
    assert whole.progress.best["metric"] == "val/accuracy"
    whole.saver.close()
    resumed.saver.close()

    look = evaluate(tmp_path / "whole", Options(str(shards / "val"), tmp_path / "out.csv"))
    best = whole.progress.phases["fine_tuning"]["best"]
    for name in ("loss", "accuracy", "margin_of_error"):
        assert look["metrics"][name]["value"] == pytest.approx(best[f"val/{name}"])
    assert look["bootstrap"]["resamples"] == 0
    assert (tmp_path / "out.csv").read_text().startswith("file,true/label,feature 0,feature 1,")

    backbone = {**GROUPED, "weights": str(tmp_path / "whole")}
    taken = compose(tmp_path / "next", task="classification", head="linear", backbone=backbone)
    best = load_file(tmp_path / "whole" / "checkpoints" / "best" / "model.safetensors")
    own = taken.net.state_dict()
    assert own["fc.weight"].shape == (4, 32)
    assert all(torch.equal(best[name], own[name]) for name in own if name.startswith("features."))
    taken.saver.close()


def to_be_killed(shards, out):
    phases = {"each": {"lr": 0.01, "duration": 64}}
    over = {"phases": phases, "optimizer": {"name": "sgd", "momentum": 0.9}, "evaluate": {"every": 7}}
    return raw_of(shards, out / "run", **said(shards, **over, checkpoint={"every": 5}, track={"every": 1}))


@pytest.mark.slow
def test_kills_at_random_change_no_bit(shards, tmp_path):
    stage = Stage(tmp_path / "logs", write_config(tmp_path / "c.yaml", to_be_killed(shards, tmp_path)))
    whole = Whole.of(stage, tmp_path / "whole")
    assert chain(stage, tmp_path / "killed", 1, whole, kills=4) == []
    assert stage.deaths.total() >= 2
    assert [ending for ending in stage.endings if ending] == []


@pytest.mark.slow
def test_killed_on_two_ranks_and_taken_up_by_one(shards, tmp_path):
    stage = Stage(tmp_path / "logs", write_config(tmp_path / "c.yaml", to_be_killed(shards, tmp_path)))
    stage.whole(tmp_path / "alone", ranks=1)
    kill = "1:tlx.train.step.Updater.update:23:rank"
    assert stage.start(tmp_path / "elastic", ranks=2, KILL_AT=kill).code() != 0
    stage.whole(tmp_path / "elastic", ranks=1)
    assert [ending for ending in stage.endings if ending] == []
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "elastic"), strict=True):
        for key in ("train/loss", "val/loss", "val/accuracy"):
            assert other.get(key) == pytest.approx(one.get(key), rel=1e-4)


def test_shards_of_pictures_alone_have_no_episodes(shards, tmp_path):
    own = said(shards)
    own["data"] = {**own["data"], "train": "nowhere", "val": None, "expected": {"train": 40}}
    with pytest.raises(UserError, match="episodes are of classes, and these shards have none") as refused:
        plan(parse(raw_of(shards, tmp_path / "run", **own)))
    assert "to draw from" not in str(refused.value)
