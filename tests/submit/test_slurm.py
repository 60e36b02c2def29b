"""slurm/train.sbatch on a real cluster of two nodes: what happens to a job, and that the training is none the worse."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time

import psutil
import pytest
import slurm_cluster
import yaml
from command_runs import raw_for, same_bits
from commands import environment, last_step, status, write_config
from images import make_shards
from places import ROOT

TRAIN = ROOT / "slurm" / "train.sbatch"
REASON = slurm_cluster.absent()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STEPS = {"feature_extraction": {"duration": 60}, "fine_tuning": {"duration": 140}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    shards = make_shards(folder / "shards", classes=3, per_class={"train": 10, "val": 7}, size=24)
    raw = raw_for(shards, "unset", phases={"each": {"lr": 0.01, "curve": "cosine"}, **STEPS})
    return write_config(folder / "c.yaml", raw)


@pytest.fixture(scope="module")
def submit(cluster):
    """Submits slurm/train.sbatch as a user does, one rank on each of two nodes; the job's number."""

    def call(config, run, *options, words=(), ranks=1, pace=0.0, **env):
        env = environment(PYTHON=sys.executable, TOYS_PACE=str(pace), **env)
        gpus, cpus = f"--gpus-per-node={ranks}", f"--cpus-per-task={2 * ranks}"
        words = ["sbatch", "--parsable", gpus, cpus, *options, TRAIN, config, f"run={run}", *words]
        return cluster.call(*words, env=env, cwd=run.parent).strip()

    return call


@pytest.fixture(scope="module")
def undisturbed(cluster, submit, config, tmp_path_factory):
    """A training that nothing happened to: its folder, and its job as Slurm shows it."""
    run = tmp_path_factory.mktemp("undisturbed") / "the run"
    began = time.monotonic()
    job = cluster.ended(submit(config, run))
    return run, job, time.monotonic() - began


def said(run):
    """By the batch script, of all jobs in the folder above a run."""
    return "".join(path.read_text() for path in sorted(run.parent.glob("tlx-*.out")))


def nodes_said(run):
    return "".join(path.read_text() for path in sorted((run / "slurm").glob("*.log")))


def reach(cluster, number, run, step, timeout=120):
    """Until a job's training has come to a step."""
    deadline = time.monotonic() + timeout
    while last_step(run) < step:
        assert time.monotonic() < deadline, f"step {step} has not come: {said(run)}{nodes_said(run)}"
        assert cluster.job(number)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), said(run) + nodes_said(run)
        time.sleep(0.05)


def of_rank(rank, run):
    """The process of a rank, the eldest of those with its environment; nodes are only namespaces of this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"run={run}" in process.cmdline() and process.environ().get("RANK") == str(rank):
                found.append(process)
    return min(found, key=lambda process: process.create_time())


def came_back(cluster, number, run, undisturbed):
    """A job that was started once more, and whose training is that of one that nothing has happened to."""
    job = cluster.ended(number, timeout=240)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said(run) + nodes_said(run)
    same_bits(run, undisturbed[0])


def test_a_job_trains_on_both_nodes(undisturbed, cluster, record_property):
    run, job, seconds = undisturbed
    assert job["JobState"] == "COMPLETED", said(run) + nodes_said(run)
    assert (job["Restarts"], status(run)["status"], status(run)["step"]) == ("0", "done", 200)
    assert json.loads((run / "result.json").read_text())["world"] == 2
    assert " ".join(cluster.names) in said(run)
    assert [path.name for path in sorted((run / "slurm").glob("*.log"))] == [
        f"{job['JobId']}-r0-node{i}.log" for i in (0, 1)
    ]
    # torchrun's agents race at their end for the store of the first one, and say so
    ours = [line for line in nodes_said(run).splitlines() if "torch/distributed/elastic/agent" not in line]
    assert "Traceback" not in "\n".join(ours)
    record_property("figures", f"slurm: two nodes, 200 steps, undisturbed: {seconds:.0f} s")


@pytest.mark.slow
def test_a_signal_saves_and_requeues_to_the_same_result(
    cluster, submit, config, undisturbed, tmp_path, record_property
):
    run, began = tmp_path / "run", time.monotonic()
    number = submit(config, run, pace=0.05)
    reach(cluster, number, run, 20)
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    came_back(cluster, number, run, undisturbed)
    assert "USR1: the training is asked for a checkpoint" in said(run)
    assert "resumed from" in (run / "slurm" / f"{number}-r1-node0.log").read_text()
    assert not (run / "stop").exists()
    record_property("figures", f"slurm: signal, checkpoint, requeue, the same bits: {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_launchers_give_the_same_weights(cluster, submit, config, tmp_path, record_property):
    """Two ranks on each node; by srun each rank is a task, and shards are staged on the nodes' own /dev/shm."""
    runs, figures = {}, []
    for launcher in ("torchrun", "accelerate", "srun"):
        runs[launcher] = tmp_path / launcher / "run"
        runs[launcher].parent.mkdir()
        began = time.monotonic()
        stage = "/dev/shm/shards" if launcher == "srun" else ""
        words = ["data.drop_last=true"]
        job = cluster.ended(submit(config, runs[launcher], ranks=2, words=words, LAUNCHER=launcher, STAGE=stage))
        assert job["JobState"] == "COMPLETED", said(runs[launcher]) + nodes_said(runs[launcher])
        assert json.loads((runs[launcher] / "result.json").read_text())["world"] == 4
        assert len(list((runs[launcher] / "slurm").glob("*.log"))) == (4 if launcher == "srun" else 2)
        same_bits(runs[launcher], runs["torchrun"])
        cache = yaml.safe_load((runs[launcher] / "config.yaml").read_text())["data"]["cache"]
        assert (cache["stage"], cache["folder"]) == ((True, stage) if stage else (False, None))
        figures.append(f"{launcher} {time.monotonic() - began:.0f} s")
    record_property("figures", f"slurm: launchers with four ranks, the same bits: {', '.join(figures)}")


@pytest.mark.slow
def test_srun_checkpoints_and_requeues_too(cluster, submit, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    number = submit(config, run, pace=0.05, LAUNCHER="srun")
    reach(cluster, number, run, 20)
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    came_back(cluster, number, run, undisturbed)


@pytest.mark.slow
def test_a_killed_rank_is_requeued(cluster, submit, config, undisturbed, tmp_path, record_property):
    run, began = tmp_path / "run", time.monotonic()
    number = submit(config, run, pace=0.05)
    reach(cluster, number, run, 70)
    of_rank(1, run).kill()
    came_back(cluster, number, run, undisturbed)
    assert "status fault" in said(run)
    record_property("figures", f"slurm: kill -9 of a rank, requeue, the same bits: {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_a_start_that_always_fails_is_not_requeued_for_ever(cluster, submit, config, tmp_path):
    run = tmp_path / "run"
    backbone = "backbone={name: 'toys:faulty', weights: none, args: {how: die, rank: 1, at: 3}}"
    number = submit(config, run, words=[backbone], MAX_TRIES="2")
    job = cluster.ended(number, timeout=240)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2"), said(run) + nodes_said(run)
    assert "3 starts in a row have brought no new checkpoint: not requeued" in said(run)


@pytest.mark.slow
def test_a_mistake_is_not_requeued(cluster, submit, config, tmp_path):
    run = tmp_path / "run"
    job = cluster.ended(submit(config, run, words=["data.bach=3"]))
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0")
    assert 'data.bach: unknown key; did you mean "batch"' in said(run)
    job = cluster.ended(submit(config, run, words=["data.train=/nowhere"]))  # found by the ranks
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "2:0"), said(run) + nodes_said(run)
    assert "/nowhere" in nodes_said(run)


@pytest.mark.slow
def test_a_cancelled_job_leaves_a_checkpoint_and_stays_cancelled(
    cluster, submit, config, undisturbed, tmp_path, record_property
):
    run, began = tmp_path / "run", time.monotonic()
    number = submit(config, run, pace=0.05)
    reach(cluster, number, run, 20)
    cluster.call("scancel", number)
    job = cluster.ended(number)
    time.sleep(8)  # a requeue's delay
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), said(run) + nodes_said(run)
    assert "requeue" not in said(run)
    stopped = status(run)
    assert stopped["status"] == "resumable"
    assert (run / "checkpoints" / "latest").resolve().name == f"step-{stopped['step']:08d}"
    assert stopped["step"] % 30  # not one that was due
    record_property("figures", f"slurm: scancel, a checkpoint, no return: {time.monotonic() - began:.0f} s")
    job = cluster.ended(submit(config, run))
    assert job["JobState"] == "COMPLETED", said(run) + nodes_said(run)
    same_bits(run, undisturbed[0])


@pytest.mark.slow
def test_a_stop_by_file_is_not_requeued(cluster, submit, config, tmp_path):
    run = tmp_path / "run"
    number = submit(config, run, pace=0.05)
    reach(cluster, number, run, 20)
    (run / "stop").touch()
    job = cluster.ended(number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "75:0"), said(run)
    assert status(run)["why"] == f"stopped by the file {run}/stop"


@pytest.mark.slow
def test_a_signal_while_the_training_is_starting_is_heard(cluster, submit, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    number = submit(config, run, pace=0.05)
    cluster.wait(number, lambda job: job["JobState"] == "RUNNING", timeout=60)
    deadline = time.monotonic() + 60
    while "meeting at" not in said(run):
        assert time.monotonic() < deadline, said(run)
        time.sleep(0.01)
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    came_back(cluster, number, run, undisturbed)


@pytest.mark.slow
def test_the_time_limit_itself(cluster, submit, config, undisturbed, tmp_path, record_property):
    run, began = tmp_path / "run", time.monotonic()
    number = submit(config, run, "--time=2", "--signal=B:USR1@30", pace=0.4)
    job = cluster.ended(number, timeout=600)
    assert job["JobState"] == "COMPLETED", said(run) + nodes_said(run)
    assert int(job["Restarts"]) >= 1
    assert said(run).count("USR1: the training is asked for a checkpoint") == int(job["Restarts"])
    same_bits(run, undisturbed[0])
    record_property(
        "figures",
        f"slurm: {job['Restarts']} real time limits of two minutes, the same bits: {time.monotonic() - began:.0f} s",
    )


@pytest.mark.slow
def test_a_power_cut_of_a_node(cluster, submit, config, undisturbed, tmp_path, record_property):
    run, began = tmp_path / "run", time.monotonic()
    number = submit(config, run, pace=0.05)
    reach(cluster, number, run, 70)
    cluster.power_off(cluster.names[0])
    cluster.wait(number, lambda job: job["JobState"] == "PENDING", timeout=120)
    cluster.power_on(cluster.names[0])
    job = cluster.ended(number, timeout=300)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said(run) + nodes_said(run)
    same_bits(run, undisturbed[0])
    record_property("figures", f"slurm: power cut of the first node: {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_an_array_and_the_report_after_it(cluster, config, undisturbed, tmp_path, record_property):
    """Four trainings on two nodes; the last of the array, whose id is the array's, goes back into the queue once."""
    began, run = time.monotonic(), tmp_path / "runs" / "x"
    script, options = ROOT / "slurm" / "array.sbatch", ["--gpus-per-node=1", "--cpus-per-task=2", "--time=0:10:00"]
    env = environment(PYTHON=sys.executable, TOYS_PACE="0.02") | cluster.environment
    base = write_config(tmp_path / "c.yaml", yaml.safe_load(config.read_text()), run=str(run))

    def call(*words):
        words = ["bash", script, *options, base, *words]
        return subprocess.run(list(map(str, words)), env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    def call_report(*words):
        words = ["bash", script, "report", *words]
        return subprocess.run(
            list(map(str, words)), env=env | {"REPORT_OPTIONS": ""}, capture_output=True, text=True, check=False
        )

    for wrong, why in (
        (["seed=1"], "nothing to sweep over"),
        (["seed=1,x"], "seed: input should be a valid integer"),
        (["sed=1,2"], 'sed: unknown key; did you mean "seed"?'),
        (["seed=1,1"], "two trainings would have the same name"),
        (["seed=1,2", "run=x"], "run: the runs' folders are named after what differs"),
    ):
        refused = call(*wrong)
        assert refused.returncode == 2, refused
        assert why in refused.stderr
    assert not (tmp_path / "runs").exists()

    done = call("seed=5,6", "phases.each.lr=0.01,0.02", "data.workers=0")
    assert done.returncode == 0, done.stderr
    array, _ = re.findall(r"^job (\d+):", done.stdout, re.MULTILINE)
    sweep = tmp_path / "runs" / "x-sweep"
    names = {f"seed={s},phases.each.lr={lr}" for s in (5, 6) for lr in ("0.01", "0.02")}
    deadline = time.monotonic() + 200
    while array not in {j["JobId"] for j in cluster.jobs(array) if j["JobState"] == "RUNNING"}:
        assert time.monotonic() < deadline, cluster.jobs(array)
        time.sleep(0.1)
    (last,) = (j for j in cluster.jobs(array) if j["JobId"] == array)
    reach(cluster, array, sweep / sorted(names)[int(last["ArrayTaskId"]) - 1], 20)
    # as on a cluster where the report has started too early, or has forgotten the array
    (listed,) = (sweep / "slurm").glob("list-*")
    early = call_report(listed, sweep, array)
    assert "still to come: " in early.stdout, early
    cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_{last['ArrayTaskId']}")
    while any(j["JobState"] != "COMPLETED" for j in cluster.jobs(array)):
        assert time.monotonic() < deadline, cluster.jobs(array)
        time.sleep(0.2)
    assert sorted(j["Restarts"] for j in cluster.jobs(array)) == ["0", "0", "0", "1"]
    forgotten = call_report(listed, sweep, "99999")
    assert forgotten.returncode == 0, forgotten
    assert "comparison.html" in forgotten.stdout
    while cluster.call("squeue", "-h"):  # a report that is early has queued a second one
        assert time.monotonic() < deadline
        time.sleep(0.2)
    reports = "".join(p.read_text() for p in (sweep / "slurm").glob("*-report.out"))
    assert "comparison.html" in reports, reports
    assert "not done" not in reports
    assert {p.parent.name for p in sweep.glob("*/result.json")} == names
    page = (sweep / "comparison.html").read_text()
    assert all(name in page for name in names)
    assert (sweep / "figures" / "comparison.png").stat().st_size > 10_000
    record_property(
        "figures", f"slurm: an array of four, one requeued, and its report: {time.monotonic() - began:.0f} s"
    )


@pytest.mark.slow
def test_a_second_job_for_the_same_run_does_no_harm(cluster, submit, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    number = submit(config, run, pace=0.3)
    reach(cluster, number, run, 40)
    second = cluster.ended(submit(config, run))
    assert (second["JobState"], second["Restarts"], second["ExitCode"]) == ("FAILED", "0", "2:0"), said(run)
    assert "another training runs in this folder" in nodes_said(run)
    assert status(run)["status"] == "running"
    of_rank(1, run).kill()
    came_back(cluster, number, run, undisturbed)


@pytest.mark.slow
def test_two_jobs_on_one_node_and_accelerate_with_one_rank(cluster, submit, config, tmp_path):
    runs = [tmp_path / str(i) / "run" for i in (1, 2)]
    for run in runs:
        run.parent.mkdir()
    where = ["--nodes=1", f"--nodelist={cluster.names[0]}"]
    jobs = [submit(config, run, *where, LAUNCHER="accelerate", words=["data.workers=0"]) for run in runs]
    for number, run in zip(jobs, runs, strict=True):
        assert cluster.ended(number)["JobState"] == "COMPLETED", said(run) + nodes_said(run)
    same_bits(*runs)


@pytest.mark.slow
def test_a_preempted_job_comes_back(cluster, submit, config, undisturbed, tmp_path, record_property):
    run, began = tmp_path / "run", time.monotonic()
    number = submit(config, run, pace=0.05)
    reach(cluster, number, run, 20)
    urgent = "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent"
    other = cluster.call(*urgent, "--wrap=sleep 5").strip()
    cluster.wait(number, lambda job: job["JobState"] == "PENDING", timeout=90)
    assert cluster.ended(other)["JobState"] == "COMPLETED"
    assert last_step(run) < 200
    came_back(cluster, number, run, undisturbed)
    assert "preempted" in said(run)
    record_property("figures", f"slurm: preempted with a grace time, the same bits: {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_a_time_limit_in_the_middle_of_a_step(cluster, submit, config, tmp_path):
    """The limit itself ends it; it comes back, but not for ever."""
    run = tmp_path / "run"
    number = submit(config, run, "--time=1", "--signal=B:USR1@10", pace=300, MAX_TRIES="1")
    job = cluster.wait(number, lambda job: job["Restarts"] == "1" and job["JobState"] == "TIMEOUT", timeout=400)
    assert job["Restarts"] == "1"
    assert "2 starts in a row have brought no new checkpoint: not requeued" in said(run)


# What needs Slurm and no training: a stand-in for python says what each launcher is given, in a second.

STAND_IN = r"""#!/bin/bash
for word in "$@"; do case $word in run=*) run=${word#run=} ;; esac; done
case "$*" in
-c*) [ "$(hostname)" != "${LACKS:-}" ]; exit ;;
"-m tlx status"*) echo "$run"; exit ;;
esac
echo "$(hostname) $*"
[ "${SLURM_RESTART_COUNT:-0}" -ge "${FAILS:-0}" ] || exit 1
[ "$SLURM_PROCID" != 0 ] || echo '{"status": "done"}' >"$TLX_VERDICT"
"""
SMALL = ("--gpus-per-node=1", "--cpus-per-task=2")


@pytest.fixture
def launch(cluster, tmp_path):
    """Submits slurm/train.sbatch with the stand-in; the job's number and the run."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "c.yaml").touch()

    def call(name, *options, script=TRAIN, **env):
        run = tmp_path / name / "run"
        run.parent.mkdir()
        env = environment(**{"PYTHON": str(tmp_path / "python"), **env})
        words = ["sbatch", "--parsable", *options, script, tmp_path / "c.yaml", f"run={run}"]
        return cluster.call(*words, env=env, cwd=run.parent).strip(), run

    return call


def told(run):
    """By the script of a launch; the job may run in a chain of them."""
    return "".join(path.read_text() for path in sorted(run.parent.rglob("*.out")))


@pytest.mark.slow
def test_a_job_submitted_inside_another_one_is_its_own(cluster, launch, tmp_path, record_property):
    """sbatch hands on the outer array's number and its memory per CPU. With them the outer job was requeued in place of
    the inner one, whose step srun refused."""
    began, run = time.monotonic(), tmp_path / "inner" / "run"
    run.parent.mkdir()
    words = [
        "sbatch",
        "--parsable",
        *SMALL,
        "--mem=100",
        f"--chdir={run.parent}",
        TRAIN,
        tmp_path / "c.yaml",
        f"run={run}",
    ]
    inside = f"{shlex.join(map(str, words))} >{tmp_path}/number; sleep 100"
    outer = cluster.call(
        "sbatch", "--parsable", "--array=7", "--mem-per-cpu=10", f"--output={tmp_path}/outer", f"--wrap={inside}",
        env=environment(FAILS="1", PYTHON=str(tmp_path / "python")), cwd=tmp_path,
    ).strip()  # fmt: skip
    number = slurm_cluster._until(
        lambda: (tmp_path / "number").exists() and (tmp_path / "number").read_text().strip(),
        40,
        lambda: "not submitted",
    )
    job = cluster.ended(number, timeout=60)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), told(run)
    assert f" job {number}, start 2: " in told(run)
    around = cluster.job(outer)
    assert (around["JobState"], around["Restarts"]) == ("RUNNING", "0")
    cluster.call("scancel", outer)
    took = time.monotonic() - began
    record_property("figures", f"slurm: a failing job inside an array's element, requeued itself: {took:.0f} s")


@pytest.mark.slow
def test_what_no_other_start_would_mend_ends_at_once(cluster, launch, tmp_path, record_property):
    """A node without an interpreter, one that does not see the run's folder, options that srun does not take."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    inside = slurm_cluster._first_child(cluster.daemons[cluster.names[1]].pid)
    subprocess.run(["nsenter", "-t", inside, "-m", "mount", "-t", "tmpfs", "tmpfs", hidden], check=True)
    other = cluster.names[1]
    wrong = {
        "lacks": (SMALL, {"LACKS": other}, f"error: {other}: PYTHON={tmp_path / 'python'} cannot train: (exit code 1)"),
        "hides": (SMALL, {"TLX_RUN": str(hidden / "run")}, f"error: {other} cannot write into {hidden}/run/slurm"),
        "option": (SMALL, {"SRUN_OPTIONS": "--nonsense"}, "srun refuses this step, in its own words above"),
        "gres": (SMALL, {"SRUN_OPTIONS": "--gres=gpu:2"}, "srun refuses this step, in its own words above"),
        "uneven": (("--gpus=3", "--gpus-per-node=0", "--cpus-per-task=2"), {"LAUNCHER": "accelerate"}, "have 2 1 GPUs"),
        "bare": (SMALL, {"PYTHON": "nowhere/python"}, "PYTHON=nowhere/python cannot train: "),
    }  # fmt: skip
    made = {name: launch(name, *options, **env) for name, (options, env, _) in wrong.items()}
    seconds = 0
    for name, (number, run) in made.items():
        job = cluster.ended(number, timeout=60)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), told(run)
        assert wrong[name][2] in told(run), told(run)
        minutes, rest = map(int, job["RunTime"].split(":")[1:])
        seconds = max(seconds, 60 * minutes + rest)
    assert seconds < 20
    record_property("figures", f"slurm: six starts that nothing would mend, told within {seconds} s each")


@pytest.mark.slow
def test_what_a_job_has_is_what_its_launchers_get(cluster, launch):
    """Unequal nodes, GPUs asked for as gres, bound GPUs, a name that would be a path; another job's variables."""
    foreign = {
        "SLURM_MEM_PER_CPU": "10", "SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_GPUS_PER_TASK": "1",
        "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip
    made = {
        "uneven": launch("uneven", "--gpus=3", "--gpus-per-node=0", "--cpus-per-task=2"),
        "gres": launch("gres", "--gres=gpu:1", "--cpus-per-task=2"),
        "bound": launch("bound", *SMALL, "--gpu-bind=single:1", "--mem=100", **foreign),
        "cpu": launch("cpu", "--gpus-per-node=0", "--cpus-per-task=2", "--job-name=a/b", **foreign),
    }
    ranks = {}
    for name, (number, run) in made.items():
        assert cluster.ended(number, timeout=60)["JobState"] == "COMPLETED", told(run)
        lines = nodes_said(run).splitlines()
        ranks[name] = [int(re.search(r" --nproc-per-node=(\d+) ", line)[1]) for line in lines]
    assert ranks == {"uneven": [2, 1], "gres": [1, 1], "bound": [1, 1], "cpu": [1, 1]}


@pytest.mark.slow
def test_where_slurm_does_not_requeue_a_chain_of_jobs_goes_on(cluster, launch):
    """The successor is the same job, also where the command line of sbatch says otherwise than the script's header."""
    said = {
        "per_node": (*SMALL, "--time=11:00:00", "--no-requeue"),
        "in_all": ("--gpus=3", "--gpus-per-node=0", "--cpus-per-task=2", "--mem=100M", "--no-requeue"),
    }
    made = {n: launch(n, *options, FAILS="1", MAX_TRIES="1", CHAIN="yes") for n, options in said.items()}
    asked = ("TimeLimit", "NumNodes", "CPUs/Task", "MinMemoryNode", "TresPerNode", "TresPerJob", "Partition", "Requeue")
    found = {}
    for name, (first, run) in made.items():
        before = cluster.ended(first, timeout=60)
        assert before["ExitCode"] == "1:0", told(run)
        second = re.search(rf"job {first}, start 1: Slurm does not requeue this job; job (\d+) goes on", told(run))[1]
        after = found[name] = cluster.ended(second, timeout=60)
        assert after["Dependency"] in ("(null)", ""), told(run)
        assert [after.get(field) for field in asked] == [before.get(field) for field in asked], told(run)
        # which fails too, and counts on: two starts in a row without a checkpoint
        assert f"job {second}, start 1: 2 starts in a row have brought no new checkpoint: not requeued" in told(run)
        assert (run / "slurm" / f"{first}.tries").read_text() == "2\n"
    assert [found["per_node"].get(field) for field in asked[:5]] == ["11:00:00", "2", "2", "0", "gres:gpu:1"]
    assert [found["in_all"].get(field) for field in asked[3:6:2]] == ["100M", "gres:gpu:3"]
