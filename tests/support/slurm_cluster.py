"""A real Slurm cluster on one machine: munge, slurmctld, and a slurmd for every node.

A node is a set of namespaces (network, hostname, mounts, IPC, processes) on a bridge: it has its own address, hostname,
loopback, /dev/shm and ports, so that MASTER_ADDR=localhost fails as it does between machines, and killing the first
process of a node is a power cut. Nothing outside the cluster's folder is written. Needs root, Debian's packages
slurmctld, slurmd, slurm-client and munge, and iproute2; by hand:

    python tests/support/slurm_cluster.py FOLDER      # until Ctrl-C; says what to put into the environment
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "unshare", "nsenter", "setpriv")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
FREEZER = Path("/sys/fs/cgroup/freezer")

# cred_expire is also how long a requeued job waits, 120 s elsewhere; config_overrides: more CPUs than there are
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
PlugStackConfig={folder}/plugstack.conf
ProctrackType={tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=5,sched_max_job_start=0
PriorityType=priority/basic
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
InactiveLimit=0
OverTimeLimit=0
UnkillableStepTimeout=120
MinJobAge=3600
CompleteWait=0
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN Port={node_port}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""

# the first process of a node; it waits for its network
NODE = """\
hostname "$0"; mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o size=2g tmpfs /dev/shm
until [ -e "$1/$0.ready" ]; do sleep 0.02; done
slurmd -D -N "$0" & wait $!"""


def absent() -> str | None:
    """Why there can be no cluster here; None if there can."""
    missing = [p for p in PROGRAMS if shutil.which(p, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge iproute2"
    if os.geteuid() != 0:
        return "a cluster in namespaces needs root"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "ip", "link", "set", "lo", "up"],
        capture_output=True, text=True, check=False, env={**os.environ, "PATH": PATH},
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass
class Cluster:
    """A running cluster; see :func:`running`."""

    folder: Path
    nodes: int = 2
    cpus: int = 8
    gpus: int = 2
    kill_wait: int = 5
    grace: int = 30
    net: str = ""
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    @property
    def bridge(self) -> str:
        return "tlx" + self.net.rpartition(".")[2]

    @property
    def names(self) -> list[str]:
        """Of the nodes; no other cluster's here, since Slurm names control groups after nodes."""
        return [f"{self.bridge}n{i}" for i in range(1, self.nodes + 1)]

    # Slurm's commands

    def call(self, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The output of one of Slurm's commands."""
        env = {**(env if env is not None else os.environ), **self.environment}
        done = subprocess.run(
            list(map(str, words)), env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, number: str) -> list[dict[str, str]]:
        """What `scontrol show job` tells, of every job of an array."""
        lines = self.call("scontrol", "show", "job", "-o", number).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def job(self, number: str) -> dict[str, str]:
        return self.jobs(number)[0]

    def wait(self, number: str, done: Callable[[dict[str, str]], bool], *, timeout: float) -> dict[str, str]:
        """Until something holds of a job. A requeued one is not hurried on: its nodes may still refuse it."""
        deadline = time.monotonic() + timeout
        while not done(job := self.job(number)):
            assert time.monotonic() < deadline, f"job {number} after {timeout} s: {job}\n{self.log()}"
            time.sleep(0.1)
        return job

    def ended(self, number: str, *, timeout: float = 180) -> dict[str, str]:
        """A job that has ended and does not come again."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        return self.wait(number, lambda job: job["JobState"] in final, timeout=timeout)

    def log(self) -> str:
        return (self.folder / "log" / "slurmctld").read_text()[-2000:]

    # its life

    def start(self) -> None:
        for name in ("munge", "state", "log", "dev"):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        self._bridge()
        self._munge()
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for name in self.names:
            self.power_on(name)
        _until(self._idle, 30, lambda: f"nodes are not idle\n{self.log()}")

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self.call("scancel", "--full", "--user=root")
            _until(lambda: not self.call("squeue", "-h"), 5, lambda: "")
        for name in self.names:
            self.power_off(name)
        for name in ("slurmctld", "munged"):
            if name in self.daemons:
                _end(self.daemons.pop(name), signal.SIGTERM)
        _ip("link", "del", self.bridge, check=False)
        for name in self.names:  # what slurmd has left; rmdir refuses what still holds a process
            for path in sorted((FREEZER / f"slurm_{name}").glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()

    def power_off(self, name: str) -> None:
        """A power cut: every process of the node is gone at once."""
        if name in self.daemons:
            _end(self.daemons.pop(name), signal.SIGKILL)

    def power_on(self, name: str) -> None:
        """Starts a node, or repairs it."""
        ready = self.folder / f"{name}.ready"
        ready.unlink(missing_ok=True)
        words = (
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--ipc",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child=KILL",
        )
        node = self._daemon(name, *words, "bash", "-c", NODE, name, str(self.folder))
        first = _until(lambda: _first_child(node.pid), 10, lambda: f"{name} has not started")
        number = name.removeprefix(f"{self.bridge}n")
        link = f"{self.bridge}-{number}"
        _ip("link", "del", link, check=False)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", first)
        _ip("link", "set", link, "master", self.bridge, "up")
        up = f"ip link set lo up; ip addr add {self.net}.{number}/24 dev eth0; ip link set eth0 up"
        subprocess.run(["nsenter", "-t", first, "-n", "sh", "-c", up], check=True, env={**os.environ, "PATH": PATH})
        ready.touch()

    def _configure(self) -> None:
        ports = _free_ports(2)
        about = {
            "host": socket.gethostname().partition(".")[0],
            "port": ports[0],
            "node_port": ports[1],
            # the other one, linuxproc, loses processes whose parent died: their output holds a step open for a minute
            "tracking": f"proctrack/{'cgroup' if os.access(FREEZER / 'cgroup.procs', os.W_OK) else 'linuxproc'}",
        }
        self.net = _free_net()
        addresses = {name: f"{self.net}.{i}" for i, name in enumerate(self.names, 1)}
        about["nodes"] = "\n".join(f"NodeName={n} NodeHostname={n} NodeAddr={a}" for n, a in addresses.items())
        known = [f"{self.net}.254 {about['host']}", *(f"{address} {name}" for name, address in addresses.items())]
        kept = {k: v for k, v in vars(self).items() if k not in ("nodes", "daemons")}
        # a count of GPUs without files is dropped without a word: twins of /dev/null
        for i in range(self.gpus):
            os.mknod(self.folder / "dev" / f"nvidia{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        files = f"{self.folder}/dev/nvidia[0-{self.gpus - 1}]"
        for name, text in {
            "slurm.conf": CONFIGURATION.format(**kept, **about),
            "gres.conf": f"AutoDetect=off\nNodeName={self.bridge}n[1-{self.nodes}] Name=gpu File={files}\n",
            "cgroup.conf": "CgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nIgnoreSystemd=yes\n",
            "plugstack.conf": "",
            "hosts": "\n".join(["127.0.0.1 localhost", *known]) + "\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",  # no waiting for DNS
        }.items():
            (self.folder / name).write_text(text)

    def _bridge(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge", "forward_delay", "0")
        _ip("addr", "add", f"{self.net}.254/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def _munge(self) -> None:
        at = self.folder / "munge"
        key = at / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        at.chmod(0o700)
        files = {"key-file": key, "socket": at / "socket", "pid-file": at / "pid", "log-file": at / "log"}
        words = [f"--{k}={v}" for k, v in {**files, "seed-file": at / "seed"}.items()]
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=2", *words)
        _until((at / "socket").exists, 10, lambda: (self.folder / "log" / "munged.out").read_text())
        at.chmod(0o711)

    def _idle(self) -> bool:
        with contextlib.suppress(AssertionError):
            return set(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(self.names)
        return False

    def _daemon(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Ends with us, however we end."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for us
            )
        return self.daemons[name]


@contextlib.contextmanager
def running(folder: Path, **shape: int) -> Iterator[Cluster]:
    """A cluster of two nodes, each of 8 CPUs and 2 GPUs (of which neither need be there), until the block ends."""
    cluster = Cluster(folder, **shape)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _first_child(process: int) -> str:
    """The first process of a namespace, once it is in one."""
    try:
        child = Path(f"/proc/{process}/task/{process}/children").read_text().split()[0]
        there = os.readlink(f"/proc/{child}/ns/net")
    except (OSError, IndexError):
        return ""
    return child if there != os.readlink("/proc/self/ns/net") else ""


def _until(found: Callable[[], object], seconds: float, why: Callable[[], str]) -> str:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)
    return str(value)


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    process.send_signal(number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
        return
    process.kill()
    process.wait()


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env={**os.environ, "PATH": PATH}, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def _free_net() -> str:
    """The first three bytes of addresses that nobody has here; tests may run several times at once."""
    taken = _ip("-o", "addr")
    return next(n for n in (f"10.213.{x}" for x in random.sample(range(256), 256)) if f"{n}." not in taken)


def _free_ports(count: int) -> list[int]:
    """Below those that systems give to clients."""
    found: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


if __name__ == "__main__":
    with running(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())) as made:
        print(f"export SLURM_CONF={made.environment['SLURM_CONF']}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
