"""Weights from files and caches."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from tlx import models
from tlx.base.errors import UserError
from tlx.models import WeightsOptions
from tlx.models.weights import download, filling
from tlx.models.weights.files import _state_dicts
from tlx.models.weights.state_dict_formats import Reading
from tlx.plan.config import parse
from tlx.train.components import backbone_of

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16]}
VIT: dict[str, Any] = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}


def resnet(classes: int = 10, **args: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(timm.create_model("resnet10t", num_classes=classes, **{**SMALL, **args}).state_dict())


def load(path: Path, **wish: Any) -> dict[str, torch.Tensor]:
    wish = {"name": "timm/resnet10t", "classes": 3, "args": SMALL, "weights": str(path), **wish}
    return dict(models.load(**wish).module.state_dict())


def error(path: Path, **wish: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **wish)
    return str(caught.value)


def same_body(found: dict[str, torch.Tensor], given: dict[str, torch.Tensor], head: str = "fc.") -> bool:
    return all(torch.equal(found[n], given[n]) for n in found if not n.startswith(head))


@pytest.mark.parametrize("classes", [10, 3])  # the old head never comes along, of whatever size it is
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_files(tmp_path: Path, suffix: str, classes: int) -> None:
    state, path = resnet(classes), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = load(path)
    assert same_body(found, state)
    assert found["fc.weight"].shape == (3, 16)
    assert classes != 3 or not torch.equal(found["fc.weight"], state["fc.weight"])


def test_wrappers_prefixes_and_half_precision(tmp_path: Path) -> None:
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in resnet().items()}
    torch.save({"epoch": 3, "state_dict": {f"module._orig_mod.{n}": t for n, t in state.items()}}, tmp_path / "w.pth")
    found = load(tmp_path / "w.pth")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float32}
    assert same_body(found, {n: t.to(found[n].dtype) for n, t in state.items()})


def test_a_file_without_a_head_is_fine(tmp_path: Path) -> None:
    state = {n: t for n, t in resnet().items() if not n.startswith("fc.")}
    torch.save(state, tmp_path / "w.pth")
    assert same_body(load(tmp_path / "w.pth"), state)


def test_a_file_that_tlx_wrote_with_another_head(tmp_path: Path) -> None:
    mlp = models.load("timm/resnet10t", classes=5, weights="none", args=SMALL, head="mlp").module
    torch.save(mlp.state_dict(), tmp_path / "w.pth")
    assert same_body(load(tmp_path / "w.pth"), dict(mlp.state_dict()))
    assert same_body(load(tmp_path / "w.pth", head="concat_pool"), dict(mlp.state_dict()), head="head.")


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = resnet()
    del state["layer1.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "w.pth")
    text = error(tmp_path / "w.pth")
    assert (
        "w.pth: does not fit timm/resnet10t: 1 missing (layer1.0.conv1.weight); 1 not in the network (layer9.weight)\n"
        in text
    )
    torch.save(resnet(channels=[8, 8, 16, 32]), tmp_path / "w.pth")
    text = error(tmp_path / "w.pth")
    assert "of another shape (layer4.0.conv1.weight (32, 16, 3, 3) instead of (16, 16, 3, 3)" in text
    assert "backbone.args" in text
    state = resnet()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    assert "1 not finite or no real numbers (layer1.0.conv1.weight)" in error(tmp_path / "w.pth")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    assert "no such file" in error(tmp_path / "none.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a file of torch")
    assert 'cannot be read as weights: it is a text file, which begins with "not a' in error(tmp_path / "noise.pth")
    torch.save({"a": Path("code")}, tmp_path / "pickle.pth")  # an object, not tensors: weights_only refuses it
    assert "cannot be read as weights: it holds a pickled pathlib.PosixPath" in error(tmp_path / "pickle.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    assert "holds no state dict" in error(tmp_path / "list.pth")


def wrapped(path: Path, rename: Callable[[str], str], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Writes a file whose names went through `rename`, with `more` in it; the state as it was."""
    state = resnet()
    torch.save({**{rename(n): t for n, t in state.items()}, **more}, path)
    return state


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.module.{n}",
        lambda n: f"model.{n}",
        lambda n: f"model.backbone.{n}",
        lambda n: f"encoder.{n}",
        lambda n: f"encoder._orig_mod.{n}",
        lambda n: n.replace("layer1.", "layer1._orig_mod."),  # one part compiled by itself
        lambda n: n.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."),
    ],
)
def test_what_wrappers_put_before_names(tmp_path: Path, rename: Callable[[str], str]) -> None:
    state = wrapped(tmp_path / "w.pth", rename)
    assert same_body(load(tmp_path / "w.pth"), state)


def test_a_network_inside_a_larger_one(tmp_path: Path) -> None:
    """Self-supervised training and segmentation: what is not under the prefix is not of the network, and is named."""
    outside = {"projector.0.weight": torch.zeros(2), "queue": torch.zeros(3)}
    state = wrapped(tmp_path / "w.pth", lambda n: f"module.encoder_q.{n}", **outside)
    found = models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(tmp_path / "w.pth"))
    assert same_body(dict(found.module.state_dict()), state)
    assert found.loaded is not None
    left = {"projector.0.weight", "queue", "module.encoder_q.fc.weight", "module.encoder_q.fc.bias"}
    assert set(found.loaded.left) == left
    assert found.loaded.tensors == len(state) - 2
    both = {f"encoder_k.{n}": t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save({**both, **{n.replace("encoder_k.", "encoder_q."): t for n, t in both.items()}}, tmp_path / "w.pth")
    text = error(tmp_path / "w.pth")
    assert "w.pth: the network is in there 2 times, under encoder_k. and encoder_q." in text
    assert "set backbone.weights_key to the one that is meant: encoder_k" in text
    asked = load(tmp_path / "w.pth", options=WeightsOptions(key="encoder_q"))
    assert same_body(asked, {**asked, **{n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}})
    wrapped(tmp_path / "w.pth", lambda n: n, **{f"ema.{n}": t for n, t in state.items()})
    assert "not in the network (ema." in error(tmp_path / "w.pth")


def test_a_prefix_hides_no_mistake(tmp_path: Path) -> None:
    state = {f"backbone.{n}": t for n, t in resnet().items()}
    del state["backbone.layer1.0.conv1.weight"]
    torch.save({**state, "backbone.fpn.weight": torch.zeros(1)}, tmp_path / "w.pth")
    text = error(tmp_path / "w.pth")
    assert "1 missing (layer1.0.conv1.weight); 1 not in the network (fpn.weight)" in text


def test_what_training_scripts_put_around_a_state_dict(tmp_path: Path) -> None:
    state, other = resnet(), {n: torch.zeros_like(t) for n, t in resnet().items()}
    options = argparse.Namespace(lr=0.1)
    for content in (
        {"epoch": 3, "model": state, "args": options},
        {"epoch": 3, "model": {"state_dict": state}},
        {"state_dict": other, "state_dict_ema": state, "args": options},
        {"model": other, "model_ema": state},
        {"model": state, "model_ema": None},
    ):
        torch.save(content, tmp_path / "w.pth")
        assert same_body(load(tmp_path / "w.pth"), state)
    torch.save({"epoch": 3, "student": state, "teacher": state}, tmp_path / "w.pth")
    assert (
        "w.pth: holds 2 state dicts, and nothing says which is meant: student, teacher\n  -> set backbone.weights_key "
        "to one of them: student"
    ) in error(tmp_path / "w.pth")
    torch.save({"epoch": 3, "student": 4}, tmp_path / "w.pth")
    assert "holds no state dict (parameter names with tensors); it has epoch, student\n" in error(tmp_path / "w.pth")


def test_the_dict_that_is_meant(tmp_path: Path) -> None:
    """By a name of its own where there is one dict, by the key where there are several; the others are told."""
    state, other = resnet(), {n: torch.zeros_like(t) for n, t in resnet().items()}
    optimizer = {"state": {"fc.weight": {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    path = tmp_path / "w.pth"
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimizer}, path)
    assert same_body(load(path), state)
    torch.save({"epoch": 3, "generator": state, "optimizer": optimizer}, path)
    found = models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(path))
    assert same_body(dict(found.module.state_dict()), state)
    assert str(found.loaded).endswith("; from its generator")
    torch.save({"ckpt": {"student": other, "teacher": state}, "model": other, "model_ema": other}, path)
    assert same_body(load(path, options=WeightsOptions(key="ckpt.teacher")), state)
    wrong = error(path, options=WeightsOptions(key="ckpt.techer"))
    assert 'w.pth: has no state dict "ckpt.techer"; did you mean "ckpt.teacher" or' in wrong
    assert "backbone.weights_key is one of model, model_ema, ckpt.student, ckpt.teacher" in wrong
    torch.save({"model": other, "model_ema": state}, path)
    told = models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(path)).loaded
    assert str(told).endswith("; from its model_ema; model is in there too (backbone.weights_key)")
    assert same_body(load(path, options=WeightsOptions(key="model")), other)
    raw = {"name": "timm/resnet10t", "args": SMALL, "weights": str(path), "weights_key": "model"}
    config = parse({"run": "r", "data": {"train": "t", "batch": 4}, "backbone": raw})
    assert same_body(dict(backbone_of(config, 3).module.state_dict()), other)


def test_a_prefix_that_several_dicts_have_is_asked_for(tmp_path: Path) -> None:
    state, path = resnet(), tmp_path / "w.pth"
    mine = {f"backbone.{n}": t for n, t in state.items()}
    other = {n: torch.zeros_like(t) for n, t in mine.items()}
    torch.save({"student": other, "teacher": mine}, path)
    text = error(path, options=WeightsOptions(key="backbone"))
    assert text.startswith(f'{path}: holds "backbone" 2 times: student.backbone, teacher.backbone\n')
    assert "set backbone.weights_key to the one that is meant: student.backbone" in text
    assert same_body(load(path, options=WeightsOptions(key="teacher.backbone")), state)
    torch.save({"student": {"x.w": torch.zeros(1)}, "teacher": mine}, path)
    assert same_body(load(path, options=WeightsOptions(key="backbone")), state)


def test_what_an_optimizer_holds_is_no_network_and_no_other_name_is_an_optimizers(tmp_path: Path) -> None:
    state, other, path = resnet(), {n: torch.zeros_like(t) for n, t in resnet().items()}, tmp_path / "w.pth"
    torch.save({"optimal_model": state, "optim": other, "optimizers": {"g": other}, "optimizer_g": other}, path)
    assert same_body(load(path), state)
    torch.save({"optim": {"net": state}, "student": other}, path)
    assert same_body(load(path, options=WeightsOptions(key="optim.net")), state)
    assert same_body(load(path), other)


def test_keys_of_a_file_take_no_memory(tmp_path: Path) -> None:
    """Each value below a long key, and each of many dicts, had a name of its own of all keys that led to it."""
    path = tmp_path / "w.pth"
    for content in (
        {"k" * 100_000: {str(n): n for n in range(3000)}},
        {"k" * 100_000: {str(n): {"n": n} for n in range(3000)}},
        {"k" * 150: {str(n): {"n": n} for n in range(30_000)}},
    ):
        torch.save(content, path)
        held = torch.load(path, weights_only=True)
        tracemalloc.start()
        assert list(_state_dicts(held, "")) == []
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.stop()
        assert "holds no state dict" in error(path)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"weights_key": "teacher"}, "backbone.weights_key"),
        ({"weights_size": 96}, "backbone.weights_size"),
        ({"allow": {"unused": ["decoder_*"]}}, "backbone.allow"),
    ],
)
def test_settings_of_weights_where_none_are_read(setting: dict[str, Any], key: str) -> None:
    raw = {"name": "timm/resnet10t", "args": SMALL, "weights": "none", **setting}
    config = parse({"run": "r", "data": {"train": "t", "batch": 4}, "backbone": raw})
    for empty in (True, False):
        with pytest.raises(
            UserError, match=rf"{key}: {key} says how weights are read, and none are \(backbone.weights"
        ):
            backbone_of(config, 3, empty=empty)
    assert backbone_of(config.untrained(), 3, empty=True).loaded is None


def test_a_size_that_does_not_matter_is_refused_in_the_plan_too() -> None:
    raw = {"name": "timm/resnet10t", "args": SMALL, "weights": "later.pth", "weights_size": 96}
    config = parse({"run": "r", "data": {"train": "t", "batch": 4}, "backbone": raw})
    with pytest.raises(UserError, match=r"backbone.weights_size: timm/resnet10t has no position embeddings"):
        backbone_of(config, 3, empty=True)
    backbone_of(
        parse(
            {"run": "r", "data": {"train": "t", "batch": 4}, "backbone": {**raw, "name": "timm/test_vit", "args": {}}}
        ),
        3,
        empty=True,
    )


def test_averages_of_weights_with_their_counters(tmp_path: Path) -> None:
    """torch's AveragedModel, as torchvision's reference scripts save it beside the network."""
    net = timm.create_model("resnet10t", num_classes=10, **SMALL)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    state, path = dict(net.state_dict()), tmp_path / "w.pth"
    assert "n_averaged" in averaged.state_dict()
    torch.save(averaged.state_dict(), path)
    found = models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(path))
    assert same_body(dict(found.module.state_dict()), state)
    assert found.loaded is not None
    assert set(found.loaded.left) == {"n_averaged", "module.fc.weight", "module.fc.bias"}
    zeros = {n: torch.zeros_like(t) for n, t in state.items()}
    options = argparse.Namespace(lr=0.1)
    torch.save({"model": zeros, "model_ema": averaged.state_dict(), "epoch": 3, "args": options}, path)
    assert same_body(load(path), state)
    torch.save({**averaged.state_dict(), "decay": torch.tensor(0.9)}, path)  # a number that may be a weight
    assert "1 not in the network (decay)" in error(path)


MAE: dict[str, Any] = {**VIT, "img_size": 32}


def mae_encoder() -> dict[str, torch.Tensor]:
    """As its authors publish it: with the norm of the class token, the decoder and the token for what is masked."""
    torch.manual_seed(1)
    state = dict(timm.create_model("vit_tiny_patch16_224", num_classes=0, **MAE).state_dict())
    decoder = {
        "decoder_embed.weight": (8, 24),
        "decoder_blocks.0.norm1.weight": (8,),
        "decoder_blocks.1.mlp.bias": (8,),
    }
    decoder |= {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 17, 8), "decoder_norm.weight": (8,)}
    return {**state, **{name: torch.zeros(shape) for name, shape in decoder.items()}}


def test_what_may_differ_is_offered_and_allowed(tmp_path: Path) -> None:
    state, path = mae_encoder(), tmp_path / "mae.pth"
    torch.save({"model": state}, path)
    wish: dict[str, Any] = {"name": "timm/vit_tiny_patch16_224", "args": {**MAE, "global_pool": "avg"}}
    text = error(path, **wish)
    assert "mae.pth: does not fit timm/vit_tiny_patch16_224: 2 missing (fc_norm.weight, fc_norm.bias)" in text
    offered = re.search(r"backbone\.allow: (\{new: (\[.*?\]), unused: (\[.*?\])\})", text)
    assert offered is not None
    assert json.loads(offered[2]) == ["fc_norm.*"]
    assert {"norm.*", "decoder_embed.*", "decoder_blocks.*", "decoder_pos_embed", "decoder_norm.*"} <= set(
        json.loads(offered[3])
    )
    allow = {"new": json.loads(offered[2]), "unused": json.loads(offered[3])}
    raw = {"name": wish["name"], "args": wish["args"], "weights": str(path), "allow": allow}
    config = parse({"run": "r", "data": {"train": "t", "batch": 4}, "backbone": raw})
    found = backbone_of(config, 3)
    values = found.module.state_dict()
    assert all(torch.equal(values[n], state[n]) for n in values if n in state)
    assert torch.equal(values["fc_norm.weight"], torch.ones(24))
    assert found.loaded is not None
    assert set(found.loaded.new) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(found.loaded.left) == {n for n in state if n.startswith(("decoder", "mask", "norm."))}
    short = load(path, **wish, options=WeightsOptions(new=("fc_*",), unused=("decoder_*", "mask_token", "norm.*")))
    assert torch.equal(short["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])


def test_values_that_are_no_numbers_are_not_to_be_allowed(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", resnet()
    state["layer1.0.conv1.weight"] = torch.full_like(state["layer1.0.conv1.weight"], float("nan"))
    for more in ({}, {"layer9.weight": torch.zeros(1)}):
        torch.save({**state, **more}, path)
        text = error(path)
        assert "1 not finite or no real numbers (layer1.0.conv1.weight)" in text
        assert "of a training that failed, or of a damaged file" in text
        assert "backbone.allow" not in text
    name = "bn1.num_batches_tracked"
    torch.save({**resnet(), name: torch.zeros(2, dtype=torch.int64)}, path)
    assert f'set backbone.allow: {{new: ["{name}"]}}' in error(path)


def test_a_pattern_of_what_is_left_that_matches_what_is_taken_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({**resnet(), "layer9.weight": torch.zeros(1)}, path)
    for unused in (("layer9.*", "layer1.*"), ("layer?.*", "bn1.*")):
        text = error(path, options=WeightsOptions(unused=unused))
        assert f'backbone.allow.unused: no parameter that is left in the file matches "{unused[1]}"' in text
    assert load(path, options=WeightsOptions(unused=("layer?.*",)))


def test_nothing_is_looked_for_to_offer_for_a_file_of_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of names are each compared with thousands, to find patterns of which no more than 12 are offered."""
    monkeypatch.setattr(filling, "_patterns", lambda *_names: pytest.fail("compared"))
    wanted = {f"w{n}": torch.zeros(1) for n in range(3)}
    usual = "the file must come from this network"
    whole = Reading(wanted, {})
    assert filling._advice({"not in the network"}, wanted, whole, [f"m{n}.w" for n in range(3000)]).startswith(usual)
    assert filling._advice({"missing"}, wanted, Reading({"w0": wanted["w0"]}, {}), []).startswith(usual)


def test_a_pattern_allows_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", resnet()
    state["layer9.weight"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, path)
    assert "1 missing (layer1.0.conv1.weight)" in error(path, options=WeightsOptions(unused=("layer9.*",)))
    assert "1 not in the network (layer9.weight)" in error(path, options=WeightsOptions(new=("layer1.0.conv1.*",)))
    both = WeightsOptions(new=("layer1.0.conv1.*",), unused=("layer9.*",))
    assert same_body({n: t for n, t in load(path, options=both).items() if n in state}, state)
    for which, options in (
        ("new", WeightsOptions(new=("layer8.*",), unused=both.unused)),
        ("unused", WeightsOptions(new=both.new, unused=("layer9.*", "decoder_*"))),
    ):
        assert f"backbone.allow.{which}: no parameter" in error(path, options=options)
    with pytest.raises(UserError, match=r'allow.new: no parameter of timm/resnet10t matches "layer8'):
        models.load("timm/resnet10t", classes=3, args=SMALL, empty=True, options=WeightsOptions(new=("layer8.*",)))
    torch.save(resnet(channels=[8, 8, 16, 32]), path)  # of another shape: as if it were not there
    new = load(path, options=WeightsOptions(new=("layer4.*",)))
    assert new["layer4.0.conv1.weight"].shape == (16, 16, 3, 3)
    wide: dict[str, Any] = {"channels": [64, 64, 128, 256]}
    torch.save(resnet(**wide), path)
    assert "backbone.allow" not in error(path)  # another network: nothing is offered


@pytest.mark.parametrize(
    ("kind", "rounds"), [(torch.float8_e4m3fn, "0.062"), (torch.float8_e5m2, "0.12"), (torch.bfloat16, "0.0039")]
)
def test_a_low_precision_is_taken_and_told(tmp_path: Path, kind: torch.dtype, rounds: str) -> None:
    state = {n: t.to(kind) if t.is_floating_point() else t for n, t in resnet().items()}
    torch.save(state, tmp_path / "w.pth")
    found = models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(tmp_path / "w.pth"))
    values = found.module.state_dict()
    assert {t.dtype for t in values.values() if t.is_floating_point()} == {torch.float32}
    assert same_body(dict(values), {n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    name = str(kind).removeprefix("torch.")
    assert re.search(rf"\d+ of \d+ tensors are stored as {name}, which rounds by up to {rounds} of", str(found.loaded))
    state["layer1.0.conv1.weight"] = torch.full((8, 8, 3, 3), torch.nan).to(kind)
    torch.save(state, tmp_path / "w.pth")
    assert "1 not finite or no real numbers (layer1.0.conv1.weight)" in error(tmp_path / "w.pth")


def test_a_low_precision_is_widened_before_channels_are_put_together(tmp_path: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in resnet().items()}
    torch.save(state, tmp_path / "w.pth")
    wish: dict[str, Any] = {"classes": 3, "args": SMALL, "weights": str(tmp_path / "w.pth"), "channels": 1}
    found = models.load("timm/resnet10t", **wish)
    wanted = state["conv1.0.weight"].float().sum(1, keepdim=True)
    assert torch.equal(found.module.state_dict()["conv1.0.weight"], wanted)
    assert not torch.equal(wanted, wanted.half().float())
    rgb = str(models.load("timm/resnet10t", **{**wish, "channels": 3}).loaded)
    told = re.search(r"\d+ of \d+ tensors are stored as float16", rgb)
    assert told is not None
    assert told[0] in str(found.loaded)


def test_what_was_loaded_is_told(tmp_path: Path) -> None:
    torch.save(resnet(), tmp_path / "w.pth")
    told = models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(tmp_path / "w.pth"), head="mlp").loaded
    assert told is not None
    assert set(told.left) == {"fc.weight", "fc.bias"}
    assert told.new == ("head.0.weight", "head.0.bias", "head.3.weight", "head.3.bias")
    path = tmp_path / "w.pth"
    assert str(told).startswith(f"weights: {len(resnet()) - 2} tensors of {path}; not taken: fc.weight, fc.bias; new: ")
    assert models.load("timm/resnet10t", classes=3, args=SMALL, weights="none").loaded is None
    assert models.load("timm/resnet10t", classes=3, args=SMALL, weights=str(path), empty=True).loaded is None


def test_what_the_librarys_filter_drops_is_told(tmp_path: Path) -> None:
    args = {**VIT, "img_size": 32}
    state = dict(timm.create_model("vit_tiny_patch16_224", num_classes=3, **args).state_dict())
    state["pre_logits.fc.weight"] = torch.zeros(4, 4)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)  # as timm had it once
    torch.save(state, tmp_path / "w.pth")
    found = models.load("timm/vit_tiny_patch16_224", classes=3, args=args, weights=str(tmp_path / "w.pth"))
    assert found.loaded is not None
    assert set(found.loaded.left) == {"pre_logits.fc.weight", "head.weight", "head.bias"}
    assert found.loaded.resized == ()


def test_what_the_librarys_filter_renames_is_not_told_as_left(tmp_path: Path) -> None:
    args = {**VIT, "img_size": 32}
    state = dict(timm.create_model("deit3_small_patch16_224", num_classes=3, **args).state_dict())
    published = {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in state.items()}
    published["patch_embed.proj.weight"] = published["patch_embed.proj.weight"].flatten(1)
    assert published.keys() != state.keys()
    torch.save({"model": published}, tmp_path / "w.pth")
    found = models.load("timm/deit3_small_patch16_224", classes=3, args=args, weights=str(tmp_path / "w.pth"))
    assert same_body(dict(found.module.state_dict()), state, head="head.")
    assert found.loaded is not None
    assert set(found.loaded.left) == {"head.weight", "head.bias"}


def test_auxiliary_classifiers_that_are_not_wanted(tmp_path: Path) -> None:
    torch.save(torchvision.models.googlenet(weights=None, init_weights=False).state_dict(), tmp_path / "w.pth")
    wish: dict[str, Any] = {"weights": str(tmp_path / "w.pth"), "classes": 3}
    found = models.load("torchvision/googlenet", args={"aux_logits": False}, **wish)
    assert found.loaded is not None
    assert {name.partition(".")[0] for name in found.loaded.left} == {"aux1", "aux2", "fc"}
    whole = models.load("torchvision/googlenet", **wish).loaded
    assert whole is not None
    assert {name.rpartition(".")[0] for name in whole.left} == {"aux1.fc2", "aux2.fc2", "fc"}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a proxy where nobody listens."""
    import huggingface_hub

    monkeypatch.delenv("TLX_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_server_that_does_not_answer_takes_a_second() -> None:
    """And not the minutes of TCP's own patience; the bounds here are far above what a busy machine adds."""
    start = time.monotonic()
    assert not download.reachable("https://192.0.2.1/weights.pth")  # reserved for documentation: packets vanish
    assert time.monotonic() - start < 20


def test_a_name_server_that_does_not_answer_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_address: Any, **_more: Any) -> None:
        time.sleep(60)
        raise socket.gaierror("timed out")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    start = time.monotonic()
    assert not download.reachable("https://download.pytorch.org/models/w.pth")
    assert time.monotonic() - start < 20


def test_tags(offline: Path) -> None:
    with pytest.raises(UserError, match='no weights "IMAGENET1K_V3"; did you mean "IMAGENET1K_V'):
        models.load("torchvision/resnet50", classes=3, weights="IMAGENET1K_V3")
    with pytest.raises(UserError, match='no weights "a9_in1k"; did you mean'):
        models.load("timm/resnet50", classes=3, weights="a9_in1k")
    with pytest.raises(UserError, match="has no pretrained weights"):
        models.load("timm/resnet50t", classes=3)


def test_torchvisions_cache(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    given = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    folder = offline / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(given, folder / "draft.pth")
    digest = hashlib.sha256((folder / "draft.pth").read_bytes()).hexdigest()[:8]
    path = (folder / "draft.pth").rename(folder / f"mobilenet_v3_small-{digest}.pth")
    member = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", f"https://download.pytorch.org/models/{path.name}")
    found = models.load("torchvision/mobilenet_v3_small", classes=4).module.state_dict()
    assert same_body(found, given, head="classifier.3.")
    assert found["classifier.3.weight"].shape == (4, 1024)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="damaged: its hash is not the one in its name"):
        models.load("torchvision/mobilenet_v3_small", classes=4)


def test_timms_cache(offline: Path) -> None:
    repository = offline / "hub" / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    torch.manual_seed(3)
    given = dict(timm.create_model("resnet10t").state_dict())
    save_file(given, snapshot / "model.safetensors")
    backbone = models.load("timm/resnet10t", classes=4)
    assert same_body(dict(backbone.module.state_dict()), given)
    assert backbone.input.size == (176, 176)
    with pytest.raises(UserError, match=r"timm/resnet10t.c3_in1k: does not fit timm/resnet10t: .* of another shape"):
        models.load("timm/resnet10t", classes=4, args=SMALL)
    (snapshot / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"model.safetensors: cannot be read as weights: it is a text file, which begins with"
    ):
        models.load("timm/resnet10t", classes=4)
