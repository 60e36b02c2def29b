"""W&B through accidents: the real client and service, against a small server of our own (`wandb_server`)."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from commands import command, environment, kill_all, rows, status, wait_for_step, write_config
from composed import two_phases
from images import make_shards
from places import SUPPORT
from tracked import ID, history, rows_of, train
from wandb_server import FakeRun, FakeServer, served

from tlx.base.errors import UserError
from tlx.plan.config import parse
from tlx.runs.metrics_file import MetricsFile
from tlx.tracking import RunInfo, guarded, tracker, wandb, wandb_run
from tlx.tracking.sync import sync
from tlx.train import command as training


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server, and an account there."""
    import wandb as library

    with served() as server:
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in server.account.items():
            monkeypatch.setenv(name, value)
        yield server
        server.up()
        with contextlib.suppress(Exception):
            library.teardown()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For servers that never answer; long enough for a busy machine."""
    monkeypatch.setattr(wandb_run, "INIT_S", 3.0)
    monkeypatch.setattr(wandb_run, "SEND_S", 3.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "run")


def run_folder(folder: Path, *, state: str = "resumable", trackers: list[Any] | None = None) -> Path:
    """As a training leaves it, without metrics."""
    folder.mkdir()
    used = [{"name": "wandb", "project": "p"}] if trackers is None else trackers  # as tlx.plan.config.dump writes it
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "track": {"trackers": used}}))
    (folder / "status.json").write_text(json.dumps({"status": state, "id": ID}))
    return folder


def service() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if c.name() == "wandb-core" and c.status() != "zombie"]


# --- one run


def test_the_summary_holds_the_best_of_each_metric_over_all_starts(server: FakeServer, folder: Path) -> None:
    """W&B's own minimum begins anew with each start of a run, and is NaN from the first NaN on."""
    metrics, nan = MetricsFile(folder / "metrics.jsonl"), math.nan
    for start, values in ((1, [(1.0, 0.2), (0.5, 0.8), (nan, nan), (0.7, 0.6)]), (5, [(0.6, 0.7), (0.55, 0.75)])):
        about = RunInfo(folder, "a name", ID, {"seed": 3}, start > 1)
        logger = guarded("wandb", functools.partial(wandb, about, project="p"))
        for step, (loss, top1) in enumerate(values, start):
            row = {"step": step, "val/loss": loss, "val/top1": top1, "ema/val/top5": top1, "val/samples": 5}
            metrics.append(row)
            logger.log(row)
        logger.finish({"finished": start > 1, "step": step, "best": {"value": 0.8}})
    summary = server.runs[ID].summary
    assert {k: v for k, v in summary.items() if k.startswith("best/")} == {
        "best/val/loss": 0.5, "best/val/top1": 0.8, "best/ema/val/top5": 0.8,
    }  # fmt: skip
    assert (summary["val/top1"], summary["val/loss"], summary["ema/val/top5"]) == (0.8, 0.5, 0.8)
    assert summary["step"] == 6, "other values are the last ones"


def test_the_summary_keeps_the_best_that_rows_tell(server: FakeServer, folder: Path) -> None:
    """Theirs is the better of raw and averaged weights."""
    logger = guarded("wandb", lambda: wandb(RunInfo(folder, "a name", ID, {"seed": 3}, False), project="p"))
    for step, (raw, averaged) in enumerate([(0.5, 0.7), (0.6, 0.65)], 1):
        logger.log({"step": step, "val/top1": raw, "ema/val/top1": averaged, "val/loss": 1 / step})
        logger.log({"step": step, "best/val/top1": 0.7})
    test = {"metrics": {"top1": {"value": 0.65, "low": 0.6, "high": 0.7}}}
    logger.finish({"finished": True, "step": 2, "best": {"value": 0.7}, "test": test})
    assert server.runs[ID].summary["test/top1"] == 0.65
    found = {k: v for k, v in server.runs[ID].summary.items() if k.startswith("best/")}
    assert found == {"best/val/top1": 0.7, "best/ema/val/top1": 0.7, "best/val/loss": 0.5}


def test_a_run_sends_each_step_once_with_its_evaluation(server: FakeServer, folder: Path, capfd) -> None:
    train(folder, range(1, 8), finished=True)
    run = server.runs[ID]
    assert run.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["_step"] for row in run.sent] == run.steps
    assert run.sent[2].items() >= {"train/loss": 1 / 3, "val/top1": 0.03, "phase": "a"}.items()
    assert run.sent[3].keys().isdisjoint({"val/top1"})
    assert run.summary["finished"] is True
    assert (run.about["project"], run.about["displayName"]) == ("p", "a name")
    assert json.loads((folder / "wandb.json").read_text())["url"].startswith(server.url)
    assert capfd.readouterr().err == ""


KILLED = """
import os, signal, sys
from pathlib import Path
from tracked import train
train(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])), middle=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def killed(folder: Path, first: int, stop: int) -> None:
    """A training that kills itself in the middle."""
    words = [sys.executable, "-c", KILLED, str(folder), str(first), str(stop)]
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def cut(folder: Path, step: int) -> None:
    """Back to the checkpoint of a step."""
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))


def test_no_step_is_lost_or_sent_twice_when_the_training_is_killed_and_goes_back(server, folder) -> None:
    killed(folder, 1, 20)  # at step 10
    assert len(server.runs[ID].steps) < 10, "the kill must lose rows, or this shows nothing"
    train(folder, range(11, 14))  # its checkpoint was at 10; 13 stays with us until the run goes on
    assert server.runs[ID].steps == list(range(1, 13))
    cut(folder, 5)  # as if the newest checkpoints were damaged
    train(folder, range(6, 31), finished=True)
    assert server.runs[ID].steps == list(range(1, 31))
    assert list(server.runs) == [ID]
    assert sum("val/top1" in row for row in server.runs[ID].sent) == 10


SECRETS = ("PASSW0RD", "SIGN4TURE")


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_no_password_of_the_command_reaches_the_disk_or_the_server(server, folder, monkeypatch, mode) -> None:
    where = f"data.train=https://me:{SECRETS[0]}@host/train?sig={SECRETS[1]}"
    monkeypatch.setattr(sys, "argv", ["/bin/tlx", "train", "flowers.yaml", where])
    monkeypatch.setenv("WANDB_MODE", mode)
    train(folder, range(1, 4))
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert [file for file in files if file.suffix == ".wandb"], "there is nothing to search"
    for secret in SECRETS:
        assert not [file for file in files if secret.encode() in file.read_bytes()]
        assert not [body for body in server.received if secret.encode() in body]
    if mode == "online":
        assert server.runs[ID].summary["command"] == "tlx train flowers.yaml data.train=https://host/train"
        assert any(b"train/loss" in body for body in server.received)


def test_a_run_that_goes_on_later_does_not_look_finished(server, folder) -> None:
    train(folder, range(1, 4))
    assert server.runs[ID].state == "preempted"
    with contextlib.suppress(ZeroDivisionError):
        logger = guarded("wandb", lambda: wandb(RunInfo(folder, "a name", ID, {"seed": 3}, True), project="p"))
        try:
            _ = 1 / 0
        finally:
            assert server.runs[ID].state == "running"
            logger.finish({"finished": False})
    assert server.runs[ID].state == "failed"
    sync(folder)
    assert server.runs[ID].state == "preempted", "status.json says that it is resumable"
    train(folder, range(4, 6), finished=True)
    assert server.runs[ID].state == "finished"
    assert server.runs[ID].steps == [1, 2, 3, 4, 5]
    assert "fault" not in server.runs[ID].summary


def test_rows_that_came_from_the_file_are_not_sent_again_when_they_come_from_the_training(
    server, folder, capfd
) -> None:
    """As when W&B begins so slowly that the training has gone on."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    every = [row for step in range(1, 7) for row in rows_of(step)]
    for row in every[:3]:
        metrics.append(row)  # the row of step 3 without its evaluation
    logger = guarded("wandb", lambda: wandb(RunInfo(folder, "a name", ID, {}), project="p"))
    for row in every:
        logger.log(row)
    logger.finish({"finished": True})
    assert server.runs[ID].steps == [1, 2, 3, 4, 5, 6]
    assert server.runs[ID].sent[2]["val/top1"] == 0.03
    assert capfd.readouterr().err == ""


# --- accidents


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_the_network_is_gone_in_mid_run_and_the_rest_is_sent_later(server, folder, capfd) -> None:
    train(folder, range(1, 4))
    train(folder, range(4, 20), finished=True, middle=server.hang)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2, warnings
    assert "not all was sent" in warnings[0]
    assert f"tlx track sync {folder}" in warnings[1]
    assert not service(), "the service is left behind"
    before = len(server.runs[ID].steps)
    assert before < 19
    server.up()
    done = sync(folder)
    assert server.runs[ID].steps == list(range(1, 20))
    assert done.steps == tuple(range(before + 1, 20))
    assert server.runs[ID].summary["finished"] is True
    assert "nothing was sent" in sync(folder).text
    assert server.runs[ID].steps == list(range(1, 20))


@pytest.mark.parametrize("when", ["from the start", "at the end"])
def test_the_server_takes_no_more_rows(server, folder, capfd, when) -> None:
    def refuse() -> None:
        server.files_mode = "403"

    if when == "from the start":
        refuse()
    train(folder, range(1, 9), finished=True, middle=refuse)
    said = capfd.readouterr().err
    assert said.lower().count("warning") == 1, said
    assert f"tlx track sync {folder}" in said
    server.up()
    sync(folder)
    assert server.runs[ID].steps == list(range(1, 9))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mode", ["401", pytest.param("500", marks=pytest.mark.slow), "hang"])
def test_a_server_that_refuses_or_hangs_at_the_start_costs_only_that_start(server, folder, capfd, mode) -> None:
    server.mode = mode
    train(folder, range(1, 6))
    said = capfd.readouterr().err
    assert said.lower().count("warning") == 1, said
    assert "this start is logged offline" in said
    assert [r["step"] for r in history(folder)[1]] == [1, 2, 3, 4], "5 is of a training that goes on"
    server.up()
    train(folder, range(6, 8), finished=True)
    assert server.runs[ID].steps == [1, 2, 3, 4, 5, 6, 7], "what was offline comes with the next start"


@pytest.mark.parametrize("end", ["kill", "suspend"])
def test_the_service_dies_or_hangs(server, folder, capfd, monkeypatch, end) -> None:
    monkeypatch.setattr(tracker.guarded, "__kwdefaults__", {"begin_s": 60.0, "finish_s": 2.0})
    train(folder, range(1, 40), middle=lambda: [getattr(p, end)() for p in service()], finished=True)
    said = capfd.readouterr().err
    assert said.lower().count("warning") == 1, said
    assert f"tlx track sync {folder}" in said
    assert not service()
    assert len(rows(folder)) == 39 + 13
    sync(folder)
    assert server.runs[ID].steps == list(range(1, 40))


@pytest.mark.parametrize("call", ["define_metric", "log", "update", "finish"])
def test_any_call_may_fail(server, folder, capfd, monkeypatch, call) -> None:
    """Injected: with a service that lives, the real ones do not."""
    from wandb.sdk.wandb_run import Run
    from wandb.sdk.wandb_summary import Summary

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("an API error")

    monkeypatch.setattr(Summary if call == "update" else Run, call, fails)
    train(folder, range(1, 5), finished=True)
    said = capfd.readouterr().err
    assert said.lower().count("warning") == 1, said
    assert "an API error" in said
    assert len(rows(folder)) == 5
    deadline = time.monotonic() + 10  # an abandoned service takes a moment
    while service() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not service()


# --- tlx track sync


def test_a_run_that_was_partly_offline_becomes_one_run(server, folder, monkeypatch, capfd) -> None:
    train(folder, range(1, 6))
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(folder, range(6, 12), finished=True)
    monkeypatch.delenv("WANDB_MODE")
    assert [r["step"] for r in history(folder)[1]] == list(range(1, 12))
    assert server.runs[ID].steps == [1, 2, 3, 4]
    with pytest.raises(UserError, match="would repeat it"):
        sync(folder, offline=True)
    done = sync(folder)
    assert "7 steps sent, 5 to 11" in done.text
    assert server.runs[ID].steps == list(range(1, 12))
    assert "W&B has all up to step 11; nothing was sent" in sync(folder).text
    assert server.runs[ID].steps == list(range(1, 12))
    assert list(server.runs) == [ID]
    assert capfd.readouterr().err == "note: W&B: mode offline (WANDB_MODE)\n"


def test_the_last_step_of_a_killed_training_waits_for_its_evaluation(server, tmp_path) -> None:
    folder = run_folder(tmp_path / "run", state="running")
    metrics = MetricsFile(folder / "metrics.jsonl")
    for row in [*rows_of(1), *rows_of(2), rows_of(3)[0]]:
        metrics.append(row)
    assert sync(folder).left_out == 3
    assert server.runs[ID].steps == [1, 2]
    cut(folder, 2)
    train(folder, range(3, 5), finished=True)
    assert server.runs[ID].steps == [1, 2, 3, 4]
    assert server.runs[ID].sent[2]["val/top1"] == 0.03


def test_a_run_that_was_never_logged_to_wandb_takes_a_project(server, tmp_path) -> None:
    folder = run_folder(tmp_path / "run", trackers=[])
    metrics = MetricsFile(folder / "metrics.jsonl")
    for row in rows_of(1):
        metrics.append(row)
    with pytest.raises(UserError, match="--project NAME"):
        sync(folder)
    sync(folder, project="chosen")
    assert server.runs[ID].about["project"] == "chosen"
    assert server.runs[ID].about["displayName"] == "run"
    assert json.loads(server.runs[ID].about["config"])["seed"]["value"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_without_a_network_sync_says_what_to_do(server, folder, tmp_path, monkeypatch) -> None:
    import wandb as library

    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in range(1, 6):
        for row in rows_of(step):
            metrics.append(row)
    server.mode = "500"
    with pytest.raises(UserError, match=r"(?s)W&B: .*fixed-id.*--offline"):
        sync(folder)
    server.up()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    library.teardown()  # which remembers the key
    with pytest.raises(UserError, match=r"(?s)no key.*wandb login.*--offline"):
        sync(folder)
    done = sync(folder, offline=True)
    assert f"wandb sync {done.to}" in done.text
    assert Path(done.to).parent == folder / "wandb"
    header, found = history(folder)
    assert (header["run_id"], header["project"]) == (ID, "p")
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5]
    assert not server.runs


def test_what_sync_refuses(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        sync(tmp_path / "nothing")
    folder = run_folder(tmp_path / "run")
    with pytest.raises(UserError, match="no metrics yet"):
        sync(folder)
    MetricsFile(folder / "metrics.jsonl").append({"step": 1})
    (folder / "status.json").unlink()
    with pytest.raises(UserError, match="the id of this run"):
        sync(folder)


@pytest.mark.parametrize("alerts", [True, False])
def test_a_fault_and_the_end_alert_whoever_asked_for_that(server, folder, alerts) -> None:
    def begin(resumed: bool) -> Any:
        about = RunInfo(folder, folder.name, ID, {}, resumed)
        return guarded("wandb", lambda: wandb(about, project="p", alerts=alerts))

    begin(False).finish({"finished": False, "step": 3})  # asked to stop: no alert
    logger = begin(True)
    with contextlib.suppress(ZeroDivisionError):
        try:
            _ = 1 / 0
        finally:
            logger.finish({"finished": False, "step": 4})
    begin(True).finish({"finished": True, "step": 9, "best": {"metric": "val/top1", "value": 0.5, "step": 6}})
    said = [(alert["severity"], alert["title"], alert["text"].partition(". ")[0]) for alert in server.runs[ID].alerts]
    both = [
        ("ERROR", "run has failed", "run: ZeroDivisionError after step 4"),
        ("INFO", "run is done", "run: 9 steps: best val/top1 0.5000 at step 6"),
    ]
    assert said == (both if alerts else [])


def test_the_console_goes_to_the_server_once_over_all_starts(server, folder) -> None:
    def start(steps: range) -> None:
        logger = guarded(
            "wandb", lambda: wandb(RunInfo(folder, "a", ID, {}, steps.start > 1), project="p", console=True)
        )
        for step in steps:
            with (folder / "log.txt").open("a") as file:
                file.write(f"step {step}\n")
            logger.log({"step": step})
        logger.finish({"finished": steps.stop == 7, "step": steps[-1]})

    start(range(1, 4))
    start(range(4, 7))
    said = [line for _, line in sorted(server.runs[ID].console.items())]
    assert [text for line in said for text in line.split() if text.isdigit()] == ["1", "2", "3", "4", "5", "6"]


def test_a_folder_in_which_a_training_runs_is_refused(server, folder, monkeypatch) -> None:
    from tlx.runs.run_lock import RunLock
    from tlx.tracking import sync as module

    MetricsFile(folder / "metrics.jsonl").append({"step": 1})
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    lock = RunLock.take(folder)
    with pytest.raises(UserError, match=f"a training runs in this folder: process {os.getpid()}"):
        sync(folder)
    lock.check()
    lock.release()
    sync(folder)
    assert server.runs[ID].steps == [1]


# --- the environment


def start(folder: Path, steps: range, *, finished: bool = False, **asked: Any) -> None:
    """A training whose configuration says `asked` of its tracker."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    about = RunInfo(folder, folder.name, ID, {"seed": 3}, steps.start > 1)
    logger = guarded("wandb", lambda: wandb(about, **asked))
    for step in steps:
        metrics.append({"step": step})
        logger.log({"step": step})
    result = {"finished": finished, "step": steps[-1]}
    logger.finish(result)
    if finished:
        (folder / "result.json").write_text(json.dumps(result))


SAID = {
    "WANDB_PROJECT": "vision", "WANDB_ENTITY": "team", "WANDB_TAGS": "a,b", "WANDB_NAME": "first",
    "WANDB_RUN_ID": "mine", "WANDB_RUN_GROUP": "seeds", "WANDB_NOTES": "why", "WANDB_JOB_TYPE": "fit",
}  # fmt: skip


def test_the_environment_wins_over_defaults_and_loses_to_the_configuration(server, folder, monkeypatch, capfd) -> None:
    for name, value in SAID.items():
        monkeypatch.setenv(name, value)
    elsewhere = folder.parent / "scratch"
    elsewhere.mkdir()
    monkeypatch.setenv("WANDB_DIR", str(elsewhere))
    start(folder, range(1, 3))
    (run,) = server.runs.values()
    shown = ("name", "project", "entity", "displayName", "groupName", "notes", "jobType", "tags")
    assert [run.about.get(key) for key in shown] == [
        "mine", "vision", "team", "first", "seeds", "why", "fit", ["a", "b"],
    ]  # fmt: skip
    assert list((elsewhere / "wandb").glob("run-*-mine"))
    assert not (folder / "wandb").exists()
    won = "id mine (WANDB_RUN_ID), project vision (WANDB_PROJECT), entity team (WANDB_ENTITY), tags a,b (WANDB_TAGS), "
    won += (
        "name first (WANDB_NAME), group seeds (WANDB_RUN_GROUP), job type fit (WANDB_JOB_TYPE), notes why (WANDB_NOTES)"
    )
    assert capfd.readouterr().err == f"note: W&B: {won}, files in {elsewhere} (WANDB_DIR)\n"
    other = run_folder(folder.parent / "other")
    monkeypatch.delenv("WANDB_RUN_ID")
    monkeypatch.delenv("WANDB_DIR")
    own = {"group": "g", "job_type": "j", "run_name": "own", "notes": "n"}
    start(other, range(1, 3), project="p", entity="me", tags=["c"], mode="online", **own)
    run = server.runs[ID]
    assert [run.about[key] for key in shown[1:]] == ["p", "me", "own", "g", "n", "j", ["c"]]
    lost = "WANDB_PROJECT=vision (the configuration says p), WANDB_ENTITY=team (the configuration says me), "
    lost += "WANDB_TAGS=a,b (the configuration says c), WANDB_NAME=first (the configuration says own), "
    lost += "WANDB_RUN_GROUP=seeds (the configuration says g), WANDB_JOB_TYPE=fit (the configuration says j), "
    lost += "WANDB_NOTES=why (the configuration says n)"
    assert capfd.readouterr().err == f"note: W&B: not used: {lost}\n"
    for name in SAID:
        monkeypatch.delenv(name, raising=False)
    start(other, range(3, 5))
    kept = json.loads((other / "wandb.json").read_text())
    assert [kept[key] for key in ("group", "job_type", "name", "notes", "tags")] == ["g", "j", "own", "n", "c"]


TRIAL = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "t1", "WANDB_PROJECT": "q", "WANDB_ENTITY": "team"}


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_trial_keeps_the_id_of_its_agent_when_it_goes_on_and_when_it_is_sent(
    server, folder, monkeypatch, mode
) -> None:
    server.runs["t1"] = FakeRun("t1", state="pending")  # which the agent was given
    for name, value in TRIAL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", mode)
    start(folder, range(1, 5))
    kept = json.loads((folder / "wandb.json").read_text())
    assert {**kept, "url": None} == {"id": "t1", "project": "q", "entity": "team", "sweep": "s1", "url": None}
    for name in [*TRIAL, "WANDB_MODE"]:
        monkeypatch.delenv(name)
    if mode == "online":
        start(folder, range(5, 7), finished=True)
    sync(folder)
    assert list(server.runs) == ["t1"], "a second run"
    run = server.runs["t1"]
    assert run.steps == list(range(1, 7 if mode == "online" else 5))
    assert (run.about["project"], run.about["entity"], run.about["sweep"]) == ("q", "team", "s1")
    assert sync(folder).steps == ()


def test_the_agent_of_another_trial_does_not_take_a_run_over(server, folder, monkeypatch, capfd) -> None:
    """W&B itself would drop our id, project and entity for the agent's."""
    kept = {"id": "t1", "project": "q", "entity": "team", "sweep": "s1", "url": f"{server.url}/team/q/runs/t1"}
    (folder / "wandb.json").write_text(json.dumps(kept))
    for name, value in {**TRIAL, "WANDB_SWEEP_ID": "s2", "WANDB_RUN_ID": "t2", "WANDB_PROJECT": "other"}.items():
        monkeypatch.setenv(name, value)
    start(folder, range(1, 3), finished=True)
    assert list(server.runs) == ["t1"]
    assert (server.runs["t1"].about["project"], server.runs["t1"].about["sweep"]) == ("q", "s1")
    assert "WANDB_RUN_ID=t2 (wandb.json: the run in this folder is t1)" in capfd.readouterr().err


def test_a_folder_whose_record_is_older_goes_on_with_the_run_that_its_page_names(server, folder) -> None:
    """Before, the id that was asked for was kept, and in a sweep W&B had taken the agent's."""
    page = f"{server.url}/team/q/runs/t1"
    (folder / "wandb.json").write_text(json.dumps({"id": ID, "project": "q", "entity": "team", "url": page}))
    start(folder, range(1, 3), finished=True)
    assert list(server.runs) == ["t1"]


# --- other places


UNWRITABLE = """
import sys
from pathlib import Path
from tlx.tracking import RunInfo, guarded, wandb
tracker = guarded("wandb", lambda: wandb(RunInfo(Path(sys.argv[1]), "a", "id", {}), mode="offline"))
tracker.log({"step": 1})
tracker.finish({})
print("went on")
"""


@pytest.mark.parametrize("which", ["run", "wandb"])
def test_a_folder_that_wandb_cannot_write_is_said_once(tmp_path: Path, which: str) -> None:
    """Root without its right to write anything is like anybody."""
    root = os.getuid() == 0
    if root and shutil.which("setpriv") is None:
        pytest.skip("root can write everywhere")
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    folder = tmp_path / "run"
    (folder if which == "run" else folder / "wandb").chmod(0o555)
    less = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if root else []
    words = [*less, sys.executable, "-c", UNWRITABLE, str(folder)]
    env = {**os.environ, "WANDB_ERROR_REPORTING": "false", "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.lower().count("warning") == 1, done.stderr
    assert f"tlx track sync {folder}" in done.stderr
    assert "went on" in done.stdout


FULL = """
import resource, sys
from pathlib import Path
from tlx.tracking import RunInfo, guarded, tensorboard
tracker = guarded("tensorboard", lambda: tensorboard(RunInfo(Path(sys.argv[1]), "a", "id", {})))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # a write past this fails, as on a full disk
for step in range(500):
    tracker.log({"step": step, "train/loss": 0.5})
tracker.finish({})
print("went on")
"""


@pytest.mark.slow
def test_tensorboard_without_room_is_said_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    words = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "went on" in done.stdout
    assert done.stderr.count('warning: the tracker "tensorboard" failed (OSError: [Errno 27] File too large)') == 1
    assert done.stderr.count("is left alone") == 1


# --- the whole of it


def serves(process: psutil.Process, url: str) -> bool:
    """Whether it is a service of ours that lives."""
    with contextlib.suppress(psutil.Error):
        return process.name() == "wandb-core" and process.environ().get("WANDB_BASE_URL") == url
    return False


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_training_killed_twice_is_one_run_with_each_step_once(tmp_path, mode) -> None:
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)
    phases = {"each": {"lr": 0.01}, "feature_extraction": {"duration": 60}, "fine_tuning": {"duration": 140}}
    raw: dict[str, Any] = {
        "run": str(tmp_path / "run"), "seed": 5, "input": {"size": 16}, "phases": phases,
        "data": {"batch": 8, "workers": 1, "train": str(shards / "train"), "val": str(shards / "val")},
        "backbone": {"name": "toys:small", "weights": "none"},
        "evaluate": {"every": 40}, "checkpoint": {"every": 30},
        "track": {"every": 1, "trackers": [{"name": "wandb", "args": {"project": "p", "tags": ["t"]}}]},
    }  # fmt: skip
    config, run = write_config(tmp_path / "c.yaml", raw), tmp_path / "run"
    with served() as server:
        env = environment(**server.account, WANDB_MODE=mode)
        for step in (50, 130):
            words = command("train", config)
            process = subprocess.Popen(
                words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            wait_for_step(process, run, step)
            kill_all(process)
        done = subprocess.run(command("train", config, ranks=2), env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "warning: " not in done.stderr
        assert status(run)["status"] == "done"
        steps = sorted({row["step"] for row in rows(run)})
        assert steps == list(range(1, 201))
        run_id = status(run)["id"]
        if mode == "offline":
            assert not server.runs
            assert [r["step"] for r in history(run)[1]] == steps
        synced = [
            subprocess.run(command("track", "sync", run), env=env, capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
        assert ("200 steps sent" if mode == "offline" else "nothing was sent") in synced[0]
        assert "W&B has all up to step 200; nothing was sent" in synced[1]
        assert list(server.runs) == [run_id]
        assert server.runs[run_id].steps == steps
        assert server.runs[run_id].summary["finished"] is True
        shown = [(row["step"], key) for row in server.runs[run_id].sent for key in row if key.endswith("/per_class")]
        assert shown == [(60, "feature_extraction/per_class"), (200, "fine_tuning/per_class")]
        # one that was begun when the training was killed is never committed, and nobody sees it
        tables = [a.name for a in server.artifacts if a.about["artifactTypeName"] == "run_table" and a.committed]
        assert len(tables) == 10, "five of each phase, and none twice"
        evaluated = [row["step"] for row in server.runs[run_id].sent if "val/top1" in row]
        assert evaluated == [row["step"] for row in rows(run) if "val/top1" in row]
        assert not [p for p in psutil.process_iter() if serves(p, server.url)], "a service is left behind"


@pytest.fixture
def raw(server, tmp_path, monkeypatch):
    """A small training with W&B, by configuration."""
    monkeypatch.delenv("RANK", raising=False)
    shards = make_shards(tmp_path / "s", classes=3, per_class={"train": 8, "val": 4}, size=16)
    trackers = {"every": 1, "trackers": [{"name": "wandb", "project": "p"}]}
    return lambda **over: {**two_phases(shards, tmp_path / "run", **over), "track": trackers}


@pytest.mark.slow
def test_a_run_that_is_extended_stays_the_same_run_of_wandb(server, raw, tmp_path):
    training.train(parse(raw()))
    (run,) = server.runs.values()
    assert (run.steps[-1], run.state) == (12, "finished")
    longer = {"fine_tuning": {"duration": "4ep"}}
    training.train(parse(raw(phases=longer)), extend=True)
    (run,) = server.runs.values()
    assert run.steps == list(range(1, 19))
    assert run.state == "finished"
    assert run.summary["samples_seen"] == 6 * 24
    assert run.config["phases"]["value"]["fine_tuning"]["duration"] == "4ep"
    assert sync(tmp_path / "run").steps == ()


@pytest.mark.slow
def test_an_extension_that_was_offline_brings_its_summary_when_it_is_sent(server, raw, tmp_path, monkeypatch):
    training.train(parse(raw()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    training.train(parse(raw(phases={"fine_tuning": {"duration": "4ep"}})), extend=True)
    monkeypatch.delenv("WANDB_MODE")
    assert sync(tmp_path / "run").steps == tuple(range(13, 19))
    (run,) = server.runs.values()
    assert run.summary["samples_seen"] == 6 * 24
