"""Heads alone and on networks of both libraries."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tlx import heads, models, plug
from tlx.errors import UserError

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16]}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}


def test_article_d() -> None:
    stack = heads.mlp(2048, 5, hidden=[256], dropout=0.4)
    assert [type(m).__name__ for m in stack.children()] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert [tuple(p.shape) for p in stack.parameters()] == [(256, 2048), (256,), (5, 256), (5,)]
    assert next(m.p for m in stack.children() if isinstance(m, nn.Dropout)) == 0.4


def test_article_c() -> None:
    stack = heads.concat_pool(512, 2)
    kinds = [type(m).__name__ for m in stack.children()]
    assert kinds == ["ConcatPool", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    maps = torch.randn(3, 4, 5, 5)
    pooled = next(stack.children())(maps)
    assert torch.equal(pooled[:, 4:], maps.flatten(2).max(-1).values)
    assert torch.allclose(pooled[:, :4], maps.flatten(2).mean(-1), atol=1e-6)
    assert stack(torch.randn(2, 512, 7, 7)).shape == (2, 2)


def test_arguments() -> None:
    part = plug.find("head", "mlp")
    assert plug.arguments(part, {"hidden": [64, 32], "activation": "gelu", "norm": True}, label="head")
    for wrong in ({"hidden": []}, {"hidden": [0]}, {"dropout": 1.0}, {"activation": "relo"}, {"hiden": [3]}):
        with pytest.raises(UserError):
            plug.arguments(part, wrong, label="head")


def test_a_linear_head_starts_alike_everywhere() -> None:
    """torchvision starts ViT's head at zero, timm draws it from a normal distribution; ours is PyTorch's own."""
    for name, args in (("timm/vit_tiny_patch16_224", VIT), ("timm/resnet10t", SMALL)):
        torch.manual_seed(0)
        backbone = models.load(name, classes=50, weights="none", args=args)
        leaf = backbone.module.get_submodule(backbone.layers.head.name)
        bound = backbone.features**-0.5
        assert 0.9 * bound < leaf.weight.abs().max() <= bound  # type: ignore[operator, union-attr]
        assert leaf.bias.abs().max() > 0  # type: ignore[operator, union-attr]


def test_dropout_before_a_linear_head_adds_no_name() -> None:
    torch.manual_seed(0)
    backbone = models.load("timm/resnet10t", classes=3, weights="none", args=SMALL, head_args={"dropout": 0.5})
    plain = models.load("timm/resnet10t", classes=3, weights="none", args=SMALL)
    assert list(backbone.module.state_dict()) == list(plain.module.state_dict())
    net, images = backbone.module, torch.randn(1, 3, 64, 64)
    for norm in net.modules():
        norm.training = False
    assert torch.equal(net(images), net(images))
    net.get_submodule("fc").train()
    assert not torch.equal(net(images), net(images))


@pytest.mark.parametrize(
    ("name", "args", "channels", "side"),
    [
        ("torchvision/resnet18", {}, 512, 2),
        ("torchvision/mobilenet_v2", {}, 1280, 2),  # pools in a function, not a module
        ("torchvision/squeezenet1_1", {}, 512, 3),  # its classifier is a convolution, before the pooling
        ("timm/resnet10t", SMALL, 16, 2),
        ("timm/convnext_atto", {}, 320, 2),
        ("timm/mobilenetv3_small_050", {}, 288, 2),  # a convolution after the pooling goes
    ],
)
def test_concat_pool_sees_the_last_map(name: str, args: dict[str, Any], channels: int, side: int) -> None:
    backbone = models.load(name, classes=3, weights="none", args=args, head="concat_pool", head_args={"hidden": [8]})
    net, seen = backbone.module, []
    assert backbone.features == channels
    head = net.get_submodule(backbone.layers.head.name)
    head.register_forward_pre_hook(lambda _m, a: seen.append(a[0].shape))
    out = net.train()(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 3)
    assert seen == [(2, channels, side, side)]
    out.sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []  # DDP would wait for them
    assert all(p.name.startswith("head.") for p in backbone.layers.head.parameters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("torchvision/vgg16_bn", 512),  # its two linear layers go
        ("torchvision/swin_t", 768),
        ("torchvision/densenet121", 1024),
        ("torchvision/convnext_tiny", 768),
        ("torchvision/inception_v3", 2048),
        ("torchvision/efficientnet_b0", 1280),
        ("torchvision/mobilenet_v3_small", 576),
        ("timm/swin_tiny_patch4_window7_224", 768),  # channels last
        ("timm/efficientnet_b0", 1280),
        ("timm/vgg16_bn", 512),
    ],
)
def test_concat_pool_on_larger_networks(name: str, channels: int) -> None:
    backbone = models.load(name, classes=3, weights="none", head="concat_pool", head_args={"hidden": [8]})
    assert backbone.features == channels
    out = backbone.module.train()(torch.randn(2, 3, *backbone.input.size))
    logits = out[0] if isinstance(out, tuple) else out
    assert logits.shape == (2, 3)
    sum(o.sum() for o in (out if isinstance(out, tuple) else [out])).backward()
    assert [n for n, p in backbone.module.named_parameters() if p.grad is None] == []


def test_channels_last_maps_are_turned() -> None:
    args = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]}
    backbone = models.load(
        "timm/swin_tiny_patch4_window7_224", classes=3, weights="none", args=args, head="concat_pool"
    )
    seen: list[torch.Size] = []
    backbone.module.get_submodule(backbone.layers.head.name).register_forward_pre_hook(
        lambda _m, a: seen.append(a[0].shape)
    )
    assert backbone.module(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert seen == [(2, 24, 4, 4)]


def test_tokens_have_no_map() -> None:
    with pytest.raises(UserError, match="ends in tokens or vectors"):
        models.load("timm/vit_tiny_patch16_224", classes=3, weights="none", args=VIT, head="concat_pool", empty=True)


def test_one_head_for_two_classifiers() -> None:
    """The distilled DeiT averages its two classifiers; a new head takes the average of their features."""
    name = "timm/deit_tiny_distilled_patch16_224"
    backbone = models.load(name, classes=3, weights="none", args=VIT, head="mlp", head_args={"hidden": [5]})
    assert [p.name for p in backbone.layers.head.parameters] == [
        "head.new.0.weight",
        "head.new.0.bias",
        "head.new.3.weight",
        "head.new.3.bias",
    ]
    assert backbone.module(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("head", ["mlp", "concat_pool"])
def test_a_new_head_survives_copies(head: str) -> None:
    backbone = models.load("timm/resnet10t", classes=3, weights="none", args=SMALL, head=head)
    assert all(n.startswith(("head.", "conv1", "bn1", "layer")) for n in backbone.module.state_dict())
    images = torch.randn(2, 3, 64, 64)
    backbone.module.train()(images).sum().backward()  # a map that was kept must not get in the way
    net = backbone.module.eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        expected = net(images)
        assert torch.equal(other(images), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(images).any()
        assert torch.equal(net(images), expected)


@pytest.mark.parametrize("head", [pytest.param("mlp", marks=pytest.mark.slow), "concat_pool"])
def test_a_new_head_compiles_into_one_graph(head: str) -> None:
    net = models.load("timm/resnet10t", classes=3, weights="none", args=SMALL, head=head).module.eval()
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images), net(images), atol=1e-5)
    torch._dynamo.reset()


def scaled(features: int, classes: int, *, scale: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, classes))


def peak(features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(features, classes))


peak.pools = True  # type: ignore[attr-defined]


def wrong(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes + 1)


def test_heads_of_the_users_own() -> None:
    wish: dict[str, Any] = {"classes": 3, "weights": "none", "args": SMALL}
    backbone = models.load("timm/resnet10t", head=f"{__name__}:scaled", head_args={"scale": "2"}, **wish)
    assert backbone.layers.head.norms == ("head.0",)
    assert models.load("timm/resnet10t", head=f"{__name__}:peak", **wish).module(torch.randn(2, 3, 64, 64)).shape == (
        2,
        3,
    )
    with pytest.raises(UserError, match=r"gives \(4,\) instead of 3 classes"):
        models.load("timm/resnet10t", head=f"{__name__}:wrong", **wish)


@pytest.mark.parametrize("head", ["mlp", "concat_pool"])
def test_a_sequential_network_runs_its_new_head_once(head):
    import toys

    backbone = models.load("toys:sequential", classes=5, weights="none", head=head, head_args={"hidden": [7]})
    net = backbone.module
    calls = []
    net.get_submodule("head").register_forward_hook(lambda *_: calls.append(1))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert len(calls) == 1
    assert toys.sequential(5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
