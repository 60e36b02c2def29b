"""`tlx train --extend`: a run goes on by a longer plan, bit for bit as if that had been given from the start."""

from __future__ import annotations

import errno
import functools
import html
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import composed
import pytest
import torch
import yaml
from commands import kill_all, start, wait_for_step, write_config
from commands import tlx as run_tlx
from composed import train, two_phases, weights
from places import ROOT

import tlx.base.files
import tlx.train.loop
from tlx.base.errors import UserError
from tlx.plan.config import load
from tlx.plan.saved_config import MAY_CHANGE
from tlx.report.report import is_drawn
from tlx.runs import extend
from tlx.runs.extend import FILE
from tlx.runs.run_status import status_text
from tlx.train import build
from tlx.train import command as training

REPORTED = {"every": 1, "report": True}
STEPS = 3  # of an epoch: 24 samples in batches of 8


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def raw(shards, alone):
    return functools.partial(two_phases, shards)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run that is done, which nobody changes."""
    return composed.finished(two_phases(shards, tmp_path_factory.mktemp("finished") / "run", track=REPORTED))


def longer(epochs=4, **said):
    return {"fine_tuning": {"duration": f"{epochs}ep", **said}}


def optimizer(run):
    states = torch.load(run / "checkpoints" / "latest" / "optimizer.pt", weights_only=True)
    return {f"{name}.{key}": torch.as_tensor(value) for name, own in states.items() for key, value in own.items()}


def assert_same(run, other):
    for read in (weights, optimizer):
        one, two = read(run), read(other)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)


def losses(run):
    """By step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/lr_head" in row}


def content(run):
    """Of every file that says where the run stands."""
    names = ("status.json", "result.json", "config.yaml", "plan.json", "metrics.jsonl", FILE)
    found = {name: (run / name).read_bytes() for name in names if (run / name).exists()}
    return found | {"checkpoints": sorted(p.name for p in (run / "checkpoints").iterdir())}


def status(run):
    return json.loads((run / "status.json").read_text())["status"]


def stop_at(step, monkeypatch):
    """Somebody asks for a stop while this step is made."""
    train_step = tlx.train.loop.train_step

    def watched(run, *given):
        stopping = train_step(run, *given)
        if run.progress.step == step - 1:
            run.stop.reason = "a test"
        return stopping

    monkeypatch.setattr(tlx.train.loop, "train_step", watched)


def test_two_more_epochs_of_a_finished_run_are_those_of_a_longer_training(raw, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(raw(run))
    assert status(run) == "done"
    with pytest.raises(UserError, match="another configuration") as refused:
        train(raw(run, phases=longer()))
    assert "--extend" in str(refused.value)
    assert status(run) == "done"
    result = train(raw(run, phases=longer(), track=REPORTED), extend=True)
    train(raw(straight, phases=longer(), track=REPORTED))
    assert_same(run, straight)
    assert losses(run) == losses(straight)
    assert [e["step"] for e in result["extended"]] == [4 * STEPS]
    assert result["extended"][0]["steps"] == [4 * STEPS, 6 * STEPS]
    assert result["step"] == 6 * STEPS
    again = f"tlx.train.command.train(tlx.plan.config.load('{run}/config.yaml', ['run={run}-again']))"
    assert result["reproduce"].partition("  #")[0] == again
    assert again in html.unescape((run / "report.html").read_text())
    assert result["phases"]["fine_tuning"]["stop"] == 6 * STEPS
    assert result["samples_seen"] == 6 * 24
    assert "  extended at step 12: 12 -> 18 steps" in status_text(run).splitlines()
    assert status(run) == "done"
    for name in ("config.yaml", "plan.json"):
        said = [yaml.safe_load((r / name).read_text()) for r in (run, straight)]
        assert said[0] | {"run": ""} == said[1] | {"run": ""}


def test_a_length_of_the_whole_that_is_said_later_takes_the_tables_place(shards, alone, tmp_path):
    said = composed.raw_of(shards, tmp_path / "run", unfreeze="head_only", phases={"each": {"lr": 0.01}})
    assert train(said)["step"] == 8 * STEPS
    for how in ({"extend": True}, {}):
        assert train({**said, "duration": "9ep"}, **how)["step"] == 9 * STEPS


def test_the_same_command_again_shows_the_result_and_the_old_one_is_refused(raw, tmp_path, capsys):
    run = tmp_path / "run"
    train(raw(run))
    train(raw(run, phases=longer()), extend=True)
    before = content(run)
    for how in ({}, {"extend": True}):
        assert train(raw(run, phases=longer()), **how)["step"] == 6 * STEPS
    assert "nothing is extended" in capsys.readouterr().err
    before.pop("status.json")
    assert before.items() <= content(run).items()
    with pytest.raises(UserError, match="another configuration"):
        train(raw(run))


def test_a_run_that_was_stopped_goes_on_by_the_longer_plan(raw, tmp_path, monkeypatch):
    run, straight = tmp_path / "run", tmp_path / "straight"
    with monkeypatch.context() as patched:
        stop_at(8, patched)
        assert train(raw(run)) is None
    assert status(run) == "resumable"
    result = train(raw(run, phases=longer()), extend=True)
    train(raw(straight, phases=longer()))
    assert_same(run, straight)
    assert result["extended"][0]["step"] == 8


def test_a_phase_that_a_plateau_has_ended_stays_ended_and_one_that_ended_last_goes_on_with_more_patience(raw, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    first = {"duration": {"max": "9ep", "patience": 1, "min_delta": 100.0}}
    last = {"duration": {"max": "9ep", "patience": 2, "min_delta": 100.0}}
    patient = {"duration": {"max": "9ep", "patience": 4, "min_delta": 100.0}}
    result = train(raw(run, phases={"feature_extraction": first, "fine_tuning": last}))
    assert {name: (p["start"], p["stop"]) for name, p in result["phases"].items()} == {
        "feature_extraction": (0, 2 * STEPS),
        "fine_tuning": (2 * STEPS, 5 * STEPS),
    }
    phases = {"feature_extraction": first, "fine_tuning": last}
    with pytest.raises(UserError, match="nothing to add") as refused:
        train(raw(run, phases=phases, evaluate={"patience": 3}), extend=True)
    assert "phase fine_tuning has ended there for want of progress: give it more patience" in str(refused.value)
    assert status(run) == "done"
    said = {"feature_extraction": first, "fine_tuning": patient}
    result = train(raw(run, phases=said), extend=True)
    assert result["phases"]["fine_tuning"]["stop"] == 7 * STEPS
    train(raw(straight, phases=said))
    assert_same(run, straight)


def test_more_phases_after_the_last_one(raw, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(raw(run))
    further = {"more": {"duration": "2ep", "lr": 0.001, "curve": "cosine"}}
    result = train(raw(run, further=further), extend=True)
    train(raw(straight, further=further))
    assert_same(run, straight)
    assert result["phases"]["more"]["start"] == 4 * STEPS
    plan = json.loads((run / "plan.json").read_text())["phases"]
    assert plan[2]["name"] == "more"
    assert plan[2]["lr"] == 0.001
    trains = [{name: y["trains"] for name, y in p["layers"].items()} for p in plan]
    assert trains[2] == trains[1]


COSINE = {"each": {"lr": 0.02, "curve": "cosine"}}


def cosine(epochs=2):
    return {**COSINE, "fine_tuning": {"duration": f"{epochs}ep"}}


def test_a_past_that_would_have_been_another_one_is_refused_and_nothing_is_touched(raw, tmp_path):
    run = tmp_path / "run"
    train(raw(run, phases=cosine()))
    before = content(run)
    with pytest.raises(UserError, match="has trained 12 steps, and by the new settings") as refused:
        train(raw(run, phases=cosine(4)), extend=True)
    # half a cosine at a sixth of the way, and at a twelfth: (1 + cos(pi / 6)) / 2, (1 + cos(pi / 12)) / 2
    assert "the rate of features.0.0 at step 7 was 0.018660" in str(refused.value)
    assert "would have been 0.019659" in str(refused.value)
    assert content(run) == before


def ways(refused):
    """The words that a message says to add, way by way."""
    lines = str(refused.value).splitlines()
    return [shlex.split(line) for line in lines if line.strip().endswith(("--extend", "--rest"))]


def rates(run):
    """Of the head, by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"] - 1: row["train/lr_head"] for row in rows if "train/lr_head" in row}


def test_the_two_ways_that_the_message_offers_work_when_they_are_followed(raw, tmp_path):
    first, other = tmp_path / "run", tmp_path / "other"
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(raw(first, phases=cosine())))
    train(raw(first, phases=cosine()))
    shutil.copytree(first, other, symlinks=True)
    typed = ["phases.fine_tuning.duration=4ep"]
    with pytest.raises(UserError, match="two ways go on") as refused:
        training.train(load(file, typed), extend=True)
    further, rest = ways(refused)
    assert further == ["phases.fine_tuning.duration=2ep", "further.more.duration=2ep", "--extend"]
    assert rest == ["--extend", "--rest"]

    words = [*typed, *(w for w in further if not w.startswith("--"))]
    assert training.train(load(file, words), extend=True)["step"] == 6 * STEPS
    assert rates(first)[12] == 0.02  # the further phase begins at the top of its own cosine
    assert rates(first)[15] == pytest.approx(0.01, abs=1e-12)

    words = [*typed, f"run={other}"]
    assert training.train(load(file, words), extend=True, rest=True)["step"] == 6 * STEPS
    assert rates(other)[9] == pytest.approx(0.01, abs=1e-12)  # half of the cosine over 6 steps
    assert rates(other)[12] == pytest.approx(0.01, abs=1e-12)  # half of that over 12, which is gone on with
    assert rates(other)[17] == pytest.approx(0.02 * 0.0170370868554659, abs=1e-12)  # (1 + cos(11 pi / 12)) / 2
    assert json.loads((other / "result.json").read_text())["extended"][0]["rest"] is True


def test_the_rest_of_a_curve_is_in_the_plan_and_whoever_types_the_same_goes_on(raw, tmp_path, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(raw(run, phases=cosine()))
    shutil.copytree(run, whole, symlinks=True)
    with monkeypatch.context() as patched:
        stop_at(14, patched)
        assert train(raw(run, phases=cosine(4)), extend=True, rest=True) is None
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["phases"]["fine_tuning"]["before"]["6"]["duration"] == "6 steps"
    made, text = build.plan(load(run / "config.yaml"))
    assert "cosine(final=0.0) from step 12; before:" in text
    assert "cosine(final=0.0) over 6 steps" in text
    head = made.layers.head
    assert [made.lr(head, step) for step in (9, 12)] == pytest.approx([0.01, 0.01], abs=1e-12)
    assert train(raw(run, phases=cosine(4)))["step"] == 6 * STEPS  # without --extend, and without --rest
    train(raw(whole, phases=cosine(4)), extend=True, rest=True)
    assert_same(run, whole)
    again = tmp_path / "again"  # and the configuration in the folder is that of the same training
    training.train(load(run / "config.yaml", [f"run={again}"]))
    assert_same(again, whole)


def test_a_length_for_all_phases_leaves_those_that_are_over_as_they_were(raw, tmp_path):
    run = tmp_path / "run"
    phases = {"each": {"lr": 0.02, "curve": "cosine", "duration": "2ep"}, "feature_extraction": {}, "fine_tuning": {}}
    more = {**phases, "each": {**phases["each"], "duration": "4ep"}}
    train(raw(run, phases=phases))
    with pytest.raises(UserError, match="two ways go on") as refused:
        train(raw(run, phases=more), extend=True)
    assert "feature_extraction: steps 0 to 6; would have been 0 to 12" in str(refused.value)
    result = train(raw(run, phases=more), extend=True, rest=True)
    assert {name: (p["start"], p["stop"]) for name, p in result["phases"].items()} == {
        "feature_extraction": (0, 2 * STEPS),
        "fine_tuning": (2 * STEPS, 6 * STEPS),
    }
    assert train(raw(run, phases=more))["step"] == 6 * STEPS


def test_a_run_is_extended_as_often_as_one_likes(raw, tmp_path):
    run = tmp_path / "run"
    train(raw(run, phases=cosine()))
    train(raw(run, phases=cosine(4)), extend=True, rest=True)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(raw(run, phases=cosine())))
    typed = ["phases.fine_tuning.duration=8ep"]
    with pytest.raises(UserError, match="two ways go on") as refused:
        training.train(load(file, typed), extend=True)
    further, _ = ways(refused)
    third = tmp_path / "third"
    shutil.copytree(run, third, symlinks=True)
    assert training.train(load(file, [*typed, f"run={third}"]), extend=True, rest=True)["step"] == 10 * STEPS
    assert rates(third)[12] == pytest.approx(0.01, abs=1e-12)
    # (1 + cos(pi / 2)) / 2 of the curve over 24 steps
    assert rates(third)[18] == pytest.approx(0.01, abs=1e-12)
    words = [*typed, *(w for w in further if not w.startswith("--"))]
    result = training.train(load(file, words), extend=True)
    assert result["step"] == 10 * STEPS
    assert rates(run)[18] == 0.02
    assert [e["steps"] for e in result["extended"]] == [[12, 18], [18, 30]]


@pytest.mark.parametrize("how", [{"extend": True}, {"rest": True}])
def test_without_a_run_there_is_nothing_to_extend(raw, tmp_path, how):
    with pytest.raises(UserError, match="there is no run to extend"):
        train(raw(tmp_path / "run"), **how)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="one of the two"):
        train(raw(tmp_path / "run"), fresh=True, **how)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"phases": {**longer(4), "each": {"lr": 0.01}}}, "was 0.02; would have been 0.01"),
        ({"phases": longer(4, norm="statistics_move")}, "fine_tuning: norm is not what it was"),
        ({"phases": longer(4, optimizer_state="reset")}, "fine_tuning: optimizer_state is not what it was"),
        ({"unfreeze": "all", "phases": longer(4) | {"feature_extraction": {}}}, "there is no phase"),
    ],
)
def test_what_would_have_been_other_in_the_past_is_named(raw, tmp_path_factory, finished, said, told):
    before = content(finished)
    with pytest.raises(UserError) as refused:
        train(raw(finished, **said), extend=True)
    assert told in str(refused.value)
    assert content(finished) == before


def test_what_speaks_against_it_later_leaves_the_run_done_too(raw, finished, monkeypatch):
    before = content(finished)
    monkeypatch.setattr(training, "identity_of", lambda *_: {"classes": ["a"], "config": {}})
    with pytest.raises(UserError, match="belongs to another training"):
        train(raw(finished, phases=longer()), extend=True)
    assert content(finished) == before
    monkeypatch.undo()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(training, "parts_of", lambda *_: (_ for _ in ()).throw(MemoryError("a fault")))
    with pytest.raises(MemoryError):
        train(raw(finished, phases=longer()), extend=True)
    assert content(finished) == before


@pytest.mark.parametrize("at", ["config.yaml", "plan.json"])
def test_killed_while_it_becomes_the_longer_run_it_goes_on(raw, finished, tmp_path, monkeypatch, at):
    run, straight = tmp_path / "run", tmp_path / "straight"
    shutil.copytree(finished, run, symlinks=True)
    replace = os.replace

    def killed(beside, path):
        if Path(path).name == at:
            raise KeyboardInterrupt
        replace(beside, path)

    with monkeypatch.context() as patched:
        patched.setattr(tlx.base.files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            train(raw(run, phases=longer()), extend=True)
    result = train(raw(run, phases=longer()), extend=True)
    train(raw(straight, phases=longer()))
    assert_same(run, straight)
    assert [e["steps"] for e in result["extended"]] == [[12, 18]]
    assert json.loads((run / FILE).read_text())[0]["before"]["result"]["step"] == 12


@pytest.mark.parametrize("at", [FILE, "status.json", "result.json"])
def test_an_extension_that_was_killed_before_it_took_place_is_none(raw, finished, tmp_path, monkeypatch, at):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)

    replace = os.replace

    def killed(*given):
        if at == "status.json" and Path(given[1]).name != at:
            return replace(*given)
        assert status(run) == ("done" if at in (FILE, "status.json") else "running")
        if at == "result.json":
            (run / at).unlink()
        raise KeyboardInterrupt

    where = {FILE: extend.Extension, "status.json": tlx.base.files.os, "result.json": extend.Extension}[at]
    name = {FILE: "record", "status.json": "replace", "result.json": "remove_result"}[at]
    with monkeypatch.context() as patched:
        patched.setattr(where, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train(raw(run, phases=longer()), extend=True)
    assert extend.earlier(run) == []
    result = train(raw(run, data={**raw(run)["data"], "workers": 1}))
    assert (result["step"], result["extended"], status(run)) == (4 * STEPS, [], "done")
    assert extend.earlier(run) == []
    result = train(raw(run, phases=longer()), extend=True)
    assert [e["steps"] for e in result["extended"]] == [[12, 18]]


@pytest.mark.parametrize("at", [FILE, "config.yaml", "plan.json", "status.json"])
def test_a_folder_without_room_refuses_an_extension_and_stays_as_it_is(raw, finished, tmp_path, monkeypatch, at):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    before, write = content(run), tlx.base.files._write

    def full(path, text):
        if path.name.startswith(f".{at}."):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(tlx.base.files, "_write", full)
        with pytest.raises(UserError, match=rf"{at}: cannot be written: No space left on device"):
            train(raw(run, phases=longer()), extend=True)
    now = content(run)
    assert extend.earlier(run) == []
    now.pop(FILE, None)  # of an extension that has not taken place
    assert now == before
    assert train(raw(run, phases=longer()), extend=True)["step"] == 6 * STEPS


def test_checkpoints_that_were_kept_for_good_stay_when_the_interval_grows(raw, tmp_path):
    run = tmp_path / "run"
    checkpoint = {"every": 3, "keep": {"last": 1, "best": 1, "every": "50%"}}

    def steps():
        return {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}

    train(raw(run, checkpoint=checkpoint))
    assert {6, 12} <= steps()
    train(raw(run, checkpoint=checkpoint, phases=longer(6)), extend=True)  # 24 steps
    assert {6, 12, 24} <= steps()
    train(raw(run, checkpoint=checkpoint, phases=longer(10)), extend=True)  # 36 steps
    assert {6, 12, 24, 36} <= steps()
    assert len(steps()) <= 5  # and perhaps the best one


def test_the_report_of_before_goes_with_its_result(raw, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    assert is_drawn(run)
    with monkeypatch.context() as patched:
        stop_at(14, patched)
        assert train(raw(run, phases=longer(), track=REPORTED), extend=True) is None
    assert not (run / "report.html").exists()
    train(raw(run, phases=longer(), track=REPORTED))
    assert is_drawn(run)
    os.utime(run / "report.html", (1, 1))  # of an earlier result
    assert not is_drawn(run)
    train(raw(run, phases=longer(), track=REPORTED))
    assert is_drawn(run)


def test_a_refused_extension_leaves_a_run_that_was_stopped_resumable_and_one_that_was_made_is_said(
    raw, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(8, patched)
        assert train(raw(run)) is None
    before = content(run)
    with pytest.raises(UserError, match="seed: 5 -> 6"):
        train(raw(run, seed=6), extend=True)
    assert content(run) == before
    with monkeypatch.context() as patched:
        stop_at(14, patched)
        assert train(raw(run, phases=longer()), extend=True) is None
    capsys.readouterr()
    assert train(raw(run, phases=longer()), extend=True)["step"] == 6 * STEPS
    said = capsys.readouterr().err
    assert "the run is extended already; going on" in said
    assert "nothing is extended" not in said


def test_the_rest_is_offered_only_where_it_adds_steps(raw, tmp_path):
    run = tmp_path / "run"
    train(raw(run, phases=cosine()))
    shorter = {**COSINE, "feature_extraction": {"duration": "1ep"}, "fine_tuning": {"duration": "2ep"}}
    with pytest.raises(UserError, match="one way goes on") as refused:
        train(raw(run, phases=shorter), extend=True)
    assert [words[-1] for words in ways(refused)] == ["--extend"]
    with pytest.raises(UserError, match="nothing to add"):
        train(raw(run, phases=shorter), extend=True, rest=True)


def test_a_key_that_came_later_is_not_to_be_taken_back(raw, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["loop"]["ema"] = {"decay": 0.9}  # by tlx 0.1.0
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(UserError) as refused:
        train(raw(run, loop={"ema": {"decay": 0.9}}, phases=longer()), extend=True)
    assert "loop.ema.ramp: False -> True, a key that came later: loop.ema.ramp=false goes on as it began" in str(
        refused.value
    )
    assert "take them back" not in str(refused.value)


def test_while_the_report_is_drawn_signals_act_as_before(raw, tmp_path, monkeypatch):
    before, seen = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(training, "draw", lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    train(raw(tmp_path / "run", track=REPORTED))
    assert seen == [before]


def test_what_may_change_is_told_in_launch():
    text = (ROOT / "launch" / "README.md").read_text().partition("**Going on.**")[2]
    said = text.partition("\n\n")[0]
    assert [key for key in (*extend.FUTURE, *MAY_CHANGE) if f"`{key}`" not in said] == []


@pytest.mark.slow
def test_on_two_ranks_and_killed_meanwhile_it_is_the_longer_training_too(raw, tmp_path, monkeypatch):
    run, straight = tmp_path / "run", tmp_path / "straight"
    phases = {"fine_tuning": {"duration": "2ep", "norm": "statistics_move"}}
    file = write_config(tmp_path / "c.yaml", raw(run, phases=phases, checkpoint={"every": 2}))
    assert run_tlx("train", file, ranks=2).returncode == 0
    more = "phases.fine_tuning.duration=6ep"
    monkeypatch.setenv("TOYS_PACE", "0.1")
    process = start("train", file, more, "--extend", ranks=2)
    try:
        wait_for_step(process, run, 4 * STEPS + 5)
        assert status(run) == "running"
        assert not (run / "result.json").exists()
    finally:
        kill_all(process)
    monkeypatch.delenv("TOYS_PACE")
    for how in (run, straight):
        done = run_tlx("train", file, more, f"run={how}", *(["--extend"] if how is run else []), ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(run, straight)
    assert losses(run) == losses(straight)
    result = json.loads((run / "result.json").read_text())
    assert [e["steps"] for e in result["extended"]] == [[12, 24]]
