"""From one training to another: the head that is kept, and what is told of the weights and pictures in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from composed import composer
from images import make_target_shards
from safetensors.torch import load_file, save_file
from torch import nn

from tlx import models
from tlx.base.errors import ConfigError, UserError
from tlx.data.shards.targets import Target
from tlx.doctor import services
from tlx.models.weights.patches import unseen
from tlx.plan.config import dump, load, parse, plain
from tlx.plan.saved_config import changes, essential
from tlx.submit import checks
from tlx.submit.checks import Findings
from tlx.submit.job import Job
from tlx.train import build
from tlx.train import command as training
from tlx.train.components import backbone_of, task_of
from tlx.train.data import count_samples, known_names, known_scale
from tlx.train.resume import check_identity
from tlx.train.run import save

MLP: dict[str, Any] = {"name": "mlp", "hidden": [4]}


def checkpoint_of(run) -> Path:
    """Of a run that has trained nothing yet: its random head is as good as another."""
    save(run)
    run.saver.settle()
    return run.folder / "checkpoints" / "step-00000000" / "model.safetensors"


@pytest.mark.parametrize("head", ["linear", MLP], ids=["linear", "mlp"])
def test_a_trained_head_is_kept(compose, tmp_path, head):
    first = compose(head=head)
    file, before = checkpoint_of(first), {n: t.clone() for n, t in first.net.state_dict().items()}
    backbone = {"name": "toys:small", "weights": str(file)}
    long = {"name": head} if isinstance(head, str) else head
    kept = compose(tmp_path / "kept", backbone=backbone, head={**long, "keep": True}, seed=5)
    assert all(torch.equal(t, before[n]) for n, t in kept.net.state_dict().items())
    new = compose(tmp_path / "new", backbone=backbone, head=head, seed=5)
    assert any(not torch.equal(t, before[n]) for n, t in new.net.state_dict().items())
    if head == "linear":
        told = models.load("toys:small", classes=3, weights=str(file), options=models.WeightsOptions(keep_head=True))
        assert told.loaded is not None
        assert told.loaded.new == told.loaded.left == ()


def test_a_runs_folder_stands_for_its_best_weights(compose, tmp_path):
    first = compose(loop={"ema": {"decay": 0.5}})
    file = checkpoint_of(first)
    run, before = str(first.folder), {n: t.clone() for n, t in first.net.state_dict().items()}
    backbone = {"name": "toys:small", "weights": run}
    kept = compose(tmp_path / "kept", backbone=backbone, head={"name": "linear", "keep": True}, seed=5)
    assert all(torch.equal(t, before[n]) for n, t in kept.net.state_dict().items())
    # the moving average's, where these were the best
    state, averaged = file.with_name("state.json"), load_file(file.with_name("ema.safetensors"))
    (file.parent.parent / "best").symlink_to(file.parent.name)
    state.write_text(json.dumps({**json.loads(state.read_text()), "best": {"step": 0, "weights": "ema"}}))
    save_file({name: tensor + 1 for name, tensor in averaged.items()}, file.with_name("ema.safetensors"))
    other = compose(tmp_path / "other", backbone=backbone, head={"name": "linear", "keep": True}, seed=5)
    assert all(torch.equal(t, averaged[n] + 1) for n, t in other.net.state_dict().items() if n in averaged)


def test_a_head_for_other_classes_is_a_mistake(compose, tmp_path, shards):
    file = checkpoint_of(compose())
    state = file.with_name("state.json")
    said = json.loads(state.read_text())
    names = said["identity"]["classes"]
    backbone, keep = {"name": "toys:small", "weights": str(file)}, {"name": "linear", "keep": True}

    def refused(run: str = "other", **over: Any) -> str:
        with pytest.raises(UserError) as caught:
            compose(tmp_path / run, **{"backbone": backbone, "head": keep, **over})
        return str(caught.value)

    for classes, shown in ((names[::-1], f"classes: {names[::-1]} -> {names}"), ([*names, "x"], "'x'] -> ")):
        state.write_text(json.dumps({**said, "identity": {**said["identity"], "classes": classes}}))
        text = refused()
        assert text.startswith(f"head.keep: the head of {file} is another one:\n    classes: ")
        assert shown in text
        assert "without head.keep the head is new" in text
        raw = {"run": str(tmp_path / "p"), "data": {"train": str(shards / "train"), "batch": 8}, "input": {"size": 16}}
        with pytest.raises(UserError, match=r"head\.keep: the head of"):
            build.plan(parse({**raw, "backbone": backbone, "head": keep, "phases": {"each": {"lr": 1, "duration": 1}}}))
    state.write_text(json.dumps(said))
    assert "head: linear -> mlp" in refused("mlp", head={**MLP, "keep": True})
    state.unlink()
    assert f"head.keep: backbone.weights ({file}) is no file in a checkpoint of tlx" in refused()
    assert "backbone.weights (none) is no file" in refused("none", backbone={"name": "toys:small", "weights": "none"})


def test_a_head_of_another_shape_is_a_mistake(compose, tmp_path):
    file = checkpoint_of(compose(head=MLP))
    state = file.with_name("state.json")
    said = json.loads(state.read_text())
    del said["identity"]["config"]["head.hidden"]
    state.write_text(json.dumps(said))
    backbone = {"name": "toys:small", "weights": str(file)}
    with pytest.raises(UserError, match=r"its head does not fit that of toys:small: 3 of another shape \(head\.0\.w"):
        compose(tmp_path / "kept", backbone=backbone, head={"name": "mlp", "hidden": [5], "keep": True})


def test_a_head_of_other_arguments_is_a_mistake_though_every_shape_fits(compose, tmp_path):
    backbone = {"name": "toys:small", "weights": str(checkpoint_of(compose(head={**MLP, "dropout": 0.1})))}
    kept = {**MLP, "keep": True, "dropout": 0.3}
    compose(tmp_path / "kept", backbone=backbone, head=kept)
    with pytest.raises(UserError, match=r"the head of .* another one:\n    head\.activation: 'relu' -> 'gelu'"):
        compose(tmp_path / "other", backbone=backbone, head={**kept, "activation": "gelu"})


KEPT = {"name": "linear", "keep": True}


@pytest.mark.parametrize("weights", ["none", "default", "r160_in1k", "hf-hub:timm/test_vit.r160_in1k"])
def test_a_head_that_cannot_be_kept_is_refused_before_any_weights_are_there(tmp_path, weights):
    raw = {"run": str(tmp_path), "data": {"train": "t", "batch": 4, "expected": {"classes": 3, "train": 9}}}
    config = parse({**raw, "backbone": {"name": "timm/test_vit", "weights": weights}, "head": KEPT})
    for names in (None, ["a", "b", "c"]):
        with pytest.raises(UserError, match=r"head\.keep: backbone\.weights .* is no file in a checkpoint"):
            backbone_of(config, 3, empty=True, names=names)
    later = {"name": "toys:small", "weights": str(tmp_path / "later.safetensors")}
    assert backbone_of(parse({**raw, "backbone": later, "head": KEPT}), 3, empty=True, names=["a", "b", "c"])


def test_a_name_that_no_file_can_have(tmp_path):
    config = parse({**RAW, "backbone": {"name": "toys:small", "weights": "x" * 5000}, "head": KEPT})
    for empty in (True, False):
        with pytest.raises(UserError, match="no file can have this name: File name too long"):
            backbone_of(config, 3, empty=empty, names=["a", "b", "c"])
    with pytest.raises(UserError, match="no file can have this name"):
        training.fetch(config)


def test_classes_are_compared_before_a_job_is_queued_and_by_the_doctor(compose, shards, tmp_path):
    file = checkpoint_of(compose())
    state = file.with_name("state.json")
    said = json.loads(state.read_text())
    said["identity"]["classes"].reverse()
    state.write_text(json.dumps(said))
    data = {"train": str(shards / "train"), "batch": 8}
    raw = {"run": str(tmp_path / "r"), "data": data, "input": {"size": 16}, "head": KEPT}
    config = parse({**raw, "backbone": {"name": "toys:small", "weights": str(file)}})
    (found,) = services.weights(config)
    assert found.verdict == "fault"
    assert "the head of" in found.said
    findings = Findings()
    job = Job(tmp_path, nodes=1, gpus=0, ranks=1, cpus=1, time=60, launcher="torchrun", options={}, settings={})
    checks.check_training(config, job, findings)
    (told,) = {str(error) for error in findings.problems.errors}
    assert told.startswith(f"head.keep: the head of {file} is another one")


RAW: dict[str, Any] = {"run": "r", "data": {"train": "t", "batch": 4}, "backbone": {"name": "toys:small"}}


def test_the_setting_is_written_where_it_is_said_and_nowhere_else(tmp_path):
    usual = parse(RAW)
    assert plain(usual)["head"] == {"name": "linear", "dropout": None}
    assert parse({**RAW, "head": {"name": "linear", "keep": False}}) == usual
    kept = parse({**RAW, "head": {"name": "mlp", "keep": "yes"}})
    assert kept.keeps_head
    assert "keep" not in kept.head_args
    (tmp_path / "c.yaml").write_text(dump(kept))
    assert plain(load(tmp_path / "c.yaml")) == yaml.safe_load(dump(kept))
    assert load(tmp_path / "c.yaml").keeps_head
    assert load(tmp_path / "c.yaml", ["head.keep=false"]).keeps_head is False
    assert not kept.untrained().keeps_head
    with pytest.raises(ConfigError, match=r"head\.keep"):
        parse({**RAW, "head": {"name": "mlp", "keep": "perhaps"}})


def own_head(features: int, classes: int, *, keep: int = 2) -> nn.Module:
    return nn.Linear(features, classes)


def test_a_head_of_ones_own_keeps_an_argument_of_that_name():
    config = parse({**RAW, "head": {"name": f"{__name__}:own_head", "keep": 3}})
    assert config.head_args == {"keep": 3}
    assert not config.keeps_head


def test_a_configuration_of_before_these_settings_is_the_same_training():
    now = plain(parse(RAW))
    before = plain(parse(RAW))
    for key in ("allow", "weights_key", "weights_size"):
        del before["backbone"][key]
    assert parse(before) == parse(now)
    assert changes(essential(before), parse(now)) == []


def test_what_pictures_are_normalised_by_is_told_of_a_file_that_does_not_say(compose, tmp_path, shards, capsys):
    torch.save(backbone_of(parse(RAW), 3).module.state_dict(), tmp_path / "w.pth")
    raw = {"run": str(tmp_path / "r"), "data": {"train": str(shards / "train"), "batch": 8}}
    raw |= {"input": {"size": 16, "mean": [0.5, 0.25, 0.125]}, "phases": {"each": {"lr": 0.1, "duration": "1ep"}}}
    told = "pictures are normalised by means (0.5, 0.25, 0.125) and deviations (0.229, 0.224, 0.225); "
    told += f"{tmp_path / 'w.pth'} does not say what it was trained with"
    for weights, says in ((tmp_path / "w.pth", True), ("none", False), (checkpoint_of(compose()), False)):
        _, text = build.plan(parse({**raw, "backbone": {"name": "toys:small", "weights": str(weights)}}))
        assert (told in " ".join(text.split())) == says
    capsys.readouterr()
    compose(
        tmp_path / "trained", backbone={"name": "toys:small", "weights": str(tmp_path / "w.pth")}, input=raw["input"]
    )
    assert told in " ".join(capsys.readouterr().out.split())


def test_of_a_repository_its_own_files_may_say_what_pictures_are_normalised_by(tmp_path):
    config = parse({**RAW, "backbone": {"name": "timm/test_vit", "weights": "hf-hub:someone/net"}})
    (told,) = build.normalisation(config, backbone_of(config, 3, empty=True))
    assert told.endswith(
        "; what hf-hub:someone/net was trained with, its config.json or card may say (input.mean, input.std)"
    )


@pytest.mark.parametrize(
    ("name", "size", "lost"),
    [
        ("timm/convnext_atto", (224, 224), (0, 0)),
        ("timm/convnext_atto", (230, 224), (6, 0)),  # 2 beyond the patches of 4, then a row of 4
        ("timm/convnext_atto", (224, 271), (0, 15)),  # 3, then 4, then 8
        ("torchvision/resnet18", (230, 225), (0, 0)),
    ],
)
def test_pixels_beyond_the_last_whole_patch(name: str, size: tuple[int, int], lost: tuple[int, int]) -> None:
    found = models.load(name, classes=3, weights="none", empty=True)
    assert unseen(found.module, size, 3, found.blocks) == lost


def test_pixels_that_no_patch_has_are_told_in_the_plan(tmp_path, shards):
    raw = {"run": str(tmp_path / "r"), "data": {"train": str(shards / "train"), "batch": 8}}
    raw |= {"phases": {"each": {"lr": 0.1, "duration": "1ep"}}}
    for size, said in ([32, 38], True), ([32, 32], False):
        net = {"backbone": {"name": f"{__name__}:patches", "weights": "none"}, "input": {"size": size}}
        warnings = build.plan(parse({**raw, **net}))[0].warnings
        told = [w for w in warnings if "leaves out 0 rows and 6 columns of pixels at the lower and right edge" in w]
        assert bool(told) == said
        assert not said or told[0].endswith("input.size: [32, 32] has none to leave out")


def patches(classes: int) -> nn.Module:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)]
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), *pool)


def aged(folder: Path, mean: float) -> Path:
    """Shards of 8 pictures, whose ages are 10 below and above this."""
    ages = mean + 10 * np.array([[1.0], [-1.0]] * 4)
    make_target_shards(folder / "train", [(Target("age", "number"), ages)], samples=8, size=24, classes=0)
    return folder


def test_a_head_of_numbers_is_kept_for_numbers_of_the_same_scale(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    young, old = aged(tmp_path / "young", 30), aged(tmp_path / "old", 60)
    data: dict[str, Any] = {"val": None, "batch": 8, "workers": 0}

    def compose(run: str, shards: Path, **over: Any):
        said = {"data": {**data, "train": str(shards / "train")}, "task": "regression", **over}
        return composer(shards, tmp_path / run, monkeypatch)(**said)

    first = compose("first", young)
    assert first.identity["scale"] == {"mean": [30.0], "std": [10.0]}
    kept = {"backbone": {"name": "toys:small", "weights": str(checkpoint_of(first))}, "head": KEPT}
    compose("same", young, **kept)
    with pytest.raises(UserError, match=r"the head of .* another one:\n    scale\.mean: \[30\.0\] -> \[60\.0\]"):
        compose("other", old, **kept)
    with pytest.raises(UserError, match=r"scale\.mean: \[30\.0\] -> \[60\.0\]"):
        check_identity(first.identity, compose("third", old).identity, first.config, where="x")
    plain_numbers = compose("plain", old, task={"name": "regression", "standardise": False})
    assert "scale" not in plain_numbers.identity


def test_names_of_shards_that_are_there_are_compared_whatever_is_expected(tmp_path):
    """Of shards without a class as of those whose classes are numbers."""
    shards, later = aged(tmp_path / "s", 30), str(tmp_path / "later")

    def known(train: str, task: str, expected: dict[str, Any]):
        data = {"train": train, "batch": 8, "expected": {"train": 8, **expected}}
        config = parse({"run": "r", "data": data, "backbone": {"name": "toys:small"}, "task": task})
        samples = count_samples(config)
        made = task_of(config, samples)
        return known_names(config, samples, made), known_scale(samples, made)

    number = {"targets": {"age": {"kind": "number"}}}
    assert known(str(shards / "train"), "regression", number) == (("age",), {"mean": [30.0], "std": [10.0]})
    assert known(later, "regression", number) == (("age",), None)
    assert known(later, "classification", {"classes": ["a", "b"]}) == (("a", "b"), None)
    assert known(later, "classification", {"classes": 2}) == (None, None)
    assert known(later, "classification", {"classes": ["0", "1"]}) == (("0", "1"), None)
