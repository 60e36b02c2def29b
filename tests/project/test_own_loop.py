"""The public API: light to import, all there, and enough for a training in a plain PyTorch loop."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from images import make_shards
from places import ROOT

import tlx

README = ROOT / "README.md"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 8, "val": 4}, size=40)


def test_every_public_name_is_there_and_nothing_else_is():
    for name in tlx.__all__:
        assert getattr(tlx, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        tlx.trian  # noqa: B018


def test_a_whole_training_takes_a_file_and_overrides(tmp_path, monkeypatch):
    monkeypatch.setattr("tlx.train.command._start", lambda config, *_, **__: {"seed": config.seed, "run": config.run})
    file = tmp_path / "c.yaml"
    file.write_text(
        f"run: {tmp_path}/run\ndata: {{train: x, batch: 8}}\nbackbone: {{name: 'toys:small', weights: none}}\n"
    )
    assert (
        tlx.fit(file, ["seed=7"]) == tlx.fit(tlx.load_config(file, ["seed=7"])) == {"seed": 7, "run": tmp_path / "run"}
    )


def test_importing_it_imports_no_library():
    libraries = ("torch", "pydantic", "timm", "numpy")
    code = f"import tlx, sys; print(tlx.__version__, [m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tlx.__version__} []\n"


def test_a_loop_of_ones_own_trains_what_the_plan_says(shards):
    """Two epochs of the head, then of everything, at rates that fall by a half for each layer down."""
    images = tlx.open_shards(str(shards / "train"))
    torch.manual_seed(0)
    backbone = tlx.load_backbone("toys:small", classes=len(images.classes), weights="none")
    phases = {"each": {"lr": 0.1, "duration": "2ep", "layer_decay": {"name": "exponential", "factor": 0.5}}}
    plan = tlx.make_plan(backbone.layers, samples=len(images), batch=8, unfreeze="two_phase", phases=phases)
    optimizer = torch.optim.SGD(tlx.parameter_groups(backbone), lr=0.0)
    first, rates, shown = backbone.module.features[0][0].weight.detach().clone(), [], []
    for step in tlx.steps(plan, images, backbone, optimizer):
        if step.phase.name == "feature_extraction":
            assert torch.equal(backbone.module.features[0][0].weight, first)
        rates.append({group["layer"]: group["lr"] for group in optimizer.param_groups})
        shown.append(step.number)
        assert step.images.shape[1:] == (3, *backbone.input.size)
        loss = torch.nn.functional.cross_entropy(backbone.module(step.images), step.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shown == list(range(12))
    assert not torch.equal(backbone.module.features[0][0].weight, first)
    assert rates[0] == {"features.0.0": 0.0, "features.1.0": 0.0, "features.2.0": 0.0, "fc": 0.1}
    assert rates[6] == pytest.approx({"features.0.0": 0.0125, "features.1.0": 0.025, "features.2.0": 0.05, "fc": 0.1})


def test_an_evaluation_counts_every_sample_once_and_leaves_no_trace_in_the_next_step(shards):
    images, val = tlx.open_shards(str(shards / "train")), tlx.open_shards(str(shards / "val"))
    torch.manual_seed(0)
    backbone = tlx.load_backbone("toys:small", classes=len(images.classes), weights="none")
    phases = {"each": {"lr": 0.1, "duration": "1ep", "norm": "frozen_is_frozen"}}
    plan = tlx.make_plan(backbone.layers, samples=len(images), batch=8, unfreeze="head_only", phases=phases)
    optimizer = torch.optim.SGD(tlx.parameter_groups(backbone), lr=0.0)
    for _ in tlx.steps(plan, images, backbone, optimizer):
        assert backbone.module.fc.training
        assert not any(m.training for m in backbone.module.modules() if isinstance(m, torch.nn.BatchNorm2d))
        whole = tlx.evaluate(backbone, val)
        assert whole == pytest.approx(tlx.evaluate(backbone, val, batch=5))
        assert set(whole) == {"loss", "top1", "samples"}  # three classes: there is no top5
        assert whole["samples"] == 12
        backbone.module.train()


def test_a_mistake_in_a_plan_is_named_with_the_others(shards):
    backbone = tlx.load_backbone("toys:small", classes=3, weights="none")
    with pytest.raises(tlx.ConfigError) as caught:
        tlx.make_plan(backbone.layers, samples=24, batch=8, unfreeze="gradul", phases={"each": {"lr": -1, "warmp": 3}})
    for word in ("gradual", "lr", "warmup"):
        assert word in str(caught.value)


@pytest.mark.slow
def test_the_readmes_ten_lines_run(shards, monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(import torch\nimport tlx\n.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(shards)
    exec(compile(code.replace('weights="default"', 'weights="none"'), "README.md", "exec"), {})
