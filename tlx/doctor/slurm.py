"""Slurm's settings that bite, of the cluster, of this job and of this step. `sinfo` and `squeue` tell the rest."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from tlx.base import limits
from tlx.base.slurm import present, records, run
from tlx.doctor.findings import Finding, ok, warning
from tlx.doctor.place import Place, in_step

_SCONTROL_S = 8.0
_STOP = "end jobs by touch RUN/stop or scancel --batch --signal=USR1 JOB, and save often (checkpoint.every)"


class NoAnswer(Exception):
    """scontrol failed, or did not answer in time."""


def scontrol(*words: str) -> str:
    """What `scontrol WORDS` prints.

    Raises:
        NoAnswer: with what it said instead.
    """
    said = f"`scontrol {' '.join(words)}`"
    try:
        done = run("scontrol", *words, patience_s=_SCONTROL_S)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{said} has not answered within {_SCONTROL_S:.0f} s") from None
    except OSError as error:
        raise NoAnswer(f"{said} cannot be run: {error.strerror}") from error
    if done.returncode:
        text = (done.stderr or done.stdout).strip().partition("\n")[0][:200]
        raise NoAnswer(f"{said} failed with {done.returncode}: {text}")
    return done.stdout


def settings(text: str) -> dict[str, str]:
    """``Key = value`` lines of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cluster() -> Iterator[Finding]:
    try:
        yield from judge_config(settings(scontrol("show", "config")))
    except NoAnswer as error:
        yield warning("Slurm", str(error), "is slurmctld up? `scontrol ping` and `sinfo` tell")


def judge_config(config: Mapping[str, str]) -> Iterator[Finding]:
    yield ok("Slurm", f"version {config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}")
    if config.get("JobRequeue") == "0":
        yield warning(
            "requeue",
            "JobRequeue=0: a job does not come back after a node failure or a preemption unless it asks for it",
            "sbatch --requeue, as slurm/train.sbatch does; or JobRequeue=1 in slurm.conf",
        )
    wait = re.fullmatch(r"(\d+) sec", config.get("KillWait", ""))
    if wait is not None and int(wait[1]) < 30:
        yield warning(
            "KillWait",
            f"{wait[1]} s from SIGTERM to SIGKILL, at scancel and at the time limit: little time for a checkpoint",
            f"KillWait=60 in slurm.conf, if that is yours; else {_STOP}",
        )
    if "CANCEL" in (mode := config.get("PreemptMode", "")).split(","):
        yield warning(
            "preemption",
            f"PreemptMode={mode}: a job that is preempted is cancelled and does not come back",
            "save often (checkpoint.every); the same sbatch command goes on from the last checkpoint",
        )


def job(env: Mapping[str, str], place: Place) -> Iterator[Finding]:
    """The job that this process is in."""
    number = env["SLURM_JOB_ID"]
    try:
        found = records(scontrol("show", "job", "-o", number))
    except NoAnswer as error:
        yield warning("job", str(error), "is slurmctld up? `scontrol ping` tells")
        return
    # of an array there are several
    record = next((one for one in found if one.get("JobId") == number), found[0] if found else {})
    if record.get("BatchFlag") == "1":
        if record.get("Requeue") == "0":
            yield warning(
                "requeue of the job",
                "Requeue=0: it does not come back after a node failure or a preemption",
                f"sbatch --requeue the next time; for this one: scontrol update JobId={number} Requeue=1",
            )
        yield from _signal(number)
    yield from judge_step(env, place, cores=len(limits.cores()))


def _signal(number: str) -> Iterator[Finding]:
    try:
        script = scontrol("write", "batch_script", number, "-")
    except NoAnswer:  # of somebody else's job, or of a Slurm that keeps no scripts
        return
    yield judge_signal(script)


def judge_signal(script: str) -> Finding:
    """Whether a batch script asks for a signal before the time limit; options of the command line are not seen."""
    asked = re.findall(r"^#SBATCH\s.*--signal[= ](\S+)", script, flags=re.MULTILINE)
    todo = "#SBATCH --signal=B:USR1@180 and a trap that does touch RUN/stop, as slurm/train.sbatch; or stop_after="
    if not asked:
        said = "the batch script asks for no signal before the time limit (options of sbatch itself are not seen here)"
        return warning("signal", said, todo)
    if not asked[-1].upper().startswith(("B:", "RB:", "BR:")):
        said = f"--signal={asked[-1]} goes to the steps, where it kills launchers and W&B's service"
        return warning("signal", said, todo)
    return ok("signal", f"--signal={asked[-1]} to the batch script")


def judge_step(env: Mapping[str, str], place: Place, *, cores: int) -> Iterator[Finding]:
    """GPUs and cores of this step, against what was given to the job.

    Args:
        cores: that this process may use.
    """
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and int(gpus) and not place.alone and place.here != int(gpus):
        yield warning(
            "GPUs of the job",
            f"{gpus} on this node, and {place.here} ranks: some are idle, or ranks share one",
            f"start {gpus} ranks a node, or ask for --gpus-per-node={place.here}",
        )
    asked = env.get("SLURM_CPUS_PER_TASK", "")
    wanted = int(asked) if asked.isdigit() else 2 if place.here <= 1 else 1
    if in_step(env) and cores < wanted:
        yield warning(
            "cores of the step",
            f"--cpus-per-task is {asked or 'not given to srun'}, and this task may use {cores}",
            "srun --cpus-per-task=N: since Slurm 22.05 srun does not take it from sbatch",
        )


def judge_nodes(listed: Sequence[str], reached: Sequence[str]) -> Iterator[Finding]:
    """The nodes of the job, against the hosts of the ranks that have met; short names."""
    here = {host.partition(".")[0] for host in reached}
    absent = [node for node in listed if node.partition(".")[0] not in here]
    if absent and len(absent) < len(listed):  # a node's name need not be its host's
        yield warning(
            "nodes of the job",
            f"no rank runs on {', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}, which the job has",
            "srun --nodes=$SLURM_JOB_NUM_NODES, one launcher a node; or ask for fewer nodes",
        )


def nodes_of(env: Mapping[str, str]) -> list[str]:
    """Of this job; Slurm writes lists as ``node[1-2]``. Empty where that is not known."""
    names = env.get("SLURM_JOB_NODELIST")
    if not names or not present("scontrol"):
        return []
    try:
        return scontrol("show", "hostnames", names).split()
    except NoAnswer:
        return []
