"""The run folder of several tasks: what it says, how it goes on, what is made of it."""

from __future__ import annotations

import json

import pytest
import torch
from commands import invoke, rows, write_config
from composed import composer, finished, train, weights
from safetensors.torch import load_file
from task_trainings import make_shards, raw_of

from tlx.base.errors import TlxError, UserError
from tlx.plan import config as configs
from tlx.report.report import report
from tlx.train.loop import fit

TASKS = {"tags": "multilabel", "species": "classification", "age": {"name": "regression", "target": "age"}}
SEVERAL = {"name": "multitask", "weighting": "uncertainty", "tasks": TASKS}
SHORT = {"each": {"lr": 0.02}, "feature_extraction": {"duration": 3}, "fine_tuning": {"duration": 3}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def raw(shards, run, **over):
    said = {"task": SEVERAL, "phases": SHORT, "evaluate": {"every": 3}, **over}
    return raw_of("equal", run.parent, shards) | {"run": str(run), **said}


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    return finished(raw(shards, tmp_path_factory.mktemp("run") / "run"))


def result_of(run):
    return json.loads((run / "result.json").read_text())


def test_what_chooses_is_written_down_and_every_metric_is_in_the_rows(run):
    written = configs.load(run / "config.yaml")
    assert written.evaluate.metric == "val/score"
    assert list(written.task.args["tasks"]) == list(TASKS)  # the order of outputs
    last = [row for row in rows(run) if "val/loss" in row][-1]
    assert {"val/tags/map", "val/tags/f1_macro", "val/species/top1", "val/age/mae", "val/age/r2"} <= set(last)
    mean = (last["val/tags/map"] + last["val/species/top1"] - last["val/age/mae"]) / 3
    assert last["val/score"] == pytest.approx(mean)


def test_lines_for_people_show_the_metric_of_each_task(shards, tmp_path, capsys):
    train(raw(shards, tmp_path / "run"))
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "val/score" in line and line.startswith("step")]
    assert len(lines) == 2
    for name in ("val/loss", "val/score", "val/tags/map", "val/species/top1", "val/age/mae"):
        assert all(f"{name} " in line for line in lines)
    assert "val/tags/loss" not in said
    assert "val/age/r2" not in said
    shown = invoke("status", tmp_path / "run").output
    assert "step 6 of 6" in shown


def test_a_report_has_every_task_and_every_metric(run):
    files = report([run])
    assert run / "figures" / "tasks.png" in files
    page = (run / "report.html").read_text()
    for words in (
        "Labels of tags",
        "Classes of species",
        "Numbers of age",
        "val/age/rmse",
        ">class1</td>",
        ">round</td>",
    ):
        assert words in page
    assert "class 0" not in page


def test_config_yaml_of_the_run_makes_the_same_run(run, tmp_path):
    said = configs.load(run / "config.yaml", [f"run={tmp_path / 'again'}"])
    from tlx.train.command import train as again

    again(said)
    one, other = weights(run), weights(tmp_path / "again")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_extended(shards, tmp_path):
    longer = {**SHORT, "fine_tuning": {"duration": 6}}
    train(raw(shards, tmp_path / "run"))
    assert train(raw(shards, tmp_path / "run", phases=longer), extend=True)["step"] == 9
    assert {"step": 6, "steps": [6, 9]}.items() <= result_of(tmp_path / "run")["extended"][0].items()


def test_tasks_in_another_order_are_no_other_way_to_go_on(shards, tmp_path, monkeypatch):
    said = raw(shards, tmp_path / "run")
    del said["run"]
    compose = composer(shards, tmp_path / "run", monkeypatch, **said)
    fit(compose())
    other = {**SEVERAL, "tasks": dict(reversed(TASKS.items()))}
    with pytest.raises(UserError, match="outputs: in another order"):
        fit(compose(task=other))


def kept(shards, run, folder, task=SEVERAL):
    file = str(run / "checkpoints" / "latest" / "model.safetensors")
    backbone = {**raw(shards, run)["backbone"], "weights": file}
    return raw(shards, folder, task=task, backbone=backbone, head={"name": "linear", "keep": True})


def test_the_heads_of_a_run_are_gone_on_with(shards, run, tmp_path, monkeypatch):
    said = kept(shards, run, tmp_path / "kept")
    del said["run"]
    net = composer(shards, tmp_path / "kept", monkeypatch, **said)().net
    before = load_file(run / "checkpoints" / "latest" / "model.safetensors")
    assert before["head.constants"].abs().min() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ({**TASKS, "age": {"name": "regression", "target": "box"}}, "without 'age/age' and with 'age/box_0'"),
        (dict(reversed(TASKS.items())), "classes: in another order"),
    ],
)
def test_other_heads_are_refused_by_name(shards, run, tmp_path, tasks, told):
    config = write_config(tmp_path / "c.yaml", kept(shards, run, tmp_path / "kept", {**SEVERAL, "tasks": tasks}))
    done = invoke("plan", config)
    assert isinstance(done.exception, UserError)
    assert told in str(done.exception)


def test_a_batch_that_is_not_finite_is_kept_with_its_targets(shards, tmp_path):
    with pytest.raises(TlxError, match="not finite"):
        train(raw(shards, tmp_path / "run", phases={**SHORT, "each": {"lr": 1e30}}))
    (file,) = (tmp_path / "run" / "nonfinite").glob("*.safetensors")
    assert {"images", "ids", "labels", "target/tags", "target/age"} <= set(load_file(file))


@pytest.mark.slow
def test_commands_that_measure_take_shards_without_a_class(tmp_path):
    from images import make_target_shards

    for part in ("train", "val"):
        make_target_shards(tmp_path / part, samples=16, size=16, classes=0)
    said = raw(tmp_path, tmp_path / "run", task={"name": "multilabel"})
    config = write_config(tmp_path / "c.yaml", said)
    for words in (("bench", "train", config), ("plan", config, "--measure"), ("doctor", config)):
        done = invoke(*words)
        assert done.exit_code == 0, (words, done.output, done.exception)
    missing = write_config(tmp_path / "c.yaml", {**said, "task": {"name": "regression", "target": "agee"}})
    assert 'did you mean "age"' in invoke("doctor", missing).output
