"""Heads alone and on networks of both libraries."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional

from tlx import models
from tlx.base import plug
from tlx.base.errors import UserError
from tlx.models import heads
from tlx.models.layers.trace import build_empty

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


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm/pvt_v2_b0", (2, 256, 7, 7)),  # works on tokens, and each stage returns a map
        ("timm/resnet50_clip", (2, 2048, 7, 7)),  # attends over the map, and that is its classifier
    ],
)
def test_concat_pool_looks_behind_tokens(name: str, shape: tuple[int, ...]) -> None:
    backbone = models.load(name, classes=3, weights="none", head="concat_pool", empty=True)
    backbone.module.to("meta")
    assert seen_by_head(backbone, torch.empty(2, 3, 224, 224, device="meta")).shape == shape
    assert not [n for n, _ in backbone.module.named_parameters() if n.startswith("head.") and ".new." not in n]


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


@pytest.mark.parametrize("head", ["mlp", "concat_pool", "attention_pool", "cosine", "prototype"])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", ["concat_pool", *(pytest.param(h, marks=pytest.mark.slow) for h in ("mlp", "attention_pool", "cosine"))]
)
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


peak.takes = "map"  # type: ignore[attr-defined]


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
    with pytest.raises(UserError, match=r"gives \(4,\) instead of 3 outputs"):
        models.load("timm/resnet10t", head=f"{__name__}:wrong", **wish)


@pytest.mark.parametrize("head", ["mlp", "concat_pool", "attention_pool", "cosine", "prototype"])
def test_a_sequential_network_runs_its_new_head_once(head):
    import toys

    backbone = models.load("toys:sequential", classes=5, weights="none", head=head)
    net = backbone.module
    calls = []
    net.get_submodule("head").register_forward_hook(lambda *_: calls.append(1))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert len(calls) == 1
    assert toys.sequential(5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


# attention pooling


def seen_by_head(backbone: models.Backbone, images: torch.Tensor) -> torch.Tensor:
    """What the head of `backbone` is given."""
    seen: list[torch.Tensor] = []
    hook = backbone.module.get_submodule(backbone.layers.head.name).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0])
    )
    assert backbone.module.eval()(images).shape == (len(images), 3)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "args", "count"),
    [
        ("timm/vit_tiny_patch16_224", VIT, 1 + 16),
        ("timm/deit_tiny_distilled_patch16_224", VIT, 2 + 16),
        ("timm/vit_small_patch14_reg4_dinov2", VIT, 5 + 16),
        ("timm/vit_base_patch16_siglip_gap_224", VIT, 16),  # no class token
    ],
)
def test_attention_pool_sees_all_tokens_after_the_final_norm(name: str, args: dict[str, Any], count: int) -> None:
    backbone = models.load(name, classes=3, weights="none", args=args, head="attention_pool")
    net, images = backbone.module, torch.randn(2, 3, 32, 32)
    tokens = seen_by_head(backbone, images)
    assert tokens.shape == (2, count, 24)
    assert isinstance(net.norm, nn.LayerNorm)  # stays in front of the head
    assert torch.equal(tokens, net.forward_features(images))  # type: ignore[operator]
    net.train()(images).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    kinds = {p.name.removeprefix("head.new."): p.kind for p in backbone.layers.head.parameters}
    assert (kinds["1.latent"], kinds["0.weight"], kinds["1.kv.weight"]) == ("embedding", "norm", "weight")


def test_a_pooling_of_the_networks_own_falls_away() -> None:
    """SigLIP's pretrained attention pooling, and a norm that follows the average, see the pooled vector only."""
    args = {**VIT, "img_size": 32}
    siglip = models.load("timm/vit_base_patch16_siglip_224", classes=3, args=args, head="attention_pool", empty=True)
    assert not [n for n, _ in siglip.module.named_parameters() if n.startswith("attn_pool")]
    gap = models.load("timm/vit_base_patch16_224", classes=3, args={**args, "global_pool": "avg", "fc_norm": True},
                      weights="none", head="attention_pool")  # fmt: skip
    assert not [n for n, _ in gap.module.named_parameters() if n.startswith("fc_norm")]
    assert gap.layers.head.norms == ("head.new.0", "head.new.1.norm")


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("timm/resnet10t", SMALL, (2, 2 * 2, 16)),
        ("torchvision/mobilenet_v3_small", {}, (2, 2 * 2, 576)),  # its classifier block goes
        (
            "timm/swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]},
            (2, 8 * 8, 24),
        ),
    ],
)
def test_a_map_counts_as_tokens(name: str, args: dict[str, Any], shape: tuple[int, ...]) -> None:
    wish: dict[str, Any] = {"classes": 3, "weights": "none", "args": args}
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    backbone = models.load(name, head="attention_pool", **wish)
    torch.manual_seed(0)
    maps = seen_by_head(models.load(name, head="concat_pool", **wish), images)
    tokens = seen_by_head(backbone, images)
    assert tokens.shape == shape
    assert torch.equal(tokens, maps.flatten(2).transpose(1, 2))


def test_torchvisions_transformers_have_tokens_too() -> None:
    backbone = models.load("torchvision/vit_b_16", classes=3, weights="none", head="attention_pool", empty=True)
    backbone.module.to("meta")
    assert seen_by_head(backbone, torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 197, 768)


def test_the_heads_of_the_attention() -> None:
    def count(features: int, **args: Any) -> int:
        return next(m for m in heads.attention_pool(features, 3, **args).modules() if hasattr(m, "num_heads")).num_heads

    assert [count(n) for n in (768, 192, 24, 1000, 1280)] == [12, 3, 1, 10, 20]
    assert count(24, heads=8) == 8
    with pytest.raises(UserError, match="24 features among 5 heads"):
        heads.attention_pool(24, 3, heads=5)
    assert [type(m).__name__ for m in heads.attention_pool(24, 3, norm=False, dropout=0.2).children()] == [
        "Identity",
        "AttentionPoolLatent",
        "Dropout",
        "Linear",
    ]


def test_vectors_have_neither_map_nor_tokens() -> None:
    with pytest.raises(UserError, match="neither tokens nor a map"):
        models.load(f"{__name__}:flat", classes=3, weights="none", head="attention_pool")
    assert models.load(f"{__name__}:flat", classes=3, weights="none", head="cosine").features == 8


def flat(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 8), nn.ReLU(), nn.Linear(8, classes))


# cosine


def test_cosine() -> None:
    torch.manual_seed(0)
    head, features = heads.cosine(16, 5), torch.randn(4, 16)
    expected = 10 * functional.cosine_similarity(features[:, None], head.weight[None], dim=-1)  # type: ignore[index]
    assert torch.allclose(head(features), expected, atol=1e-5)
    assert torch.allclose(head(100 * features), expected, atol=1e-5)  # lengths do not count
    assert head.weight.abs().max() <= 16**-0.5  # type: ignore[operator, union-attr]
    fixed = heads.cosine(16, 5, scale=2, learn_scale=False, dropout=0.3)
    assert [n for n, _ in fixed.named_parameters()] == ["1.weight"]
    assert fixed.state_dict()["1.scale"] == 2
    with pytest.raises(UserError, match="scale"):
        plug.arguments(plug.find("head", "cosine"), {"scale": 0}, label="head")


def test_the_scale_of_a_cosine_head_is_a_scale() -> None:
    backbone = models.load("timm/resnet10t", classes=3, weights="none", args=SMALL, head="cosine")
    assert {p.name: p.kind for p in backbone.layers.head.parameters} == {"head.weight": "weight", "head.scale": "scale"}


# classifier blocks, several classifiers


@pytest.mark.parametrize(
    ("name", "head", "block"),
    [
        ("torchvision/vgg16_bn", "classifier.6", ["classifier.0", "classifier.3"]),
        ("torchvision/alexnet", "classifier.6", ["classifier.1", "classifier.4"]),
        ("torchvision/mobilenet_v3_small", "classifier.3", ["classifier.0"]),
        ("timm/vgg11", "head.fc", ["pre_logits.fc1", "pre_logits.fc2"]),
    ],
)
@pytest.mark.parametrize("new", ["linear", "cosine"])
def test_a_classifier_block_keeps_all_but_its_last_layer(name: str, head: str, block: list[str], new: str) -> None:
    backbone = models.load(name, classes=7, weights="none", head=new, empty=True)
    plain = build_empty(lambda: library(name))
    have = {n: p.shape for n, p in backbone.module.named_parameters()}
    want = {n: p.shape for n, p in plain.named_parameters() if not n.startswith(f"{head}.")}
    assert have.items() >= want.items()
    mine = {p.name for p in backbone.layers.head.parameters}
    assert set(have) == set(want) | mine
    assert (mine == {f"{head}.weight", f"{head}.bias"}) == (new == "linear")
    kept = {p.name.rpartition(".")[0] for y in backbone.layers if y.role == "classifier" for p in y.parameters}
    assert kept == set(block)


def library(name: str) -> nn.Module:
    if name.startswith("timm/"):
        return timm.create_model(name[len("timm/") :])
    return torchvision.models.get_model(name[len("torchvision/") :], weights=None)


def test_a_classifier_block_keeps_its_pretrained_values(tmp_path: Path) -> None:
    plain = torchvision.models.mobilenet_v3_small()
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    backbone = models.load("torchvision/mobilenet_v3_small", classes=7, weights=str(tmp_path / "w.pth"))
    new = backbone.module.state_dict()
    same = {n for n, t in plain.state_dict().items() if new[n].shape == t.shape and torch.equal(new[n], t)}
    assert set(new) - same == {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize("train", [False, True])
def test_two_linear_classifiers_are_averaged_in_training_too(train: bool) -> None:
    name = "timm/deit_tiny_distilled_patch16_224"
    backbone = models.load(name, classes=3, weights="none", args=VIT)
    assert {p.name for p in backbone.layers.head.parameters} == {
        f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    }
    net, images = backbone.module.train(train), torch.randn(2, 3, 32, 32)
    tokens = net.forward_features(images)  # type: ignore[operator]
    expected = (net.head(tokens[:, 0]) + net.head_dist(tokens[:, 1])) / 2  # type: ignore[operator]
    assert torch.allclose(net(images), expected, atol=1e-6)


def test_a_new_head_sees_the_average_of_what_two_classifiers_saw() -> None:
    name = "timm/deit_tiny_distilled_patch16_224"
    backbone = models.load(name, classes=3, weights="none", args=VIT, head="cosine")
    images = torch.randn(2, 3, 32, 32)
    pooled = seen_by_head(backbone, images)
    tokens = backbone.module.forward_features(images)  # type: ignore[operator]
    assert torch.allclose(pooled, (tokens[:, 0] + tokens[:, 1]) / 2, atol=1e-6)


def test_classifiers_of_different_widths_stay_linear() -> None:
    with pytest.raises(UserError, match=r"has classifiers of 128, 256 features each.*\n.*use linear"):
        models.load("timm/crossvit_9_240", classes=3, weights="none", head="mlp", empty=True)
    linear = models.load("timm/crossvit_9_240", classes=3, weights="none", empty=True)
    assert len(linear.layers.head.parameters) == 4


@pytest.mark.parametrize("head", ["attention_pool", "cosine"])
def test_auxiliary_classifiers_stay_linear(head: str) -> None:
    backbone = models.load("torchvision/googlenet", classes=3, weights="none", head=head, empty=True)
    net = backbone.module.to("meta").train()
    out = net(torch.empty(2, 3, 224, 224, device="meta"))
    assert (type(out).__name__, [tuple(o.shape) for o in out]) == ("GoogLeNetOutputs", [(2, 3)] * 3)
    assert backbone.auxiliary == ("aux1.fc2", "aux2.fc2")


HEADS = ["attention_pool", "concat_pool", "cosine", "mlp"]
UNEQUAL = ("timm/crossvit_9_240", "timm/efficientvim_m1")
MAPLESS = (
    *("timm/levit_128s", "timm/cait_xxs24_224", "timm/coat_tiny", "timm/coat_lite_tiny", "timm/volo_d1_224"),
    *("timm/xcit_nano_12_p16_224", "timm/mixer_s32_224", "timm/hiera_tiny_224", "timm/naflexvit_base_patch16_gap"),
)


ODD = [
    *("timm/levit_128s", "timm/levit_conv_128s", "timm/cait_xxs24_224", "timm/coat_tiny", "timm/coat_lite_tiny"),
    *("timm/volo_d1_224", "timm/nextvit_small", "timm/maxvit_tiny_tf_224", "timm/davit_tiny", "timm/repvit_m1"),
    *("timm/xcit_nano_12_p16_224", "timm/mixer_s32_224", "timm/hiera_tiny_224", "timm/mobilevit_xxs"),
    *("timm/efficientvit_m0", "timm/vgg11", "timm/poolformer_s12", "timm/naflexvit_base_patch16_gap"),
    *("timm/crossvit_9_240", "timm/efficientvim_m1", "torchvision/inception_v3", "torchvision/squeezenet1_1"),
    *("torchvision/maxvit_t", "torchvision/swin_v2_t", "torchvision/vgg16_bn", "torchvision/alexnet"),
]
HEAD_BY_HEAD = [(name, HEADS[(i + step) % len(HEADS)]) for i, name in enumerate(ODD) for step in (0, 2)]
"""Two heads for each network, all of them in turn."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), HEAD_BY_HEAD)
def test_heads_on_the_odd_networks(name: str, head: str) -> None:
    """On shapes alone; where it cannot be, the message says what to use instead."""
    if name in UNEQUAL or (head == "concat_pool" and name in MAPLESS):
        with pytest.raises(UserError, match="-> use "):
            models.load(name, classes=5, weights="none", head=head, empty=True)
        return
    backbone = models.load(name, classes=5, weights="none", head=head, empty=True)
    net, images = backbone.module.to("meta"), torch.empty(2, 3, *backbone.input.size, device="meta")
    assert all(p.name.startswith(("head.", "new_head.")) or "aux" in p.name.lower()
               for p in backbone.layers.head.parameters)  # fmt: skip
    assert net.eval()(images).shape == (2, 5)
    out = net.train()(images)
    outputs = out if isinstance(out, tuple) else (out,)
    assert {tuple(o.shape) for o in outputs} == {(2, 5)}
    sum(o.sum() for o in outputs).backward()
    idle = {p.name for y in backbone.layers for p in y.parameters if p.idle}
    assert {n for n, p in net.named_parameters() if p.grad is None} == idle
    assert not idle or name == "timm/coat_tiny"  # what leads to the tokens of coarser scales alone
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.eval()(images).shape == (2, 5)


# first values


@pytest.mark.parametrize("head", ["linear", *HEADS])
def test_the_seed_fixes_a_new_head(head: str) -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return models.load("timm/resnet10t", classes=3, weights="none", args=SMALL, head=head).module.state_dict()

    one, again, other = values(1), values(1), values(2)
    drawn = [n for n in one if n.startswith(("head.", "fc.")) and one[n].ndim > 1]
    assert drawn
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in drawn)


def test_what_a_head_may_take() -> None:
    with pytest.raises(UserError, match='takes "maps"; did you mean "map"'):
        models.load("timm/resnet10t", classes=3, weights="none", args=SMALL, head=f"{__name__}:confused", empty=True)


def confused(features: int, classes: int) -> nn.Module:
    return nn.Linear(features, classes)


confused.takes = "maps"  # type: ignore[attr-defined]


# what tracing leaves behind


def test_a_module_that_several_share_keeps_its_values() -> None:
    torch.manual_seed(0)
    net = models.load(f"{__name__}:sharing", classes=3, weights="none", head="cosine").module
    assert net.first is net.blocks[0]  # type: ignore[index]
    assert net.first.weight is net.tied.weight  # type: ignore[union-attr]
    assert not any(p.is_meta for p in net.parameters())
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


class Sharing(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first = nn.Conv2d(8, 8, 3, 1, 1)
        self.blocks = nn.ModuleList([self.first, self.first])
        self.tied = nn.Conv2d(8, 8, 3, 1, 1)
        self.tied.weight = self.first.weight
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu()
        return self.fc(self.tied(x).mean((2, 3)))


def sharing(classes: int) -> nn.Module:
    return Sharing(classes)
