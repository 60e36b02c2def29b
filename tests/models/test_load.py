"""Names, arguments, input specs, and networks of other packages."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from tlx import models
from tlx.base.errors import UserError
from tlx.base.inputs import InputSpec
from tlx.models import Backbone

SMALL_RESNET: dict[str, Any] = {"channels": [8, 8, 16, 16]}
SMALL_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}


def error(**wish: Any) -> str:
    with pytest.raises(UserError) as caught:
        models.load(**{"classes": 3, "weights": "none", "empty": True, **wish})
    return str(caught.value)


def test_importing_costs_no_torch() -> None:
    code = "import sys, tlx.models, tlx.models.heads; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names() -> None:
    assert models.source("torchvision/resnet18").name == "torchvision/resnet18"
    assert models.source("resnet10t").name == "timm/resnet10t"  # only timm has it
    assert models.source("googlenet").name == "torchvision/googlenet"
    assert models.source("timm/resnet50.tv_in1k").tags()[0] == "tv_in1k"
    assert "torchvision/resnet50 or timm/resnet50" in error(name="resnet50")
    assert 'did you mean "torchvision/resnet50"' in error(name="torchvision/resnet5O")
    assert "there is no library" in error(name="keras/resnet50")
    assert "timm/resnet10t" in error(name="resnet10tt")


def test_arguments_are_checked_before_anything_is_built() -> None:
    checked = models.check_args("timm/resnet10t", {"drop_path_rate": "0.1", "channels": [8, 16, 24, 32]})
    assert checked == {"drop_path_rate": 0.1, "channels": (8, 16, 24, 32)}
    assert models.check_args("timm/mobilenetv2_100", {"pad_type": "same"}) == {"pad_type": "same"}
    assert models.check_args("timm/vit_tiny_patch16_224", {"img_size": 64}) == {"img_size": 64}
    assert models.check_args("timm/deit_tiny_distilled_patch16_224", {"drop_path_rate": 0.1})  # through its base class
    assert models.check_args("torchvision/vit_b_16", {"image_size": 64}) == {"image_size": 64}
    with pytest.raises(UserError) as caught:
        models.check_args(
            "timm/resnet10t", {"drop_path_rat": 0.1, "num_classes": 3, "in_chans": 1, "drop_rate": "much"}
        )
    for part in (
        'did you mean "drop_path_rate"',
        '"num_classes" cannot be set in args (the number of classes comes from the data)',
        '"in_chans" cannot be set in args',
        "drop_rate: input should be a valid number",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match='resnet18 has no argument "zero_init_residua"; did you mean'):
        models.check_args("torchvision/resnet18", {"zero_init_residua": True})
    with pytest.raises(UserError, match='resnet18 sets "layers" itself'):
        models.check_args("torchvision/resnet18", {"layers": [1, 1, 1, 1]})
    with pytest.raises(UserError, match='"weights" cannot be set in args'):
        models.check_args("torchvision/resnet18", {"weights": "DEFAULT"})


def test_arguments_reach_the_network() -> None:
    net = models.load("timm/resnet10t", classes=3, weights="none", args=SMALL_RESNET).module
    assert net.conv1[0].out_channels == 24  # type: ignore[index, union-attr]
    assert net.layer4[0].conv1.out_channels == 16  # type: ignore[index, union-attr]
    assert "cannot be built with" in error(name="torchvision/densenet121", args={"growth_rate": 8})


@pytest.mark.parametrize(
    ("name", "weights", "args", "spec"),
    [
        ("torchvision/resnet50", "none", {}, InputSpec(crop_pct=224 / 232)),
        ("torchvision/resnet50", "IMAGENET1K_V1", {}, InputSpec(crop_pct=0.875)),
        ("torchvision/efficientnet_b3", "none", {}, InputSpec((300, 300), interpolation="bicubic", crop_pct=300 / 320)),
        ("torchvision/vit_h_14", "none", {}, InputSpec((518, 518), interpolation="bicubic", crop_pct=1.0)),
        ("torchvision/vit_b_16", "none", {"image_size": 64}, InputSpec((64, 64), crop_pct=0.875)),
        ("timm/resnet50", "none", {}, InputSpec((224, 224), interpolation="bicubic", crop_pct=0.95)),
        ("timm/resnet50", "tv_in1k", {}, InputSpec((224, 224), interpolation="bilinear", crop_pct=0.875)),
        (
            "timm/vit_tiny_patch16_224",
            "none",
            {"img_size": 64},
            InputSpec((64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9),
        ),
        ("timm/efficientnet_b0", "none", {}, InputSpec((224, 224), interpolation="bicubic", crop_pct=0.875)),
    ],
)
def test_input_spec_is_the_librarys(name: str, weights: str, args: dict[str, Any], spec: InputSpec) -> None:
    assert models.load(name, classes=3, weights=weights, args=args, empty=True).input == spec


def test_inception_sees_what_torchvision_shows_it() -> None:
    """Pretrained, torchvision rescales ImageNet's normalisation inside the network; we normalise so at once."""
    spec = models.load("torchvision/inception_v3", classes=3, weights="none", empty=True).input
    assert (spec.size, spec.crop_pct) == ((299, 299), 299 / 342)
    inside = torchvision.models.inception_v3(weights=None, transform_input=True, init_weights=False)
    pixels = torch.rand(1, 3, 8, 8)
    preset = torchvision.models.Inception_V3_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preset.mean, preset.std))
    ours = (pixels - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)
    assert torch.allclose(inside._transform_input((pixels - mean) / std), ours, atol=1e-6)
    asked = models.load(
        "torchvision/inception_v3", classes=3, weights="none", empty=True, args={"transform_input": True}
    )
    assert asked.input.mean == (0.485, 0.456, 0.406)


def test_empty_networks_have_no_storage() -> None:
    backbone = models.load("torchvision/vit_b_16", classes=3, weights="default", empty=True)
    assert {p.device.type for p in backbone.module.parameters()} == {"meta"}
    fallback = models.load("timm/swinv2_tiny_window8_256", classes=3, weights="none", empty=True)  # computes when built
    assert {p.device.type for p in fallback.module.parameters()} == {"meta"}


def plain(name: str, args: dict[str, Any], classes: int) -> nn.Module:
    library, _, model = name.partition("/")
    if library == "timm":
        return timm.create_model(model, num_classes=classes, **args)
    return torchvision.models.get_model(model, weights=None, num_classes=classes, **args)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torchvision/resnet18", {}),
        ("torchvision/mobilenet_v3_small", {}),
        ("torchvision/squeezenet1_1", {}),
        ("torchvision/googlenet", {}),
        ("torchvision/inception_v3", {}),
        ("timm/resnet10t", SMALL_RESNET),
        ("timm/deit_tiny_distilled_patch16_224", SMALL_VIT),
        ("timm/mobilenetv3_small_050", {}),
        ("timm/convnext_atto", {}),
    ],
)
def test_trained_weights_load_strictly_into_the_plain_library(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = models.load(name, classes=7, weights="none", args=args).module
    torch.save(net.state_dict(), tmp_path / "model.pt")
    extra = {"init_weights": False} if "googlenet" in name or "inception" in name else {}
    other = plain(name, {**args, **extra}, 7)
    other.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    images = torch.randn(1, 3, 96, 96) if args is not SMALL_VIT else torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), other.eval()(images))


@pytest.mark.parametrize(("name", "outputs"), [("torchvision/inception_v3", 2), ("torchvision/googlenet", 3)])
def test_auxiliary_classifiers_know_the_classes(name: str, outputs: int) -> None:
    backbone = models.load(name, classes=7, weights="none", head="mlp", head_args={"hidden": [16]})
    with torch.no_grad():
        out = backbone.module.train()(torch.randn(2, 3, *backbone.input.size))
    assert [tuple(o.shape) for o in out] == [(2, 7)] * outputs
    assert out[0] is out.logits
    assert set(backbone.auxiliary) == ({"AuxLogits.fc"} if outputs == 2 else {"aux1.fc2", "aux2.fc2"})


def test_no_classifier_is_an_error() -> None:
    assert "nothing in this network is a classifier" in error(name=f"{__name__}:deaf")


class Digits(nn.Module):
    """A network for 32 pixels, as a user writes one."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(*[Shortcut(width) for _ in range(3)])
        self.out = nn.Linear(width, classes)
        self.input = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.stem(x.mean(1, keepdim=True))).mean((2, 3)))


class Shortcut(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x).relu()


def digits(classes: int, *, width: int = 8) -> nn.Module:
    return Digits(classes, width)


def deaf(classes: int) -> nn.Module:
    return Digits(10, 4)


def complete(classes: int) -> Backbone:
    net = Digits(classes, 4)
    return models.adopt(net, ("out",), name="complete", input=net.input)


def forgetful(classes: int) -> Any:
    return "net"


def test_a_network_of_the_users_own() -> None:
    backbone = models.load(f"{__name__}:digits", classes=4, args={"width": 6})
    assert backbone.input.size == (32, 32)
    assert backbone.layers.names == ("stem", "body.0", "body.1", "body.2", "out")
    assert (backbone.features, backbone.blocks) == (6, ("body.0", "body.1", "body.2"))
    assert backbone.module(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    pooled = models.load(f"{__name__}:digits", classes=4, head="concat_pool", head_args={"hidden": [5]})
    assert pooled.module(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert 'did you mean "width"' in error(name=f"{__name__}:digits", args={"widht": 3})
    assert "returned str" in error(name=f"{__name__}:forgetful")


def test_a_backbone_of_the_users_own() -> None:
    backbone = models.load(f"{__name__}:complete", classes=4)
    assert backbone.layers.names == ("stem", "body.0", "body.1", "body.2", "out")
    assert "brings its own head" in error(name=f"{__name__}:complete", head="mlp")


def test_an_entry_point_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_nets.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            def tiny(classes, *, width: int = 4):
                return nn.Sequential(
                    nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(4),
                    nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(width, classes),
                )
            """
        )
    )
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tlx.backbone]\nstranger_tiny = stranger_nets:tiny\nresnet10t = stranger_nets:tiny\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = models.load("stranger_tiny", classes=3, args={"width": "6"})
    assert backbone.layers.names == ("0", "4", "8")
    assert [y.depth for y in backbone.layers] == [0, 1, 2]
    assert "several libraries" in error(name="resnet10t")  # a name of timm's, too
    assert any(row.name == "stranger_tiny" for row in models.search("stranger"))


def test_search_and_describe() -> None:
    rows = {row.name: row for row in models.search("vgg16_bn")}
    assert set(rows) == {"timm/vgg16_bn", "torchvision/vgg16_bn"}
    row = rows["torchvision/vgg16_bn"]
    assert (row.parameters, row.head, row.features) == (138_365_992, "classifier.6", 4096)
    assert row.weights == ("IMAGENET1K_V1",)
    assert len(list(models.search("torchvision/*"))) >= 80
    assert next(models.search("torchvision/*")).head is None  # too many to build each
    found = models.describe("timm/resnet10t")
    assert "drop_path_rate" in found.args
    assert "num_classes" not in found.args
    assert set(found.layers) == {"stage", "block", "module"}
