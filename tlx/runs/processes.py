"""Processes around a rank: the launcher above it, and ranks of the same start beside it.

What the operating system knows of processes on this machine, asked once a second. A signal at the parent's death
(``PR_SET_PDEATHSIG``) would come when the parent's *thread* ends, and not at all where a shell stands between, so it is
not used. A parent need not be a launcher: a shell that is closed ends no training that was started with `nohup`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from tlx.base.launcher import environment, is_accelerate
from tlx.runs.stop import EarlySignals

_MARKS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""What launchers set for the processes that they start, and nobody exports in a shell."""

_START = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What ranks of one start have in common."""


def launcher_above(env: Mapping[str, str] | None = None) -> psutil.Process | None:
    """The process that has started this one as a rank: the nearest ancestor without the mark that launchers leave in
    the environment of their ranks (torchrun's agent, which accelerate uses too; slurmstepd; mpirun), or `accelerate
    launch` itself, which starts a lone process without one. None where there is none, or it cannot be seen."""
    env = environment().variables if env is None else env
    mark = next((name for name in _MARKS if name in env), None)
    try:
        if mark is None:
            parent = psutil.Process().parent() if "ACCELERATE_MIXED_PRECISION" in env else None
            return parent if parent is not None and is_accelerate(parent.cmdline()) else None
        return next((p for p in psutil.Process().parents() if _said(p).get(mark) != env[mark]), None)
    except psutil.Error:
        return None


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, also where nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # not ours to look at: it is there
        return False


_SAME_MOMENT_S = 10.0


@dataclass
class Siblings:
    """Ranks of the same start that the same parent has started on this machine.

    Ranks that have not met cannot hear of each other; one that was seen here and is no more has ended before it came.

    Attributes:
        env: what tells ranks of this start, and this one's own.
        seen: process by rank.
    """

    parent: psutil.Process | None
    env: Mapping[str, str]
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    @classmethod
    def here(cls, env: Mapping[str, str] | None = None, *, parent: psutil.Process | None = None) -> Siblings:
        """As they are now; `parent`: of this process, unless it is another one."""
        env = environment().variables if env is None else env
        said = {name: env[name] for name in ("RANK", *_START, "LOCAL_WORLD_SIZE") if name in env}
        made = cls(parent or psutil.Process().parent(), said)
        made.look()
        return made

    def look(self) -> None:
        """Sees who has come."""
        for child in self._children():
            said = _said(child)
            rank, same = said.get("RANK", ""), all(said.get(name) == self.env[name] for name in _START)
            if same and rank.isdecimal() and rank != self.env["RANK"] and not is_gone(child):
                self.seen[int(rank)] = child

    def nameless(self) -> list[int]:
        """Processes that ended before anybody could tell which ranks they were, while not all of this machine have
        come: alike, of the same moment, and their parent has yet to ask for their exit codes."""
        ranks = self.env.get("LOCAL_WORLD_SIZE", self.env.get("WORLD_SIZE", ""))
        if not ranks.isdecimal() or len(self.seen) + 1 >= int(ranks):
            return []
        own, known = psutil.Process(), {child.pid for child in self.seen.values()}
        born, name = own.create_time(), own.name()
        return [c.pid for c in self._children() if c.pid not in known and _is_zombie(c, born=born, name=name)]

    def _children(self) -> list[psutil.Process]:
        if self.parent is None or self.parent.pid == 1 or not self.env.keys() >= {"RANK", *_START}:
            return []
        try:
            return list(self.parent.children())
        except psutil.Error:
            return []

    def gone(self) -> dict[int, int]:
        """Ranks that were here and have ended: their process ids."""
        return {rank: child.pid for rank, child in self.seen.items() if is_gone(child)}


def _is_zombie(process: psutil.Process, *, born: float, name: str) -> bool:
    try:
        zombie = process.status() == psutil.STATUS_ZOMBIE
        return bool(zombie and abs(process.create_time() - born) < _SAME_MOMENT_S and process.name() == name)
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Early:
    """What a rank sees and hears from the first moment on, since its imports take seconds."""

    siblings: Siblings
    signals: EarlySignals | None


@functools.cache
def early() -> Early:
    """Of this process, from the first call on."""
    return Early(Siblings.here(), EarlySignals.heard())


def _said(process: psutil.Process) -> Mapping[str, str]:
    """Its environment; nothing where it is another user's."""
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):
        return {}
