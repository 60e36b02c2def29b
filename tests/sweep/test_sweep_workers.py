"""Sweeps by real processes: two workers, one of them killed; ranks; a training that is pruned ends cleanly."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from commands import environment, invoke, kill_all, last_step, rows, start, status, tlx, write_config
from composed import raw_of, two_phases
from places import ROOT

from tlx.plan.config import load, parse
from tlx.runs.stop import prune
from tlx.tracking.journal import Journal
from tlx.train import command as training


def table(folder):
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_training_that_is_pruned_ends_cleanly_and_may_go_on(shards, tmp_path, capsys):
    raw, heard = two_phases(shards, tmp_path / "run"), []

    def judge(step, value):
        heard.append((step, value))
        return "worse than others" if len(heard) == 2 else None

    result = training.train(parse(raw), judge=judge)
    assert [step for step, _ in heard] == [3, 6]
    assert (result["finished"], result["pruned"]) == (False, "worse than others")
    said = status(tmp_path / "run")
    assert (said["status"], said["why"]) == ("pruned", "worse than others")
    assert 6 < said["step"] <= 8, "within two steps"
    assert not (tmp_path / "run" / "result.json").exists()
    seen = rows(tmp_path / "run")
    assert "pruned at step" in capsys.readouterr().out
    whole = training.train(parse(raw))
    assert (whole["finished"], status(tmp_path / "run")["status"]) == (True, "done")
    assert rows(tmp_path / "run")[: len(seen)] == seen
    assert "pruned" not in whole


def test_a_command_that_is_pruned_from_outside_ends_with_0(shards, tmp_path, monkeypatch):
    """As W&B's client asks for it, from a thread of its own."""
    monkeypatch.delenv("RANK", raising=False)
    config = write_config(tmp_path / "c.yaml", two_phases(shards, tmp_path / "run"))
    usual = Journal.row

    def told(self, row):
        usual(self, row)
        if row["step"] == 3:
            prune(tmp_path / "run", "stopped  at\nW&B")

    monkeypatch.setattr(Journal, "row", told)
    done = invoke("train", config)
    assert done.exit_code == 0, done.output
    assert (status(tmp_path / "run")["status"], status(tmp_path / "run")["why"]) == ("pruned", "stopped at W&B")
    assert not (tmp_path / "run" / "stop").exists()


def test_nothing_trains_before_all_is_right(shards, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw_of(shards, tmp_path / "run"))
    wrong = invoke("sweep", config, "phases.each.lrr=1e-4..1e-2:log", "optimizer=adamw,adamv", "--trials", 2)
    assert "unknown key" in str(wrong.exception)
    assert 'did you mean "lr"?' in str(wrong.exception)
    assert 'did you mean "adam" or "adamw"?' in str(wrong.exception)
    wrong = invoke("sweep", config, "data.batch=1e1..2e1", "--trials", 2)
    assert "a number in between, 13.72, is refused" in str(wrong.exception)
    wrong = invoke("sweep", config, "run=a,b", "--trials", 2)
    assert "run: a sweep cannot vary it: each trial has a folder of its own" in str(wrong.exception)
    wrong = invoke("sweep", config, "seed=0..3", "data.val=null", "--trials", 2)
    assert "data.val: a sweep chooses by validation data" in str(wrong.exception)
    shown = invoke("sweep", config, "seed=0..3", "phases.each.lr=1..2", "--trials", 9, "--dry-run")
    assert shown.exit_code == 0, shown.exception
    assert f"{'seed':<14}  0 to 3 (whole numbers, evenly)" in shown.output
    assert "phases.each.lr  1 to 2 (evenly)" in shown.output, "the key takes any number"
    assert "9 trials: at most 864 training pictures (96 a trial) and 36 evaluations" in shown.output
    assert not (tmp_path / "run-sweep").exists()


def test_the_file_for_w_and_b(shards, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw_of(shards, tmp_path / "run"))
    words = ("phases.each.lr=1e-4..1e-2:log", "optimizer=adamw,sgd", "seed=4")
    made = invoke("sweep", config, *words, "--trials", 7, "--wandb")
    assert made.exit_code == 0, made.exception
    sweep = yaml.safe_load((tmp_path / "run-sweep" / "wandb.yaml").read_text())
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 7)
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}
    assert sweep["early_terminate"] == {"type": "hyperband", "min_iter": 1, "eta": 3}
    assert sweep["parameters"]["optimizer"] == {"values": ["adamw", "sgd"]}
    assert sweep["command"][-1] == "${args_no_hyphens}"
    assert f"run={tmp_path / 'run-sweep'}/trials/{{trial}}" in sweep["command"]


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed(shards, tmp_path, monkeypatch):
    """All trials are done, each once; the killed one goes on from its checkpoint; the best is that of a brute force."""
    raw = two_phases(shards, tmp_path / "run", checkpoint={"every": 1}, world={"device": "cpu"})
    config, folder = write_config(tmp_path / "c.yaml", raw), tmp_path / "run-sweep"
    words = ("sweep", config, "phases.each.lr=0.0005,0.02", "seed=0,1", "--sampler", "grid", "--pruner", "none")
    monkeypatch.setenv("TOYS_PACE", "0.3")
    first = start(*words)
    wait_for(lambda: last_step(folder / "trials" / "0000") >= 4, first)
    os.killpg(first.pid, signal.SIGSTOP)  # so that it is in mid-trial however long the other one takes to begin
    second = start(*words)
    wait_for(lambda: (folder / "trials" / "0001" / "config.yaml").exists(), second)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    killed = last_step(folder / "trials" / "0000")
    said = second.communicate(timeout=900)[0]
    assert second.returncode == 0, said[-3000:]
    assert killed < 12, "it was in mid-trial"
    found = table(folder)
    assert [(row["trial"], row["state"]) for row in found] == [(str(i), "done") for i in range(4)], said[-3000:]
    assert "trial 0, which goes on from step" in said
    steps = [row["step"] for row in rows(folder / "trials" / "0000") if "val/top1" not in row]
    assert steps == list(range(1, 13)), "its rows continue"
    monkeypatch.delenv("TOYS_PACE")
    brute = {}
    for row in found:
        own = [f"phases.each.lr={row['phases.each.lr']}", f"seed={row['seed']}", f"run={tmp_path / 'b' / row['trial']}"]
        result = training.train(load(config, own))
        brute[row["trial"]] = result["best"]["value"]
        assert rows(folder / "trials" / f"{int(row['trial']):04d}") == rows(tmp_path / "b" / row["trial"])
    best = max(brute.values())
    assert {row["trial"]: float(row["val/top1"]) for row in found} == brute
    text = (folder / "best.yaml").read_text()
    assert f"val/top1 {best:.4f}. It is the best of 4 trials on the validation data that chose it" in text
    (winner,) = [row for row in found if f"trial {row['trial']}," in text.splitlines()[0]]
    assert float(winner["val/top1"]) == best
    mine = load(folder / "best.yaml")
    assert (mine.seed, mine.run) == (int(winner["seed"]), tmp_path / "run-best")
    assert (folder / "comparison.html").exists()
    again = invoke("sweep", folder)
    assert (again.exit_code, "best: trial" in again.output) == (0, True)
    refused = invoke("sweep", config, "phases.each.lr=0.0005,0.03", "seed=0,1", "--sampler", "grid")
    assert "space phases.each.lr: '0.0005,0.02' -> '0.0005,0.03'" in str(refused.exception)


@pytest.mark.slow
def test_a_worker_of_a_job_array_outlives_its_trial_and_goes_back_into_the_queue(shards, tmp_path):
    """slurm/sweep.sbatch without Slurm: a trial's process is killed, then the signal before the limit comes."""
    config = write_config(tmp_path / "c.yaml", two_phases(shards, tmp_path / "run", checkpoint={"every": 1}))
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >>"$0.log"\nexit 1\n')
    (tmp_path / "scontrol").chmod(0o755)
    env = environment(
        PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=sys.executable, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2",
        SLURM_JOB_ID="9", RANK="3", TOYS_PACE="0.3",
    )  # fmt: skip
    words, log, run = ["seed=0,1", "--sampler", "grid"], tmp_path / "out", tmp_path / "run-sweep" / "trials" / "0000"
    with log.open("w") as out:
        script = ["bash", str(ROOT / "slurm" / "sweep.sbatch"), str(config), *words]
        job = subprocess.Popen(script, env=env, stdout=out, stderr=out, text=True, start_new_session=True)
    wait_for(lambda: last_step(run) >= 2, job)
    os.kill(json.loads((run / ".lock").read_text())["pid"], signal.SIGKILL)  # as the kernel does without memory
    before = last_step(run)
    wait_for(lambda: last_step(run) >= before + 3, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 75, log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7_2\n"
    assert "its process was killed by SIGKILL; it goes on from its last checkpoint" in log.read_text()
    assert (status(run)["status"], status(run)["why"]) == ("resumable", "stopped by SIGTERM")
    done = tlx("sweep", config, *words)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in table(tmp_path / "run-sweep")] == ["done", "done"]


@pytest.mark.slow
def test_two_ranks_train_each_trial_together(shards, tmp_path):
    raw = two_phases(shards, tmp_path / "run")
    config, folder = write_config(tmp_path / "c.yaml", raw), tmp_path / "run-sweep"
    wrong = tlx("sweep", config, "seed=0,x", "--sampler", "grid", ranks=2, is_forked=True)
    assert "seed: input should be a valid integer" in wrong.stderr
    done = tlx("sweep", config, "seed=0,1", "--sampler", "grid", ranks=2, is_forked=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["state"] for row in table(folder)] == ["done", "done"], done.stderr[-3000:]
    for number in ("0000", "0001"):
        assert json.loads((folder / "trials" / number / "result.json").read_text())["world"] == 2


def wait_for(happens, process):
    end = time.monotonic() + 600
    while True:
        with contextlib.suppress(OSError, ValueError):
            if happens():
                return
        if process.poll() is not None or time.monotonic() > end:
            kill_all(process)
            raise AssertionError("it ended, or nothing happened")
        time.sleep(0.02)
