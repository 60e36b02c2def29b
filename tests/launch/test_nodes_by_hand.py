"""Several machines without a scheduler: one launcher on each, as launch/README.md says."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from commands import environment, free_port, last_step, ranks_of, status, tlx, write_config
from composed import smallest_config
from images import make_shards
from networks import INTERFACE, Machine, two_machines
from places import ROOT

from tlx.base.errors import TlxError, UserError
from tlx.ranks import rendezvous

RAW = {
    "seed": 5,
    "input": {"size": 16},
    "backbone": {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}},
    "phases": {"each": {"lr": 0.01}, "feature_extraction": {"duration": 100}, "fine_tuning": {"duration": 300}},
    "evaluate": {"every": 100},
    "checkpoint": {"every": 50},
    "track": {"every": 1},
    "world": {"device": "cpu", "timeout_minutes": 1},
}
WAYS = ["torchrun", "accelerate"]
Command = Callable[[int, str, int, int], Sequence[object]]


def torchrun(node: int, address: str, port: int, ranks: int) -> Sequence[object]:
    where = (f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}")
    return ("torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}", *where, "-m", "tlx", "train")


def accelerate(node: int, address: str, port: int, ranks: int) -> Sequence[object]:
    file = ("--config_file", ROOT / "launch" / "several_nodes.yaml", "--num_processes", 2 * ranks)
    where = ("--machine_rank", node, "--main_process_ip", address, "--main_process_port", port)
    return ("accelerate.commands.launch", *file, *where, "-m", "tlx", "train")


class Nodes:
    """A launcher on each of two machines, or two on this one."""

    def __init__(self, way: str, config: Path, *words: object, machines: Sequence[Machine] = (), **more) -> None:
        command: Command = {"torchrun": torchrun, "accelerate": accelerate}[way]
        address, port = more.pop("address", machines[0].address if machines else "127.0.0.1"), free_port()
        ranks = more.pop("ranks", (1, 1))
        env = {k: v for k, v in environment(**more).items() if k != "ACCELERATE_USE_CPU"}
        self.files = [config.parent / f"node-{node}.out" for node in (0, 1)]
        self.launchers = []
        for node, file in enumerate(self.files):
            said = [sys.executable, "-m", *map(str, command(node, address, port, ranks[node])), config, *words]
            with file.open("w") as out:
                self.launchers.append(
                    subprocess.Popen(
                        machines[node].words(*said) if machines else [*map(str, said)], env=env, stdout=out, stderr=out
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for node in (0, 1):
            self.kill(node)

    def kill(self, node: int) -> None:
        """SIGKILL for everything on a machine."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.launchers[node].pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.launchers[node].wait()

    def until_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + 240
        while last_step(run) < step:
            assert all(p.poll() is None for p in self.launchers), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def ends(self, *nodes: int, within: float = 240) -> list[int]:
        """Exit codes of the launchers."""
        deadline = time.monotonic() + within
        ended = [self.launchers[node] for node in nodes or (0, 1)]
        while any(p.poll() is None for p in ended):
            assert time.monotonic() < deadline, f"still there after {within} s:\n{self.text()}"
            time.sleep(0.05)
        return [p.returncode for p in ended]

    def text(self, *nodes: int) -> str:
        return "\n".join(self.files[node].read_text()[-6000:] for node in nodes or (0, 1))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("s") / "s", classes=3, per_class={"train": 10, "val": 7}, size=24)


def configure(folder: Path, shards: Path, **over: object) -> Path:
    data = {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 12, "workers": 1}
    return write_config(folder / "c.yaml", {**RAW, "run": str(folder / "run"), "data": data, **over})


@pytest.fixture
def plan(tmp_path, shards):
    """The configuration's file, and its run folder."""
    return configure(tmp_path, shards), tmp_path / "run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shards):
    """The same training on one machine, by its number of ranks."""
    made = {}

    def run(ranks: int) -> bytes:
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"alone{ranks}")
            done = tlx("train", configure(folder, shards), ranks=ranks)
            assert done.returncode == 0, done.stderr[-3000:]
            made[ranks] = weights(folder / "run")
        return made[ranks]

    return run


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "latest" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_machines_train(tmp_path, shards):
    """Each with its own address, name, loopback and shared memory."""
    phases = {"each": {"lr": 0.01}, "feature_extraction": {"duration": 4}, "fine_tuning": {"duration": 8}}
    plan = configure(tmp_path, shards, phases=phases)
    with two_machines(tmp_path) as machines, Nodes("accelerate", plan, machines=machines) as nodes:
        assert nodes.ends() == [0, 0], nodes.text()
    assert status(tmp_path / "run")["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_launchers_give_what_one_machine_gives(plan, alone, way):
    with Nodes(way, *plan[:1]) as nodes:
        assert nodes.ends() == [0, 0], nodes.text()
    assert weights(plan[1]) == alone(2)


@pytest.mark.slow
def test_machines_with_different_numbers_of_ranks(plan, alone):
    """torchrun takes what each machine is told; accelerate deals all processes evenly."""
    with Nodes("torchrun", plan[0], ranks=(1, 2)) as nodes:
        assert nodes.ends() == [0, 0], nodes.text()
    assert weights(plan[1]) == alone(3)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "dead"), [("torchrun", 0), ("torchrun", 1), ("accelerate", 1)], ids=str)
def test_a_launcher_and_its_ranks_are_killed(plan, alone, way, dead, record_property):
    config, run = plan
    with Nodes(way, config) as nodes:
        nodes.until_step(run, 120)
        (gone,) = ranks_of(nodes.launchers[dead])
        nodes.kill(dead)
        since = time.monotonic()
        assert nodes.ends(1 - dead, within=90) == [1], nodes.text()
        record_property("figures", f"{way}, node {dead} killed: the other ended after {time.monotonic() - since:.1f} s")
        said = nodes.text(1 - dead)
        assert f"rank {dead} (" in said, said
        assert f"pid {gone.pid})" in said, said
        assert "the same command goes on from the last checkpoint" in said
    assert status(run)["status"] == "fault"
    with Nodes(way, config) as again:
        assert again.ends() == [0, 0], again.text()
    assert weights(run) == alone(2)


@pytest.mark.slow
def test_a_machine_loses_its_power(plan, alone, tmp_path, record_property):
    """Nothing is heard of it any more, not even the end of its connections."""
    config, run = plan
    with two_machines(tmp_path) as machines, Nodes("torchrun", config, machines=machines) as nodes:
        nodes.until_step(run, 120)
        machines[1].cut_power()
        since = time.monotonic()
        assert nodes.ends(0, within=150) == [1], nodes.text(0)
        record_property("figures", f"a machine's power cut: the other ended after {time.monotonic() - since:.1f} s")
        assert "rank 1 (two, pid " in nodes.text(0), nodes.text(0)
    with two_machines(tmp_path) as machines, Nodes("torchrun", config, machines=machines) as again:
        assert again.ends() == [0, 0], again.text()
    assert weights(run) == alone(2)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_names_on_loopback_and_the_interface_named(plan, alone, tmp_path, way):
    """Debian writes a machine's own name as 127.0.1.1, which gloo would tell the others."""
    with (
        two_machines(tmp_path, named_on_loopback=True) as machines,
        Nodes(way, plan[0], machines=machines, GLOO_SOCKET_IFNAME=INTERFACE) as nodes,
    ):
        assert nodes.ends() == [0, 0], nodes.text()
    assert weights(plan[1]) == alone(2)


@pytest.mark.slow
def test_names_on_loopback_are_told(plan, tmp_path):
    with two_machines(tmp_path, named_on_loopback=True) as machines, Nodes("torchrun", plan[0], machines=machines) as n:
        assert n.ends() == [1, 1], n.text()
    # by the one that notices first; the other may find it gone already
    told = [said for node in (0, 1) if "ranks cannot connect to each other" in (said := n.files[node].read_text())]
    assert told
    assert all("resolves to a loopback address here" in said and "GLOO_SOCKET_IFNAME" in said for said in told)


# --- where ranks meet


@pytest.mark.slow
def test_a_wrong_address_is_told_where_it_is_used(plan, tmp_path):
    """Each machine's localhost is itself: rank 0 waits, rank 1 finds nobody, and both end in time."""
    with two_machines(tmp_path) as machines:
        ranks, port = [], str(free_port())
        for rank, machine in enumerate(machines):
            env = environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port)
            words = machine.words(sys.executable, "-m", "tlx", "train", plan[0], "world.timeout_minutes=0.05")
            ranks.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        first, second = (process.communicate(timeout=120)[0] for process in ranks)
    assert [process.returncode for process in ranks] == [1, 1]
    assert "rank 1 (two) cannot connect to MASTER_ADDR:MASTER_PORT = localhost:" in second
    assert "localhost is two itself: if rank 0 runs elsewhere" in second
    assert "not all 2 ranks joined at localhost:" in first
    assert "MASTER_ADDR must lead them to this machine (one)" in first
    assert "Exception raised from" not in second, "a trace of C++"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1", "is .* itself: if rank 0 runs elsewhere"),
        ("nowhere.invalid", "cannot resolve nowhere.invalid"),
    ],
)
def test_nobody_is_where_rank_0_should_be(monkeypatch, address, said):
    monkeypatch.setattr(rendezvous, "limit_of", lambda config: timedelta(seconds=0.2))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TlxError, match=rf"rank 1 .* cannot connect to .* = {address}:9 (.|\n)*{said}"):
        rendezvous.join_ranks(smallest_config())


def test_nothing_says_where_ranks_meet(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="this is rank 1 of 2, and nothing says where ranks meet"):
        rendezvous.join_ranks(smallest_config())


def test_tasks_of_srun_that_nobody_has_made_ranks_of(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"srun has started 4 tasks(.|\n)*train\.sbatch(.|\n)*RANK=\$SLURM_PROCID"):
        rendezvous.join_ranks(smallest_config(world={"device": "cpu"}))
    monkeypatch.setenv("WORLD_SIZE", "1")  # a training per task
    assert rendezvous.join_ranks(smallest_config(world={"device": "cpu"})).size == 1


@pytest.mark.parametrize(
    ("address", "port", "said"),
    [
        ("127.0.0.1", "70000", r"MASTER_PORT: '70000' is not a port\n  -> .* 1 to 65535"),
        ("127.0.0.1", "0", "MASTER_PORT: '0' is not a port"),
        ("127.0.0.1", "\N{SUPERSCRIPT TWO}", "MASTER_PORT: .*xb2' is not a port"),
        ("a..b", "9", r"MASTER_ADDR: not a valid host name\n  -> .* cannot resolve a\.\.b"),
    ],
)
def test_what_cannot_be_an_address_is_told_at_once(monkeypatch, address, port, said):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        rendezvous.join_ranks(smallest_config())
