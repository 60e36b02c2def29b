"""Slurm's settings that bite, of the cluster, of this job and of this step."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

from tlx.base import limits
from tlx.base.slurm import present, records, run
from tlx.doctor.findings import Finding, fault, ok, warning
from tlx.doctor.place import Place, in_step

_SCONTROL_S = 8.0
_SHORT_S = 300  # of a job's time: too little to begin with
_STOP = "end jobs by touch RUN/stop or scancel --batch --signal=USR1 JOB, and save often (checkpoint.every)"


class NoAnswer(Exception):
    """scontrol failed, or did not answer in time."""


def scontrol(*words: str) -> str:
    """What `scontrol WORDS` prints.

    Raises:
        NoAnswer: with what it said instead.
    """
    said = ["scontrol", *words]
    try:
        done = run(*said, patience_s=_SCONTROL_S)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"`{' '.join(said)}` has not answered within {_SCONTROL_S:.0f} s") from None
    except OSError as error:
        raise NoAnswer(f"`{' '.join(said)}` cannot be run: {error.strerror}") from error
    if done.returncode:
        text = next(iter((done.stderr or done.stdout).strip().splitlines()), f"exit code {done.returncode}")
        raise NoAnswer(f"`{' '.join(said)}` failed: {text[:200]}")
    return done.stdout


def settings(text: str) -> dict[str, str]:
    """``Key = value`` lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs if re.fullmatch(r"\s*\w+\s*", key)}


def seconds(text: str) -> float | None:
    """Of a setting of the cluster, ``30 sec`` or ``5 min``; None of other words."""
    said = re.fullmatch(r"(\d+)\s*(sec|min)?", text)
    return float(said[1]) * (60 if said[2] == "min" else 1) if said else None


def cluster() -> Iterator[Finding]:
    try:
        yield from judge_config(settings(scontrol("show", "config")))
        yield from partitions(records(scontrol("show", "partition", "-o")))
    except NoAnswer as error:
        yield warning("Slurm", str(error), "is slurmctld up? `scontrol ping` and `sinfo` tell")


def judge_config(config: Mapping[str, str]) -> Iterator[Finding]:
    version, name = config.get("SLURM_VERSION", "?"), config.get("ClusterName", "?")
    yield ok("Slurm", f"version {version}, cluster {name}")
    if config.get("JobRequeue") == "0":
        yield warning(
            "requeue",
            "JobRequeue=0: a job does not come back after a node failure or a preemption unless it asks for it",
            "sbatch --requeue, as slurm/train.sbatch does; or JobRequeue=1 in slurm.conf",
        )
    elif "JobRequeue" in config:
        yield ok("requeue", f"JobRequeue={config['JobRequeue']}: jobs may be requeued")
    wait = seconds(config.get("KillWait", ""))
    if wait is not None and wait < 30:
        yield warning(
            "KillWait",
            f"{wait:.0f} s from SIGTERM to SIGKILL, at scancel and at the time limit: little time for a checkpoint",
            f"KillWait=60 in slurm.conf, if that is yours; else {_STOP}",
        )
    elif wait is not None:
        yield ok("KillWait", f"{wait:.0f} s from SIGTERM to SIGKILL")
    yield from preemption("preemption", config.get("PreemptMode", "OFF"))


def preemption(name: str, mode: str) -> Iterator[Finding]:
    """Of the cluster or of a partition; ``GANG`` may stand beside the mode itself."""
    words = [word for word in mode.upper().split(",") if word not in ("GANG", "WITHIN")]
    if "CANCEL" in words:
        yield warning(
            name,
            f"PreemptMode={mode}: a job that is preempted is cancelled and does not come back",
            "save often (checkpoint.every); the same sbatch command goes on from the last checkpoint",
        )
    elif "SUSPEND" in words:
        said = f"PreemptMode={mode}: a job that is preempted is stopped in place; tlx's watch knows that"
        yield ok(name, said)
    elif "REQUEUE" in words:
        yield ok(name, f"PreemptMode={mode}: a job that is preempted comes back")
    else:
        yield ok(name, f"PreemptMode={mode}")


def partitions(found: Sequence[Mapping[str, str]]) -> Iterator[Finding]:
    """Names, nodes and time limits."""
    shown = []
    for one in found[:8]:
        limit = one.get("MaxTime", "?")
        star = "*" if one.get("Default") == "YES" else ""
        down = "" if one.get("State", "UP") == "UP" else f", {one['State']}"
        nodes = one.get("TotalNodes", "?")
        shown.append(f"{one.get('PartitionName')}{star} ({nodes} nodes, at most {limit}{down})")
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    if shown:
        yield ok("partitions", ", ".join(shown) + more)


def job(env: Mapping[str, str], place: Place) -> Iterator[Finding]:
    """The job that this process is in."""
    number = env["SLURM_JOB_ID"]
    try:
        found = records(scontrol("show", "job", "-o", number))
    except NoAnswer as error:
        yield warning("job", str(error), "is slurmctld up? `scontrol ping` tells")
        return
    if not found:
        yield warning("job", f"scontrol knows nothing of job {number}", "squeue tells")
        return
    record = next((one for one in found if one.get("JobId") == number), found[0])  # of an array there are several
    yield from judge_job(record, now=time.time())
    yield from judge_inherited(env, record)
    if record.get("BatchFlag") == "1":
        yield from _signal(number)
    yield from judge_step(env, place, cores=len(limits.cores()))


def judge_job(record: Mapping[str, str], *, now: float) -> Iterator[Finding]:
    """
    Args:
        now: in seconds since the epoch.
    """
    number = record.get("JobId", "?")
    batch = record.get("BatchFlag") == "1"
    restarts = record.get("Restarts", "0")
    often = f", requeued {restarts} times" if restarts not in ("0", "") else ""
    yield ok("job", f"{number}, nodes {record.get('NodeList', '?')}{often}")
    if batch and record.get("Requeue") == "0":
        yield warning(
            "requeue of the job",
            "Requeue=0: it does not come back after a node failure or a preemption",
            f"sbatch --requeue the next time; for this one: scontrol update JobId={number} Requeue=1",
        )
    try:
        end = time.mktime(time.strptime(record.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # Unknown
        return
    left = end - now
    limit = record.get("TimeLimit", "?")
    if limit == "UNLIMITED":
        yield ok("time left", "no limit")
    elif left < _SHORT_S:
        yield warning("time left", f"{max(left, 0):.0f} s of {limit}", "a longer --time; tlx goes on where it stopped")
    else:
        yield ok("time left", f"{left / 3600:.1f} h of {limit}" if left > 7200 else f"{left / 60:.0f} min of {limit}")


def judge_inherited(env: Mapping[str, str], record: Mapping[str, str]) -> Iterator[Finding]:
    """Variables of another job, which sbatch has handed on because this one was submitted from inside it."""
    array = sorted(name for name in env if name.startswith("SLURM_ARRAY_")) if "ArrayJobId" not in record else []
    memory = [name for name in ("SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE") if name in env]
    foreign = array + (memory if len(memory) > 1 else [])
    if foreign:
        yield warning(
            "variables of another job",
            f"{', '.join(foreign)}: the job was submitted inside another one; srun and scripts take them for its own",
            f"unset {' '.join(foreign)} before srun; slurm/train.sbatch and tlx submit do it",
        )


def _signal(number: str) -> Iterator[Finding]:
    try:
        script = scontrol("write", "batch_script", number, "-")
    except NoAnswer:  # of somebody else's job, or of a Slurm that keeps no scripts
        return
    yield from judge_signal(script)


def judge_signal(script: str) -> Iterator[Finding]:
    """Whether a batch script asks for a signal before the time limit; options of the command line are not seen."""
    asked = re.findall(r"^#SBATCH\s.*--signal[= ](\S+)", script, flags=re.MULTILINE)
    if not asked:
        yield warning(
            "signal",
            "the batch script asks for no signal before the time limit (options of sbatch itself are not seen here)",
            "#SBATCH --signal=B:USR1@180 and a trap that does touch RUN/stop, as slurm/train.sbatch; or stop_after=",
        )
    elif not asked[-1].upper().startswith(("B:", "RB:", "BR:")):
        yield warning(
            "signal",
            f"--signal={asked[-1]} goes to the steps, where it kills launchers and W&B's service",
            "--signal=B:USR1@180, which goes to the batch script only, and a trap that does touch RUN/stop",
        )
    else:
        yield ok("signal", f"--signal={asked[-1]} to the batch script")


def judge_step(env: Mapping[str, str], place: Place, *, cores: int) -> Iterator[Finding]:
    """GPUs and cores of this step, against what was given to the job.

    Args:
        cores: that this process may use.
    """
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and not place.alone and 0 < place.here < int(gpus):
        yield warning(
            "GPUs of the job",
            f"{gpus} on this node, and {place.here} ranks: some are idle",
            f"start {gpus} ranks a node, or ask for --gpus-per-node={place.here}",
        )
    elif gpus.isdigit() and not place.alone and place.here > int(gpus) > 0:
        yield warning(
            "GPUs of the job",
            f"{gpus} on this node, and {place.here} ranks: they share",
            f"start {gpus} ranks a node, or ask for --gpus-per-node={place.here}",
        )
    elif gpus:
        yield ok("GPUs of the job", f"{gpus} on this node")
    asked = env.get("SLURM_CPUS_PER_TASK", "")
    if in_step(env) and not asked and cores == 1 and place.here <= 1:
        yield warning(
            "cores of the step",
            "srun was not told --cpus-per-task, and this task may use one core",
            "srun --cpus-per-task=N: since Slurm 22.05 srun does not take it from sbatch",
        )
    elif in_step(env) and asked.isdigit() and cores < int(asked):
        yield warning(
            "cores of the step",
            f"--cpus-per-task is {asked}, and this task may use {cores}",
            f"srun --cpus-per-task={asked}: since Slurm 22.05 srun does not take it from sbatch",
        )
    elif asked:
        yield ok("cores of the step", f"--cpus-per-task is {asked}, and this task may use {cores}")


def judge_nodes(listed: Sequence[str], reached: Sequence[str]) -> Iterator[Finding]:
    """The nodes of the job, against the hosts of the ranks that have met; short names."""
    here = {host.partition(".")[0] for host in reached}
    absent = [node for node in listed if node.partition(".")[0] not in here]
    if not here & {node.partition(".")[0] for node in listed}:
        return  # a node's name need not be its host's
    if absent:
        yield warning(
            "nodes of the job",
            f"no rank runs on {', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}, which the job has",
            "srun --nodes=$SLURM_JOB_NUM_NODES, one launcher a node; or ask for fewer nodes",
        )
    else:
        yield ok("nodes of the job", f"ranks run on all {len(listed)}")


def nodes_of(env: Mapping[str, str]) -> list[str]:
    """Of this job; Slurm writes lists as ``node[1-2]``. Empty where that is not known."""
    names = env.get("SLURM_JOB_NODELIST")
    if not names or not present("scontrol"):
        return []
    try:
        return scontrol("show", "hostnames", names).split()
    except NoAnswer:
        return []


def outside(env: Mapping[str, str]) -> Iterator[Finding]:
    """Slurm's own variables outside of scontrol's reach: a container, say, that has no Slurm inside."""
    if env.get("SLURM_JOB_ID") and not present("scontrol"):
        yield ok("Slurm", f"in job {env['SLURM_JOB_ID']}, and there is no scontrol here (a container?)")
    if (
        env.get("SLURM_JOB_ID")
        and env.get("SLURM_CONF")
        and not os.path.exists(env["SLURM_CONF"])
        and present("scontrol")
    ):
        yield fault("Slurm", f"SLURM_CONF={env['SLURM_CONF']} is not there", "unset it, or mount the file")
