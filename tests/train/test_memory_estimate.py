"""The memory estimate: what it says of activations is what a pass with values keeps; the rest is arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from tlx import models
from tlx.base.errors import UserError
from tlx.base.layers import LayerMap
from tlx.plan.config import parse
from tlx.plan.plan import Plan
from tlx.plan.timetable import timetable
from tlx.train import optim
from tlx.train.memory_estimate import Images, _autocast, _Ledger, activation_bytes, memory_by_phase, optimizer_bytes

VIT: dict[str, Any] = {"img_size": 64, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "timm/vit_tiny_patch16_224": VIT,
    "timm/test_resnet": {},
    "torchvision/mobilenet_v3_small": {},
}


def kept(net: nn.Module, images: Images) -> int:
    """Bytes that a real forward pass keeps."""
    ledger = _Ledger([*net.parameters(), *net.buffers()])
    with ledger.watching(net, ()), _autocast(images.precision):
        net(torch.randn(images.count, *images.shape))
    return ledger.kept


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_those_of_a_pass_with_values(name: str, precision: str) -> None:
    images = Images(4, (3, 64, 64), precision)
    said, real = (models.load(name, classes=3, weights="none", args=NETWORKS[name], empty=e) for e in (True, False))
    for frozen in (False, True):
        for backbone in (said, real):
            backbone.module.train()
            head = {p.name for p in backbone.layers.head.parameters}
            for parameter_name, parameter in backbone.module.named_parameters():
                parameter.requires_grad_(not frozen or parameter_name in head)
        bytes_said, bytes_kept = activation_bytes(said.module, images), kept(real.module, images)
        assert bytes_said is not None
        on_top = bytes_said - bytes_kept  # the largest module's input and output, and the pixels
        assert on_top > 0
        with_more = activation_bytes(said.module, Images(8, (3, 64, 64), precision))
        assert with_more is not None
        assert with_more > 1.5 * bytes_said - 10e6
        if not frozen:
            assert on_top < 0.4 * bytes_said


def test_what_optimizers_keep() -> None:
    for make, expected in (
        (functools.partial(optim.adamw), 8),
        (functools.partial(optim.sgd, momentum=0.9), 4),
        (functools.partial(optim.sgd, momentum=0.0), 0),
    ):
        assert optimizer_bytes(make) == expected


def plan_of(layers: LayerMap, **phases: Any) -> Plan:
    raw = {
        "run": "runs/x",
        "data": {"train": "x", "batch": 8},
        "backbone": {"name": "timm/test_resnet"},
        "phases": {"each": {"duration": 2, "lr": 0.1}, **phases},
    }
    return Plan.make(parse(raw), layers, samples=16)


def test_phases_add_up() -> None:
    backbone = models.load("timm/test_resnet", classes=3, weights="none", empty=True)
    size = sum(p.numel() for p in backbone.module.parameters())
    head = backbone.layers.head.size
    images = Images(8, (3, 96, 96), "fp32")
    plan = plan_of(backbone.layers)
    needs = memory_by_phase(plan, backbone.module, images, optim.adamw, averaged=False)
    first, second = needs["feature_extraction"], needs["fine_tuning"]
    assert (first.gradients, second.gradients) == (4 * head, 4 * size)
    assert (first.optimizer, second.optimizer) == (8 * head, 8 * size)
    assert first.weights == second.weights >= 4 * size
    assert first.activations is not None
    assert second.activations is not None
    assert first.activations < second.activations / 3
    assert second.total == second.weights + second.gradients + second.optimizer + second.activations
    averaged = memory_by_phase(plan, backbone.module, images, optim.adamw, averaged=True)
    assert averaged["fine_tuning"].weights == 2 * second.weights
    less = memory_by_phase(plan, backbone.module, images, optim.adamw, averaged=False, recomputed=backbone.blocks)[
        "fine_tuning"
    ]
    assert less.activations is not None
    assert less.activations < second.activations
    text = timetable(plan, memory=needs)
    assert "memory of a rank" in text
    assert f"{second.total / 2**20:,.0f}" in text


def test_a_reset_optimizer_forgets_what_trained_before() -> None:
    backbone = models.load("timm/test_resnet", classes=3, weights="none", empty=True)
    backwards = {
        "unfreeze": {
            "name": "explicit",
            "phases": [{"name": "all_of_it", "layers": {"*": "all"}}, {"name": "head", "layers": {"head": "all"}}],
        }
    }
    found = {}
    for state in ("keep", "reset"):
        raw = {
            "run": "runs/x",
            "data": {"train": "x", "batch": 8},
            "backbone": {"name": "timm/test_resnet"},
            "phases": {"each": {"duration": 2, "lr": 0.1, "optimizer_state": state}},
            **backwards,
        }
        plan = Plan.make(parse(raw), backbone.layers, samples=16)
        images = Images(2, (3, 64, 64), "fp32")
        found[state] = memory_by_phase(plan, backbone.module, images, optim.adamw, averaged=False)["head"].optimizer
    size = sum(p.numel() for p in backbone.module.parameters())
    assert found == {"keep": 8 * size, "reset": 8 * backbone.layers.head.size}


class Curious(nn.Module):
    """Decides by the values it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3))
        return self.fc(pooled if float(pooled.sum()) > 0 else -pooled)


def test_a_network_that_looks_at_values_is_unknown_not_wrong() -> None:
    assert activation_bytes(Curious(), Images(2, (3, 8, 8), "fp32")) is None


def test_a_network_that_does_not_take_the_images_is_no_unknown() -> None:
    backbone = models.load("timm/vit_tiny_patch16_224", classes=3, weights="none", args=VIT, empty=True)
    plan = plan_of(backbone.layers)
    with pytest.raises(UserError, match=r"does not train on 2 images of 72 x 72: Input height \(72\) doesn't match"):
        memory_by_phase(plan, backbone.module, Images(2, (3, 72, 72), "fp32"), optim.adamw, averaged=False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["timm/resnet50", "timm/vit_small_patch16_224"])
def test_the_estimate_against_a_gpus_peak(name: str, precision: str) -> None:
    """Within a third of what the allocator has given out at most, workspaces of kernels included."""
    images = Images(32, (3, 224, 224), precision)
    said = activation_bytes(models.load(name, classes=7, weights="none", empty=True).module.train(), images)
    net = models.load(name, classes=7, weights="none").module.cuda().train()
    batch = torch.randn(images.count, *images.shape, device="cuda")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype, enabled=precision == "bf16"):
            loss = net(batch).float().sum()
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = 4 * sum(p.numel() for p in net.parameters())
    measured = torch.cuda.max_memory_allocated() - before
    assert said is not None
    assert said == pytest.approx(measured - gradients, rel=0.33)
