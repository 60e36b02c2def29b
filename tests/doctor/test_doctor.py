"""`tlx doctor`: what each check makes of a good and of a broken machine, and the command as a user starts it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from commands import environment, tlx, write_config
from images import make_shards
from places import SUPPORT
from typer.testing import CliRunner

from tlx.base import limits
from tlx.base.errors import TlxError, UserError
from tlx.base.launcher import Environment
from tlx.base.slurm import records
from tlx.cli.main import app
from tlx.doctor import (
    accelerates,
    computing,
    facts,
    findings,
    hardware,
    meeting,
    network,
    place,
    services,
    shared_folder,
    slurm,
    software,
)
from tlx.doctor import storage as disks
from tlx.doctor.checks import DoctorChecks
from tlx.doctor.findings import Finding, Section, fault, guarded, merged, ok
from tlx.doctor.shown import Output
from tlx.doctor.wire import Wire
from tlx.plan.config import parse

HERE = Path(__file__).parent
CONFIG = (HERE / "scontrol_config.txt").read_text()
JOB = (HERE / "scontrol_job.txt").read_text()
GIB = 1 << 30


def verdicts(found):
    return {f.name: f.verdict for f in found}


# Findings


def test_a_check_that_breaks_or_hangs_is_a_warning_and_what_it_found_before_stays():
    def breaks():
        yield ok("one", "fine")
        raise OSError(5, "Input/output error")

    def hangs():
        yield ok("one", "fine")
        time.sleep(3)

    first, second = guarded("disk", breaks)
    assert first == ok("one", "fine")
    assert second.verdict == "warning"
    assert "could not be checked: OSError: [Errno 5]" in second.said
    first, second = guarded("disk", hangs, limit_s=0.2)
    assert (first.name, second.verdict) == ("one", "warning")
    assert "no answer" in second.said


def test_findings_of_ranks_are_said_once_or_by_rank_and_host():
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    same, gone = ok("disk", "fine"), fault("gpu", "gone", "reset it")
    by_rank = {rank: [same, ok("gpu", f"there, {rank}")] for rank in range(4)}
    by_rank[0] = [*by_rank[0], ok("slurm", "up")]
    by_rank[3] = [same, gone]
    assert [(f.name, f.verdict, f.said) for f in merged(by_rank, hosts)] == [
        ("disk", "ok", "all 4 ranks: fine"),
        ("gpu", "fault", "rank 3 (b): gone"),
        ("gpu", "ok", "ranks 0-2 (a, b): there, 0, and the like"),
        ("slurm", "ok", "rank 0 (a): up"),
    ]


def test_output_is_plain_in_a_log_and_whole_as_json(capsys):
    for as_json in (False, True):
        output = Output(as_json=as_json, silent=False, file=sys.stdout)
        output.add(Section("disks", (ok("a", "fine [bold]"), fault("b", "full " * 60, "free some"))))
        output.end()
        assert output.verdict == "fault"
        said = capsys.readouterr().out
        assert "\x1b" not in said
        if as_json:
            assert json.loads(said)["findings"][0] == {
                "section": "disks", "name": "a", "verdict": "ok", "said": "fine [bold]", "todo": None,
            }  # fmt: skip
        else:
            assert "fine [bold]\n" in said
            assert "-> free some" in said
            assert "faults: 1, warnings: 0, in 2 lines" in said


# Software


@pytest.mark.parametrize(
    ("built", "devices", "visible", "verdict", "words"),
    [
        ("13.2", 0, None, "ok", "training is on the CPU"),
        ("13.2", 2, "0", "fault", "driver is too old"),
        (None, 1, None, "fault", "without CUDA"),
        ("13.2", 0, "0,1", "warning", "CUDA_VISIBLE_DEVICES='0,1'"),
        ("13.2", 2, "", "warning", "CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_torch_against_the_driver(built, devices, visible, verdict, words):
    found = software.judge_cuda(built, devices, visible, why="the driver is too old")
    assert found.verdict == verdict
    assert words in found.said


def test_a_gpu_that_is_asked_for_may_be_on_a_compute_node():
    (found, job) = (software.judge_cuda("13", 0, None, wanted=True, in_job=j) for j in (False, True))
    assert (found.verdict, job.verdict) == ("warning", "fault")
    assert "a compute node may have one" in found.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_a_training_elsewhere_has_is_no_fault_of_this_machine(config):
    from tlx.plan import config as configs

    here = place.of_environment({})
    said = configs.load(config, ["world.size=16", "world.device=cpu"])
    assert [f.verdict for f in computing.compute(said, here, 5.0)] == ["ok"]
    said = configs.load(config, ["world.size=16", "world.device=cuda"])
    assert list(computing.compute(said, here, 5.0)) == []


# Hardware


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nmore", "take another node"),
        ("CUDA error: no kernel image is available for execution on the device", "install a torch"),
    ],
)
def test_a_gpu_that_does_not_compute_is_a_fault_and_not_a_traceback(monkeypatch, error, words):
    def fails(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    one = replace(place.of_environment({}), launcher="torchrun", rank=1, size=2, local=1)
    (sick,) = hardware.gpus(one)
    assert sick.said == f"GPU 1 cannot be used: {error.splitlines()[0]}"
    assert words in sick.todo
    assert meeting.blocks(sick)
    assert facts.of_rank(one, workers=1, on_cpu=False).gpu is None


def test_a_failed_collective_names_what_failed():
    assert computing.remedy(RuntimeError("CUDA error: device-side")) == hardware.SICK
    assert "NCCL_SOCKET_IFNAME" in computing.remedy(RuntimeError("gloo/transport/tcp/pair.cc: Connection closed"))


def test_ranks_against_gpus_cores_and_limits():
    def gpus(count, here=8, backend=None):
        where = place.Place("torchrun", 0, 8, 0, here, 1, "a")
        return verdicts(hardware.ranks_and_gpus(where, count, backend=backend))["ranks and GPUs"]

    assert (gpus(8), gpus(4), gpus(4, backend="gloo"), gpus(8, here=2)) == ("ok", "fault", "ok", "warning")

    def cores(have, quota=None, in_step=False):
        (found,) = hardware.judge_cores(have, quota, ranks=2, workers=3, in_step=in_step)
        return found

    assert [cores(8).verdict, cores(4).verdict, cores(64, 4.0).verdict] == ["ok", "warning", "warning"]
    assert "srun" in cores(4, in_step=True).todo
    about = {"size": 8, "workers": 2}
    assert verdicts(hardware.limits(64, -1, **about, infiniband=False)) == {"open files": "warning"}
    assert verdicts(hardware.limits(-1, 65536, **about, infiniband=True)) == {"locked memory": "warning"}
    assert not list(hardware.limits(4096, 65536, **about, infiniband=False))


def test_a_small_shm_matters_where_nccl_needs_it():
    assert hardware.shared_memory(64 << 20, ranks=8, gpus=True).verdict == "warning"
    assert hardware.shared_memory(64 << 20, ranks=1, gpus=True).verdict == "ok"
    assert hardware.shared_memory(64 << 20, ranks=8, gpus=False).verdict == "ok"
    assert hardware.shared_memory(64 * GIB, ranks=8, gpus=True).verdict == "ok"


@pytest.mark.parametrize("version", [1, 2])
def test_quotas_of_control_groups(tmp_path, version):
    proc, base = tmp_path / "proc/self", tmp_path / "sys/fs/cgroup"
    proc.mkdir(parents=True)
    if version == 2:
        (proc / "cgroup").write_text("0::/job/step\n")
        (base / "job/step").mkdir(parents=True)
        (base / "cgroup.controllers").write_text("cpu memory")
        (base / "job/cpu.max").write_text("250000 100000\n")
        (base / "job/step/cpu.max").write_text("max 100000\n")
        (base / "job/memory.max").write_text(f"{8 * GIB}\n")
    else:
        (proc / "cgroup").write_text("3:cpu,cpuacct:/job\n2:memory:/job\n")
        (base / "cpu,cpuacct/job").mkdir(parents=True)
        (base / "memory/job").mkdir(parents=True)
        (base / "cpu,cpuacct/cpu.cfs_quota_us").write_text("-1")
        (base / "cpu,cpuacct/job/cpu.cfs_quota_us").write_text("250000")
        (base / "cpu,cpuacct/job/cpu.cfs_period_us").write_text("100000")
        (base / "memory/job/memory.limit_in_bytes").write_text(str(8 * GIB))
    assert limits.cpu_quota(tmp_path) == 2.5
    assert limits.memory_limit(tmp_path) == min(8 * GIB, psutil.virtual_memory().total)
    assert limits.cpu_quota(tmp_path / "nothing") is None


# Launchers and addresses


def test_what_the_launcher_says():
    def at(**env):
        return place.of_environment(env)

    assert at() == place.Place("plain python", 0, 1, 0, 1, 1, socket.gethostname())
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    found = at(**torchrun, GROUP_WORLD_SIZE="2")
    assert (found.launcher, found.nodes, found.here) == ("torchrun", 2, 4)
    assert at(**torchrun, ACCELERATE_MIXED_PRECISION="no").launcher == "torchrun"  # anybody may export that
    assert place.of_environment(torchrun, ["accelerate", "launch"]).launcher == "accelerate launch"
    with pytest.raises(UserError, match="no number"):
        at(RANK="a", WORLD_SIZE="2")
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    ranked = {**step, "RANK": "0", "WORLD_SIZE": "4"}
    assert (at(**ranked).launcher, at(**ranked).nodes, at(**ranked).here) == ("srun", 2, 2)
    assert verdicts(place.launcher(at(**ranked), ranked)) == {"launcher": "ok"}
    assert verdicts(place.launcher(at(RANK="1"), {"RANK": "1"})) == {"launcher": "fault"}


def test_where_ranks_meet():
    assert network.judge_address("localhost", ["127.0.0.1"], nodes=2).verdict == "fault"
    assert network.judge_address("localhost", ["127.0.0.1"], nodes=1).verdict == "ok"
    assert network.judge_address("nowhere", [], nodes=1).verdict == "fault"
    assert network.judge_address("node1", ["10.0.0.1"], nodes=2).verdict == "ok"
    assert network.judge_host("a", ["127.0.1.1"], many=True, named=False).verdict == "warning"
    assert network.judge_host("a", ["127.0.1.1"], many=True, named=True).verdict == "ok"
    assert network.judge_host("a", ["127.0.1.1"], many=False, named=False).verdict == "ok"


def test_a_port_that_is_taken_is_noticed_before_the_start_only():
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen(1)
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1])}
        here = place.of_environment({})
        assert verdicts(network.meeting_point(here, env, served=False))["MASTER_PORT"] == "fault"
        other = place.of_environment({**env, "RANK": "1", "WORLD_SIZE": "2"})
        assert verdicts(network.meeting_point(other, env, served=False))["MASTER_PORT"] != "fault"
    assert verdicts(network.meeting_point(here, {"MASTER_PORT": "x"}, served=False)) == {
        "MASTER_ADDR": "fault", "MASTER_PORT": "fault",
    }  # fmt: skip


def test_interfaces_that_are_not_there():
    def judge(variable, said, nodes=2):
        return verdicts(network.interfaces({variable: said}, ["lo", "ib0"], nodes=nodes))["interface"]

    assert judge("NCCL_SOCKET_IFNAME", "ib") == "ok"  # NCCL takes the beginning of a name
    assert judge("NCCL_SOCKET_IFNAME", "=ib") == "fault"
    assert judge("GLOO_SOCKET_IFNAME", "eth0") == "fault"
    assert judge("GLOO_SOCKET_IFNAME", "lo") == "fault"
    assert judge("GLOO_SOCKET_IFNAME", "lo", nodes=1) == "ok"


def test_accelerates_settings():
    config = accelerates.stand_in({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert config.loop.precision == "bf16"  # nobody's configuration disagrees
    told = Environment({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert verdicts(accelerates.environment(config, told)) == {"accelerate": "ok"}
    plain = accelerates.stand_in({})
    told = Environment({"ACCELERATE_USE_FSDP": "true"})
    assert verdicts(accelerates.environment(plain, told)) == {"accelerate": "fault"}


def test_ranks_that_know_no_place_to_meet_do_not_wait(monkeypatch, capsys):
    monkeypatch.setattr(Wire, "join", lambda _: pytest.fail("it has waited"))
    own = [Section("launcher and network", (fault("MASTER_ADDR", "nowhere does not resolve", "another"),))]
    for rank, many in ((0, 2), (1, 1)):
        here = replace(place.of_environment({}), launcher="torchrun", rank=rank, size=2)
        mine = facts.Facts("a", [0], None, 1, None)
        look = DoctorChecks(None, accelerates.stand_in({}), here)
        found = list(meeting.together(look, own, mine, wait_s=1, give_up=pytest.fail))
        assert len(found) == many
        assert verdicts(found[-1].findings) == {"rendezvous": "fault"}
    assert "rank 1 " in capsys.readouterr().err


def test_nobody_where_ranks_meet_is_told_once_and_in_time(monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "1", "WORLD_SIZE": "2"})
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(network.free_port()))
    with pytest.raises(TlxError, match="cannot connect to MASTER_ADDR") as caught:
        Wire.join(0.2)
    found = meeting.not_met(caught.value, "rendezvous")
    assert "\n" not in found.said
    assert found.todo.count("NCCL_SOCKET_IFNAME") == 1


def seen_by(nodes, hosts=("a", "b", "c")):
    return list(shared_folder.judge_seen([{"seen": one} for one in nodes], dict(enumerate(hosts))))


def test_the_run_folder_of_all(tmp_path, monkeypatch):
    assert seen_by(["", ""]) == []
    assert verdicts(seen_by(["", "same", "same"])) == {"run folder of all": "ok"}
    (found,) = seen_by(["", "unlocked", "absent"])
    assert (found.verdict, found.said.endswith("not seen on c")) == ("fault", True)
    (found,) = seen_by(["", "same", "unlocked"])
    assert (found.verdict, found.said.endswith("does not hold on c")) == ("warning", True)
    first, other = (replace(place.of_environment({}), host=host) for host in ("a", "b"))
    probe = tmp_path / "probe"
    probe.write_text("token")
    assert shared_folder.look(other, str(probe), "token", "a") == "unlocked"
    with probe.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert shared_folder.look(other, str(probe), "token", "a") == "same"
    assert shared_folder.look(other, str(probe), "other", "a") == "absent"  # a file of that name, and not that one
    assert shared_folder.look(other, str(tmp_path / "x"), "token", "a") == "absent"
    assert shared_folder.look(first, str(probe), "token", "a") == ""
    assert shared_folder.look(replace(other, local=1), str(probe), "token", "a") == ""


def test_cores_and_gpus_of_a_node_are_those_of_all_its_ranks():
    one = facts.Facts("a", [0, 1], None, 1, "gpu-0")
    bound = [one, replace(one, cores=[2, 3], gpu="gpu-1")]
    assert verdicts(facts.joint(bound, backend=None)) == {
        "ranks": "ok", "cores": "ok", "GPU of each rank": "ok",
    }  # fmt: skip
    found = verdicts(facts.joint([one, one], backend=None))
    assert (found["cores"], found["GPU of each rank"]) == ("warning", "fault")
    assert verdicts(facts.joint([one, one], backend="gloo"))["GPU of each rank"] == "warning"


# Disks


def test_a_run_folder(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "a"
    assert verdicts(disks.run_folder(run)) == {"run folder": "ok", "locks": "ok"}
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, nothing was made
    (tmp_path / "runs").write_text("a file")
    (found,) = disks.run_folder(run)
    assert found.verdict == "fault"
    assert "a file, not a folder" in found.said

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    for flock in (no_locks, lambda *_: None):  # the second grants every lock
        monkeypatch.setattr(fcntl, "flock", flock)
        assert verdicts(disks.locks(tmp_path)) == {"locks": "warning"}


@pytest.mark.skipif(not os.path.isdir("/proc/1"), reason="needs a folder that nobody may write")
def test_a_folder_that_cannot_be_written():
    found = disks.writable(Path("/proc/1/runs"), "run folder", "run")
    assert found is not None
    assert found.verdict == "fault"
    assert "cannot be written" in found.said


# Services


def test_no_credentials_of_the_hubs_address_are_shown(monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", "https://joe:s3cret@hub.example")
    monkeypatch.setattr("tlx.base.reachable.reachable", lambda url: asked.append(url) or True)
    (found,) = services.weights(None)
    assert found == ok("internet", "https://hub.example answers")
    assert asked == ["https://joe:s3cret@hub.example"]  # its port and scheme are wanted


def test_a_backbone_is_made_with_the_classes_that_there_are(config, monkeypatch):
    from tlx.models import Outputs
    from tlx.plan import config as configs

    asked = []
    monkeypatch.setattr(services, "load", lambda config, *classes: asked.append(classes) or "fine")
    (found,) = services.weights(configs.load(config))
    (other,) = services.weights(configs.load(config, ["data.train=nowhere"]))
    assert (found.verdict, other.verdict, asked) == (
        "ok",
        "ok",
        [(Outputs({"": 3}), ("class0", "class1", "class2"), {}), (Outputs({"": 2}), None, None)],
    )


def test_weights_that_are_not_here_name_the_command(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("TLX_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    raw = {"run": "x", "data": {"train": "x", "batch": 1}}
    (found,) = services.weights(parse({**raw, "backbone": {"name": "timm/test_resnet.r160_in1k"}}))
    assert found.verdict == "fault"
    assert "tlx weights fetch timm/test_resnet.r160_in1k" in found.todo
    monkeypatch.setattr("tlx.base.reachable.reachable", lambda url: True)
    (found,) = services.weights(parse({**raw, "backbone": {"name": "timm/test_resnet.r160_in1k"}}))
    assert found.verdict == "warning"
    (found,) = services.weights(parse({**raw, "backbone": {"name": "toys:small", "weights": "none"}}))
    assert found.verdict == "ok"


# Slurm


def test_settings_of_a_cluster():
    said = slurm.settings(CONFIG)
    assert (said["KillWait"], said["JobRequeue"], said["ClusterName"]) == ("5 sec", "1", "ci")
    assert verdicts(slurm.judge_config(said)) == {"Slurm": "ok", "KillWait": "warning"}
    worse = {**said, "JobRequeue": "0", "KillWait": "30 sec", "PreemptMode": "GANG,CANCEL"}
    assert verdicts(slurm.judge_config(worse)) == {"Slurm": "ok", "requeue": "warning", "preemption": "warning"}


def test_words_of_a_jobs_command_are_not_its_settings():
    assert records(JOB.replace("Power=", "Power= Requeue=0"))[0]["Requeue"] == "1"


@pytest.mark.parametrize(
    ("script", "verdict"),
    [
        ("#!/bin/bash\n#SBATCH -N2 --signal=B:USR1@180\n", "ok"),
        ("#SBATCH --signal=USR1@180\n", "warning"),
        ("#SBATCH -N2\necho --signal=B:USR1@180\n", "warning"),
    ],
)
def test_the_signal_that_a_batch_script_asks_for(script, verdict):
    assert slurm.judge_signal(script).verdict == verdict


def test_a_step_against_its_job():
    here = place.Place("torchrun", 0, 4, 0, 2, 2, "node1")
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}
    assert not list(slurm.judge_step(step, here, cores=8))
    assert verdicts(slurm.judge_step(step, here, cores=1)) == {"cores of the step": "warning"}
    four = {**step, "SLURM_GPUS_ON_NODE": "4"}
    assert verdicts(slurm.judge_step(four, here, cores=8)) == {"GPUs of the job": "warning"}
    assert not list(slurm.judge_nodes(["node1", "node2"], ["node1.site", "node2.site"]))
    assert verdicts(slurm.judge_nodes(["node1", "node2"], ["node1"])) == {"nodes of the job": "warning"}
    assert not list(slurm.judge_nodes(["node1", "node2"], ["ip-10-0-0-1"]))


def fake_scontrol(folder: Path, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    return folder


def recorded(folder: Path, *, config: Path | None = None) -> Path:
    return fake_scontrol(
        folder,
        f'case "$1 $2" in\n"show config") cat {config or HERE / "scontrol_config.txt"} ;;\n'
        f'"show job") cat {HERE / "scontrol_job.txt"} ;;\n"write batch_script") echo "#SBATCH -N2" ;;\n'
        '"show hostnames") printf "node1\\nnode2\\n" ;;\n*) exit 1 ;;\nesac',
    )


def test_a_scontrol_that_fails_or_hangs_is_a_warning(tmp_path, monkeypatch):
    before = os.environ["PATH"]
    monkeypatch.setattr(slurm, "_SCONTROL_S", 0.3)
    for script, words in (
        ("echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1", "Unable to contact"),
        ("exec sleep 20", "not answered within"),
    ):
        monkeypatch.setenv("PATH", f"{fake_scontrol(tmp_path / 'bin', script)}:{before}")
        (found,) = slurm.cluster()
        assert found.verdict == "warning"
        assert words in found.said
    monkeypatch.setenv("PATH", f"{recorded(tmp_path / 'bin')}:{before}")
    assert verdicts(slurm.cluster()) == {"Slurm": "ok", "KillWait": "warning"}
    env = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    assert verdicts(slurm.job(env, place.of_environment({}))) == {"signal": "warning"}
    assert slurm.nodes_of(env) == ["node1", "node2"]


# The command

RAW = {
    "data": {"batch": 8, "workers": 1},
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none"},
    "phases": {"each": {"lr": 0.01, "duration": 4}},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    shards = make_shards(folder / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)
    data = {**RAW["data"], "train": str(shards / "train"), "val": str(shards / "val"), "drop_last": True}
    return write_config(folder / "c.yaml", {**RAW, "data": data, "run": str(folder / "runs" / "a")})


def of_json(done):
    found = json.loads(done.stdout)
    return found["verdict"], [Finding(f["name"], f["verdict"], f["said"], f["todo"]) for f in found["findings"]]


def test_broken_things_get_their_verdicts_and_exit_code_1(config, tmp_path):
    (tmp_path / "runs").write_text("a file")
    (tmp_path / "site.txt").write_text(CONFIG.replace("JobRequeue              = 1", "JobRequeue = 0"))
    bin_ = recorded(tmp_path / "bin", config=tmp_path / "site.txt")
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen(1)
        done = tlx(
            "doctor", config, f"run={tmp_path / 'runs' / 'b'}", "data.val=nowhere", "--quick", "--json",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(sock.getsockname()[1]), PATH=f"{bin_}:{os.environ['PATH']}",
            ACCELERATE_USE_FSDP="true",
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    verdict, found = of_json(done)
    assert verdict == "fault"
    faults = {f.name for f in found if f.verdict == "fault"}
    assert faults == {"accelerate", "MASTER_PORT", "shards", "run folder"}
    assert {f.name for f in found if f.verdict == "warning"} >= {"requeue", "KillWait"}
    assert all(f.todo for f in found if f.verdict != "ok")


def test_a_rank_that_is_no_number_is_told_without_a_traceback():
    done = tlx("doctor", "--quick", RANK="x", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "'x' is no number" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistake_in_the_configuration_is_2(config):
    with pytest.raises(UserError, match='did you mean "batch"'):  # which main() ends with 2
        CliRunner().invoke(app, ["doctor", str(config), "data.batchh=3"], catch_exceptions=False)
    with pytest.raises(UserError, match="none is named"):
        CliRunner().invoke(app, ["doctor", "run=x"], catch_exceptions=False)


@pytest.mark.slow
def test_a_plain_run_finds_nothing_wrong(config, tmp_path):
    done = tlx("doctor", config, PATH=f"{recorded(tmp_path / 'bin')}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  fault " not in done.stdout
    assert "loopback: two processes met here" in done.stdout
    assert not (config.parent / "runs").exists()


@pytest.mark.slow
def test_two_ranks_are_told_of_by_rank_0(config):
    done = tlx("doctor", config, "--json", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict, found = of_json(done)
    assert verdict in ("ok", "warning")
    said = {f.name: f.said for f in found}
    assert said["versions"].startswith("all 2 ranks: ")
    assert said["all_reduce"] == "all 2 ranks: 2 ranks add up over gloo"
    assert said["start"] == "all 2 ranks: joined as training does: ranks 2, on cpu"


def ranks(config, *words, envs):
    """Two ranks that nobody launches, each with an environment of its own."""
    port = str(network.free_port())
    processes = []
    for rank, env in enumerate(envs):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", **env}
        env = environment(**{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **own})
        command = [sys.executable, "-m", "tlx", "doctor", str(config), "--quick", *words]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )  # fmt: skip
    return [(*p.communicate(timeout=120), p.returncode) for p in processes]


@pytest.mark.slow
def test_ranks_that_cannot_compute_together_are_told_within_the_time(config):
    # the second one waits at another port: neither meets the other
    other = str(network.free_port())
    (said, _, code), (nothing, error, second) = ranks(config, "--wait", "5", envs=[{}, {"MASTER_PORT": other}])
    assert code == second == 1
    assert "not all 2 ranks joined" in said
    assert "versions" in said  # its own findings are there all the same
    assert nothing == ""
    assert "tlx doctor: rank 1" in error


@pytest.mark.slow
def test_what_one_rank_finds_is_everybodys_fault(config):
    conflict = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    (said, _, code), (nothing, _, second) = ranks(config, envs=[{}, conflict])
    assert code == second == 1
    assert nothing == ""
    assert re.search(r"fault +accelerate: rank 1 \(.*\): .*accelerate is told to accumulate over 4 steps", said)
    assert "not tried" in said


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(config, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if os.environ.get('HANGS') and 'doctor' in ' '.join(sys.orig_argv):\n"
        "    import torch.distributed as dist\n"
        "    real = dist.all_reduce\n"
        "    dist.all_reduce = lambda *a, **k: time.sleep(600)\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{SUPPORT}"}
    (said, _, code), (_, _, second) = ranks(config, "--wait", "20", envs=[path, {**path, "HANGS": "1"}])
    assert code == second == 1
    assert "could not add up numbers within 20 s" in said
    assert "NCCL_SOCKET_IFNAME" in said


def test_verdicts_are_ordered():
    assert findings.worst(["ok", "fault", "warning"]) == "fault"
    assert findings.worst([]) == "ok"
