"""`tlx doctor`: what each check makes of a good and of a broken machine, and the command as a user starts it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from commands import environment, tlx, write_config
from images import make_shards
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
from tlx.doctor.findings import Finding, Section, fault, guarded, merged, ok, warning
from tlx.doctor.look import Look
from tlx.doctor.needs import Needs, needs_of
from tlx.doctor.shown import Output
from tlx.doctor.traffic import Traffic
from tlx.doctor.wire import Wire
from tlx.plan.config import parse

HERE = Path(__file__).parent
CONFIG = (HERE / "doctor_scontrol_config.txt").read_text()
JOB = (HERE / "doctor_scontrol_job.txt").read_text()
PARTITION = (HERE / "doctor_scontrol_partition.txt").read_text()
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
    same, main, odd = ok("disk", "fine"), ok("wandb", "online"), fault("gpu", "gone", "reset it")
    by_rank = {rank: [same, ok("gpu", "there")] for rank in range(4)}
    by_rank[0] = [*by_rank[0], main]
    by_rank[3] = [same, odd]
    found = merged(by_rank, hosts)
    assert [f.said for f in found if f.name == "disk"] == ["all 4 ranks: fine"]
    assert [f.said for f in found if f.name == "wandb"] == ["online"]
    assert [(f.verdict, f.said) for f in found if f.name == "gpu"] == [
        ("fault", "rank 3 (b): gone"),
        ("ok", "ranks 0, 1 (a), rank 2 (b): there"),
    ]
    assert merged({0: [same], 2: [same]}, hosts)[0].said == "all 2 nodes: fine"
    many = {rank: [ok("room", f"{rank} GiB")] for rank in range(64)}
    many[50] = [warning("room", "none", "free some")]
    found = merged(many, {rank: f"node{rank}" for rank in range(64)})
    assert len(found) <= 10
    assert found[0] == warning("room", "rank 50 (node50): none", "free some")


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
            assert "1 fault in 2 lines" in said


# Software


def test_versions_below_the_minimum_are_faults():
    wanted = [("torch", ">=2.8", "2.7.1+cu128"), ("timm", ">=1.0.20", "1.0.20"), ("rich", ">=13", None)]
    found = list(software.too_old(wanted))
    assert [(f.verdict, f.said) for f in found] == [
        ("fault", "torch 2.7.1+cu128, and tlx needs >=2.8"),
        ("fault", "rich is not installed"),
    ]
    assert verdicts(software.versions()) == {"versions": "ok"}


@pytest.mark.parametrize(
    ("built", "usable", "devices", "visible", "verdict", "words"),
    [
        ("13.2", 2, 2, "0,1", "ok", "2 GPUs"),
        ("13.2", 0, 0, None, "ok", "no GPU here"),
        ("13.2", 0, 2, None, "fault", "cannot use it"),
        ("13.2", 0, 2, "0", "fault", "driver is too old"),
        (None, 0, 1, None, "fault", "without CUDA"),
        ("13.2", 0, 0, "0,1", "warning", "CUDA_VISIBLE_DEVICES='0,1'"),
        ("13.2", 0, 2, "", "warning", "CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_torch_against_the_driver(built, usable, devices, visible, verdict, words):
    driver = software.Driver(devices, "470.1" if devices else None)
    found = software.judge_cuda(built, usable, driver, visible, why="the driver is too old")
    assert found.verdict == verdict
    assert words in found.said
    assert software.judge_cuda(built, usable, driver, visible, on_cpu=True).verdict == "ok"


def test_a_gpu_that_is_asked_for_may_be_on_a_compute_node():
    none = software.Driver(0)
    (found, job) = (software.judge_cuda("13", 0, none, None, wanted=True, in_job=j) for j in (False, True))
    assert (found.verdict, job.verdict) == ("warning", "fault")
    assert "a compute node may have one" in found.said
    assert software.judge_cuda("13", 1, software.Driver(1), None, wanted=True).verdict == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_what_a_training_elsewhere_has_is_no_fault_of_this_machine(config):
    from tlx.plan import config as configs

    here = place.of_environment({})
    said = configs.load(config, ["world.size=16", "world.device=cpu"])
    assert [f.verdict for f in computing.compute(said, here, None, 5.0)] == ["ok"]
    said = configs.load(config, ["world.size=16", "world.device=cuda"])
    assert list(computing.compute(said, here, None, 5.0)) == []


def test_a_gpu_that_has_failed_is_a_fault_and_not_a_traceback(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    one = replace(place.of_environment({}), launcher="torchrun", rank=1, size=2, local=1)
    found, (sick,) = hardware.look_at_gpus(one)
    assert found == []
    assert sick.said == "GPU 1 cannot be used: CUDA error: uncorrectable ECC error encountered"
    assert "take another node" in sick.todo
    assert meeting.blocks(sick)
    assert facts.of_rank(one, workers=1, on_cpu=False).gpu is None
    assert computing.remedy(RuntimeError("CUDA error: device-side")) == hardware.SICK
    assert "NCCL_SOCKET_IFNAME" in computing.remedy(RuntimeError("gloo/transport/tcp/pair.cc: Connection closed"))
    monkeypatch.setattr(torch.cuda, "is_available", fails)
    checks = dict(
        Look(None, accelerates.stand_in({}), one, quick=True)._node()
    )  # nothing is asked before it is guarded
    assert guarded("GPU", checks["GPU"])[0].verdict == "warning"


# Hardware


def test_a_torch_without_kernels_for_a_gpu_is_a_fault():
    built = ["sm_80", "sm_90", "compute_90"]
    assert hardware.supported((8, 6), built)
    assert hardware.supported((12, 0), built)  # from PTX
    assert not hardware.supported((7, 0), built)
    assert not hardware.supported((12, 0), ["sm_80", "sm_90a"])
    good = hardware.Gpu(0, "X", 80 * GIB, 79 * GIB, (8, 0), supported=True, bf16=True)
    assert verdicts(hardware.gpus([good], precision="bf16")) == {"GPU": "ok"}
    old = replace(good, supported=False, capability=(7, 0), bf16=False)
    assert [f.verdict for f in hardware.gpus([old], precision="bf16")] == ["ok", "fault", "warning"]
    assert verdicts(hardware.gpus([replace(good, free=20 * GIB)], needed=30 * GIB))["GPU memory"] == "warning"


def test_ranks_against_gpus_cores_memory_and_limits():
    def at(**over):
        return replace(place.Place("torchrun", 0, 8, 0, 8, 1, "a"), **over)

    def gpus(count, where, backend=None):
        return verdicts(hardware.ranks_and_gpus(where, count, on_cpu=False, backend=backend)).get("ranks and GPUs")

    assert gpus(8, at()) == "ok"
    assert gpus(4, at()) == "fault"
    assert gpus(4, at(), backend="gloo") == "ok"
    assert gpus(8, at(here=2)) == "warning"

    def cores(have, quota=None, **over):
        said = {"ranks": 2, "workers": 3, "threads": 1, "on_cpu": False, **over}
        return verdicts(hardware.judge_cores(have, quota, **said))

    assert cores(8) == {"cores": "ok"}
    assert cores(4)["cores"] == "warning"
    assert cores(64, 4.0)["cores"] == "warning"
    for step in (False, True):
        (found, *_) = hardware.judge_cores(4, None, ranks=2, workers=3, threads=1, on_cpu=False, in_step=step)
        assert ("srun" in found.todo) == step
    assert cores(8, threads=8)["threads"] == "warning"
    assert verdicts(hardware.limits(64, -1, size=8, workers=2, infiniband=False))["open files"] == "warning"
    assert verdicts(hardware.limits(-1, 65536, size=8, workers=2, infiniband=True))["locked memory"] == "warning"
    assert set(verdicts(hardware.limits(4096, 65536, size=8, workers=2, infiniband=False)).values()) == {"ok"}
    needs = Needs(checkpoint=GIB, checkpoints=4 * GIB, batches=GIB, gradients=GIB, memory=None)
    for left, verdict in ((None, "ok"), (10 * GIB, "warning"), (6 * GIB, "fault")):
        assert verdicts(hardware.memory(64 * GIB, left, ranks=8, needs=needs)) == {"memory": verdict}


def test_a_small_shm_matters_where_nccl_needs_it():
    small = (64 << 20, 60 << 20)
    assert verdicts(hardware.shared_memory(*small, ranks=8, gpus=True))["/dev/shm"] == "warning"
    assert verdicts(hardware.shared_memory(*small, ranks=1, gpus=True))["/dev/shm"] == "ok"
    assert verdicts(hardware.shared_memory(*small, ranks=8, gpus=False))["/dev/shm"] == "ok"
    assert verdicts(hardware.shared_memory(64 * GIB, 60 * GIB, ranks=8, gpus=True))["/dev/shm"] == "ok"


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
        (base / "job/memory.current").write_text(f"{5 * GIB}\n")
        (base / "job/memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    else:
        (proc / "cgroup").write_text("3:cpu,cpuacct:/job\n2:memory:/job\n")
        (base / "cpu,cpuacct/job").mkdir(parents=True)
        (base / "memory/job").mkdir(parents=True)
        (base / "cpu,cpuacct/cpu.cfs_quota_us").write_text("-1")
        (base / "cpu,cpuacct/job/cpu.cfs_quota_us").write_text("250000")
        (base / "cpu,cpuacct/job/cpu.cfs_period_us").write_text("100000")
        (base / "memory/job/memory.limit_in_bytes").write_text(str(8 * GIB))
        (base / "memory/job/memory.usage_in_bytes").write_text(str(5 * GIB))
        (base / "memory/job/memory.stat").write_text(f"total_inactive_file {GIB}\n")
    assert limits.cpu_quota(tmp_path) == 2.5
    assert limits.memory_left(tmp_path) == 4 * GIB
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
    assert verdicts(place.launcher(at(**step), step)) == {"launcher": "fault"}
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
    ports = (32768, 60999)
    assert network.judge_port(29500, ports, served=False, taken=False).verdict == "ok"
    assert network.judge_port(40000, ports, served=False, taken=False).verdict == "warning"
    assert network.judge_port(40000, ports, served=True, taken=False).verdict == "ok"
    assert network.judge_port(29500, ports, served=False, taken=True).verdict == "fault"


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


def test_accelerates_settings(tmp_path):
    config = accelerates.stand_in({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert config.loop.precision == "bf16"  # nobody's configuration disagrees
    told = Environment({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert verdicts(accelerates.environment(config, told)) == {"accelerate": "ok"}
    plain = accelerates.stand_in({})
    told = Environment({"ACCELERATE_USE_FSDP": "true"})
    assert verdicts(accelerates.environment(plain, told)) == {"accelerate": "fault"}
    file = tmp_path / "default.yaml"
    for content, verdict in (
        ({"distributed_type": "MULTI_GPU", "num_processes": 8, "mixed_precision": "no"}, "ok"),
        ({"distributed_type": "NO", "mixed_precision": "bf16"}, "warning"),
        ({"distributed_type": "FSDP", "num_processes": 8}, "warning"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2, "mixed_precision": False}, "warning"),
    ):
        assert accelerates.judge_file(plain, content, file).verdict == verdict, content


def test_accelerates_default_file_without_a_configuration(tmp_path, monkeypatch):
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    file.write_text("{distributed_type: MULTI_GPU, num_processes: 8, mixed_precision: bf16}")
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    assert verdicts(accelerates.default_file(None)) == {"accelerate's file": "ok"}  # nobody disagrees with bf16
    assert verdicts(accelerates.default_file(accelerates.stand_in({}))) == {"accelerate's file": "warning"}


def test_ranks_that_know_no_place_to_meet_do_not_wait(monkeypatch, capsys):
    monkeypatch.setattr(Wire, "join", lambda _: pytest.fail("it has waited"))
    own = [Section("launcher and network", (fault("MASTER_ADDR", "nowhere does not resolve", "another"),))]
    for rank, many in ((0, 2), (1, 1)):
        here = replace(place.of_environment({}), launcher="torchrun", rank=rank, size=2)
        mine = facts.Facts("a", [0], None, 1, 1, None)
        look = Look(None, accelerates.stand_in({}), here, quick=True)
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
    found = meeting._not_met(caught.value)
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
    one = facts.Facts("a", [0, 1], None, 1, 1, "gpu-0")
    bound = [one, replace(one, cores=[2, 3], gpu="gpu-1")]
    assert verdicts(facts.joint(bound, backend=None, on_cpu=False)) == {
        "ranks": "ok", "cores": "ok", "GPU of each rank": "ok",
    }  # fmt: skip
    found = verdicts(facts.joint([one, one], backend=None, on_cpu=False))
    assert (found["cores"], found["GPU of each rank"]) == ("warning", "fault")
    assert verdicts(facts.joint([one, one], backend="gloo", on_cpu=False))["GPU of each rank"] == "warning"


def test_bus_bandwidth_is_that_of_nccl_tests():
    found = Traffic("nccl", 4, 2e-5, 1 << 30, 0.5)
    assert found.bus == pytest.approx((1 << 30) / 0.5 * 1.5)
    assert computing.judge_traffic(found, None, nodes=2).verdict == "ok"
    assert computing.judge_traffic(replace(found, seconds=5.0), None, nodes=2).verdict == "warning"
    assert computing.judge_traffic(replace(found, seconds=5.0), None, nodes=1).verdict == "ok"


# Disks


def test_the_kind_of_file_system(tmp_path):
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/vda rw\n"
        f"2 1 0:50 / {tmp_path}/my\\040data rw shared:1 - nfs4 server:/x rw\n"
        f"3 1 0:51 / {tmp_path}/my rw - tmpfs tmpfs rw\n"
    )
    assert str(disks.file_system(tmp_path / "my data" / "runs", table)) == "nfs4, a network file system"
    assert str(disks.file_system(tmp_path / "my" / "runs", table)) == "tmpfs, in memory"
    assert str(disks.file_system(tmp_path, table)) == "ext4, local"
    assert disks.FileSystem("fuse.sshfs").network
    assert not disks.FileSystem("fuse.fuse-overlayfs").network


def test_a_run_folder(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "a"
    found = list(disks.run_folder(run, needs=None, measure=True))
    assert set(verdicts(found)) == {"run folder", "room for checkpoints", "locks", "write speed"}
    assert verdicts(found)["locks"] == "ok"
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, nothing was made
    (tmp_path / "runs").write_text("a file")
    (found,) = disks.run_folder(run, needs=None, measure=True)
    assert found.verdict == "fault"
    assert "a file, not a folder" in found.said
    needs = Needs(checkpoint=GIB, checkpoints=4 * GIB, batches=0, gradients=0, memory=None)
    for free, verdict in ((8 * GIB, "ok"), (3 * GIB, "warning"), (GIB, "fault")):
        assert verdicts(disks.room(free, needs)) == {"room for checkpoints": verdict}
    assert verdicts(disks.room(3 * GIB, needs, there=GIB)) == {"room for checkpoints": "ok"}  # the old ones go
    (tmp_path / "b/checkpoints/1").mkdir(parents=True)
    (tmp_path / "b/checkpoints/1/model").write_bytes(bytes(3 << 20))
    said = {f.name: f.said for f in disks.run_folder(tmp_path / "b", needs=needs, measure=False)}
    assert "of which 3.0 MiB are there already" in said["room for checkpoints"]

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


def test_read_speed_tells_of_the_page_cache(tmp_path):
    tar = tmp_path / "a.tar"
    tar.write_bytes(os.urandom(8 << 20))
    found = disks.read_speed(tar)
    assert found.verdict == "ok"
    assert "in the page cache" in found.said or "not known" in found.said
    tar.write_bytes(b"x")
    assert "too small" in disks.read_speed(tar).said


@pytest.mark.parametrize(
    ("got", "took", "kept", "verdict", "words"),
    [
        (64 << 20, 0.5, 0.0, "ok", "134 MB/s"),
        (64 << 20, 0.5, 0.5, "ok", "50% of it was in the page cache"),
        (64 << 20, 0.5, None, "ok", "not known"),
        (16 << 20, 2.0, 0.0, "warning", "8 MB/s"),
        (16 << 20, 2.0, None, "warning", "8 MB/s"),
        (0, 2.0, 0.0, "warning", "0 MB/s"),  # a disk that gives nothing in all this time
        (1 << 20, 0.2, 0.0, "ok", "too small to measure"),
    ],
)
def test_a_disk_that_is_slow_to_read_is_a_warning(got, took, kept, verdict, words):
    found = disks.judge_read("a.tar", got, took, kept)
    assert (found.verdict, words in found.said) == (verdict, True)


def test_the_share_of_a_file_in_the_page_cache(tmp_path, monkeypatch):
    asked = []

    def preadv(handle, buffers, at, flags):
        asked.append(at)
        if at >= 500:  # the first half is in the cache
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    monkeypatch.setattr(os, "preadv", preadv, raising=False)
    assert disks.cached_share(0, 0, 1001) == 0.5
    assert 0 <= min(asked) < max(asked) < 1001
    assert disks.cached_share(0, 0, 0) is None
    monkeypatch.setattr(os, "preadv", lambda *_: os.stat("/nowhere"), raising=False)
    assert disks.cached_share(0, 0, 1001) is None


def test_a_checkpoint_that_takes_long_to_write_is_a_warning(tmp_path):
    needs = Needs(checkpoint=1, checkpoints=1, batches=0, gradients=0, memory=None)
    assert disks.write_speed(tmp_path, needs).verdict == "ok"
    assert disks.write_speed(tmp_path, replace(needs, checkpoint=1 << 60)).verdict == "warning"


# Services


class _Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def test_any_answer_of_a_server_counts(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), _Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert services.unanswered(url) is None
    server.shutdown()
    server.server_close()
    assert "refused" in services.unanswered(url)


def test_how_wandb_would_be_used():
    judge = services.judge_tracking
    assert judge(None, False, "https://x", None).verdict == "ok"
    assert judge("online", False, "https://x", None).verdict == "warning"
    assert judge(None, True, "https://x", "no route").verdict == "warning"
    assert judge(None, True, "https://x", None).verdict == "ok"
    (found,) = services.tracking(None, {"WANDB_MODE": "offline"})
    assert found.verdict == "ok"
    assert "tlx track sync" in found.said


def test_no_credentials_of_the_hubs_address_are_shown(monkeypatch):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", "https://joe:s3cret@hub.example")
    monkeypatch.setattr("tlx.base.reachable.reachable", lambda url: asked.append(url) or True)
    (found,) = services.weights(None)
    assert found == ok("internet", "https://hub.example answers")
    assert asked == ["https://joe:s3cret@hub.example"]  # its port and scheme are wanted


def test_a_backbone_is_made_with_the_classes_that_there_are(config, monkeypatch):
    from tlx.plan import config as configs

    asked = []
    monkeypatch.setattr(services, "load", lambda config, *classes: asked.append(classes) or "fine")
    (found,) = services.weights(configs.load(config))
    (other,) = services.weights(configs.load(config, ["data.train=nowhere"]))
    assert (found.verdict, other.verdict, asked) == ("ok", "ok", [(3, ("class0", "class1", "class2")), (2, None)])


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
    assert verdicts(services.caches())["weights folder"] == "warning"


# Slurm


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("30 sec", 30), ("5 min", 300), ("60", 60), ("(null)", None), ("", None)],
    ],
)
def test_times_of_slurm(text, value):
    assert slurm.seconds(text) == value


def test_settings_of_a_cluster():
    said = slurm.settings(CONFIG)
    assert (said["KillWait"], said["JobRequeue"], said["ClusterName"]) == ("5 sec", "1", "ci")
    found = verdicts(slurm.judge_config(said))
    assert found == {"Slurm": "ok", "requeue": "ok", "KillWait": "warning", "preemption": "ok"}
    worse = verdicts(
        slurm.judge_config({**said, "JobRequeue": "0", "KillWait": "30 sec", "PreemptMode": "GANG,CANCEL"})
    )
    assert worse == {"Slurm": "ok", "requeue": "warning", "KillWait": "ok", "preemption": "warning"}
    (found,) = slurm.partitions(records(PARTITION))
    assert "gpu* (2 nodes, at most UNLIMITED)" in found.said


def test_settings_of_a_job():
    (record,) = records(JOB)
    began = time.mktime(time.strptime(record["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert verdicts(slurm.judge_job(record, now=began)) == {"job": "ok", "time left": "ok"}
    assert verdicts(slurm.judge_job(record, now=began + 500))["time left"] == "warning"
    assert verdicts(slurm.judge_job({**record, "Requeue": "0"}, now=began))["requeue of the job"] == "warning"
    assert records(JOB.replace("Power=", "Power= Requeue=0"))[0]["Requeue"] == "1"
    for script, verdict in (
        ("#!/bin/bash\n#SBATCH -N2 --signal=B:USR1@180\n", "ok"),
        ("#SBATCH --signal=USR1@180\n", "warning"),
        ("#SBATCH -N2\necho --signal=B:USR1@180\n", "warning"),
    ):
        assert verdicts(slurm.judge_signal(script)) == {"signal": verdict}, script


def test_a_step_against_its_job():
    here = place.Place("torchrun", 0, 4, 0, 2, 2, "node1")
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}
    assert verdicts(slurm.judge_step(step, here, cores=8)) == {"GPUs of the job": "ok", "cores of the step": "ok"}
    assert verdicts(slurm.judge_step(step, here, cores=1))["cores of the step"] == "warning"
    four = {**step, "SLURM_GPUS_ON_NODE": "4"}
    assert verdicts(slurm.judge_step(four, here, cores=8))["GPUs of the job"] == "warning"
    assert verdicts(slurm.judge_nodes(["node1", "node2"], ["node1.site", "node2.site"])) == {"nodes of the job": "ok"}
    assert not list(slurm.judge_inherited({"SLURM_MEM_PER_NODE": "1", "SLURM_ARRAY_JOB_ID": "3"}, {"ArrayJobId": "3"}))
    (foreign,) = slurm.judge_inherited({"SLURM_ARRAY_JOB_ID": "3", "SLURM_MEM_PER_NODE": "1"}, {"JobId": "5"})
    assert (foreign.verdict, foreign.todo.partition(" before")[0]) == ("warning", "unset SLURM_ARRAY_JOB_ID")
    (foreign,) = slurm.judge_inherited({"SLURM_MEM_PER_CPU": "3", "SLURM_MEM_PER_NODE": "1"}, {"JobId": "5"})
    assert "SLURM_MEM_PER_CPU, SLURM_MEM_PER_NODE: the job was submitted inside another one" in foreign.said
    assert verdicts(slurm.judge_nodes(["node1", "node2"], ["node1"])) == {"nodes of the job": "warning"}


def fake_scontrol(folder: Path, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    return folder


def recorded(folder: Path, *, config: Path | None = None) -> Path:
    return fake_scontrol(
        folder,
        f'case "$1 $2" in\n"show config") cat {config or HERE / "doctor_scontrol_config.txt"} ;;\n'
        f'"show partition") cat {HERE / "doctor_scontrol_partition.txt"} ;;\n'
        f'"show job") cat {HERE / "doctor_scontrol_job.txt"} ;;\n"write batch_script") echo "#SBATCH -N2" ;;\n'
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
    assert len(list(slurm.cluster())) == 5
    env = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    assert verdicts(slurm.job(env, place.of_environment({})))["signal"] == "warning"
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


def test_what_the_training_of_a_configuration_needs(config):
    from tlx.plan import config as configs

    said = configs.load(config)
    needs = needs_of(said, 2)
    assert needs.checkpoint == pytest.approx(3 * needs.gradients, rel=0.2)  # weights, and two moments of AdamW
    # on two ranks of four samples: two batches ahead of the one worker and four spare, training and validation
    assert needs.batches == (4 + 4) * 16 * 16 * 3 * 6


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
            WANDB_API_KEY="s3cret" * 7, SLURM_STEP_NUM_TASKS="2", ACCELERATE_USE_FSDP="true",
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    verdict, found = of_json(done)
    assert verdict == "fault"
    faults = {f.name for f in found if f.verdict == "fault"}
    assert faults == {"launcher", "accelerate", "MASTER_PORT", "shards", "run folder"}
    assert {f.name for f in found if f.verdict == "warning"} >= {"requeue", "KillWait"}
    assert all(f.todo for f in found if f.verdict != "ok")
    assert "s3cret" not in done.stdout + done.stderr


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
    for words in ("loopback: two processes met here: gloo, 2 ranks", "write speed", "read speed", "a checkpoint takes"):
        assert words in done.stdout
    assert not (config.parent / "runs").exists()


@pytest.mark.slow
def test_two_ranks_are_told_of_by_rank_0(config):
    done = tlx("doctor", config, "--json", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict, found = of_json(done)
    assert verdict in ("ok", "warning")
    said = {f.name: f.said for f in found}
    assert said["versions"].startswith("all 2 ranks: ")
    assert re.search(r"gloo, 2 ranks: .* for one number, .* GB/s bus bandwidth", said["all_reduce"])
    assert said["accelerate believes in"].startswith("all 2 ranks: 2 ranks (MULTI_CPU) on cpu over gloo")


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
    path = {"PYTHONPATH": f"{tmp_path}:{HERE}"}
    (said, _, code), (_, _, second) = ranks(config, "--wait", "20", envs=[path, {**path, "HANGS": "1"}])
    assert code == second == 1
    assert "could not add up numbers within 20 s" in said
    assert "NCCL_SOCKET_IFNAME" in said


def test_verdicts_are_ordered():
    assert findings.worst(["ok", "fault", "warning"]) == "fault"
    assert findings.worst([]) == "ok"
