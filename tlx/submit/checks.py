"""What is looked at on the login node before a job is queued."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from tlx.base.errors import ConfigError, Problems, UserError, did_you_mean, lines
from tlx.base.launcher import environment
from tlx.base.location import without_credentials
from tlx.data.stream.order import micro_batches, share
from tlx.plan.config import Config
from tlx.runs.run_folder import JOBS, RunFolder, refuse_read_only
from tlx.runs.run_lock import holder
from tlx.submit import slurm, times
from tlx.submit.job import Job

if TYPE_CHECKING:
    from tlx.plan.plan import Plan
    from tlx.tasks import Task
    from tlx.train.data import Samples

T = TypeVar("T")


@dataclass
class Findings:
    """What was found: `problems` keep a job from being queued, `warnings` do not."""

    problems: Problems = field(default_factory=Problems)
    warnings: list[str] = field(default_factory=list)

    def of(self, act: Callable[[], T]) -> T | None:
        """What `act` gives; a user's mistake in it becomes a problem."""
        return self.problems.of(act)

    def refuse(self) -> None:
        """
        Raises:
            UserError: with every problem.
        """
        texts = [lines(e) if isinstance(e, ConfigError) else [str(e)] for e in self.problems.errors]
        problems = list(dict.fromkeys(itertools.chain(*texts)))  # the plan and the weights may meet the same one
        if problems:
            count = len(problems)
            found = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in problems)
            raise UserError(f"not submitted, {count} problem{'s' * (count > 1)}:\n{found}")


def check_training(config: Config, job: Job, findings: Findings) -> Plan | None:
    """Shards, plan, weights and dealing; the plan on so many ranks, where one can be made."""
    from tlx.train import data as feed
    from tlx.train.components import task_of

    # the shards themselves, and not what data.expected says of them
    findings.of(lambda: feed.open_sets(config, staged=False))
    try:
        samples = feed.count_samples(config)
    except UserError:  # which open_sets has found too
        samples = None
    task = findings.of(lambda: task_of(config, samples)) if samples is not None else None
    made = findings.of(lambda: _plan(config, samples, task, job.world)) if samples is not None and task else None
    findings.of(lambda: _load(config, samples, task))
    if config.world.size not in (None, job.world):
        what = f"the configuration expects {config.world.size} ranks, the job has {job.world}"
        todo = f"world.size={job.world}, or other --nodes and --gpus"
        findings.problems.add(UserError(what, where="world.size", todo=todo))
    if config.world.device == "cuda" and not job.gpus:
        what = "cuda is asked for, and the job has no GPUs"
        findings.problems.add(UserError(what, where="world.device", todo="world.device=auto"))
    findings.warnings += [*(made.warnings if made is not None else ()), *_uneven(config, job.world)]
    findings.warnings += _slow_or_late(config, job)
    return made


def _load(config: Config, samples: Samples | None, task: Task | None) -> None:
    """Loads the weights without a network, which nodes may not have."""
    from tlx.models.weights import download
    from tlx.tasks import outputs_of
    from tlx.train.components import backbone_of, unknown_outputs
    from tlx.train.data import known_names, known_scale

    if config.backbone.weights != "none" or config.keeps_head:
        with download.without_network():
            outputs = outputs_of(task) if task is not None else unknown_outputs(config)
            names, scale = known_names(config, samples, task), known_scale(samples, task)
            backbone_of(config, outputs, names=names, scale=scale)


def _plan(config: Config, samples: Samples, task: Task, world: int) -> Plan | None:
    from tlx.tasks import outputs_of
    from tlx.train.build import checked_plan, try_on_shapes
    from tlx.train.components import backbone_of
    from tlx.train.data import known_names, known_scale

    names, scale = known_names(config, samples, task), known_scale(samples, task)
    backbone = backbone_of(config, outputs_of(task), empty=True, names=names, scale=scale)
    made, _ = checked_plan(config, backbone, samples, task, world)
    if made is not None:
        try_on_shapes(config, made, backbone, task)
    return made


def _uneven(config: Config, world: int) -> list[str]:
    """What is uneven about how a global batch is dealt to the ranks."""
    batch, most = config.data.batch, config.loop.micro_batch
    if batch < world:  # the plan refuses it
        return []
    shares = [len(share(batch, world, rank)) for rank in (0, world - 1)]
    if shares[0] != shares[1]:
        even = f"{batch - batch % world} or {batch - batch % world + world}"
        return [
            f"data.batch={batch} on {world} ranks: some take {shares[0]} samples, others {shares[1]} and wait; {even} "
            "would be even"
        ]
    parts = micro_batches(batch, world, most)
    if shares[0] % parts:
        return [
            f"loop.micro_batch={most}: a rank's {shares[0]} samples become {parts} micro-batches that are not alike"
        ]
    return []


def _slow_or_late(config: Config, job: Job) -> list[str]:
    found = []
    each, wanted = job.cpus // job.ranks, config.data.workers + 1
    if each < wanted:
        found.append(
            f"data.workers={config.data.workers} and the training itself want {wanted} CPUs, a rank has {each}: "
            f"--cpus-per-gpu={wanted} for sbatch, or data.workers={max(each - 1, 0)}"
        )
    if config.stop_after is not None and config.stop_after >= job.time:
        limits = f"stop_after ({times.written(config.stop_after)}) is not shorter than the job"
        found.append(f"{limits} ({times.written(job.time)}): it never comes to that")
    return found


def check_words(words: Sequence[str], *, frozen: bool) -> list[str]:
    """Warnings about key=value words that anybody may read while the job is queued.

    Args:
        frozen: the job reads a file in place of the words; the run's folder is its comment all the same.
    """
    return [
        f"{key}: everybody on the cluster can read this address, with its credentials (scontrol show job)"
        for key, _, value in (word.partition("=") for word in words)
        if without_credentials(value) != value and (not frozen or key == "run")
    ]


def check_folder(config: Config, job: Job, findings: Findings, *, changed: bool) -> None:
    """Whether the run may go on in its folder, or begin there. Nothing stays of it.

    Args:
        changed: the configuration may be another one than the run's.
    """
    for folder in (job.run, job.run / JOBS):
        findings.of(functools.partial(refuse_read_only, folder))
    owner = holder(job.run)
    if owner is not None:
        todo = f"wait for it, stop it (touch {job.run / 'stop'}), or set run to another folder"
        what = f"a training runs in this folder: {owner}"
        findings.problems.add(UserError(what, where=str(job.run), todo=todo))
    if not changed:
        findings.of(lambda: RunFolder(config.run).refuse_changes(config))


def check_queue(job: Job, findings: Findings, *, dry: bool) -> bool:
    """Whether Slurm would take it, by its own words: the queue, the partition's limit. Nothing is queued.

    Args:
        dry: a Slurm that does not answer is no reason to refuse; only its client may be here.

    Returns:
        Whether Slurm answers.
    """
    try:
        same = slurm.jobs_of(job.run)
    except UserError as error:  # the rest would only say so again
        if dry:
            findings.warnings.append(str(error))
        else:
            findings.problems.add(error)
        return False
    for number, state in same:
        what = f"job {number} is for the same run, and {state.lower()}"
        todo = f"wait for it, scancel {number}, or set run to another folder"
        findings.problems.add(UserError(what, todo=todo))
    partitions = findings.of(slurm.partitions)
    if partitions:
        findings.of(lambda: _limit(job, partitions, findings.warnings))
    return True


def _limit(job: Job, partitions: Sequence[slurm.Partition], warnings: list[str]) -> None:
    asked, where = job.options.get("partition"), "--partition"
    if not asked and (said := environment().get("SBATCH_PARTITION")):  # which sbatch heeds, too
        asked, where = said, "SBATCH_PARTITION"
    known = {p.name: p for p in partitions}
    names = asked.split(",") if asked else [p.name for p in partitions if p.default]
    for name in names:
        if name not in known:
            raise UserError(f'there is no partition "{name}"{did_you_mean(name, known)}', where=where)
    longest = max((known[name].most or math.inf for name in names), default=math.inf)
    if longest >= job.time:
        return
    enough = [p.name for p in partitions if p.most is None or p.most >= job.time]
    limit, other = times.written(int(longest)), f", or --partition={' or '.join(enough)}" if enough else ""
    error = UserError(
        f"{times.written(job.time)} is more than partition {','.join(names)} allows ({limit})",
        where="--time",
        todo=f"--time {limit}: the job goes on after each requeue{other}",
    )
    if not (job.options.get("qos") or environment().get("SBATCH_QOS")):
        raise error
    warnings.append(f"{error.where}: {error.what}, unless the qos allows more")
