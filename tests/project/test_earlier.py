"""What earlier versions wrote (`earlier/`) is read, or refused in words: configurations, shards, run folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import rows, status
from places import TESTS
from safetensors.torch import load_file
from typer.testing import CliRunner

import tlx
from tlx.base.errors import UserError
from tlx.cli.main import app
from tlx.data.shards.manifest import Manifest
from tlx.plan import config as configs
from tlx.plan.config import load
from tlx.plan.later_keys import is_written
from tlx.plan.loop_config import EMA
from tlx.report.report import report
from tlx.runs.extend import Extend
from tlx.runs.history import read_history
from tlx.runs.run_folder import RunFolder
from tlx.train.command import train

EARLIER = TESTS / "earlier"


@pytest.fixture
def v0_1(tmp_path, monkeypatch):
    """A copy of the folder, in it."""
    folder = shutil.copytree(EARLIER / "v0_1", tmp_path / "v0_1", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def test_shards(v0_1):
    assert [len(Manifest.open(v0_1 / "shards" / part)) for part in ("train", "val")] == [24, 6]
    checked = CliRunner().invoke(app, ["shards", "check", "shards", "--jobs", "0"])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("name", ["finished", "stopped", "changed"])
def test_a_run_is_reported_on(v0_1, name):
    run = v0_1 / "runs" / name
    history = read_history(run)
    best = json.loads((run / "checkpoints" / "latest" / "state.json").read_text())["best"]
    assert history.best.value(history.metric) == best["value"]  # the step may be another: ties went to the earlier one
    assert (run / "report.html") in report([run])
    shown = CliRunner().invoke(app, ["status", str(run)])
    assert f"step {history.step} of" in shown.output


def test_a_finished_run_shows_its_result(v0_1):
    before = (v0_1 / "runs/finished/result.json").read_bytes()
    result = train(configs.load("finished.yaml"), fresh=False)
    assert result["best"]["step"] == 3
    assert (v0_1 / "runs/finished/result.json").read_bytes() == before


@pytest.mark.parametrize("name", ["finished", "stopped"])
def test_a_model_is_used(v0_1, name):
    """A run whose weights do not say yet what they are of."""
    model = tlx.load(v0_1 / "runs" / name)
    found = model.evaluate(v0_1 / "shards" / "val")
    best = json.loads((v0_1 / "runs" / name / "checkpoints" / "best" / "state.json").read_text())["best"]
    assert best["metric"] == "val/top1"
    assert (found["top1"], found["samples"]) == (best["value"], 6)
    shown = CliRunner().invoke(app, ["evaluate", f"runs/{name}", "--bootstrap", "0", "--json"])
    assert json.loads(shown.stdout)["metrics"]["top1"]["value"] == best["value"]


def test_a_finished_run_that_kept_the_worst_shows_its_result_too(v0_1):
    file = v0_1 / "runs/finished/config.yaml"
    file.write_text(
        file.read_text().replace("  metric: val/top1\n  mode: max\n  top_k", "  metric: val/loss\n  mode: max\n  top_k")
    )
    assert train(configs.load("finished.yaml", ["evaluate={metric: val/loss}"]), fresh=False)["step"] == 15


def test_a_stopped_run_goes_on_to_the_same_weights(v0_1):
    result = train(configs.load("stopped.yaml"), fresh=False)
    assert result["step"] == 18
    assert [row["step"] for row in rows(v0_1 / "runs/stopped") if "train/loss" in row and "val/loss" not in row] == [
        *range(1, 19)
    ]
    assert status(v0_1 / "runs/stopped")["status"] == "done"
    weights, whole = load_file("runs/stopped/checkpoints/latest/model.safetensors"), load_file("whole.safetensors")
    for name, tensor in whole.items():  # rounding of another CPU, over eleven steps
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["finished", "stopped", "changed"])
def test_the_configuration_that_a_run_has_written_is_read(v0_1, name):
    """From config.yaml the same training can be begun again."""
    written = configs.load(f"runs/{name}/config.yaml")
    asked = configs.load(f"{name}.yaml")
    assert written.settings("fine_tuning") == asked.settings("fine_tuning")
    assert written.data == asked.data


def test_a_key_that_came_later_means_in_a_written_configuration_what_was_done_without_it(v0_1):
    """The average did not ramp when config.yaml was written; who writes a configuration now gets the default of now."""
    written = "runs/changed/config.yaml"
    assert load(written, ["run=runs/new", "loop.ema.decay=0.5"]).loop.ema == EMA(decay=0.5, ramp=False)
    assert load("changed.yaml").loop.ema == EMA(decay=0.9, ramp=True)
    assert load(written, ["loop.ema={decay: 0.5}"]).loop.ema == EMA(decay=0.5, ramp=True)
    again = Path("again.yaml")
    again.write_text(configs.dump(load("changed.yaml")))
    assert load(again).loop.ema == EMA(decay=0.9, ramp=True)
    assert is_written(yaml.safe_load(again.read_text()))
    assert not is_written(yaml.safe_load(Path("changed.yaml").read_text()))
    raw = yaml.safe_load(Path(written).read_text())
    again.write_text(yaml.safe_dump({**raw, "loop": None, "loop.ema": {"decay": 0.5}}))
    with pytest.raises(UserError, match="2 mistakes"):
        load(again)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_whose_settings_meant_something_else_is_refused_and_left_as_it_is(v0_1):
    run = v0_1 / "runs" / "changed"
    (run / "checkpoints" / "latest").unlink()  # as in a copy without links
    before = files(run)
    with pytest.raises(UserError, match=r"loop\.ema\.ramp: False -> True.*loop\.ema\.ramp=false goes on as it began"):
        train(configs.load("changed.yaml"), fresh=False)
    with pytest.raises(UserError, match=r"begun by tlx 0\.1\.0(.|\n)*multi_step(.|\n)*balanced(.|\n)*--fresh"):
        train(configs.load("changed.yaml", ["loop.ema.ramp=false"]), fresh=False)
    after = files(run)
    assert after == before
    fresh = train(configs.load("changed.yaml", ["phases.fine_tuning.duration=2ep"]), fresh=True)
    assert fresh["finished"]
    [aside] = (v0_1 / "runs").glob("changed.before-*")
    assert before.keys() <= files(aside).keys()


@pytest.mark.parametrize("done", [False, True])
def test_such_a_run_is_not_extended_by_other_rules_either(v0_1, done):
    run = v0_1 / "runs" / "changed"
    if done:
        shutil.copy(v0_1 / "runs/finished/result.json", run / "result.json")
    before = files(run)
    longer = configs.load("changed.yaml", ["loop.ema.ramp=false", "further.more.duration=2ep"])
    with pytest.raises(UserError, match=r"begun by tlx 0\.1\.0(.|\n)*multi_step(.|\n)*balanced(.|\n)*--fresh"):
        train(longer, extend=True)
    with pytest.raises(UserError, match=r"begun by tlx 0\.1\.0"):
        RunFolder(run).extension(longer, Extend(lambda _: pytest.fail("compiled")))
    after = files(run)
    assert after == before


def test_a_run_whose_settings_mean_the_same_is_extended(v0_1):
    further = ["loop.ema.ramp=false", "further.more.duration=2ep"]
    result = train(configs.load("finished.yaml", further), extend=True)
    assert result["step"] == 15 + 2 * 3


FURTHER = ["further.more.duration=2ep", "further.more.warmup=1", "further.more.curve={name: multi_step, at: ['50%']}"]


@pytest.mark.parametrize(
    "rewritten",
    [pytest.param(False, id="at once"), pytest.param(True, id="after a start by now", marks=pytest.mark.slow)],
)
def test_a_run_that_was_extended_and_killed_before_its_first_checkpoint_goes_on(v0_1, monkeypatch, rewritten):
    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tlx.train.loop.fit", killed)
        for words, how in [([], {})] * rewritten + [(FURTHER, {"extend": True})]:
            with pytest.raises(KeyboardInterrupt):
                train(configs.load("stopped.yaml", words), **how)
    for again in ({"extend": True}, {}):
        with monkeypatch.context() as patched:
            patched.setattr("tlx.train.loop.fit", killed)
            with pytest.raises(KeyboardInterrupt):
                train(configs.load("stopped.yaml", FURTHER), **again)
    result = train(configs.load("stopped.yaml", FURTHER))
    assert (result["step"], [e["steps"] for e in result["extended"]]) == (18 + 2 * 3, [[18, 24]])
