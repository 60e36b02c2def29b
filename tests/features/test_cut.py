"""Where networks of many families are cut, and that the rest of them, from features, is the same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tlx
from tlx.features.cut import Rest, features_of, find_cut

QUICK = [
    "timm/test_resnet",
    "timm/test_vit",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "torchvision/squeezenet1_1",
]
SLOW = [
    *(f"torchvision/{n}" for n in ("resnet18", "vgg11", "mobilenet_v2", "inception_v3", "densenet121", "googlenet")),
    *(f"torchvision/{n}" for n in ("vit_b_16", "swin_t", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0")),
    *(f"torchvision/{n}" for n in ("maxvit_t", "convnext_tiny", "mnasnet0_5", "alexnet")),
    *(f"timm/{n}" for n in ("deit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "mobilevit_xxs")),
    *(f"timm/{n}" for n in ("levit_128s", "xcit_nano_12_p16_224", "cait_xxs24_224", "pit_ti_224", "ghostnet_100")),
    *(f"timm/{n}" for n in ("poolformer_s12", "mixer_s32_224", "repvgg_a0", "dla34", "hrnet_w18_small", "nest_tiny")),
]
NOWHERE = {("timm/hrnet_w18_small", 0.25)}
"""Four branches side by side enter what trains: no one place is below it."""


def frozen_below(backbone, count):
    """Only the last `count` layers train; the rest is as a phase leaves what is frozen."""
    layers = list(backbone.layers)
    trained = {p.name for layer in layers[-count:] for p in layer.parameters}
    modules = dict(backbone.module.named_modules())
    backbone.module.train()
    for name, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(name in trained)
    for layer in layers[:-count]:
        for name in layer.modules:
            modules[name].training = False
    for layer in layers:
        for name in layer.norms:
            modules[name].training = False
    return backbone.module


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@pytest.mark.parametrize("share", [0, 0.25], ids=["head", "last_quarter"])
def test_the_rest_of_a_network_is_the_same_function_and_learns_the_same(name, share, record_property):
    torch.manual_seed(0)
    backbone = tlx.load_backbone(name, classes=7, weights="none")
    net = frozen_below(backbone, max(1, int(share * len(list(backbone.layers)))))
    image = (3, *backbone.input.size)
    cut = find_cut(net, image, device=torch.device("cpu"))
    if (name, share) in NOWHERE:
        assert cut is None
        return
    assert cut is not None
    record_property("figures", f"cut of {name}, {share:.0%} trained: {cut}, differs by {cut.difference:.1g}")
    images = torch.randn(3, *image)

    def outputs_and_gradients(forward):
        torch.manual_seed(1)
        net.zero_grad()
        output = forward()
        first = output[0] if isinstance(output, tuple) else output
        first.square().sum().backward()
        return first.detach(), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    whole, gradients = outputs_and_gradients(lambda: net(images))
    rest, own = outputs_and_gradients(lambda: Rest(net, cut)(features_of(net, cut, images)))
    torch.testing.assert_close(rest, whole, rtol=1e-4, atol=1e-5)
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-9)


class Shortcut(nn.Module):
    """What the first layer gives goes around the last frozen one into what trains."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(8, 2)

    def forward(self, images):
        x = self.first(images)
        return self.head(torch.cat([x.mean((2, 3)), self.second(x).amax((2, 3))], 1))


class Drawn(nn.Module):
    """Something is drawn between the frozen layer and the head."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.head = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.drop(self.first(images).mean((2, 3))))


def of_head_alone(net):
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return find_cut(net, (3, 8, 8), device=torch.device("cpu"))


def test_a_place_that_something_goes_around_is_none():
    cut = of_head_alone(Shortcut())
    assert str(cut) == "input of head, 8 float32"  # where both are
    net = Shortcut()
    net.head = nn.Identity()
    net.second.requires_grad_(True)
    for parameter in net.first.parameters():
        parameter.requires_grad_(False)
    assert str(find_cut(net, (3, 8, 8), device=torch.device("cpu"))) == "output of first, 4 x 6 x 6 float32"


def test_what_is_drawn_is_drawn_anew():
    assert str(of_head_alone(Drawn())) == "input of drop, 4 float32"


class Remembered(nn.Module):
    """Remembers its scale, with its gradient, in evaluation mode, as timm's LeViT does its biases."""

    def __init__(self):
        super().__init__()
        self.scale, self.kept = nn.Parameter(torch.zeros(4, 1, 1)), None

    def forward(self, x):
        if self.training or self.kept is None:
            self.kept = self.scale.exp()
        return x * self.kept


class Counted(nn.Module):
    """Code after what is frozen uses how many pictures there were before it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), Remembered(), nn.Linear(4 * 36, 2)

    def forward(self, images):
        x = self.first(images)
        count = len(x)
        return self.head(self.second(x).reshape(count, -1))


def test_code_that_counts_pictures_and_weights_remembered_in_evaluation_are_no_hindrance():
    net = Counted()
    net.first.requires_grad_(requires_grad=False)
    cut = find_cut(net, (3, 8, 8), device=torch.device("cpu"))
    assert cut is not None
    assert (cut.path, cut.side, cut.repeated) == ("second", "input", True)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(Rest(net, cut)(features_of(net, cut, images)), net(images))


def test_a_network_that_trains_from_its_first_layer_on_has_none():
    net = Drawn()
    assert find_cut(net, (3, 8, 8), device=torch.device("cpu")) is None
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]


class Borrowing(nn.Module):
    """A module that is never called, whose weights another one reads; and a norm of the batch without statistics."""

    def __init__(self, norm=False):
        super().__init__()
        self.lent, self.first = nn.Linear(3, 4), nn.Identity()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False) if norm else nn.Identity()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, images):
        x = torch.einsum("nchw,dc->ndhw", self.first(images), self.lent.weight)
        return self.head(self.pool(self.norm(x) + 1).flatten(1))


def test_weights_that_others_read_count_and_a_norm_of_the_batch_is_no_place_to_pass_over():
    cut = of_head_alone(Borrowing())
    assert "lent.weight" in cut.state
    assert "head.weight" not in cut.state
    assert of_head_alone(Borrowing(norm=True)) is None or "norm" not in of_head_alone(Borrowing(norm=True)).passed


def test_in_bf16_a_place_inside_of_a_shortcut_is_none():
    """Compared in fp32: rounding of bf16 would hide what goes around."""
    torch.manual_seed(0)
    backbone = tlx.load_backbone("timm/test_resnet", classes=7, weights="none")
    net = frozen_below(backbone, 2)
    bf16 = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    cut = find_cut(net, (3, 64, 64), device=torch.device("cpu"), autocast=bf16)
    assert (cut.path, cut.side) == ("layer4.0", "input")
    with bf16(), torch.no_grad():
        images = torch.randn(3, 3, 64, 64)
        features = features_of(net, cut, images)
        assert features.dtype == cut.dtype
        torch.testing.assert_close(Rest(net, cut)(features), net(images))


def test_buffers_that_cannot_be_written_do_not_matter():
    net = Drawn()
    net.register_buffer("wide", torch.zeros(1).expand(5))
    assert str(of_head_alone(net)) == "input of drop, 4 float32"


def test_blocks_that_are_computed_again_are_not_cut_inside():
    from tlx.train.recompute import recompute_blocks

    backbone = tlx.load_backbone("torchvision/mobilenet_v2", classes=7, weights="none")
    net = frozen_below(backbone, 3)
    recompute_blocks(net, backbone.blocks)
    cut = find_cut(net, (3, 64, 64), device=torch.device("cpu"))
    Rest(net, cut)(features_of(net, cut, torch.randn(3, 3, 64, 64))).sum().backward()
