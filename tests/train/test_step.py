"""One update: what is not finite moves nothing, weights in the loss, statistics, recomputation."""

from __future__ import annotations

import pytest
import torch
import toys
from commands import status, tlx, write_config
from images import make_shards
from torch import nn
from updates import batch, classifying, phase_model

from tlx import models
from tlx.base.errors import UserError
from tlx.runs.progress import Mean
from tlx.tasks.objectives import cross_entropy
from tlx.train.recompute import recompute_blocks


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told(fused):
    updater, net = phase_model(torch.optim.AdamW, fused=fused)
    tally, _, _ = updater.update(net, 0, [batch()])
    assert tally[3] == 0
    before = [p.detach().clone() for p in net.parameters]
    for parameter in net.parameters[:1]:
        parameter.register_hook(lambda g: g * float("nan"))
    tally, _, _ = updater.update(net, 1, [batch()])
    assert tally[3] == 1
    assert all(torch.equal(p, b) for p, b in zip(net.parameters, before, strict=True))


def test_the_tally_counts_loss_right_ones_and_samples():
    updater, net = phase_model(torch.optim.SGD)
    tally, bad, total = updater.update(net, 0, [batch()])
    assert (tally[2], total, bad) == (4, 4.0, [])
    assert 0 < tally[0] / total < 10
    assert 0 <= tally[1] <= 4


def test_normalising_is_torchvisions():
    from torchvision.transforms.v2 import functional

    updater, _ = phase_model(torch.optim.SGD)
    images, spec = batch().images, models.load("toys:small", classes=3, weights="none").input
    expected = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), spec.mean, spec.std)
    assert torch.allclose(updater.normalise(images), expected, atol=1e-5)


def test_class_weights_smoothing_mixing_and_auxiliary_logits_add_up():
    from types import SimpleNamespace

    from torch.nn.functional import cross_entropy as torchs

    logits, labels, others = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 1, 0, 2, 2, 0])
    weights = [1.0, 3.0, 0.5]
    objective = cross_entropy([5, 5, 5], class_weights=weights, label_smoothing=0.1)
    total = sum(weights[i] for i in labels)
    mean = torchs(logits, labels, weight=torch.tensor(weights), label_smoothing=0.1)
    assert torch.allclose(objective.loss(logits, labels, None) / total, mean)
    mix = SimpleNamespace(partner_labels=others, lam=torch.full((6,), 0.7))
    soft = 0.7 * objective.loss(logits, labels, None) + 0.3 * objective.loss(logits, others, None)
    assert torch.allclose(objective.loss(logits, labels, mix), soft)
    assert torch.allclose(objective.loss((logits, logits), labels, None), 1.4 * objective.loss(logits, labels, None))
    assert cross_entropy([6, 3, 1], class_weights="balanced").class_weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])  # which gives every sample a share of the other classes' loss
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_whose_classes_weigh_nothing_has_a_gradient_of_zero(mixed, smoothing):
    from dataclasses import replace

    from tlx.data.stream.mix import plain

    updater, net = phase_model(torch.optim.SGD)
    objective = cross_entropy([1, 1, 1], class_weights=[0.0, 1.0, 0.0], label_smoothing=smoothing)
    updater.__dict__["task"] = classifying(objective)
    weightless = replace(batch((0, 2, 2, 0)), total=0.0)
    if mixed:
        weightless = replace(weightless, mix=plain(weightless.labels.numpy(), {"label": weightless.labels.numpy()}))
    before = [p.detach().clone() for p in net.parameters]
    tally, _, total = updater.update(net, 0, [weightless])
    assert (tally[0], tally[2], tally[3], total) == (0.0, 4, 0, 0.0)  # no loss, four samples seen, all finite
    assert all(not p.grad.any() for p in net.parameters)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters, before, strict=True))


def test_a_stretch_that_weighs_nothing_has_no_mean_loss():
    reading = {"loss": 0.0, "total": 0.0, "correct": 1.0, "seen": 4.0, "told": 4.0}
    mean = Mean()
    mean.add(reading)
    assert mean.take() == {"train/top1": 0.25}
    mean.add(reading)
    mean.add({"loss": 6.0, "total": 4.0, "correct": 3.0, "seen": 4.0, "told": 4.0})
    assert mean.take() == {"train/loss": 1.5, "train/top1": 0.5}
    assert mean.take() == {}


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_class_weights_out_of_range_are_refused(weights):
    with pytest.raises(UserError, match="finite numbers of 0 or more, and not all 0"):
        cross_entropy([3, 3], class_weights=weights)


def test_an_epoch_that_weighs_nothing_is_refused_by_its_classes(tmp_path, monkeypatch):
    from tlx.data.shards.manifest import Manifest
    from tlx.data.stream.stream import ShardStream

    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 2}, size=16)
    manifest = Manifest.open(str(shards / "train"))
    counts = manifest.counts()

    def stream(weights):
        return ShardStream(manifest, batch=2, seed=0, transform=lambda x: x, class_weights=weights)

    stream([0.0, 0.0, 1.0])
    counts[2] = 0  # a class without samples
    monkeypatch.setattr(Manifest, "counts", lambda _: counts)
    with pytest.raises(UserError, match="every class that an epoch shows weighs 0: class0, class1"):
        stream([0.0, 0.0, 1.0])


def test_recomputed_blocks_keep_names_gradients_and_statistics():
    torch.manual_seed(0)
    plain, again = toys.small(3), toys.small(3)
    again.load_state_dict(plain.state_dict())
    recompute_blocks(again, ["features.0", "features.1", "features.2"])
    images = torch.randn(4, 3, 32, 32)
    for net in (plain, again):
        net(images).square().sum().backward()
    assert plain.state_dict().keys() == again.state_dict().keys()
    for (name, a), (_, b) in zip(plain.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert isinstance(again.features[0][1], nn.BatchNorm2d)


def test_a_loss_that_explodes_is_a_fault_that_says_where(tmp_path):
    shards = make_shards(tmp_path / "s", classes=2, per_class={"train": 8, "val": 2}, size=16)
    raw = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 4, "workers": 0},
        "input": {"size": 16},
        "backbone": {"name": "toys:small", "weights": "none", "args": {"norm": "group"}},
        "unfreeze": "all",
        "phases": {"each": {"lr": 1e30, "duration": "2ep"}},
        "optimizer": {"name": "sgd", "momentum": 0.9},
    }
    done = tlx("train", write_config(tmp_path / "c.yaml", raw), is_forked=True)
    assert done.returncode == 1
    assert "the loss or gradient is not finite at step" in done.stderr
    assert "nothing was updated" in done.stderr
    assert "Traceback" not in done.stderr
    assert status(tmp_path / "run")["status"] == "fault"
