"""Whole trainings of every task: the same on any number of ranks, and after kills; the loss by a loop written apart."""

from __future__ import annotations

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from commands import environment, rows, write_config
from composed import composer
from safetensors.torch import load_file
from survival import Stage, Whole, chain
from task_trainings import SCENARIOS, SEVERAL, VAL, make_shards, raw_of
from torch.nn.functional import softplus

from tlx.data.shards.manifest import Manifest
from tlx.runs.predictions import read
from tlx.train.loop import fit
from tlx.train.step import Updater, by_step

QUICK = ("uncertain", "uncertain_mixed", "cached")
"""Scenarios that two ranks train in the quick tier; the rest, and three ranks, are slow."""

PAIRS = [
    pytest.param(world, name, marks=[] if world == 2 and name in QUICK else pytest.mark.slow)
    for world in (2, 3)
    for name in SCENARIOS
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request, shards):
    """What the chosen tests look at: OUT/<world>/<scenario>."""
    own = [i for i in request.session.items if i.path == Path(__file__) and {"world", "name"} <= set(i.fixturenames)]
    chosen = {(i.callspec.params["world"], i.callspec.params["name"]) for i in own}
    names = {world: sorted({name for w, name in chosen if w == world}) for world in {w for w, _ in chosen}}
    names[1] = sorted({"equal" if name == "equal_accumulated" else name for _, name in chosen})
    out = tmp_path_factory.mktemp("tasks")

    def launch(world: int):
        words = [str(out / str(world)), str(shards), *names[world]]
        return forked.run(words, environment(), ranks=world, entry="task_trainings:main")

    with ThreadPoolExecutor() as pool:
        for world, done in zip(sorted(names), pool.map(launch, sorted(names)), strict=True):
            assert done.returncode == 0, f"{world} ranks:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return out


def weights(run, which="model"):
    return load_file(run / "checkpoints" / "latest" / f"{which}.safetensors")


def assert_same_run(one, other, rel=2e-6):
    """Equal up to the order of sums: the losses of steps, every metric of every evaluation, the weights."""
    pairs = list(zip(rows(one), rows(other), strict=True))
    for before, after in pairs:
        assert before.keys() == after.keys()
        for key, value in before.items():
            same = value == after[key] or after[key] == pytest.approx(value, rel=rel, abs=rel, nan_ok=True)
            assert same, (before["step"], key, value, after[key])
    whole, dealt = (json.loads((run / "result.json").read_text())["last"] for run in (one, other))
    assert whole.keys() == dealt.keys()
    for key, value in whole.items():
        if isinstance(value, list):
            assert [v is None for v in dealt[key]] == [v is None for v in value]
            pairs = [(a, b) for a, b in zip(dealt[key], value, strict=True) if b is not None]
            assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=rel, abs=rel)
    assert dealt["val/samples"] == whole["val/samples"] == VAL
    for phase in ("feature_extraction", "fine_tuning") if (one / "predictions").exists() else ():
        assert_same_predictions(read(one, phase, "last"), read(other, phase, "last"))
        assert read(other, phase).matches(json.loads((other / "result.json").read_text())["phases"][phase]["best"])
    for which in ("model", "ema") if (one / "checkpoints/latest/ema.safetensors").exists() else ("model",):
        first, second = weights(one, which), weights(other, which)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert (tensor - second[key]).abs().max() < 2 * rel * max(float(tensor.abs().max()), 0.1), (which, key)


def assert_same_predictions(one, other):
    """Each picture once, in the order of ids, whatever rank it was on."""
    assert one.ids.tolist() == other.ids.tolist() == list(range(VAL))
    for whole, dealt in zip(one.parts, other.parts, strict=True):
        assert whole.about == dealt.about
        for name, array in whole.arrays.items():
            np.testing.assert_allclose(array, dealt.arrays[name], rtol=2e-3, atol=1e-3 * (array.dtype.kind == "f"))


@pytest.mark.parametrize(("world", "name"), PAIRS)
def test_any_number_of_ranks_makes_the_same_run(trained, world, name):
    alone = trained / "1" / ("equal" if name == "equal_accumulated" else name)
    assert_same_run(alone, trained / str(world) / name)


def corn(logits, rank):
    """Shi, Cao & Raschka 2021: output k learns whether the rank is above k from ranks that are not below k."""
    asked = logits[: rank + 1]
    return torch.stack([softplus(-x) if rank > k else softplus(x) for k, x in enumerate(asked)]).sum()


def asymmetric(p, labels):
    """Ridnik et al. 2021, of the labels that are known."""
    below = (p - 0.05).clamp(min=0)
    applies, not_ = -(1 - p) * p.log(), -(below**4) * (1 - below).log()
    return torch.stack([applies[i] if y else not_[i] for i, y in enumerate(labels) if y >= 0]).sum()


def squares(outputs, values, mean, std):
    known = [i for i, value in enumerate(values) if not math.isnan(value)]
    return torch.stack([(outputs[i] - (values[i] - mean[i]) / std[i]) ** 2 for i in known]).mean()


def by_hand(outputs, targets, box, log_variances):
    """The loss of a whole batch from the formulas: for each task the mean over samples that have its target.

    Args:
        box: mean and standard deviation of that target's columns.
    """
    species, colour, rare, tags, boxes = outputs[:, :16].split([3, 3, 2, 4, 4], 1)
    own = {name: values.tolist() for name, values in targets.items()}
    losses = [
        [-o.log_softmax(0)[y] for o, y in zip(species, own["label"], strict=True)],
        [-o.log_softmax(0)[y] for o, y in zip(colour, own["colour"], strict=True) if y >= 0],
        [corn(o, y) for o, y in zip(rare, own["rare"], strict=True) if y >= 0],
        [asymmetric(o.sigmoid(), y) for o, y in zip(tags, own["tags"], strict=True) if max(y) >= 0],
        [squares(o, y, *box) for o, y in zip(boxes, own["box"], strict=True) if not all(map(math.isnan, y))],
    ]
    means = {task: torch.stack(of_samples).mean() for task, of_samples in enumerate(losses) if of_samples}
    if log_variances is None:
        return sum(means.values()), means
    return sum((-log_variances[task]).exp() * loss + log_variances[task] for task, loss in means.items()), means


@pytest.mark.parametrize("weighting", ["equal", "uncertainty"])
def test_steps_are_those_of_a_loop_written_apart(shards, tmp_path, monkeypatch, weighting):
    said = raw_of("equal_accumulated", tmp_path, shards) | {
        "task": {**SEVERAL, "weighting": weighting},
        "optimizer": {"name": "sgd", "momentum": 0.0},
        "unfreeze": "all",
        "phases": {"each": {"lr": 0.05, "duration": 4}},
    }
    run = composer(shards, tmp_path / "run", monkeypatch)(**said)
    apart, index = copy.deepcopy(run.net), Manifest.open(shards / "train")
    whole = index.values("box").astype(np.float64)
    box = np.nanmean(whole, 0), np.nanstd(whole, 0)
    fit(run)
    seen, losses = [], []
    for _, batches in by_step(run.stream.batches(0, 4)):
        parts = list(batches)
        ids = torch.cat([part.ids for part in parts])
        mean, std = (torch.tensor(run.identity["input"][key])[:, None, None] for key in ("mean", "std"))
        outputs = apart((torch.cat([part.images for part in parts]) / 255 - mean) / std)
        targets = {name: index.values(name)[ids] for name in ("label", "colour", "rare", "tags", "box")}
        constants = apart.head.constants if weighting == "uncertainty" else None
        loss, means = by_hand(outputs, targets, box, constants)
        apart.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in apart.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        seen.append(set(means))
        losses.append(loss.item())
    assert {2} in [set(range(5)) - tasks for tasks in seen]  # a batch without the rare one
    assert set(range(5)) in seen
    told = [row["train/loss"] for row in rows(run.folder) if "train/lr_head" in row]
    assert told == pytest.approx(losses, rel=1e-6)
    moved = copy.deepcopy(apart).state_dict()
    for name, tensor in run.net.state_dict().items():
        assert (tensor - moved[name]).abs().max() < 1e-6, name
    assert weighting == "equal" or run.net.head.constants.abs().min() > 1e-3


def to_be_killed(shards, out, **args):
    """Several tasks with missing targets, everything that a checkpoint holds, checkpoints within epochs."""
    return raw_of("uncertain_mixed", out, shards) | {
        "backbone": {"name": "toys:small", "weights": "none", "args": {"norm": "group", **args}},
        "optimizer": "adamw",
        "loop": {"ema": {"decay": 0.8}},
        "phases": {
            "each": {"lr": 0.01},
            "feature_extraction": {"duration": 30},
            "fine_tuning": {"duration": "34 steps"},
        },
        "evaluate": {"every": 7},
        "checkpoint": {"every": 5},
    }


def test_a_run_that_breaks_within_an_epoch_goes_on_to_the_same_bits(shards, tmp_path, monkeypatch):
    said = to_be_killed(shards, tmp_path, dropout=0.1) | {
        "unfreeze": "all",
        "phases": {"each": {"lr": 0.01, "duration": 14}},
    }
    compose = composer(shards, tmp_path, monkeypatch, **{key: value for key, value in said.items() if key != "run"})
    whole = compose(tmp_path / "whole")
    fit(whole)
    broken, update = compose(tmp_path / "broken"), Updater.update

    def breaks(self, phase_model, step, batches, **options):
        if step == 9:
            raise KeyboardInterrupt
        return update(self, phase_model, step, batches, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Updater, "update", breaks)
        with pytest.raises(KeyboardInterrupt):
            fit(broken)
    broken.saver.close()
    resumed = compose(tmp_path / "broken")
    fit(resumed)
    assert resumed.progress.step == 14
    assert rows(resumed.folder) == rows(whole.folder)
    for one, other in ((resumed.net, whole.net), (resumed.ema.module, whole.ema.module)):
        after = other.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in one.state_dict().items())
    assert resumed.progress.best == whole.progress.best


@pytest.mark.slow
def test_kills_at_random_change_no_bit(shards, tmp_path):
    stage = Stage(tmp_path / "logs", write_config(tmp_path / "c.yaml", to_be_killed(shards, tmp_path, dropout=0.1)))
    whole = Whole.of(stage, tmp_path / "whole")
    found = [line for seed in (1, 2) for line in chain(stage, tmp_path / f"run{seed}", seed, whole, kills=5)]
    assert found == []
    assert stage.deaths.total() >= 4
    assert [ending for ending in stage.endings if ending] == []


@pytest.mark.slow
def test_killed_and_taken_up_by_other_numbers_of_ranks(shards, tmp_path):
    raw = to_be_killed(shards, tmp_path) | {"optimizer": {"name": "sgd", "momentum": 0.9}}
    stage = Stage(tmp_path / "logs", write_config(tmp_path / "c.yaml", raw))
    stage.whole(tmp_path / "alone", ranks=1)
    for ranks, update in ((2, 13), (1, 20)):
        kill = f"{ranks - 1}:tlx.train.step.Updater.update:{update}:rank"
        assert stage.start(tmp_path / "elastic", ranks=ranks, KILL_AT=kill).code() != 0
    stage.whole(tmp_path / "elastic", ranks=3)
    assert [ending for ending in stage.endings if ending] == []
    assert_same_run(tmp_path / "alone", tmp_path / "elastic", rel=1e-4)
