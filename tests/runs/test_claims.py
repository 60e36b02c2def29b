"""A start owns the run folder from the moment on when its first step can be made, as long as the folder is there."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import composed
import pytest
import torch
from commands import status
from composed import train, weights
from images import make_shards

import tlx.base.files
import tlx.train.loop
from tlx.base import plug
from tlx.base import verdict as verdicts
from tlx.base.console import Console
from tlx.base.errors import TlxError, UserError
from tlx.cli import main as cli
from tlx.plan.config import parse
from tlx.ranks.collectives import World
from tlx.runs.metrics_file import MetricsFile, read_rows
from tlx.runs.run_folder import Claim, RunFolder
from tlx.runs.run_lock import RunLock
from tlx.train import build
from tlx.train import command as training

STEPS = 6  # two epochs of 24 samples in batches of 8


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """What the file says that TLX_VERDICT names."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TLX_VERDICT", str(tmp_path / "verdict"))
    return lambda: json.loads((tmp_path / "verdict").read_text())


@pytest.fixture
def raw(shards, verdict):
    return functools.partial(raw_of, shards)


def raw_of(shards, run, **over):
    own = {
        "seed": 5,
        "backbone": {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}},
        "phases": {"each": {"lr": 0.02, "duration": "1ep"}},
        "track": {"every": 1, "report": False},
        "checkpoint": {"every": 2},
    }
    return composed.raw_of(shards, run, **{**own, **over})


def at_step(step, monkeypatch, act):
    """Does something once, while a step is made."""
    train_step, done = tlx.train.loop.train_step, []

    def watched(run, *given):
        stopping = train_step(run, *given)
        if run.progress.step == step and not done:
            done.append(step)
            run.saver.settle()
            act(run)
        return stopping

    monkeypatch.setattr(tlx.train.loop, "train_step", watched)


def ask_to_stop(run):
    run.stop.reason = "a test"


def content(folder):
    """Of all files, with the time of their last change."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def without_times(files):
    return {name: text for name, (text, _) in files.items() if name != Path(".lock")}


@pytest.fixture
def stopped(raw, tmp_path, monkeypatch):
    """A run that was stopped after step 4, and what is in its folder."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_step(3, patched, ask_to_stop)
        assert train(raw(run)) is None
    assert (status(run)["status"], status(run)["step"]) == ("resumable", 4)
    return run, content(run)


MISTAKES = {
    "shards": ({"data": {"train": "/nowhere", "batch": 8}}, "/nowhere"),
    "weights": ({"backbone": {"name": "toys:small", "weights": "/nowhere.safetensors"}}, "/nowhere.safetensors"),
    "device": ({"world": {"device": "cuda"}}, "there is no GPU"),
    "ranks": ({"world": {"device": "cpu", "size": 3}}, "expects 3 ranks"),
    "objective": ({"objective": {"name": "cross_entropy", "class_weights": [1, 2]}}, "class_weights"),
    "metric": ({"evaluate": {"metric": "val/top9"}}, "val/top9"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_start_that_is_refused_leaves_no_folder_and_the_corrected_command_works(raw, tmp_path, verdict, mistake):
    run = tmp_path / "runs" / "mine"
    over, why = MISTAKES[mistake]
    if mistake == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=why):
        train(raw(run, **over))
    assert not run.parent.exists()
    assert verdict()["status"] == "user-error"
    assert why in verdict()["message"]
    if mistake == "shards":
        assert train(raw(run))["step"] == STEPS
        assert verdict()["status"] == "done"


def test_a_tracker_whose_package_is_not_installed_is_noticed_by_plan_and_start(raw, tmp_path, monkeypatch, verdict):
    """It is made when the folder is claimed already. A folder that has the package's name is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(plug, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    wanted = parse(raw(tmp_path / "run", track={"trackers": ["wandb", "tensorboard"]}))
    for act in (build.plan, training.train):
        with pytest.raises(UserError) as caught:
            act(wanted)
        for line in (
            "track.trackers: tracker wandb needs the package wandb, not installed here; pip install wandb",
            "track.trackers: tracker tensorboard needs the package tensorboard, not installed here; "
            "pip install 'tlx[tensorboard]'",
        ):
            assert line in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert verdict()["status"] == "user-error"


def test_a_machine_keeps_its_own_cache_folder(raw, tmp_path, monkeypatch):
    """$TMPDIR may be another one on each; the rest of the configuration is rank 0's."""

    def wanted(folder, **over):
        run = raw(tmp_path / "run", **over)
        return {**run, "data": {**run["data"], "cache": {"folder": folder}}}

    def composed(config, *_, **__):
        seen.append(config)
        raise UserError("composed")

    seen, of_rank_0 = [], parse(wanted("/of/rank/0", seed=6))
    with monkeypatch.context() as patched:
        patched.setattr(training, "compose", composed)
        patched.setattr(
            World,
            "from_main",
            lambda _, given: (
                (dataclasses.replace(given[0], config=of_rank_0), *given[1:])
                if isinstance(given, tuple) and isinstance(given[0], Claim)
                else given
            ),
        )
        with pytest.raises(UserError, match="composed"):
            train(wanted("/of/this/machine"))
    assert (seen[0].data.cache.folder, seen[0].seed) == (Path("/of/this/machine"), 6)


def test_a_start_that_is_refused_changes_no_byte_of_a_run_that_goes_on(raw, stopped, shards, tmp_path, verdict):
    run, before = stopped
    other = make_shards(tmp_path / "t", classes=3, per_class={"train": 8, "val": 4}, size=16, seed=1)
    shown = {**raw(run)["data"], "train": str(other / "train")}
    longer = {"each": {"lr": 0.02, "duration": "1ep"}, "fine_tuning": {"duration": "2ep"}}
    for how, over, why in (
        ({}, {"seed": 6}, "another configuration"),
        ({}, {"data": {"train": "/nowhere", "batch": 8}}, "another configuration"),
        ({"extend": True}, {"seed": 6}, "settings are of the whole training"),
        ({"extend": True}, {"phases": {"each": {"lr": 0.5, "duration": "2ep"}}}, "would have been others"),
        ({"fresh": True}, {"data": {"train": "/nowhere", "batch": 8}}, "/nowhere"),
    ):
        with pytest.raises(UserError, match=why):
            train(raw(run, **over), **how)
        assert content(run) == before
        assert verdict()["status"] == "user-error"
    # the path of the shards is the same, and what is in them is not
    shutil.move(shards / "train", shards / "former")
    shutil.copytree(shown["train"], shards / "train")
    try:
        for how in ({}, {"extend": True}):
            with pytest.raises(UserError, match="not what this run was trained on"):
                train(raw(run, phases=longer if how else raw(run)["phases"]), **how)
            assert content(run) == before
    finally:
        shutil.rmtree(shards / "train")
        shutil.move(shards / "former", shards / "train")
    assert list(tmp_path.glob("run.*")) == []
    assert train(raw(run))["step"] == STEPS


def test_a_run_that_is_done_keeps_its_status_and_one_that_does_not_say_so_is_mended(raw, tmp_path, verdict):
    run = tmp_path / "run"
    train(raw(run))
    before = content(run)
    for _ in range(2):
        assert train(raw(run))["step"] == STEPS
        assert content(run) == before
        assert (verdict()["status"], verdict()["step"]) == ("done", STEPS)
    with pytest.raises(UserError, match="another configuration"):
        train(raw(run, seed=6))
    assert content(run) == before
    known = status(run)
    (run / "status.json").write_text(json.dumps({"status": "user-error", "id": known["id"]}))  # as it was written once
    train(raw(run))
    assert status(run) | {"time": ""} == known | {"time": ""}


def full(at, monkeypatch):
    """No room for one file, by name."""
    write = tlx.base.files._write

    def writing(path, text):
        if path.name.startswith(f".{at}."):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(tlx.base.files, "_write", writing)


@pytest.mark.parametrize("at", ["config.yaml", "plan.json", "status.json"])
def test_a_full_disk_while_the_folder_is_claimed_leaves_it_as_it_was(raw, stopped, tmp_path, monkeypatch, at):
    run, before = stopped
    new = tmp_path / "new" / "run"
    with monkeypatch.context() as patched:
        full(at, patched)
        for folder, how in ((new, {}), (run, {"fresh": True}), (run, {})):
            with pytest.raises(UserError, match=rf"{at}: cannot be written: No space left on device"):
                train(raw(folder), **how)
            assert not new.parent.exists()
            assert list(tmp_path.glob("run.*")) == []
            assert without_times(content(run)) == without_times(before)
    assert train(raw(run))["step"] == STEPS


def test_a_mistake_before_the_first_checkpoint_owns_nothing_and_later_ones_do(raw, tmp_path, monkeypatch, capfd):
    def wrong(run):
        raise UserError("what only a step shows")

    run = tmp_path / "run"
    for step, kept in ((1, False), (5, True)):
        with monkeypatch.context() as patched:
            at_step(step, patched, wrong)
            with pytest.raises(UserError, match="what only a step shows"):
                train(raw(run, seed=4))
        assert status(run)["status"] == "user-error"
        former = status(run)["id"]
        if kept:
            with pytest.raises(UserError, match="seed: 4 -> 5"):
                train(raw(run))
            return
        result = train(raw(run))
        assert (result["step"], status(run)["id"] == former) == (STEPS, False)
        (aside,) = tmp_path.glob("run.before-*")
        assert f"failed before its first checkpoint; its folder was moved to {aside}" in capfd.readouterr().err
        assert status(aside)["id"] == former
        shutil.rmtree(run)


def test_who_looks_at_its_parts_while_another_start_trains_takes_nothing_from_it(raw, tmp_path):
    run, config = tmp_path / "run", parse(raw(tmp_path / "run"))
    slow = RunFolder(run)
    claim = slow.look(config)
    train(raw(run))
    before = content(run)
    with pytest.raises(UserError, match="another training was here while this one was starting"):
        slow.claim(claim)
    assert without_times(content(run)) == without_times(before)
    assert status(run)["status"] == "done"


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_who_interrupts_a_training_finds_it_resumable(raw, tmp_path, monkeypatch, verdict):
    run = tmp_path / "run"
    for owner, act in ((training, "compose"), (tlx.train.loop, "fit")):  # before the claim, and after it
        with monkeypatch.context() as patched:
            patched.setattr(owner, act, interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(raw(run))
        assert verdict()["status"] == "resumable"
        assert run.exists() is (act == "fit")
    assert status(run)["status"] == "resumable"
    assert train(raw(run))["step"] == STEPS


def test_who_interrupts_a_command_before_it_trains_finds_it_resumable(monkeypatch, verdict):
    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(verdicts, "_given", [])
    monkeypatch.setattr(sys, "argv", ["tlx", "train", "c.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, verdict()["status"]) == (130, "resumable")


def test_a_fault_right_after_the_claim_is_told_in_the_folder(raw, tmp_path, monkeypatch):
    """Else it would say that it is running, for ever."""

    def broken(*_):
        raise RuntimeError("no console")

    monkeypatch.setattr(Console, "keep_in", broken)
    with pytest.raises(RuntimeError, match="no console"):
        train(raw(tmp_path / "run"))
    assert (status(tmp_path / "run")["status"], status(tmp_path / "run")["message"]) == ("fault", "no console")


def test_no_report_is_drawn_after_a_stop(raw, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "draw", drawn.append)
    wanted = raw(tmp_path / "run", track={"every": 1, "report": True})
    with monkeypatch.context() as patched:
        at_step(3, patched, ask_to_stop)
        assert train(wanted) is None
    assert drawn == []
    assert train(wanted)["finished"]
    assert drawn == [tmp_path / "run"]


# The folder goes while it trains


def losses(run):
    return [(row["step"], row["train/loss"]) for row in read_rows(run / "metrics.jsonl") if "train/lr_head" in row]


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    return composed.finished(raw_of(shards, tmp_path_factory.mktemp("straight") / "run"))


def assert_same(run, straight):
    assert losses(run) == losses(straight)
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    one, other = weights(run), weights(straight)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("step", [1, 3, STEPS])
@pytest.mark.parametrize("way", ["renamed", "removed"])
def test_a_folder_that_goes_in_mid_training_is_noticed_and_nothing_is_lost(
    raw, straight, tmp_path, monkeypatch, verdict, way, step
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    go = (lambda _: run.rename(elsewhere)) if way == "renamed" else (lambda _: shutil.rmtree(run))
    with monkeypatch.context() as patched:
        at_step(step, patched, go)
        with pytest.raises(TlxError) as caught:
            train(raw(run))
    assert not isinstance(caught.value, UserError)  # exit code 1, under a launcher too
    assert not run.exists()
    (place,) = [elsewhere] if way == "renamed" else tmp_path.glob("run.rescued-*")
    ended = min(step + 1, STEPS)
    assert f"{run}: the run folder was {way}" in str(caught.value)
    assert str(place) in str(caught.value)
    assert f"(step {ended} of {STEPS} is saved)" in str(caught.value)
    assert (place / "checkpoints" / "latest").resolve().name == f"step-{ended:08d}"
    assert [s for s, _ in losses(place)] == list(range(1, ended + 1))
    assert (status(place)["status"], status(place)["step"]) == ("done" if ended == STEPS else "user-error", ended)
    assert verdict()["status"] == status(place)["status"]  # a batch script does not begin anew
    assert {p.name for p in tmp_path.iterdir()} == {"verdict", place.name}
    place.rename(run)
    assert train(raw(run))["step"] == STEPS
    assert_same(run, straight)


def test_a_last_checkpoint_that_went_with_its_folder_is_written_again(raw, straight, tmp_path, monkeypatch):
    """After the last step no other one is due."""
    run, fit = tmp_path / "run", tlx.train.loop.fit

    def fitted(trained):
        ended = fit(trained)
        trained.saver.settle()
        shutil.rmtree(run)
        return ended

    with monkeypatch.context() as patched:
        patched.setattr(tlx.train.loop, "fit", fitted)
        with pytest.raises(TlxError, match="was removed in mid-training"):
            train(raw(run))
    (place,) = tmp_path.glob("run.rescued-*")
    assert (place / "checkpoints" / "latest").resolve().name == f"step-{STEPS:08d}"
    place.rename(run)
    assert train(raw(run))["step"] == STEPS
    assert_same(run, straight)


def test_another_folder_in_its_place_is_not_taken_for_it(raw, straight, tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def swap(_):
        run.rename(elsewhere)
        run.mkdir()
        (run / "other").touch()

    with monkeypatch.context() as patched:
        at_step(3, patched, swap)
        with pytest.raises(TlxError, match=f"was renamed to {elsewhere}"):
            train(raw(run))
    assert [path.name for path in run.iterdir()] == ["other"]
    shutil.rmtree(run)
    assert train(raw(elsewhere))["step"] == STEPS
    assert_same(elsewhere, straight)


def test_where_nothing_can_be_written_beside_it_the_working_folder_takes_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "above" / "run"
    config = parse({"run": str(run), "data": {"train": "x", "batch": 8}, "backbone": {"name": "toys:small"}})
    folder = RunFolder(run)
    folder.claim(folder.look(config), {"plan.json": "{}"})
    shutil.rmtree(run.parent)
    assert "removed in mid-training" in folder.follow()
    assert folder.path.parent == tmp_path / "here"
    assert {p.name for p in folder.path.iterdir()} == {".lock", "config.yaml", "defaults.json", "plan.json"}
    assert not run.parent.exists()
    folder.release()


def test_a_file_server_that_numbers_anew_or_hiccups_is_no_other_folder(tmp_path, monkeypatch):
    lock, stat = RunLock.take(tmp_path), os.stat
    try:
        assert lock.place() == tmp_path
        with monkeypatch.context() as patched:  # the token in .lock decides
            patched.setattr(os.path, "samestat", lambda *_: False)
            assert lock.place() == tmp_path
        with monkeypatch.context() as patched:

            def stale(path, **how):
                if path == tmp_path:
                    raise OSError(errno.ESTALE, "Stale file handle")
                return stat(path, **how)

            patched.setattr(os, "stat", stale)
            assert lock.place() == tmp_path
    finally:
        lock.release()


def test_rows_go_on_under_their_name_where_the_file_was_replaced(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append({"step": 1})
    (tmp_path / "m.jsonl").unlink()
    file.append({"step": 2})
    assert [row["step"] for row in read_rows(tmp_path / "m.jsonl")] == [1, 2]
    (tmp_path / "edited").write_text("")
    (tmp_path / "edited").rename(tmp_path / "m.jsonl")
    file.append({"step": 3})
    assert [row["step"] for row in read_rows(tmp_path / "m.jsonl")] == [1, 2, 3]
    file.close()
