"""data.test: a training looks at it once, at its end, with the weights that validation has chosen; and says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import invoke, rows, status
from composed import finished, raw_of, train
from images import make_shards
from safetensors.torch import load_file
from survival import Stage

import tlx.train.test_set
import tlx.use.evaluate
from tlx.base.errors import UserError
from tlx.data.shards.manifest import Manifest
from tlx.tracking.tracker import of_test
from tlx.train.result import summary

SPLITS = {"train": 8, "val": 5, "test": 7}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class=SPLITS, size=16)


def raw_for(shards, run, *, test="test", data=(), **over):
    raw = raw_of(shards, run, **{"phases": {"each": {"lr": 0.002, "duration": "2ep"}}, **over})
    return {**raw, "data": {**raw["data"], **({"test": str(shards / test)} if test else {}), **dict(data)}}


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A network that has learned little, judged at its end."""
    return finished({**raw_for(shards, tmp_path_factory.mktemp("r") / "run"), "track": {"report": True}})


def result_of(run):
    return json.loads((run / "result.json").read_text())


def looks_of(run):
    return [
        look for file in sorted((run / "evaluations").glob("*.json")) for look in json.loads(file.read_text())["looks"]
    ]


def test_the_numbers_are_those_of_tlx_evaluate_to_the_last_bit(shards, tmp_path):
    raw = raw_for(shards, tmp_path / "run")
    run = finished(raw)
    test = result_of(run)["test"]
    assert (test["samples"], test["look"], test["skipped"], test["headline"]) == (21, 1, 0, ["loss", "top1"])
    assert finished(raw) == run  # the same command, of a run that is done: no second look
    (own,) = looks_of(run)
    assert own["training_ended"] == result_of(run)["step"]
    step = json.loads((run / "checkpoints" / "best" / "state.json").read_text())["step"]
    assert own["weights"]["step"] == json.loads((run / "model.json").read_text())["provenance"]["step"] == step
    assert own["temperature"]["samples"] == 15  # of validation
    done = invoke("evaluate", run, "--data", shards / "test", "--workers", "0", "--json")
    look = json.loads(done.stdout)
    assert look["metrics"] == own["metrics"] == test["metrics"]
    assert look["confusion"] == own["confusion"]
    assert (look["look"], "training_ended" in look) == (2, False)


def test_what_is_told_of_it(trained, shards):
    result = result_of(trained)
    of = result["test"]["metrics"]["top1"]
    assert f"test, 21 samples of {shards / 'test'}: loss" in summary(result)
    assert f"top1 {of['value']:.4f} ({of['low']:.4f} to {of['high']:.4f})" in summary(result)
    assert json.loads((trained / "model.json").read_text())["test"] == result["test"]
    page = (trained / "report.html").read_text()
    assert f"{100 * of['value']:.2f} % ({100 * of['low']:.2f} % to {100 * of['high']:.2f} %)" in page
    note = invoke("evaluate", trained, "--workers", "0", "--bootstrap", "0").stderr
    assert f"note: it has a data.test, too: --data {shards / 'test'}" in note


def test_a_metric_that_is_no_number_is_told_as_a_dash(trained, tmp_path, capsys):
    """json_text writes null for it."""
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    result = result_of(run)
    result["test"]["metrics"]["top1"] = {"value": 0.5, "low": None, "high": None}
    result["test"]["metrics"]["loss"] = {"value": None, "low": None, "high": None}
    assert ": loss - (- to -)  top1 0.5000 (- to -)" in summary(result)
    assert of_test(result)["test/top1"] == 0.5
    assert "test/loss" not in of_test(result)
    (run / "result.json").write_text(json.dumps(result))
    assert invoke("report", run).exit_code == 0
    assert "50.00 % (- to -)" in (run / "report.html").read_text()


def test_nothing_of_the_training_sees_it(trained, shards, tmp_path):
    run = finished(raw_for(shards, tmp_path / "run", test=None))
    assert result_of(run)["test"] is None
    assert result_of(run)["best"] == result_of(trained)["best"]
    assert rows(run) == rows(trained)
    for name in ("best", "latest"):
        one, other = (load_file(r / "checkpoints" / name / "model.safetensors") for r in (run, trained))
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_longer_run_looks_again_and_says_so(shards, tmp_path):
    raw = raw_for(shards, tmp_path / "run")
    run = finished(raw)
    train({**raw, "phases": {**raw["phases"], "fine_tuning": {"duration": "3ep"}}}, extend=True)
    first, second = looks_of(run)
    assert first["training_ended"] < second["training_ended"]
    assert ", look 2 at these data: " in summary(result_of(run))


def test_a_run_goes_on_with_another_one(shards, tmp_path, capsys):
    """And one that is done is told how it is judged, not judged."""
    raw = raw_for(shards, tmp_path / "run", test=None)
    run = finished(raw)
    train(raw_for(shards, run))
    assert f"-> tlx evaluate {run} --data {shards / 'test'}" in capsys.readouterr().err
    assert not (run / "evaluations").exists()


def test_data_that_were_changed_after_the_end_are_not_taken_for_judged(shards, trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    shutil.copytree(shards / "test", tmp_path / "other")
    for same in (shards / "test", shards / "val" / ".." / "test"):
        train(raw_for(shards, run, data={"test": str(same)}))
        assert "tlx evaluate" not in capsys.readouterr().err
    train(raw_for(shards, run, data={"test": str(tmp_path / "other")}))
    said = capsys.readouterr().err
    assert "note: the training has not judged data.test, and is done" in said
    assert f"-> tlx evaluate {run} --data {tmp_path / 'other'}" in said


def spoilt(shards):
    """One picture of the test shards."""
    manifest = Manifest.open(str(shards / "test"))
    tar = Path(manifest.location) / manifest.shards[0].name
    content = bytearray(tar.read_bytes())
    at = content.index(b"\xff\xd8\xff")
    content[at : at + 200] = bytes(200)
    tar.write_bytes(content)


def full(*_):
    raise OSError(28, "No space left on device", "evaluations")


def odd(*_):
    raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda shards, _: spoilt(shards), "1 unreadable samples, 0 allowed"),
        (lambda _, patched: patched.setattr(tlx.use.evaluate, "write_whole", full), "No space left on device"),
        (lambda _, patched: patched.setattr(tlx.use.evaluate, "_classified", odd), "CUDA out of memory"),
    ],
)
def test_a_look_that_fails_leaves_the_training_done(tmp_path, monkeypatch, capsys, break_it, message):
    shards = make_shards(tmp_path / "s", classes=3, per_class=SPLITS, size=16)
    break_it(shards, monkeypatch)
    raw = raw_for(shards, tmp_path / "run", track={"report": False})
    run = finished(raw)
    told = capsys.readouterr().out
    assert message in told
    assert f"-> tlx evaluate {run} --data {shards / 'test'}" in told
    assert (status(run)["status"], result_of(run)["test"], result_of(run)["unreadable"]) == ("done", None, {})


def test_unreadable_pictures_count_as_those_of_validation(tmp_path):
    shards = make_shards(tmp_path / "s", classes=3, per_class=SPLITS, size=16)
    spoilt(shards)
    run = finished(raw_for(shards, tmp_path / "run", data={"bad_samples": 1}))
    result = result_of(run)
    assert (result["test"]["samples"], result["test"]["skipped"], len(result["unreadable"])) == (20, 1, 1)


def test_asked_to_stop_it_looks_later(shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    plain = tlx.train.test_set.load

    def asked(*given, **named):
        (run / "stop").touch()
        return plain(*given, **named)

    monkeypatch.setattr(tlx.train.test_set, "load", asked)
    raw = raw_for(shards, run)
    assert train(raw) is None
    assert (status(run)["status"], (run / "result.json").exists(), (run / "evaluations").exists()) == (
        "resumable",
        False,
        False,
    )
    monkeypatch.setattr(tlx.train.test_set, "load", plain)
    assert train(raw)["test"]["look"] == 1


def test_a_look_that_was_recorded_and_not_told_is_told(shards, tmp_path, monkeypatch):
    """Killed, or no room, between the record and result.json."""
    raw = raw_for(shards, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("tlx.runs.run_folder.RunFolder.write_result", full)
        with pytest.raises(UserError, match="the same command writes it"):
            train(raw)
    (look,) = looks_of(tmp_path / "run")
    assert train(raw)["test"]["metrics"] == look["metrics"]
    assert len(looks_of(tmp_path / "run")) == 1


def test_it_is_checked_before_anything_trains(shards, tmp_path):
    other = make_shards(tmp_path / "two", classes=2, per_class={"train": 4, "val": 2}, size=16)
    for place, message in (
        (other / "val", "3 classes, test shards 2; only on one side: class2"),
        (tmp_path, "this folder holds no shards"),
    ):
        with pytest.raises(UserError, match=message):
            train(raw_for(shards, tmp_path / "run", data={"test": str(place)}))
    assert not (tmp_path / "run").exists()
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(raw_for(shards, tmp_path / "run", test="val")))
    said = " ".join(invoke("plan", config).output.split())
    assert "data.test: 15 samples, judged once, at the end" in said
    assert "2 of the 2 shards of data.test are shards of data.val, too: pictures that choose the weights" in said


@pytest.mark.slow
def test_killed_in_the_look_two_ranks_look_once_as_one_does(trained, shards, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(raw_for(shards, "unused", track={"report": False})))
    stage, run = Stage(tmp_path / "logs", config), tmp_path / "run"
    assert stage.start(run, KILL_AT="1:tlx.use.evaluate.scored:2:group").code() != 0
    assert "test_set.judge_test" in (tmp_path / "logs" / "deaths").read_text()
    assert not (run / "result.json").exists()
    assert not (run / "evaluations").exists()  # nobody was told a number
    launch = stage.start(run)
    assert launch.code() == 0, launch.said()
    one, two = result_of(trained)["test"], result_of(run)["test"]
    assert (len(looks_of(run)), two["look"], two["samples"]) == (1, 1, one["samples"])
    assert two["metrics"]["top1"] == one["metrics"]["top1"]
