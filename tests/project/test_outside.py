"""Schedule, decay, curve, head, backbone and task from another installed package, without touching tlx."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from commands import tlx, write_config
from images import make_shards, make_target_shards
from places import TESTS
from safetensors.torch import load_file

PACKAGE = TESTS / "outside"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package, installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path_factory.mktemp("source") / "outside"
    subprocess.run(["cp", "-r", str(PACKAGE), str(source)], check=True)
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return str(target)


@pytest.fixture
def config(tmp_path):
    shards = make_shards(tmp_path / "shards", classes=3, per_class={"train": 8, "val": 5}, size=24)
    raw = {
        "run": str(tmp_path / "run"),
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 0},
        "input": {"size": 16},
        "backbone": {"name": "tiny", "weights": "none", "args": {"width": 12}},
        "head": {"name": "two_layers", "hidden": 10},
        "unfreeze": {"name": "top_down", "every": "2ep", "keep_stem": False},
        "phases": {"each": {"lr": 0.01, "layer_decay": {"name": "halves", "lower": "1/4"}, "curve": "sawtooth"}},
    }
    return write_config(tmp_path / "c.yaml", raw)


@pytest.mark.slow
def test_parts_from_an_installed_package_train(installed, config, tmp_path):
    done = tlx("train", config, path=installed)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [p["name"] for p in plan["phases"]] == ["only_head", "the_rest"]
    rates = [layer["lr"] for layer in plan["phases"][1]["layers"].values()]
    assert rates[0] == 0.0025
    assert rates[-1] == 0.01
    weights = load_file(tmp_path / "run" / "checkpoints" / "latest" / "model.safetensors")
    assert weights["head.0.weight"].shape == (10, 12)
    assert weights["0.weight"].shape == (12, 3, 3, 3)


@pytest.fixture
def of_age(tmp_path):
    """A configuration whose shards have no class."""
    for part, samples in (("train", 24), ("val", 14)):
        make_target_shards(tmp_path / part, samples=samples, classes=0, size=24)
    return {
        "run": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val"), "batch": 8, "workers": 0},
        "input": {"size": 16},
        "backbone": {"name": "tiny", "weights": "none"},
        "task": {"name": "quantiles", "target": "age", "levels": [0.25, 0.75]},
        "phases": {"each": {"lr": 0.01, "duration": "2ep"}},
    }


@pytest.mark.slow
def test_a_task_from_an_installed_package_trains_by_its_own_metrics(installed, of_age, tmp_path):
    done = tlx("train", write_config(tmp_path / "c.yaml", of_age), path=installed)
    assert done.returncode == 0, done.stderr
    assert "metric: val/pinball_loss" in (tmp_path / "run" / "config.yaml").read_text()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best"]["metric"] == "val/pinball_loss"
    assert result["last"]["val/pinball_loss"] < 5
    assert 0 <= result["last"]["val/coverage"] <= 1


@pytest.mark.slow
def test_it_is_one_of_several_tasks_on_two_ranks(installed, of_age, tmp_path):
    tasks = {"age": {"name": "quantiles", "target": "age"}, "tags": "multilabel"}
    config = write_config(tmp_path / "c.yaml", of_age | {"task": {"name": "multitask", "tasks": tasks}})
    done = tlx("train", config, path=installed, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "val/age/coverage" in json.loads((tmp_path / "run" / "result.json").read_text())["last"]
    wrong = tlx("plan", config, "task.tasks.age.levls=[0.5]", path=installed)
    assert (wrong.returncode, 'did you mean "levels"' in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_their_arguments_are_checked_like_ours(installed, config):
    wrong = ["head.hiden=3", "backbone.args={depth: 3}"]
    first = tlx("plan", config, *wrong, "unfreeze.evry=1", path=installed)
    then = tlx("plan", config, *wrong, path=installed)  # what has to be imported comes once all else is right
    assert (first.returncode, then.returncode) == (2, 2)
    assert 'did you mean "every"' in first.stderr
    for expected in ('did you mean "hidden"', 'no argument "depth"'):
        assert expected in then.stderr
    assert tlx("plan", config).returncode == 2  # not installed: nothing but the path is missing
