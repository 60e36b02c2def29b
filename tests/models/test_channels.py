"""Grey, RGBA and other images: networks, weights, pictures, transforms, and a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import rows, status, tlx, write_config
from images import encoded, make_shards, picture
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tlx import models
from tlx.base.errors import ConfigError, UserError
from tlx.base.inputs import InputSpec
from tlx.data.build.write import BuildOptions, build_shards
from tlx.data.pixels import transforms
from tlx.data.pixels.decode import decode
from tlx.data.pixels.transforms import eval_transform, train_transform
from tlx.data.shards.manifest import Manifest
from tlx.data.stream.stream import ShardStream, evaluation_batches
from tlx.models import Backbone
from tlx.models.channels import adapted
from tlx.plan.config import parse

RESNET: dict[str, Any] = {"channels": [8, 8, 16, 16]}
VIT: dict[str, Any] = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
NETWORKS = [
    ("timm/resnet10t", RESNET, "conv1.0"),
    ("timm/vit_tiny_patch16_224", VIT, "patch_embed.proj"),
    ("torchvision/squeezenet1_1", {}, "features.0"),
    ("toys:small", {}, "features.0.0"),
]


def rgb_file(name: str, args: dict[str, Any], path: Path) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    net = models.load(name, classes=3, weights="none", args=args).module.eval()
    torch.save(net.state_dict(), path)
    return net, str(path)


def with_head_of(backbone: Backbone, other: nn.Module) -> nn.Module:
    """The network with the classifier's values of another."""
    mine, theirs = backbone.module.state_dict(), other.state_dict()
    for parameter in backbone.layers.head.parameters:
        mine[parameter.name].copy_(theirs[parameter.name])
    return backbone.module.eval()


@pytest.mark.parametrize(("name", "args", "first"), NETWORKS)
def test_pretrained_values_for_grey_and_rgba(name: str, args: dict[str, Any], first: str, tmp_path: Path) -> None:
    """Summed for one channel, so that grey gives what it gave as R = G = B; beside zeros for alpha."""
    rgb, file = rgb_file(name, args, tmp_path / "rgb.pth")
    images, weight = torch.randn(2, 1, 64, 64), rgb.get_submodule(first).weight
    one = models.load(name, classes=3, weights=file, args=args, channels=1)
    assert one.module.get_submodule(first).weight.shape[1] == one.input.channels == 1  # type: ignore[index, union-attr]
    assert torch.allclose(with_head_of(one, rgb)(images), rgb(images.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    four = models.load(name, classes=3, weights=file, args=args, channels=4)
    expected = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)  # type: ignore[index]
    assert torch.equal(four.module.get_submodule(first).weight, expected)  # type: ignore[arg-type]
    coloured, opaque = torch.randn(2, 3, 64, 64), torch.ones(2, 1, 64, 64)  # 255 by a mean and deviation of 0.5
    seen = with_head_of(four, rgb)(torch.cat([coloured, opaque], 1))
    assert torch.allclose(seen, rgb(coloured), atol=1e-5, rtol=1e-5)
    four.module.get_submodule(first).weight.requires_grad_()  # type: ignore[union-attr, operator]
    four.module(torch.cat([coloured, opaque], 1)).square().sum().backward()
    assert four.module.get_submodule(first).weight.grad[:, 3].abs().max() > 0  # type: ignore[index, union-attr]
    six = models.load(name, classes=3, weights=file, args=args, channels=6).module.get_submodule(first).weight
    assert torch.equal(six, torch.cat([weight, weight], 1) / 2)  # type: ignore[list-item, arg-type]
    assert one.layers.names == four.layers.names


@pytest.mark.parametrize(("name", "args", "first"), NETWORKS)
def test_a_file_of_one_channel_is_taken_as_it_is(name: str, args: dict[str, Any], first: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = models.load(name, classes=3, weights="none", args=args, channels=1).module
    torch.save(net.state_dict(), tmp_path / "grey.pth")
    again = models.load(name, classes=3, weights=str(tmp_path / "grey.pth"), args=args, channels=1).module
    assert torch.equal(again.get_submodule(first).weight, net.get_submodule(first).weight)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{first}.weight.*instead of"):
        models.load(name, classes=3, weights=str(tmp_path / "grey.pth"), args=args)


def test_values_under_other_names_are_made_to_fit_too(tmp_path: Path) -> None:
    """A prefix in the file, which is only found out while it is read."""
    rgb, _ = rgb_file("timm/resnet10t", RESNET, tmp_path / "rgb.pth")
    torch.save({f"encoder.{n}": t for n, t in rgb.state_dict().items()}, tmp_path / "prefixed.pth")
    weights = str(tmp_path / "prefixed.pth")
    one = models.load("timm/resnet10t", classes=3, weights=weights, args=RESNET, channels=1).module
    assert torch.equal(one.conv1[0].weight, rgb.conv1[0].weight.sum(1, keepdim=True))  # type: ignore[index, union-attr]


def test_trained_weights_load_strictly_into_timm_with_as_many_channels() -> None:
    net = models.load("timm/resnet10t", classes=3, weights="none", args=RESNET, channels=2).module
    plain = timm.create_model("resnet10t", num_classes=3, in_chans=2, **RESNET)
    plain.load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/vit_b_16", "torchvision/googlenet"])
def test_plans_for_other_channels_need_no_weights(name: str) -> None:
    backbone = models.load(name, classes=3, empty=True, channels=6)
    assert {p.device.type for p in backbone.module.parameters()} == {"meta"}
    first = backbone.layers.layers[0].parameters[0]
    assert 6 in first.shape[:2] or any(p.shape[1:2] == (6,) for p in backbone.layers.layers[0].parameters)


def test_networks_and_weights_without_a_rule() -> None:
    with pytest.raises(UserError, match="at least one channel"):
        models.load("timm/resnet10t", classes=3, weights="none", channels=0)
    with pytest.raises(UserError, match=r"no convolution of Sequential takes the image.*\n.*`in_chans`"):
        models.load(f"{__name__}:linear", classes=3, weights="none", channels=1)
    with pytest.raises(UserError, match=r'"in_chans" cannot be set in args \(set input\.channels'):
        models.check_args("timm/resnet10t", {"in_chans": 1})
    patches = {"embeds.proj.weight": torch.zeros(24, 768)}  # NaFlexViT sees them through a linear layer
    with pytest.raises(UserError, match=r"no rule makes embeds.proj.weight \(24, 768\), trained on RGB"):
        adapted(patches, {"embeds.proj.weight": (24, 768)}, 4)


def linear(classes: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))
    net.input = InputSpec(size=(8, 8))  # type: ignore[assignment]
    return net


def told(classes: int, *, in_chans: int = 3) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 8 * 8, 4), nn.ReLU(), nn.Linear(4, classes))
    net.input = InputSpec(size=(8, 8))  # type: ignore[assignment]
    return net


def grey_only(classes: int) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    net.input = InputSpec(size=(8, 8), mean=(0.3,), std=(0.2,))  # type: ignore[assignment]
    return net


def adopted(classes: int) -> Backbone:
    net = grey_only(classes)
    return models.adopt(net, ("3",), input=net.input)  # type: ignore[arg-type]


def preserving(classes: int) -> nn.Module:
    """Its first convolution gives what looks like another image."""
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def test_networks_of_other_packages() -> None:
    wish: dict[str, Any] = {"classes": 3, "weights": "none"}
    assert models.load(f"{__name__}:told", channels=2, **wish).module(torch.randn(2, 2, 8, 8)).shape == (2, 3)
    with pytest.raises(UserError, match=r"set input\.channels"):
        models.check_args(f"{__name__}:told", {"in_chans": 2})
    for function in ("grey_only", "adopted"):
        backbone = models.load(f"{__name__}:{function}", channels=1, **wish)
        assert (backbone.input.mean, backbone.module(torch.randn(2, 1, 8, 8)).shape) == ((0.3,), (2, 3))
        with pytest.raises(UserError, match=r"takes images of 1 channels(.|\n)*input.channels: 1"):
            models.load(f"{__name__}:{function}", **wish)
    net = models.load(f"{__name__}:preserving", channels=4, **wish).module
    assert [m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [4, 3]


# the input spec and its settings


def test_means_of_other_channels() -> None:
    spec = InputSpec()
    assert spec.for_channels(3) is spec or spec.for_channels(3) == spec
    assert spec.for_channels(1).mean == pytest.approx((0.449,), abs=1e-9)
    assert spec.for_channels(1).std == pytest.approx((0.226,), abs=1e-9)
    assert spec.for_channels(4).mean == (0.485, 0.456, 0.406, 0.5)
    assert spec.for_channels(4).std == (0.229, 0.224, 0.225, 0.5)
    with pytest.raises(UserError, match="1 means and 3 standard"):
        InputSpec(mean=(0.5,))


RAW = {"run": "x", "data": {"train": "x", "batch": 4}, "backbone": {"name": "toys:small"}}


def test_as_many_means_as_channels() -> None:
    config = parse({**RAW, "input": {"channels": 1, "mean": [0.3]}})
    spec = config.input.over(InputSpec().for_channels(1))
    assert (spec.mean, spec.std, spec.channels) == ((0.3,), pytest.approx((0.226,)), 1)
    with pytest.raises(ConfigError, match="input: mean has 3 values for 1 channels"):
        parse({**RAW, "input": {"channels": 1, "mean": [0.3, 0.3, 0.3]}})
    with pytest.raises(ConfigError, match="input: std has 1 values for 3 channels"):
        parse({**RAW, "input": {"std": [0.3]}})
    with pytest.raises(ConfigError, match="channels: input should be 1, 3 or 4"):
        parse({**RAW, "input": {"channels": 2}})


# pictures

PHOTO = picture(1, size=(40, 60))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_pictures_in_one_channel_and_in_four(mode: str, format: str) -> None:
    if (mode, format) in (("CMYK", "PNG"), ("RGBA", "JPEG"), ("P", "JPEG")):
        return
    data = encoded(PHOTO.convert(mode), format)
    rgb, grey, rgba = (decode(data, n).int() for n in (3, 1, 4))  # type: ignore[arg-type]
    assert [tuple(p.shape) for p in (grey, rgba)] == [(1, 40, 60), (4, 40, 60)]
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    assert (grey[0] - luma).abs().max() <= 3
    assert torch.equal(rgba[:3], rgb)
    assert set(rgba[3].unique().tolist()) == {255}


def test_transparency_is_the_fourth_channel() -> None:
    pixels = np.full((9, 9, 4), (200, 100, 50, 0), np.uint8)
    pixels[4:, :, 3] = 77
    assert decode(encoded(Image.fromarray(pixels), "PNG"), 4)[:, 0, 0].tolist() == [200, 100, 50, 0]
    assert decode(encoded(Image.fromarray(pixels), "PNG"), 4)[3, 8, 8] == 77
    sixteen = encoded(Image.fromarray(np.array([[0, 2560, 65535]], dtype=np.uint16)), "PNG")
    assert decode(sixteen, 1).tolist() == [[[0, 10, 255]]]
    assert decode(sixteen, 4)[:, 0, 1].tolist() == [10, 10, 10, 255]


def test_shards_keep_transparency(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "p" / label).mkdir(parents=True)
        Image.fromarray(np.full((40, 60, 4), (200, 100, 50, 9), np.uint8)).save(tmp_path / "p" / label / "0.png")
    build_shards(str(tmp_path / "p"), tmp_path / "s", BuildOptions(val=0.0, resize=20, jobs=0))
    view = eval_transform(InputSpec(size=(16, 16)).for_channels(4))
    batch = next(evaluation_batches(Manifest.open(tmp_path / "s" / "train"), batch=2, transform=view, channels=4))
    assert batch.images[0, :, 8, 8].tolist() == [200, 100, 50, 9]


# transforms

NEEDED: dict[str, Any] = {
    "rotation": {"degrees": 10, "fill": "mean"},
    "shear": {"degrees": 10},
    "color_jitter": {"brightness": 0.2, "hue": 0.1},
    "random_erasing": {"p": 1.0, "fill": 7},
}
COLOURS = {"augmix", "auto_augment", "color_jitter", "grayscale", "rand_augment", "trivial_augment"}


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", transforms.__all__)
def test_every_transform_on_other_channels(name: str, channels: int) -> None:
    """The list is tried out on a few pictures only, so what may fail later has to be refused by name."""
    spec = InputSpec(size=(16, 16)).for_channels(channels)
    parts = [(name, NEEDED.get(name, {})), ("random_resized_crop", {})]
    if channels == 4 and name in COLOURS:
        with pytest.raises(UserError, match=rf"transforms\.0: {name} changes the colours"):
            train_transform(parts, spec)
        return
    view = train_transform(parts, spec)
    for seed in range(30):
        torch.manual_seed(seed)
        assert view(torch.randint(0, 256, (channels, 24, 20), dtype=torch.uint8)).shape == (channels, 16, 16)


def only_rgb(input: InputSpec) -> Any:
    def view(image: torch.Tensor) -> torch.Tensor:
        red, green, blue = image
        return torch.stack([blue, green, red])

    return view


def test_a_transform_that_fails_is_named() -> None:
    parts = [("random_resized_crop", {}), (f"{__name__}:only_rgb", {})]
    with pytest.raises(UserError, match=r"only_rgb fails on a picture of 32 x 48 pixels in 1 channels"):
        train_transform(parts, InputSpec(size=(16, 16)).for_channels(1))
    with pytest.raises(UserError, match=r"transforms\.0: fill has 3 values for 1 channels"):
        train_transform([("random_crop", {"fill": [1, 2, 3]})], InputSpec(size=(16, 16)).for_channels(1))


# training


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "s", classes=3, per_class={"train": 12, "val": 6}, size=24)


def test_streams_read_as_many_channels_as_they_are_told(shards: Path) -> None:
    manifest = Manifest.open(shards / "train")
    spec = InputSpec(size=(16, 16)).for_channels(1)
    view = train_transform([("random_resized_crop", {})], spec)
    for workers in (0, 1):
        stream = ShardStream(manifest, batch=6, seed=0, transform=view, channels=1, workers=workers)
        assert next(stream.batches(0, 1)).images.shape == (6, 1, 16, 16)
    val = evaluation_batches(manifest, batch=5, transform=eval_transform(spec), channels=1)
    assert next(iter(val)).images.shape == (5, 1, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_a_training(shards: Path, tmp_path: Path, channels: int) -> None:
    """From an RGB file, through the command, to a checkpoint that says how its pictures were read."""
    _, file = rgb_file("toys:small", {}, tmp_path / "rgb.pth")
    raw = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 9, "workers": 0},
        "input": {"size": 16, "channels": channels},
        "transforms": ["random_resized_crop", "horizontal_flip", {"name": "random_erasing", "p": 0.5}],
        "backbone": {"name": "toys:small", "weights": file},
        "unfreeze": "two_phase",
        "phases": {"feature_extraction": {"lr": 0.01, "duration": "2ep"}, "fine_tuning": {"lr": 0.01, "duration": 20}},
        "evaluate": {"every": 5},
        "track": {"every": 1, "report": False},
    }
    path = write_config(tmp_path / "c.yaml", raw)
    planned = tlx("plan", path)
    assert planned.returncode == 0, planned.stderr
    done = tlx("train", path, is_forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert status(tmp_path / "run")["status"] == "done"
    first = load_file(tmp_path / "run" / "checkpoints" / "latest" / "model.safetensors")["features.0.0.weight"]
    assert first.shape == (8, channels, 3, 3)
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert len(state["identity"]["input"]["mean"]) == channels
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5])
