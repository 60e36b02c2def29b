"""The calls of Slurm's own commands: no shell, and a limit of time to each."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlx.base.errors import UserError
from tlx.base.launcher import environment
from tlx.base.slurm import present, records, run
from tlx.submit import times

PATIENCE_S = 60.0
MARK = "tlx:"
"""Before the run's folder, in the comment of a job."""

_OURS: tuple[str, ...] = (
    "ARRAY_INX",
    "COMMENT",
    "CHDIR",
    "JOB_NAME",
    "OPEN_MODE",
    "OUTPUT",
    "SIGNAL",
    "REQUEUE",
    "NO_REQUEUE",
    "WAIT",
)
_OURS += ("TIMELIMIT", "NODES", "CPUS_PER_TASK", "CPUS_PER_GPU", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK")
_OURS += ("NTASKS_PER_NODE", "GRES", "GPU_BIND", "TRES_PER_TASK")
_MAYBE = {
    "partition": ("PARTITION",),
    "account": ("ACCOUNT",),
    "qos": ("QOS",),
    "constraint": ("CONSTRAINT",),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU")),
}


class Unsure(UserError):
    """What was asked for may have been done all the same."""


@dataclass(frozen=True)
class Partition:
    """
    Attributes:
        most: seconds that a job may take; None for no limit.
    """

    name: str
    default: bool
    most: int | None


def there() -> bool:
    """Whether this machine has Slurm's commands."""
    return present("sbatch")


def absent() -> UserError:
    return UserError(
        "there is no sbatch on this machine", todo="run this on a login node of the cluster; --dry-run works anywhere"
    )


def partitions() -> list[Partition]:
    """
    Raises:
        UserError: with scontrol's own words.
    """
    return [
        Partition(about["PartitionName"], about.get("Default") == "YES", times.limit(about.get("MaxTime", "")))
        for about in records(_call("scontrol", "show", "partition", "--oneliner"))
        if "PartitionName" in about
    ]


def jobs_of(run: Path) -> list[tuple[str, str]]:
    """Jobs of this user for a run that wait or run, as (id, state); ids of arrays are ``12_[0-3]``.

    Raises:
        UserError: with squeue's own words.
    """
    env = {name: value for name, value in environment().variables.items() if not name.startswith("SQUEUE_")}
    said = _call("squeue", f"--user={os.getuid()}", "--noheader", "--format=%i|%T|%k", env=env)
    rows = [line.split("|", 2) for line in said.splitlines() if line.count("|") >= 2]
    return [(job, state) for job, state, comment in rows if comment == f"{MARK}{run}"]


def tried(script: str, options: Mapping[str, str | None]) -> str:
    """What `sbatch --test-only` says: when the job would start.

    Raises:
        UserError: it would be refused; in sbatch's own words.
    """
    try:
        said = _call("sbatch", "--test-only", stdin=script, env=_environment(options))
    except UserError as error:
        if any(sign in error.what.lower() for sign in _LATER):
            return f"it would wait: {error.what}"
        if _NOT_AVAILABLE in error.what.lower() and _are_down(options):
            return f"it would wait: nodes are down or drained ({error.what})"
        raise
    when = re.search(r"Job \S+ (to start at .*)", said)
    return when[1] if when else " ".join(said.split())


def _are_down(options: Mapping[str, str | None]) -> bool:
    """Whether too few of the partition's nodes work now, and all of them would be enough: sbatch queues such a job."""
    partition = options.get("partition") or environment().get("SBATCH_PARTITION")
    env = {name: value for name, value in environment().variables.items() if not name.startswith("SINFO_")}
    try:
        said = _call(
            "sinfo", "--noheader", *([f"--partition={partition}"] if partition else []), "--format=%t %D", env=env
        )
    except UserError:
        return False
    rows = [line.split() for line in said.splitlines()]
    counts = [(state, int(count)) for state, count in (row for row in rows if len(row) == 2) if count.isdecimal()]
    # a star: the node does not answer; other signs behind a state, of nodes that sleep or reboot, leave it of use
    up = sum(count for state, count in counts if re.fullmatch(r"(idle|alloc|mix|comp)[^*]?", state))
    return up < int(options.get("nodes") or 1) <= sum(count for _, count in counts)


def node_cpus(partition: str | None) -> int | None:
    """CPUs of the largest node of a partition, by default of any; None where Slurm does not say."""
    asked = partition or environment().get("SBATCH_PARTITION")
    words = [f"--partition={asked}"] if asked else []
    env = {name: value for name, value in environment().variables.items() if not name.startswith("SINFO_")}
    try:
        said = _call("sinfo", "--noheader", *words, "--format=%c cpus", env=env)
    except UserError:
        return None
    counts = re.findall(r"^(\d+)\+? cpus$", said, flags=re.MULTILINE)  # 8+: of unequal nodes at least these
    return max(map(int, counts), default=None)


def queued(words: Sequence[str], options: Mapping[str, str | None]) -> str:
    """Submits; the job's id.

    Args:
        words: the script and its arguments.

    Raises:
        UserError: sbatch refuses, in its own words.
        Unsure: it does not answer, or names no job.
    """
    said = _call("sbatch", "--parsable", *words, env=_environment(options))
    # plugins of a site may print lines of their own
    found = [line for line in said.splitlines() if re.fullmatch(r"\d+(;\S+)?", line.strip())]
    if not found:
        raise Unsure(f"sbatch has printed no job id: {' '.join(said.split())}", todo="is it queued? squeue --me")
    return found[-1].strip().partition(";")[0]


def _environment(options: Mapping[str, str | None]) -> dict[str, str]:
    """Without the variables that sbatch would put before the lines of the script, and without those of a job or a
    launcher that this process runs in, which sbatch would hand on."""
    taken = {f"SBATCH_{name}" for name in _OURS}
    taken |= {f"SBATCH_{name}" for key, names in _MAYBE.items() if key in options for name in names}
    return {name: value for name, value in environment().outside().items() if name not in taken}


def _call(*words: str, stdin: str = "", env: Mapping[str, str] | None = None) -> str:
    """What a command prints, on both channels; sbatch --test-only answers on the second."""
    try:
        done = run(*words, stdin=stdin, env=env, patience_s=PATIENCE_S)
    except FileNotFoundError as error:
        raise UserError(f"there is no {words[0]} on this machine", todo="run this on a login node") from error
    except subprocess.TimeoutExpired as error:
        perhaps = "; the job may be queued all the same: squeue --me" if "--parsable" in words else ""
        raise Unsure(
            f"{words[0]} has not answered for {PATIENCE_S:g} s{perhaps}", todo="does slurmctld run? scontrol ping"
        ) from error
    said = f"{done.stdout}\n{done.stderr}".strip()
    if done.returncode:
        text = " ".join(line.strip() for line in said.splitlines()) or f"exit code {done.returncode}"
        raise UserError(text if text.startswith(words[0]) else f"{words[0]}: {text}", todo=_remedy(text))
    return said


_LATER = ("nodes are busy", "node not available")
"""Of what keeps a job waiting, and is no reason to refuse it."""

_NOT_AVAILABLE = "node configuration is not available"
"""Said of what no node has, and likewise of what only nodes have that are down."""

_REMEDIES = (
    ("invalid account", "--account, or account in the site file: sacctmgr show associations user=$USER lists yours"),
    ("invalid partition", "--partition, or partition in the site file: sinfo lists them"),
    ("invalid qos", "--qos, or qos in the site file: sacctmgr show qos lists them"),
    ("invalid feature", "--constraint, or constraint in the site file: sinfo --format='%P %f' lists them"),
    ("time limit", "a shorter --time: the job goes on after each requeue"),
    (
        "node configuration",
        "fewer --gpus, --cpus-per-gpu or memory to a node: sinfo --format='%P %D %c %m %G' shows them",
    ),
    ("more processors", "fewer --cpus-per-gpu or --nodes: sinfo --format='%P %D %c %m %G' shows what there is"),
    ("generic resource", "gpus_per_node and gpu_type in the site file: sinfo --format='%P %D %G' shows what there is"),
    ("policy", "less at once, or another --qos; sacctmgr show associations user=$USER shows your limits"),
    ("unrecognized option", "is --option, or options in the site file, written as sbatch --help has it?"),
    ("partition not available", "it is closed: sinfo tells; --partition for another one"),
    (
        "configuration source",
        "Slurm's commands find no slurm.conf here: is SLURM_CONF set? Or run this on a login node",
    ),
    ("configuration file", "is SLURM_CONF right? It must name a slurm.conf that is there"),
    ("contact", "does slurmctld run? scontrol ping"),
)


def _remedy(text: str) -> str | None:
    return next((todo for sign, todo in _REMEDIES if sign in text.lower()), None)
