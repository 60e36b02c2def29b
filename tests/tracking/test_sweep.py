"""Sweeps: a folder for each trial, and its run at W&B; the recipe of launch/README.md under a real agent."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from commands import rows, status, tlx, write_config
from composed import two_phases
from images import make_shards
from places import ROOT
from wandb_agent import wandb
from wandb_server import served

from tlx.base import sweep
from tlx.base.errors import ConfigError
from tlx.plan.config import parse
from tlx.tracking.wandb_target import Asked, Record, choose

README = ROOT / "launch" / "README.md"


def config(run):
    return parse({"run": run, "data": {"train": "x", "batch": 2}, "backbone": {"name": "toys:small"}})


def test_a_trial_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2")
    assert config("runs/sweep/{trial}").run == Path("runs/sweep/a1b2")
    assert config("runs/{trial}/{trial}").run == Path("runs/a1b2/a1b2")
    assert config("runs/{other}").run == Path("runs/{other}")
    monkeypatch.delenv("WANDB_RUN_ID")
    assert config("runs/sweep/a1b2").run == Path("runs/sweep/a1b2"), "as config.yaml says it"


@pytest.mark.parametrize(
    ("run", "trial", "said"),
    [
        ("runs/{trial}", "", "run: {trial} is the id of a sweep's trial, and WANDB_RUN_ID says none: start this with"),
        ("runs/{trial}", "../x", "run: {trial}: WANDB_RUN_ID='../x' cannot be a folder's name"),
        ("runs/{trail}", "a1", 'run: there is no "{trail}" to fill in; did you mean "trial"?'),
    ],
)
def test_a_folder_for_no_trial_is_a_mistake(monkeypatch, run, trial, said):
    monkeypatch.setenv("WANDB_RUN_ID", trial)
    with pytest.raises(ConfigError, match=re.escape(said)):
        config(run)


# --- which run at W&B


def chosen(asked=None, record=None, **env):
    said = {f"WANDB_{name}": value for name, value in env.items()}
    return choose(asked or Asked(), record or Record(), said, run_id="own", name="folder", here=Path("/here"))


def test_the_configuration_comes_before_the_environment_and_that_before_defaults():
    first = chosen()
    assert (first.run_id, first.project, first.entity, first.name, first.mode) == ("own", "tlx", None, "folder", None)
    assert first.note is None
    second = chosen(PROJECT="p", MODE="dryrun", DIR="/scratch", RUN_ID="r")
    assert (second.run_id, second.project, second.mode, second.folder) == ("r", "p", "offline", Path("/scratch"))
    third = chosen(Asked("c", mode="online"), PROJECT="p", MODE="offline", RESUME="never")
    assert (third.project, third.mode) == ("c", "online")
    assert third.note == (
        "W&B: not used: WANDB_PROJECT=p (the configuration says c), "
        "WANDB_MODE=offline (the configuration says online), WANDB_RESUME (tlx decides that)"
    )


def test_what_w_and_b_gave_comes_before_the_environment():
    record = Record("r", "p", "e")
    other = chosen(record=record, PROJECT="q", RUN_ID="s")
    assert (other.run_id, other.project, other.entity) == ("r", "p", "e")
    assert other.note == (
        "W&B: not used: WANDB_RUN_ID=s (wandb.json: the run in this folder is r), WANDB_PROJECT=q (wandb.json says p)"
    )
    assert chosen(Asked("moved"), record).project == "moved"


def test_a_trial_is_where_its_sweep_is():
    agent = {"SWEEP_ID": "s", "RUN_ID": "t", "PROJECT": "p", "DIR": "/here"}
    trial = chosen(Asked("mine"), **agent)
    assert (trial.run_id, trial.sweep, trial.project, trial.name) == ("t", "s", "p", None)
    assert trial.folder is None, "the agent says its own folder, and nobody has asked for that"
    assert trial.note == (
        "W&B: id t (WANDB_RUN_ID), project p (WANDB_PROJECT); "
        "not used: project=mine of the configuration (a trial is where its sweep is)"
    )
    alone = chosen(Asked("mine"), Record("t", "p", "e", sweep="s"))
    assert (alone.run_id, alone.sweep, alone.project) == ("t", "s", "p"), "later, without an agent"
    other = chosen(record=Record("t", "p", "e"), **agent | {"RUN_ID": "t2"})
    assert (other.run_id, other.sweep) == ("t", None), "another trial's agent in the folder of this run"


# --- the recipe


def recipe(config: Path, folder: Path, *more: str) -> Path:
    """The sweep of launch/README.md, with our configuration, our interpreter, and folders below `folder`."""
    (text,) = re.findall(r"^    # sweep\.yaml\n((?:    .*\n)+)", README.read_text(), re.MULTILINE)
    sweep = yaml.safe_load(re.sub(r"^    ", "", text, flags=re.MULTILINE))
    program, action, _, run, *rest = sweep["command"]
    assert (program, action, run) == ("tlx", "train", "run=runs/sweep/{trial}")
    words = [sys.executable, "-m", "tlx", "train", str(config), f"run={folder}/{{trial}}", *rest, *more]
    made = config.with_name("sweep.yaml")
    made.write_text(yaml.safe_dump({**sweep, "command": words, "parameters": {"seed": {"values": [3, 4]}}}))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_real_agent_runs_two_trials_each_with_a_folder_and_a_run_of_its_own(tmp_path, mode):
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)
    config = write_config(tmp_path / "c.yaml", {**two_phases(shards, tmp_path / "unused"), "track": {"every": 1}})
    more = ["track.trackers=[{name: wandb, mode: offline}]"] if mode == "offline" else []
    made, folder = recipe(config, tmp_path / "runs", *more), tmp_path / "runs"
    with served() as server:
        begun = wandb(server, "sweep", "--project", "vision", made.name, cwd=tmp_path)
        assert list(server.sweeps) == ["sweep1"], begun.stderr
        done = wandb(server, "agent", "--count", "2", "me/vision/sweep1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        trials = server.sweeps["sweep1"].trials
        assert [said["seed"] for said in trials.values()] == [3, 4], done.stderr[-3000:]
        assert sorted(trials) == sorted(path.name for path in folder.iterdir())
        for trial, said in trials.items():
            assert status(folder / trial)["status"] == "done", done.stderr[-3000:]
            assert yaml.safe_load((folder / trial / "config.yaml").read_text())["seed"] == said["seed"]
            kept = json.loads((folder / trial / "wandb.json").read_text())
            assert (kept["id"], kept["project"], kept["sweep"]) == (trial, "vision", "sweep1")
            assert ("url" in kept) == (mode == "online")
        synced = tlx("track", "sync", *(folder / trial for trial in trials), is_forked=True, **server.account)
        assert synced.returncode == 0, synced.stderr
        assert synced.stdout.count("nothing was sent") == (2 if mode == "online" else 0)
        assert sorted(server.runs) == sorted(trials), "a second run of a trial"
        for trial in trials:
            run = server.runs[trial]
            assert run.steps == sorted({row["step"] for row in rows(folder / trial)})
            assert (run.about["project"], run.about["sweep"], run.state) == ("vision", "sweep1", "finished")
    assert not (Path(os.getcwd()) / "runs" / "sweep").exists()


def test_a_variable_of_that_name_is_no_trial():
    """``${trial}`` is filled in by tlx.base.paths."""
    assert sweep.with_trial("runs/${trial_id}/${trial}", {}) == "runs/${trial_id}/${trial}"
    assert sweep.with_trial("runs/${trial}/{trial}", {sweep.VARIABLE: "x1"}) == "runs/${trial}/x1"
