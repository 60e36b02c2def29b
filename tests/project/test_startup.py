"""What a command costs before it does anything: libraries are imported where they are used, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import environment
from images import make_folder

from tlx import __version__
from tlx.base.errors import ConfigError, UserError
from tlx.data.pixels.extension import extension
from tlx.runs.run_status import folder_of

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "wandb",
    "matplotlib",
    "webdataset",
    "torchmetrics",
    "huggingface_hub",
    "datasets",
    "pyarrow",
    "onnx",
    "onnxruntime",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "optuna",
)
RUN = """
import contextlib, io, json, sys
from tlx.base.errors import UserError
from tlx.cli.main import app
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        try:
            app(words, standalone_mode=False)
        except UserError as error:
            print(error)
    print(json.dumps([words, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.fixture
def config(tmp_path):
    raw = {"run": str(tmp_path / "run"), "data": {"train": "x", "batch": 8}, "backbone": {"name": "timm/resnet18"}}
    raw |= {"optimizer": "sgd", "phases": {"each": {"lr": 0.1}}, "transforms": ["random_resized_crop"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "c.yaml"


def test_commands_import_no_library_that_they_do_not_need(config, tmp_path):
    """One process, in which none may have come in: looking, mistakes in keys, types and names, and building shards."""
    (tmp_path / "old").mkdir()
    make_folder(tmp_path / "pictures", 2, 2, 16)
    built = tmp_path / "shards"
    commands = [
        ["train", str(config), "sed=1", "seed=x", "backbone.name=timm/resnet19", "head=linaer", "optimizer=adamv"],
        ["plan", str(config), "transforms=[flip]", "objective=x", "track.trackers=[wandbb]", "phases.each.curve=cosin"],
        *([["shards", "build", str(tmp_path / "pictures"), str(built), "--jobs", "0"]] if extension else []),
        ["--version"], ["-h"], ["status", "-h"], ["submit", "-h"], ["train", "-h"], ["predict", "-h"],
        ["evaluate", "-h"], ["export", "-h"], ["serve", "-h"], ["sweep", "-h"], ["probe", "-h"],
        ["config", "optimizer"], ["config", str(config), "phases.fine_tuning.lr"], ["completion", "bash"],
        ["status", str(tmp_path / "old")],
        ["status", "--folder", str(config), "optimizer=adamw", "optimizer.betas.1=0.9", "transforms.0.scale.0=0.5"],
        ["status", "--folder", str(config), "seed=1", "--each", "seed=2", "--each", "phases.each.curve=cosine"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], env=environment(), capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, _, _ in shown] == commands
    assert shown[0][1].startswith(f"tlx {__version__}: train {config}\n"), "the first line comes before all imports"
    typos = " ".join(said for _, said, _ in shown[:2])
    assert typos.count("did you mean") == 6, typos
    assert [said for _, said, _ in shown[-2:]] == [f"{tmp_path / 'run'}\n"] * 2
    for words, said, modules in shown:
        assert said, words
        assert not {*HEAVY} & {*modules}, words


def test_a_folder_comes_with_what_is_wrong_with_the_values(config):
    """All of them, in one process; parts are looked up only where a value names one."""
    assert folder_of(config, ["run=elsewhere"], ["seed=1", "optimizer=adamw"]) == Path("elsewhere")
    with pytest.raises(ConfigError) as caught:
        folder_of(config, [], ["seed=x", "seed=1", "phases.each.lr=-1", "sed=1", "optimizer=adamv"])
    seed, rate, key, part = caught.value.problems
    assert "seed: input should be a valid integer" in seed
    assert "phases.each.lr: input should be greater than 0" in rate
    assert 'sed: unknown key; did you mean "seed"?' in key
    assert 'optimizer: there is no optimizer "adamv"; did you mean "adam" or "adamw"' in part
    with pytest.raises(ConfigError, match=r'task: there is no task "multilable"; did you mean "multilabel"'):
        folder_of(config, [], ["task=multilable"])
    with pytest.raises(ConfigError, match=r'phases\.each\.curve: there is no curve "cosin"'):
        folder_of(config, ["phases.each.curve=cosin"])


def test_values_that_say_the_same_are_one_training(config):
    """Of a sweep each value is a run: 010 is 10 in YAML 1.2, and a rate may be written in two ways."""
    several = ["seed=10", "seed=9", "seed=010", "phases.each.lr=1e-3", "phases.each.lr=0.001", "data.batch=010"]
    with pytest.raises(ConfigError) as caught:
        folder_of(config, [], several)
    assert caught.value.problems == (
        "seed=010 is the same as seed=10; leave one of them out",
        "phases.each.lr=0.001 is the same as phases.each.lr=1e-3; leave one of them out",
    )
    with pytest.raises(UserError, match=r"^seed=1 stands twice\n  -> leave one of them out$"):
        folder_of(config, [], ["seed=1", "seed=1"])
    assert folder_of(config, ["seed=1"], ["seed=1", "data.batch=8", "data.batch=9"])
