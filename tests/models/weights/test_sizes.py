"""Weights for another image size: what is resized keeps its meaning, and what cannot be is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from tlx import models
from tlx.base.errors import UserError
from tlx.models import WeightsOptions
from tlx.models.libraries.from_timm import Timm
from tlx.models.weights import local_weights as shelf
from tlx.models.weights.fetch import fetch
from tlx.plan.config import parse
from tlx.train.components import backbone_of

VIT: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 3}
SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2]}


def library(name: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Random values, with an old head of 10 classes."""
    torch.manual_seed(1)
    return dict(timm.create_model(name.removeprefix("timm/"), num_classes=10, **args).state_dict())


def load(
    path: Path, state: dict[str, Tensor], name: str, args: dict[str, Any], size: tuple[int, int] | None = None
) -> models.Backbone:
    torch.save(state, path / "w.pth")
    options = WeightsOptions(size=size)
    found = models.load(name, classes=3, args=args, weights=str(path / "w.pth"), options=options)
    size = found.input.size
    with torch.no_grad():
        assert found.module.eval()(torch.zeros(1, 3, *size)).shape == (1, 3)
    values = found.module.state_dict()
    assert found.loaded is not None
    changed = {*found.loaded.resized, *found.loaded.new}
    assert all(torch.equal(values[n], state[n]) for n in values if n not in changed)
    return found


def ramp(size: int) -> Tensor:
    """[size, size, 2]: where each cell's middle is, from 0 to 1, down and across."""
    middle = (torch.arange(size) + 0.5) / size
    return torch.stack(torch.meshgrid(middle, middle, indexing="ij"), -1)


GRIDS = [  # network, arguments, image sizes, patch, tokens before the grid
    ("vit_tiny_patch16_224", VIT, 64, 96, 8, 1),
    ("vit_tiny_patch16_224", VIT, 96, 64, 8, 1),
    ("deit_tiny_distilled_patch16_224", VIT, 64, 96, 8, 2),
    ("vit_medium_patch16_reg4_gap_256", VIT, 64, 96, 8, 0),  # four registers without a position
    ("vit_small_patch14_dinov2", VIT, 64, 96, 8, 1),
    ("vit_small_patch14_reg4_dinov2", VIT, 64, 96, 8, 0),
    ("eva02_tiny_patch14_336", VIT, 64, 96, 8, 1),
    ("vit_base_patch16_siglip_224", VIT, 64, 96, 8, 0),  # no class token, attention pooling
    ("flexivit_small", VIT, 64, 96, 8, 0),
    ("cait_xxs24_224", VIT, 64, 96, 8, 0),  # timm itself does not resize these
    ("convit_tiny", {"depth": 1, "local_up_to_layer": 1}, 64, 96, 8, 0),
]


@pytest.mark.parametrize(("name", "args", "old", "new", "patch", "prefix"), GRIDS)
def test_a_grid_of_positions(
    tmp_path: Path, name: str, args: dict[str, Any], old: int, new: int, patch: int, prefix: int
) -> None:
    args = {**args, "patch_size": patch}
    state = library(name, {**args, "img_size": old})
    embedding = state["pos_embed"]
    assert embedding.shape[1] == prefix + (old // patch) ** 2
    embedding[:, prefix:, 0] = 7.0  # one channel constant, two that rise
    embedding[:, prefix:, 1:3] = ramp(old // patch).flatten(0, 1)
    found = load(tmp_path, state, f"timm/{name}", {**args, "img_size": new})
    assert found.loaded is not None
    assert found.loaded.resized == ("pos_embed",)
    resized = found.module.state_dict()["pos_embed"]
    assert torch.equal(resized[:, :prefix], embedding[:, :prefix])
    side = new // patch
    grid = resized[0, prefix:].unflatten(0, (side, side))
    assert torch.allclose(grid[..., 0], torch.full((side, side), 7.0), atol=1e-5)
    inside = slice(side // 4, side - side // 4)
    assert torch.allclose(grid[..., 1:3][inside, inside], ramp(side)[inside, inside], atol=0.01)
    assert torch.all(grid[..., 1].diff(dim=0) > 0)
    assert torch.all(grid[..., 2].diff(dim=1) > 0)


WIDE: dict[str, Any] = {**VIT, "patch_size": 8}


def on_grid(rows: int, columns: int) -> dict[str, Tensor]:
    """A network whose position embedding rises down in one channel, across in another, and is 7 in a third."""
    state = library("vit_tiny_patch16_224", {**WIDE, "img_size": (8 * rows, 8 * columns)})
    grid = state["pos_embed"][0, 1:].unflatten(0, (rows, columns))
    grid[..., 0] = 7.0
    grid[..., 1] = ((torch.arange(rows) + 0.5) / rows)[:, None]
    grid[..., 2] = ((torch.arange(columns) + 0.5) / columns)[None]
    return state


def lies_on(found: models.Backbone, rows: int, columns: int) -> bool:
    grid = found.module.state_dict()["pos_embed"][0, 1:].unflatten(0, (rows, columns))
    down, across = grid[..., 1], grid[..., 2]
    flat = torch.allclose(grid[..., 0], torch.tensor(7.0), atol=1e-5)
    straight = torch.allclose(down, down[:, :1].expand_as(down), atol=1e-5)
    straight &= torch.allclose(across, across[:1].expand_as(across), atol=1e-5)
    return flat and straight and bool((down.diff(dim=0) > 0).all() and (across.diff(dim=1) > 0).all())


NAME = "timm/vit_tiny_patch16_224"
GRIDS_OF_FILES = [((4, 16), (8, 8)), ((8, 8), (4, 16)), ((10, 14), (14, 14)), ((16, 4), (4, 16)), ((4, 16), (4, 16))]


@pytest.mark.parametrize("told", ["by the configuration", "by the run", "by the file"])
@pytest.mark.parametrize(("old", "new"), GRIDS_OF_FILES)
def test_a_table_lies_on_the_grid_of_its_file(
    tmp_path: Path, old: tuple[int, int], new: tuple[int, int], told: str
) -> None:
    """64 places are 8 x 8 or 4 x 16, and no shape says which: pictures of 32 x 128 into a network for 64 x 64."""
    state, path, (height, width) = on_grid(*old), tmp_path / "w.pth", (8 * old[0], 8 * old[1])
    args = {**WIDE, "img_size": (8 * new[0], 8 * new[1])}
    options = WeightsOptions(size=(height, width) if told == "by the configuration" else None)
    torch.save({"model": state, "args": argparse.Namespace(img_size=None, input_size=(3, height, width))}, path)
    if told != "by the file":
        torch.save(state, path)
    if told == "by the run":
        config = {"backbone.args.img_size": [height, width], "head": "linear"}
        said = {"config": config, "classes": ["a"], "input": {"size": [9, 9], "mean": [0.5] * 3, "std": [0.5] * 3}}
        (tmp_path / "state.json").write_text(json.dumps({"identity": said}))
    found = models.load(NAME, classes=3, args=args, weights=str(path), options=options)
    assert lies_on(found, *new)
    assert found.loaded is not None
    assert found.loaded.resized == (("pos_embed",) if old != new else ())
    assert "which the file does not say" not in str(found.loaded)
    assert torch.equal(found.module.state_dict()["pos_embed"][:, :1], state["pos_embed"][:, :1])


def beside(path: Path, name: str, args: dict[str, Any], size: tuple[int, int], **more: Any) -> None:
    """A state.json of a run that trained this network on pictures of `size`."""
    config = {f"backbone.args.{key}": value for key, value in args.items()} | {"backbone.name": name, **more}
    seen = {"size": list(size), "mean": [0.5] * 3, "std": [0.5] * 3}
    said = {"backbone": name, "config": config, "classes": ["a"], "input": seen}
    (path / "state.json").write_text(json.dumps({"identity": said}))


def test_the_size_of_the_pictures_is_not_that_of_a_table_which_takes_any(tmp_path: Path) -> None:
    """A table of 28 x 28 for 224 pixels, trained on pictures of 14 x 56 places, which are as many."""
    args = {**WIDE, "dynamic_img_size": True}
    state = on_grid(28, 28)
    torch.save(state, tmp_path / "w.pth")
    beside(tmp_path, "vit_tiny_patch16_224", args, (112, 448))
    found = models.load(NAME, classes=3, args=args, weights=str(tmp_path / "w.pth"))
    assert torch.equal(found.module.state_dict()["pos_embed"], state["pos_embed"])
    assert "does not say" not in str(found.loaded)
    wide = models.load(NAME, classes=3, args={**args, "img_size": [112, 448]}, weights=str(tmp_path / "w.pth"))
    assert lies_on(wide, 14, 56)  # from 28 x 28, which its library builds it for


def outside(classes: int, *, img_size: list[int]) -> torch.nn.Module:
    from tlx.base.inputs import InputSpec

    net: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=classes, img_size=img_size, **WIDE)
    net.input = InputSpec(size=(img_size[0], img_size[1]))  # type: ignore[assignment]
    return net


def test_tables_of_a_network_from_another_package_too(tmp_path: Path) -> None:
    name, path = f"{__name__}:outside", tmp_path / "w.pth"
    torch.save(on_grid(4, 16), path)
    wide = WeightsOptions(size=(32, 128))
    assert lies_on(models.load(name, classes=3, args={"img_size": [64, 64]}, weights=str(path), options=wide), 8, 8)
    with pytest.raises(UserError, match=r"of 64 places, and nothing says"):
        models.load(name, classes=3, args={"img_size": [32, 128]}, weights=str(path))
    beside(tmp_path, name, {"img_size": [32, 128]}, (64, 64))
    assert lies_on(models.load(name, classes=3, args={"img_size": [32, 128]}, weights=str(path)), 4, 16)
    assert lies_on(models.load(name, classes=3, args={"img_size": [48, 48]}, weights=str(path)), 6, 6)
    torch.save(on_grid(8, 8), path)
    (tmp_path / "state.json").unlink()
    assert lies_on(models.load(name, classes=3, args={"img_size": [96, 96]}, weights=str(path)), 12, 12)


def test_a_grid_that_nobody_says_is_square_or_of_the_networks_shape_or_asked_for(tmp_path: Path) -> None:
    for old, new in (((8, 8), (8, 8)), ((8, 8), (14, 14)), ((10, 14), (10, 14)), ((5, 7), (10, 14))):
        found = load(tmp_path, on_grid(*old), NAME, {**WIDE, "img_size": (8 * new[0], 8 * new[1])})
        assert lies_on(found, *new)
        assert f"pos_embed read as {old[0]} x {old[1]} places, which the file does not say" in str(found.loaded)
    with pytest.raises(UserError, match=r"w.pth: the position embeddings \(pos_embed\) are of 140 places") as asked:
        load(tmp_path, on_grid(10, 14), NAME, {**WIDE, "img_size": 112})
    assert "set backbone.weights_size to height and width" in str(asked.value)
    assert "[80, 112] for 10 x 14 or [112, 80] for 14 x 10 or" in str(asked.value)
    with pytest.raises(UserError, match=r"of 64 places, and nothing says .* timm/vit_tiny_patch16_224 has 4 x 16"):
        load(tmp_path, on_grid(8, 8), NAME, {**WIDE, "img_size": (32, 128)})
    with pytest.raises(UserError, match=r"backbone.weights_size: pictures of 96 x 96 are 12 x 12 patches of 8 x 8"):
        load(tmp_path, on_grid(10, 14), NAME, {**WIDE, "img_size": 112}, size=(96, 96))
    state = dict(timm.create_model("resnet10t", num_classes=10).state_dict())
    with pytest.raises(UserError, match=r"backbone.weights_size: timm/resnet10t has no position embeddings"):
        load(tmp_path, state, "timm/resnet10t", {}, size=(96, 96))


def test_the_size_that_weights_were_trained_at_is_a_setting(tmp_path: Path) -> None:
    torch.save(on_grid(4, 16), tmp_path / "w.pth")
    raw = {"name": NAME, "weights": str(tmp_path / "w.pth"), "args": {**WIDE, "img_size": 64}}
    data = {"train": "t", "batch": 4}
    config = parse({"run": "r", "data": data, "backbone": {**raw, "weights_size": [32, 128]}})
    assert lies_on(backbone_of(config, 3), 8, 8)
    assert parse({"run": "r", "data": data, "backbone": {**raw, "weights_size": 64}}).backbone.trained_size == (64, 64)


def test_under_other_names_and_prefixes_too(tmp_path: Path) -> None:
    """DeiT III's, which timm renames; timm alone would take the grid for that of its own weights."""
    args = {**WIDE, "img_size": (64, 64)}
    state = library("deit3_small_patch16_224", {**args, "img_size": (32, 128)})
    grid = state["pos_embed"][0].unflatten(0, (4, 16))
    grid[..., 0], grid[..., 1], grid[..., 2] = 7.0, torch.arange(4.0)[:, None], torch.arange(16.0)[None]
    published = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in state.items()}
    torch.save({f"backbone.{n}": t for n, t in published.items()}, tmp_path / "w.pth")
    options = WeightsOptions(size=(32, 128))
    weights = str(tmp_path / "w.pth")
    found = models.load("timm/deit3_small_patch16_224", classes=3, args=args, weights=weights, options=options)
    table = found.module.state_dict()["pos_embed"][0].unflatten(0, (8, 8))
    assert torch.allclose(table[..., 0], torch.tensor(7.0), atol=1e-5)
    assert torch.allclose(table[..., 1], table[:, :1, 1].expand(8, 8), atol=1e-5)
    assert torch.all(table[..., 2].diff(dim=1) > 0)
    assert found.loaded is not None
    assert found.loaded.resized == ("pos_embed",)


def test_the_librarys_own_weights_for_a_picture_of_another_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 x 10 places of 160 pixels and 5 x 20 of 80 x 320 are as many."""
    state = dict(timm.create_model("test_vit").state_dict())
    grid = state["pos_embed"][0, 1:].unflatten(0, (10, 10))
    grid[..., 0], grid[..., 1], grid[..., 2] = 7.0, torch.arange(10.0)[:, None], torch.arange(10.0)[None]
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.delenv(shelf.VARIABLE, raising=False)
    monkeypatch.setattr(Timm, "_located", lambda *_self: {"file": str(tmp_path / "w.safetensors")})
    assert lies_on(models.load("timm/test_vit", classes=3, args={"img_size": [80, 320]}), 5, 20)


def test_what_the_library_has_resized_itself_is_no_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(dict(timm.create_model("test_vit").state_dict()), tmp_path / "w.safetensors")
    monkeypatch.delenv(shelf.VARIABLE, raising=False)
    monkeypatch.setattr(Timm, "_located", lambda *_self: {"file": str(tmp_path / "w.safetensors")})
    found = models.load("timm/test_vit", classes=3, args={"img_size": 96})
    assert "does not say" not in str(found.loaded)


def test_the_files_own_patch_divides_the_size_of_its_pictures(tmp_path: Path) -> None:
    """Patches of 16 into a network of patches of 8: a table of 4 x 16 for pictures of 64 x 256."""
    state = library("flexivit_small", {**VIT, "patch_size": 16, "img_size": (64, 256)})
    grid = state["pos_embed"][0].unflatten(0, (4, 16))
    grid[..., 0], grid[..., 1], grid[..., 2] = 7.0, torch.arange(4.0)[:, None], torch.arange(16.0)[None]
    torch.save(state, tmp_path / "w.pth")
    args, options = {**VIT, "patch_size": 8, "img_size": (64, 64)}, WeightsOptions(size=(64, 256))
    found = models.load(
        "timm/flexivit_small", classes=3, args=args, weights=str(tmp_path / "w.pth"), options=options
    ).module.state_dict()["pos_embed"]
    wanted = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], [8, 8], old_size=[4, 16], num_prefix_tokens=0, interpolation="bilinear", antialias=False
    )
    assert torch.equal(found, wanted)


def test_a_size_that_a_file_says_and_its_table_contradicts_is_asked_for(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", on_grid(8, 8)
    args = {**WIDE, "img_size": (64, 64)}
    torch.save({"model": state, "args": argparse.Namespace(img_size=[40, 160])}, path)
    with pytest.raises(UserError, match=r"of 64 places, and nothing says on how many rows"):
        models.load(NAME, classes=3, args=args, weights=str(path))
    torch.save({"model": state, "args": argparse.Namespace(img_size=224)}, path)  # square all the same
    assert lies_on(models.load(NAME, classes=3, args=args, weights=str(path)), 8, 8)


def test_biases_of_distances_on_another_grid(tmp_path: Path) -> None:
    """BEiT: 4 x 8 places into 8 x 4, as many distances."""
    args = {**VIT, "patch_size": 8}
    state = library("beit_base_patch16_224", {**args, "img_size": (32, 64)})
    name = "blocks.0.attn.relative_position_bias_table"
    down, across = torch.meshgrid(torch.arange(7) - 3.0, torch.arange(15) - 7.0, indexing="ij")
    state[name][:105, 0] = (100 * down + across).flatten()
    found = load(tmp_path, state, "timm/beit_base_patch16_224", {**args, "img_size": (64, 32)}, size=(32, 64))
    table = found.module.state_dict()[name]
    bias = table[:105, 0].unflatten(0, (15, 7))
    assert bias[8, 3] == pytest.approx(100, rel=0.02)  # one place down
    assert bias[7, 4] == pytest.approx(1, rel=0.02)  # one across
    assert torch.equal(table[105:], state[name][105:])
    assert found.loaded is not None
    assert name in found.loaded.resized


def test_half_precision_is_resized_in_full(tmp_path: Path) -> None:
    args = {**VIT, "patch_size": 8}
    state = {n: t.half() for n, t in library("vit_tiny_patch16_224", {**args, "img_size": 64}).items()}
    found = load(tmp_path, state, "timm/vit_tiny_patch16_224", {**args, "img_size": 96}).module.state_dict()
    wanted = timm.layers.resample_abs_pos_embed(state["pos_embed"].float(), [12, 12])
    assert torch.allclose(found["pos_embed"], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "key", "last"),
    [
        ("visformer_tiny", "pos_embed1", False),
        ("pit_ti_224", "pos_embed", False),
        pytest.param("volo_d1_224", "pos_embed", True, marks=pytest.mark.slow),
    ],
)
def test_a_map_of_positions(tmp_path: Path, name: str, key: str, last: bool) -> None:
    state = library(name, {"img_size": 96})
    old = state[key] if last else state[key].permute(0, 2, 3, 1)
    old[..., 0] = 7.0
    old[0, ..., 1:3] = ramp(old.shape[1])
    found = load(tmp_path, state, f"timm/{name}", {"img_size": 192}).module.state_dict()[key]
    grid = (found if last else found.permute(0, 2, 3, 1))[0]
    side = grid.shape[0]
    assert side > old.shape[1]
    assert torch.allclose(grid[..., 0], torch.full((side, side), 7.0), atol=1e-5)
    inside = slice(side // 4, side - side // 4)
    assert torch.allclose(grid[..., 1:3][inside, inside], ramp(side)[inside, inside], atol=0.01)


@pytest.mark.parametrize(
    ("name", "args", "old", "new", "windows", "extra"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, {"window_size": 4}, {"window_size": 7}, (4, 7), 0),
        ("swin_tiny_patch4_window7_224", SWIN, {"window_size": 7}, {"window_size": 4}, (7, 4), 0),
        ("beit_base_patch16_224", {**VIT, "patch_size": 8}, {"img_size": 32}, {"img_size": 64}, (4, 8), 3),
        ("beit_base_patch16_224", {**VIT, "patch_size": 8}, {"img_size": 64}, {"img_size": 32}, (8, 4), 3),
    ],
)
def test_relative_positions(
    tmp_path: Path,
    name: str,
    args: dict[str, Any],
    old: dict[str, Any],
    new: dict[str, Any],
    windows: tuple[int, int],
    extra: int,
) -> None:
    """A bias per distance: near ones keep it, far ones are spread or cut; what is not a distance stays."""
    small = {"img_size": 56, **args} if "swin" in name else args
    state = library(name, {**small, **old})
    tables = [n for n in state if n.endswith("relative_position_bias_table")]
    before, after = (2 * window - 1 for window in windows)
    for table in tables:
        distances = torch.stack(torch.meshgrid(*[torch.arange(before) - windows[0] + 1.0] * 2, indexing="ij"), -1)
        state[table][: before**2] = 7.0
        state[table][: before**2, 0] = (10 * distances[..., 0] + distances[..., 1]).flatten()
    found = load(tmp_path, state, f"timm/{name}", {**small, **new})
    assert found.loaded is not None
    assert set(found.loaded.resized) == set(tables) != set()
    for table in tables:
        resized = found.module.state_dict()[table]
        assert resized.shape == (after**2 + extra, state[table].shape[1])
        assert torch.equal(resized[after**2 :], state[table][before**2 :])
        assert torch.allclose(resized[: after**2, 1:], torch.tensor(7.0), atol=1e-4)
        bias = resized[: after**2, 0].unflatten(0, (after, after))
        middle = after // 2
        assert torch.allclose(bias, -bias.flip(0, 1), atol=1e-3)
        assert torch.all(bias.diff(dim=0) > -1e-4)  # beyond the farthest distance known, the same as there
        assert torch.all(bias.diff(dim=1) > -1e-4)
        assert bias[middle + 1, middle] == pytest.approx(10, rel=0.02)
        assert bias[middle, middle + 1] == pytest.approx(1, rel=0.02)


def test_positions_that_a_network_computes(tmp_path: Path) -> None:
    """Swin V2 has a function of the distance instead of a table: it takes any window as it is."""
    state = library("swinv2_tiny_window8_256", {**SWIN, "img_size": 64})
    found = load(tmp_path, state, "timm/swinv2_tiny_window8_256", {**SWIN, "img_size": 96, "window_size": 6})
    assert found.loaded is not None
    assert found.loaded.resized == ()
    older = {**state, "layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 15, 15, 2)}
    found = load(tmp_path, older, "timm/swinv2_tiny_window8_256", {**SWIN, "img_size": 64})
    assert "layers.0.blocks.0.attn.relative_coords_table" in found.loaded.left  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "sizes"), [("levit_128s", (64, 96)), ("nest_tiny", (112, 224)), ("mixer_s32_224", (64, 96))]
)
def test_what_cannot_be_resized_is_refused(tmp_path: Path, name: str, sizes: tuple[int, int]) -> None:
    state = library(name, {"img_size": sizes[0]})
    with pytest.raises(UserError, match=r"of another shape(.|\n)*backbone.args must be those"):
        load(tmp_path, state, f"timm/{name}", {"img_size": sizes[1]})


def test_a_grid_with_other_tokens_is_refused(tmp_path: Path) -> None:
    """A class token more or less must not become a place in the picture."""
    args = {**VIT, "patch_size": 8}
    state = library("vit_medium_patch16_reg4_gap_256", {**args, "img_size": 64})
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), state["pos_embed"]], 1)
    for size in (64, 96):
        with pytest.raises(UserError, match="pos_embed"):
            load(tmp_path, state, "timm/vit_medium_patch16_reg4_gap_256", {**args, "img_size": size})


def test_the_librarys_file_and_a_fetched_one_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm resizes from its own file, tlx from the one that `tlx weights fetch` made of it."""
    state = dict(timm.create_model("test_vit").state_dict())
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv(shelf.VARIABLE, raising=False)
    list(fetch(["timm/test_vit"], tmp_path / "w"))
    wish: dict[str, Any] = {"classes": 3, "args": {"img_size": 96}}
    cached = models.load("timm/test_vit", **wish)
    monkeypatch.setenv(shelf.VARIABLE, str(tmp_path / "w"))
    fetched = models.load("timm/test_vit", **wish)
    assert fetched.loaded is not None
    assert fetched.loaded.where == str(tmp_path / "w" / "timm--test_vit.r160_in1k.safetensors")
    assert fetched.loaded.resized == ("pos_embed",)
    ours, theirs = fetched.module.state_dict(), cached.module.state_dict()
    assert ours["pos_embed"].shape != state["pos_embed"].shape
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours if not n.startswith("head."))


@pytest.mark.slow
def test_args_that_add_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm would fill SigLIP without a word about the norm that average pooling adds."""
    name = "vit_base_patch16_siglip_224"
    save_file(dict(timm.create_model(name).state_dict()), tmp_path / "w.safetensors")
    monkeypatch.setattr(Timm, "_located", lambda *_self: {"file": str(tmp_path / "w.safetensors")})
    assert models.load(f"timm/{name}", classes=3).loaded
    with pytest.raises(UserError, match=r"2 missing \(fc_norm.weight, fc_norm.bias\)"):
        models.load(f"timm/{name}", classes=3, args={"global_pool": "avg"})


@pytest.mark.slow  # the smallest vision transformer of torchvision has 86 million parameters
def test_torchvisions_vision_transformer(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = dict(torchvision.models.vit_b_16(image_size=128, num_classes=10).state_dict())
    old = state["encoder.pos_embedding"]
    old[:, 1:, 0] = 7.0
    corners = torch.linspace(0, 1, 8)
    old[:, 1:, 1:3] = torch.stack(torch.meshgrid(corners, corners, indexing="ij"), -1).flatten(0, 1)
    half = {name: tensor.half() for name, tensor in state.items()}
    torch.save(half, tmp_path / "w.pth")
    found = models.load("torchvision/vit_b_16", classes=3, args={"image_size": 192}, weights=str(tmp_path / "w.pth"))
    values = found.module.state_dict()
    assert torch.equal(values["encoder.ln.weight"], half["encoder.ln.weight"].float())
    resized = values["encoder.pos_embedding"]
    assert torch.equal(resized[:, :1], half["encoder.pos_embedding"][:, :1].float())
    grid = resized[0, 1:].unflatten(0, (12, 12))
    assert torch.allclose(grid[..., 0], torch.full((12, 12), 7.0), atol=1e-3)
    corners = torch.linspace(0, 1, 12)  # torchvision's own function lays corner on corner
    wanted = torch.stack(torch.meshgrid(corners, corners, indexing="ij"), -1)
    assert torch.allclose(grid[..., 1:3], wanted, atol=0.03)


@pytest.mark.slow
def test_torchvisions_swin_takes_any_size_as_it_is(tmp_path: Path) -> None:
    state = dict(torchvision.models.swin_t().state_dict())
    torch.save(state, tmp_path / "w.pth")
    found = models.load("torchvision/swin_t", classes=3, weights=str(tmp_path / "w.pth"))
    name = "features.1.0.attn.relative_position_bias_table"
    assert torch.equal(found.module.state_dict()[name], state[name])
    with torch.no_grad():
        assert found.module.eval()(torch.zeros(1, 3, 96, 128)).shape == (1, 3)
    state[name] = torch.zeros(81, 3)  # of a window of 5 instead of 7
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="of another shape"):
        models.load("torchvision/swin_t", classes=3, weights=str(tmp_path / "w.pth"))
