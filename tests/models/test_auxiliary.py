"""Auxiliary classifiers: not the head, but part of the layer whose output they read; while that is frozen they count
nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
import toys
from trainings import CLASSES, Training, alone, config_of, moved, values

from tlx import models
from tlx.plan.plan import Phase

BRANCHES = {
    "torchvision/googlenet": {"inception4a": 2_171_143, "inception4d": 2_173_191},
    "torchvision/inception_v3": {"Mixed_6e": 2_563_079},
    "timm/inception_v3": {"Mixed_6e": 2_563_079},
    "toys:assisted": {"features.1.0": 531},
}
"""Layer -> parameters of the branch that hangs on it, with 7 classes."""

ARGS: dict[str, dict[str, Any]] = {"timm/inception_v3": {"aux_logits": True}}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_belongs_to_the_layer_whose_output_it_reads(name):
    found = models.load(name, classes=7, weights="none", args=ARGS.get(name, {}), empty=True)
    sizes = {y.name: sum(p.size for p in y.parameters if p.auxiliary) for y in found.layers}
    assert {name: size for name, size in sizes.items() if size} == BRANCHES[name]
    assert found.layers.head.size == 7 * found.features + 7
    assert not set(found.auxiliary) & set(found.layers.head.modules)


@pytest.mark.parametrize("granularity", ["stage", "block", "module"])
def test_at_every_granularity(granularity):
    found = models.load("torchvision/googlenet", classes=7, weights="none", empty=True, granularity=granularity)
    home = {p.name: y.name for y in found.layers for p in y.parameters}
    assert home["aux1.fc2.weight"] == home["inception4a.branch1.conv.weight"]
    assert home["aux2.fc2.weight"] == home["inception4d.branch1.conv.weight"]


def test_names_of_weights_are_the_librarys():
    found = models.load("torchvision/googlenet", classes=7, weights="none")
    plain = torchvision.models.googlenet(num_classes=7, aux_logits=True, init_weights=False)
    plain.load_state_dict(found.module.state_dict())


def of(name: str, **said: Any) -> Training:
    return Training.of(config_of(name, batch=4, **said), alone(), size=16)


def logits(training: Training, phase: Phase) -> list[Any]:
    return list(training.prepare_phase(phase).forward(torch.randn(4, 3, 16, 16)))


@pytest.mark.parametrize("functional", [False, True])
def test_a_frozen_auxiliary_classifier_counts_nothing(functional):
    training = of("toys:assisted", args={"functional": functional})
    extraction = training.plan.phases[0]
    assert sum(p.size for y in training.plan.layers for p in extraction.trained(y)) == 7 * 32 + 7
    main, aux = logits(training, extraction)
    assert (main.shape, aux) == ((4, CLASSES), None)

    net = training.backbone.module
    before = values(net)
    tally = training.step(training.prepare_phase(extraction), extraction, 0)
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(before[name])
        images = training.updater.normalise(training.batch(0).images)
        plain = loss(net.eval()(images), training.batch(0).labels, reduction="sum")
    assert tally[0].item() == pytest.approx(plain.item(), rel=1e-6)  # nothing is added to it
    assert sum(p.numel() for n, p in net.named_parameters() if n.startswith("aux")) == 531


def test_an_auxiliary_classifier_trains_with_its_layer():
    training = of("toys:assisted")
    tuning = training.plan.phases[1]
    main, aux = logits(training, tuning)
    assert (main.shape, aux.shape) == ((4, CLASSES), (4, CLASSES))
    before = values(training.backbone.module)
    training.step(training.prepare_phase(tuning), tuning, 1)
    changed = moved(training.backbone.module, before)
    assert {"aux.0.weight", "aux.1.running_mean", "aux.3.weight"} <= changed


def test_what_trains_above_the_branch_leaves_it_alone():
    phases = [
        {"name": "above", "layers": {"features.2.0": "all", "head": "all"}},
        {"name": "norms", "layers": {"backbone": "norms", "head": "all"}},
        {"name": "biases", "layers": {"backbone": "biases", "head": "all"}},
        {"name": "its_own", "layers": {"features.1.0": "all", "head": "all"}},
    ]
    training = of("toys:assisted", unfreeze={"name": "explicit", "phases": phases})
    for phase, there in zip(training.plan.phases, (False, False, False, True), strict=True):
        assert (logits(training, phase)[1] is not None) == there
        trained = {p.name for y in training.plan.layers for p in phase.trained(y) if p.name.startswith("aux")}
        assert bool(trained) == there
        phase_model = training.prepare_phase(phase)
        training.step(phase_model, phase, phase.start)
        assert all(p.grad is not None for p in phase_model.parameters), phase.name  # or DDP would wait for it


def test_norms_that_learn_in_frozen_layers_do_not_learn_in_a_branch_that_is_left_out():
    training = of("toys:assisted", phases={"each": {"lr": 0.1, "duration": 1, "norm": "norms_train"}})
    phase_model = training.prepare_phase(training.plan.phases[0])
    training.step(phase_model, training.plan.phases[0], 0)
    assert all(p.grad is not None for p in phase_model.parameters)


def test_two_classifiers_that_are_put_together_are_both_the_head():
    found = models.load("timm/deit_tiny_distilled_patch16_224", classes=7, weights="none", empty=True)
    assert [p.name for p in found.layers.head.parameters] == [
        "head.weight", "head.bias", "head_dist.weight", "head_dist.bias",
    ]  # fmt: skip
    assert found.auxiliary == ()


def test_a_network_of_ones_own_may_bring_its_heads():
    torch.manual_seed(0)
    net = toys.assisted(7)
    found = models.adopt(net, ("fc", "aux.3"), input=models.InputSpec(size=(16, 16)))
    home = {p.name: y.name for y in found.layers for p in y.parameters}
    assert (home["aux.0.weight"], home["aux.3.weight"], found.auxiliary) == ("features.1.0", "features.1.0", ("aux.3",))
