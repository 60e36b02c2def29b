"""What the launcher says about this process: which rank it is, of how many, on how many nodes."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tlx.base.errors import UserError
from tlx.base.launcher import Environment, environment
from tlx.doctor.findings import Finding, fault, ok


@dataclass(frozen=True)
class Place:
    """
    Attributes:
        launcher: in words.
        rank, size: of all processes; 0 of 1 without a launcher.
        local: which one of its node.
        here: processes on this node.
        nodes: as far as the environment tells.
    """

    launcher: str
    rank: int
    size: int
    local: int
    here: int
    nodes: int
    host: str

    @property
    def alone(self) -> bool:
        """Nobody to meet: no launcher has said who else there is."""
        return self.launcher == "plain python"

    @property
    def speaks(self) -> bool:
        """Whether this process prints for all. Tasks of srun that nobody told of each other are each rank 0."""
        return self.rank == 0 and (not self.alone or environment().get("SLURM_PROCID", "0") == "0")


def of_environment(env: Mapping[str, str], accelerate: Sequence[str] = ()) -> Place:
    """
    Args:
        accelerate: the words of the `accelerate launch` above this process.

    Raises:
        UserError: RANK, WORLD_SIZE or their like are no numbers.
    """

    def number(*names: str, default: int) -> int:
        said = next((env[name] for name in names if env.get(name)), None)
        try:
            return default if said is None else int(said)
        except ValueError:
            raise UserError(
                f"{said!r} is no number", where=names[0], todo="unset it, or let a launcher set it"
            ) from None

    ranked = bool(env.get("RANK")) and bool(env.get("WORLD_SIZE"))
    size = number("WORLD_SIZE", default=1) if ranked else 1
    here = number("LOCAL_WORLD_SIZE", default=0) if ranked else 1
    nodes = number("GROUP_WORLD_SIZE", default=0) if ranked else 0
    if not nodes and in_step(env):
        nodes = number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    if not nodes:
        nodes = max(size // here, 1) if here else number("SLURM_JOB_NUM_NODES", default=1)
    return Place(
        launcher=_launcher(Environment(env, accelerate), ranked),
        rank=number("RANK", default=0) if ranked else 0,
        size=size,
        local=number("LOCAL_RANK", default=0) if ranked else 0,
        here=here or -(-size // nodes),
        nodes=nodes,
        host=socket.gethostname(),
    )


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process, or an ancestor of it."""
    return "SLURM_STEP_NUM_TASKS" in env


def _launcher(here: Environment, ranked: bool) -> str:
    if not ranked:
        return "plain python"
    if here.accelerate:
        return "accelerate launch"
    if here.elastic:
        return "torchrun"
    return "srun" if in_step(here.variables) else "RANK and WORLD_SIZE in the environment"


def launcher(place: Place, env: Mapping[str, str]) -> Iterator[Finding]:
    """Who started this, and whether all that were started know of each other."""
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or 1)
    if place.alone and tasks > 1:
        yield fault(
            "launcher",
            f"srun has started {tasks} tasks, and WORLD_SIZE is not set: each would train alone, in one run folder",
            "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from SLURM_PROCID and its like in each "
            "task, or start one torchrun per node; slurm/train.sbatch does both",
        )
        return
    half = [name for name in ("RANK", "WORLD_SIZE") if env.get(name)]
    if place.alone and len(half) == 1:
        other = "WORLD_SIZE" if half == ["RANK"] else "RANK"
        yield fault("launcher", f"{half[0]} is set and {other} is not: this would train alone", "set both, or neither")
        return
    if place.alone:
        yield ok("launcher", f"none: one process on {place.host}")
        return
    nodes = "1 node" if place.nodes == 1 else f"{place.nodes} nodes"
    yield ok("launcher", f"{place.launcher}: {place.size} {'rank' if place.size == 1 else 'ranks'} on {nodes}")
