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

_OF_THE_SCRIPT = re.compile(
    "SBATCH_(ARRAY_INX|COMMENT|CHDIR|JOB_NAME|OPEN_MODE|OUTPUT|SIGNAL|REQUEUE|NO_REQUEUE|WAIT|TIMELIMIT|NODES|GRES|"
    "CPUS_PER_(TASK|GPU)|GPUS|GPUS_PER_(NODE|TASK)|NTASKS_PER_NODE|GPU_BIND|TRES_PER_TASK)"
)
_MEMORY = ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU")


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
    said = _call("squeue", f"--user={os.getuid()}", "--noheader", "--format=%i|%T|%k")
    rows = [line.split("|", 2) for line in said.splitlines() if line.count("|") >= 2]
    return [(job, state) for job, state, comment in rows if comment == f"{MARK}{run}"]


def tried(script: str, options: Mapping[str, str | None]) -> str:
    """What `sbatch --test-only` says: when the job would start, or that it would wait. Of nodes that are down it says
    the same as of nodes that there are none of, which sbatch itself then refuses.

    Raises:
        UserError: it would be refused; in sbatch's own words.
    """
    try:
        said = _call("sbatch", "--test-only", stdin=script, env=_environment(options))
    except UserError as error:
        if _NONE in error.what.lower():
            return f"{error.what} (there are no such nodes, or they are down)"
        if any(sign in error.what.lower() for sign in _LATER):
            return f"it would wait: {error.what}"
        raise
    when = re.search(r"Job \S+ (to start at .*)", said)
    return when[1] if when else " ".join(said.split())


def node_cpus(partition: str | None) -> int | None:
    """CPUs of the largest node of a partition, by default of any; None where Slurm does not say."""
    asked = partition or environment().get("SBATCH_PARTITION")
    try:
        said = _call("sinfo", "--noheader", *([f"--partition={asked}"] if asked else []), "--format=%c cpus")
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
    taken = {f"SBATCH_{name.upper().replace('-', '_')}" for name in options}
    if {"mem", "mem-per-cpu", "mem-per-gpu"} & set(options):
        taken |= {f"SBATCH_{name}" for name in _MEMORY}
    variables = environment().outside()
    return {k: v for k, v in variables.items() if k not in taken and not _OF_THE_SCRIPT.fullmatch(k)}


def _call(*words: str, stdin: str = "", env: Mapping[str, str] | None = None) -> str:
    """What a command prints, on both channels; sbatch --test-only answers on the second. Variables that stand for its
    options (``SINFO_FORMAT``) are not for our calls."""
    options = f"{words[0].upper()}_"
    own = {name: value for name, value in environment().variables.items() if not name.startswith(options)}
    try:
        done = run(*words, stdin=stdin, env=own if env is None else env, patience_s=PATIENCE_S)
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
_NONE = "node configuration is not available"

_REMEDIES = {
    "node configuration": "fewer --gpus, or -- --cpus-per-gpu or --mem: sinfo -o '%P %D %c %m %G' shows the nodes",
    "partition not available": "it is closed: sinfo tells; -- --partition=OTHER",
    "unrecognized option": "what follows the -- is sbatch's: sbatch --help",
    "configuration source": "there is no slurm.conf here: is SLURM_CONF set? Or run this on a login node",
    "contact": "does slurmctld run? scontrol ping",
}


def _remedy(text: str) -> str | None:
    if wrong := re.search(r"invalid (account|partition|qos)", text.lower()):
        mine = "sinfo and sacctmgr show associations user=$USER list yours"
        return f"-- --{wrong[1]}=NAME, or {wrong[1]} in the site file: {mine}"
    return next((todo for sign, todo in _REMEDIES.items() if sign in text.lower()), None)
