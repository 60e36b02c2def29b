"""Several heads on one network: they are its head layer, whatever the network, and one alone keeps the classifier's
name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tlx import models
from tlx.models.head_modules import TaskHeads
from tlx.models.layers.trace import build_empty
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.train.averaging import MovingAverage
from tlx.train.components import optimizer_of
from tlx.train.dry_run import DryRun

OUTPUTS = models.Outputs({"species": 3, "colour": 2, "box": 4}, 3)
VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "torchvision/mobilenet_v2": {"width_mult": 0.25},
    "torchvision/googlenet": {},
    "torchvision/vgg11": {},
    "timm/vit_tiny_patch16_224": VIT,
    "timm/deit_tiny_distilled_patch16_224": VIT,
    "timm/resnet10t": {"channels": [8, 8, 16, 16]},
}


@functools.cache
def empty(name, *, head="linear"):
    return models.load(name, classes=OUTPUTS, weights="none", args=NETWORKS[name], head=head, empty=True)


def owned(backbone):
    """Parameters of the new heads, by name without the path of all of them."""
    (path,) = (path for path, module in backbone.module.named_modules() if isinstance(module, TaskHeads))
    names = [name for name, _ in backbone.module.named_parameters() if name.startswith(f"{path}.")]
    return {name.removeprefix(f"{path}."): name for name in names}


def config_of(name):
    return parse(
        {
            "run": "unused",
            "data": {"train": "unused", "batch": 4},
            "backbone": {"name": name, "weights": "none", "args": NETWORKS[name]},
            "optimizer": {"name": "adamw", "weight_decay": 0.5},
            "unfreeze": {"name": "gradual", "every": 2},
            "phases": {"each": {"lr": 0.1, "layer_decay": {"name": "exponential", "factor": 0.5}}},
            "loop": {"ema": {"decay": 0.5, "ramp": False}},
        }
    )


@pytest.mark.parametrize("head", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_head_is_in_the_head_layer_and_nowhere_else(name, head):
    backbone = empty(name, head=head)
    own, of_head = owned(backbone), {p.name: p for p in backbone.layers.head.parameters}
    assert {name.split(".")[0] for name in own} == {"constants", "species", "colour", "box"}
    assert set(own.values()) <= set(of_head)
    backbone.layers.verify(name for name, _ in backbone.module.named_parameters())  # each in one layer, exactly
    assert of_head[own["constants"]].kind == "scale"


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_every_head_in_both_modes(name):
    backbone, seen = empty(name), []
    plan = Plan.make(config_of(name), backbone.layers, samples=8)
    assert DryRun(backbone, plan, backbone.input, OUTPUTS.count, seen.append).on_shapes() is None
    every = [output if isinstance(output, tuple) else (output,) for output in seen]
    assert {o.shape[1] for given in every for o in given if o is not None} == {3 + 2 + 4 + 3}
    assert {len(given) for given in every} == {1 + len(backbone.auxiliary)}


@pytest.mark.parametrize("name", NETWORKS)
def test_unfreezing_layer_decay_and_weight_decay_treat_them_as_the_head(name):
    config, backbone = config_of(name), empty(name)
    plan, own = Plan.make(config, backbone.layers, samples=8), set(owned(backbone).values())
    trained = [{p.name for layer in plan.layers for p in phase.trained(layer)} for phase in plan.phases]
    assert all(own <= names for names in trained)
    assert len(trained[0]) < len(trained[-1])
    by_name = {
        name: group
        for group in optimizer_of(config, backbone.module, backbone.layers).param_groups
        for name in group["names"]
    }
    assert {by_name[name]["layer"] for name in own} == {backbone.layers.head.name}
    decays = {short: by_name[name]["weight_decay"] for short, name in owned(backbone).items()}
    assert (decays["constants"], decays["species.weight"], decays["box.weight"]) == (0, 0.5, 0.5)
    last = plan.phases[-1].rates(plan.phases[-1].start)
    assert last[backbone.layers.head.name] == max(last.values()) == 0.1
    assert min(last.values()) < 0.1


LIBRARIES = {
    "torchvision/mobilenet_v2": lambda **args: torchvision.models.mobilenet_v2(num_classes=5, **args),
    "torchvision/googlenet": lambda **args: torchvision.models.googlenet(num_classes=5, init_weights=False, **args),
    "torchvision/vgg11": lambda **args: torchvision.models.vgg11(num_classes=5, **args),
    "timm/vit_tiny_patch16_224": lambda **args: timm.create_model("vit_tiny_patch16_224", num_classes=5, **args),
    "timm/deit_tiny_distilled_patch16_224": lambda **args: timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=5, **args
    ),
    "timm/resnet10t": lambda **args: timm.create_model("resnet10t", num_classes=5, **args),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_single_head_is_the_librarys_own_classifier(name):
    """So a run of any task with one head is loaded strictly by its library."""
    outputs = models.Outputs({"": 5})
    ours = models.load(name, classes=outputs, weights="none", args=NETWORKS[name], empty=True).module.state_dict()
    theirs = build_empty(lambda: LIBRARIES[name](**NETWORKS[name])).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


def test_heads_of_one_kind_with_outputs_beside_each_other():
    heads = TaskHeads({"one": nn.Linear(4, 3), "two": nn.Linear(4, 2)}, 2)
    features = torch.randn(6, 4)
    with torch.no_grad():
        heads.constants.copy_(torch.tensor([0.25, -3.0]))
    expected = [functional.linear(features, h.weight, h.bias) for h in (heads.one, heads.two)]
    outputs = heads(features)
    assert torch.equal(outputs[:, :5], torch.cat(expected, 1))
    assert outputs[:, 5:].tolist() == [[0.25, -3.0]] * 6
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        heads.constants.copy_(torch.tensor([0.2503, -3.0078]))
        assert heads(features)[0, 5:].tolist() == heads.constants.tolist()  # bf16 has three digits


def test_a_checkpoint_of_several_heads_is_loaded_strictly_with_its_average(tmp_path):
    def made():
        return models.load("timm/resnet10t", classes=OUTPUTS, weights="none", args=NETWORKS["timm/resnet10t"]).module

    net = made()
    average = MovingAverage(net, config_of("timm/resnet10t").loop.ema)
    with torch.no_grad():
        net.head.constants.fill_(2.0)
    average.update(net)
    assert 0 < average.module.head.constants.max() < 2.0 + 1e-6
    for module, file in ((net, tmp_path / "net.safetensors"), (average.module, tmp_path / "ema.safetensors")):
        save_file(module.state_dict(), file)
        other = made()
        other.load_state_dict(load_file(file), strict=True)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(other.eval()(images), module.eval()(images))
