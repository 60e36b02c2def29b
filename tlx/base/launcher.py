"""What stands above this process: launcher, Slurm, the user's TLX_ variables. The only reader of the environment.

A variable says what somebody has exported, perhaps for another process: whatever a job or a launcher sets is inherited
by all that is submitted or started inside it. So nothing is concluded from one variable that anybody may export: who
watches over this process is asked of the process itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tlx.base.errors import UserError

RESUMABLE = 75
"""The exit code of a training that was asked to stop and can go on."""

_YES = ("1", "true", "yes")
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "env", "time", "timeout", "numactl", "tini", "dumb-init")
"""Programs that only start another one, and hand on its exit code."""
_AGENT = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE")
"""torchrun's agent gives its ranks all of these."""

_CLIENT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Variables of Slurm's commands themselves, and of no job."""
_OF_A_JOB = ("SLURM_", "SLURMD_", "PMI_", "PMI2_", "PMIX_", "TORCHELASTIC_")
_OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
_OF_OUR_JOB = ("TLX_RUN", "TLX_DO", "TLX_BEGAN", "TLX_CHAIN", "TLX_VERDICT", "TLX_THREADS", "RANKS")
"""What slurm/train.sbatch sets for its own training."""


@dataclass(frozen=True)
class Environment:
    """The environment of this process, and what it says about who started it.

    Attributes:
        variables: all of them, as they are.
        accelerate: the words of the `accelerate launch` that started this process; empty where none did.
    """

    variables: Mapping[str, str]
    accelerate: Sequence[str] = ()

    def get(self, name: str, default: str = "") -> str:
        return self.variables.get(name, default)

    @property
    def elastic(self) -> bool:
        """Whether torchrun's agent has started this process, its own or that of `accelerate launch`."""
        return all(name in self.variables for name in _AGENT)

    @property
    def launched(self) -> bool:
        """Whether a launcher that turns exit codes into banners and restarts stands over this process."""
        return self.elastic or bool(self.accelerate)

    @property
    def ranked(self) -> bool:
        """Whether this process was started as a rank, by a launcher, by srun or by hand."""
        return "WORLD_SIZE" in self.variables

    @property
    def meets(self) -> bool:
        """Whether there are other ranks to meet, or a process group of this one alone to make."""
        return "RANK" in self.variables and self.ranked

    @property
    def rank(self) -> int:
        """Of all processes, before there is a process group; 0 where RANK is no number, so that it can be told."""
        return self._count("RANK")

    @property
    def size(self) -> int:
        """Of all processes.

        Raises:
            UserError: WORLD_SIZE is no number.
        """
        return self.number("WORLD_SIZE", 1)

    @property
    def local_rank(self) -> int:
        """Of the processes on this machine.

        Raises:
            UserError: LOCAL_RANK is no number.
        """
        return self.number("LOCAL_RANK", 0)

    @property
    def local_size(self) -> int:
        """How many processes this machine has, as far as it is said.

        Raises:
            UserError: LOCAL_WORLD_SIZE is no number.
        """
        return self.number("LOCAL_WORLD_SIZE", 1)

    @property
    def restarted(self) -> bool:
        """Whether the launcher above has started its ranks again, after one of them failed."""
        return self._count("TORCHELASTIC_RESTART_COUNT") > 0

    @property
    def agent_serves(self) -> bool:
        """Whether the store where ranks meet lives in the launcher and not in rank 0."""
        return self.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    @property
    def job(self) -> str | None:
        """The number of the Slurm job that this process runs in."""
        return self.get("SLURM_JOB_ID") or None

    @property
    def requeued_job(self) -> str | None:
        """The number of the Slurm job that this is another start of; None of a first start, or without Slurm."""
        return self.job if self._count("SLURM_RESTART_COUNT") > 0 else None

    @property
    def step_tasks(self) -> int:
        """How many tasks srun has started together with this one; 1 where it was not srun."""
        return max(self._count("SLURM_STEP_NUM_TASKS"), 1)

    @property
    def on_cpu(self) -> bool:
        """Whether accelerate is told to leave GPUs alone."""
        return self.get("ACCELERATE_USE_CPU").lower() in _YES

    @property
    def began(self) -> float | None:
        """When the command was started, in seconds of the epoch, where a batch script says it."""
        said = self.get("TLX_BEGAN")
        return float(said) if said.isdecimal() else None

    def number(self, name: str, default: int) -> int:
        """
        Raises:
            UserError: the variable is set and no number.
        """
        said = self.get(name)
        if said and not said.isdecimal():
            raise UserError(f"{said!a} is no number", where=name, todo="unset it, or let a launcher set it")
        return int(said) if said else default

    def outside(self) -> dict[str, str]:
        """The environment for a job that is submitted from here: without what the job, the step and the launcher that
        this process runs in have set for themselves. sbatch hands on all that it is given, and what Slurm does not set
        anew would be taken for the new job's own."""
        own = {*_OF_A_RANK, *_OF_OUR_JOB}
        if self.get("OMP_NUM_THREADS") == self.get("TLX_THREADS"):
            own.add("OMP_NUM_THREADS")
        return {
            name: value
            for name, value in self.variables.items()
            if name in _CLIENT or not (name.startswith(_OF_A_JOB) or name in own)
        }

    def _count(self, name: str) -> int:
        said = self.get(name)
        return int(said) if said.isdecimal() else 0


def environment() -> Environment:
    """Of this process, as it is now."""
    variables = dict(os.environ)
    # accelerate says so wherever it starts something; whether it was this process, only the process above knows
    perhaps = "ACCELERATE_MIXED_PRECISION" in variables
    return Environment(variables, _accelerate_above(os.getpid()) if perhaps else ())


def export(name: str, value: str, *, replace: bool = True) -> None:
    """Tells a library that reads the environment, and the processes that this one starts."""
    if replace or name not in os.environ:
        os.environ[name] = value


def withdraw(name: str) -> None:
    """The same libraries and processes find nothing under this name any more."""
    os.environ.pop(name, None)


@contextmanager
def exported_meanwhile(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, they are exported with these values, or not at all where that is None; afterwards as before."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        withdraw(name) if value is None else export(name, value)


def launched() -> bool:
    return environment().launched


def ranked() -> bool:
    return environment().ranked


def relaunched() -> bool:
    return environment().restarted


def requeued_job() -> str | None:
    return environment().requeued_job


def rank() -> int:
    return environment().rank


def program(words: Sequence[str]) -> tuple[str, list[str]]:
    """What a command line runs, the name of a program or of python's script or module, and the words after it."""
    name, rest = Path(words[0]).name, list(words[1:])
    if not name.startswith("python"):
        return name, rest
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        rest = rest[2 if rest[0] in ("-W", "-X") else 1 :]
    if rest[:1] == ["-m"]:
        return rest[1] if len(rest) > 1 else "", rest[2:]
    return (Path(rest[0]).name, rest[1:]) if rest else (name, [])


def is_accelerate(words: Sequence[str]) -> bool:
    """Whether a command line is that of `accelerate launch`."""
    name, rest = program(words) if words else ("", [])
    if name in ("accelerate", "accelerate.commands.accelerate_cli"):
        return rest[:1] == ["launch"]
    return name in ("accelerate-launch", "accelerate.commands.launch")


@cache  # once: a launcher that has died since was there all the same
def _accelerate_above(pid: int) -> tuple[str, ...]:
    """The words of the `accelerate launch` that started a process, shells and the like between them left out."""
    import psutil

    try:
        for process in psutil.Process(pid).parents():
            words = process.cmdline()
            if is_accelerate(words):
                return tuple(words)
            if not words or Path(words[0]).name.lstrip("-") not in _SHELLS:
                break
    except (psutil.Error, OSError):  # it is gone, or another user's
        pass
    return ()


def verdict_file() -> Path | None:
    """Where whoever started this process wants to read how it ended; see :mod:`tlx.base.verdict`."""
    said = environment().get("TLX_VERDICT")
    return Path(said) if said else None
