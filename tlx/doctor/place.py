"""What the launcher says about this process: which rank it is, of how many, on how many nodes."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
    said, host = Environment(env, accelerate), socket.gethostname()
    if not (env.get("RANK") and env.get("WORLD_SIZE")):
        return Place("plain python", 0, 1, 0, 1, max(said.number("SLURM_STEP_NUM_NODES", 1), 1), host)
    size, here = said.size, said.number("LOCAL_WORLD_SIZE", 0)
    nodes = said.number("GROUP_WORLD_SIZE", 0) or said.number("SLURM_STEP_NUM_NODES", 0)
    nodes = nodes or (max(size // here, 1) if here else said.number("SLURM_JOB_NUM_NODES", 1))
    launcher = "accelerate launch" if said.accelerate else "torchrun" if said.elastic else ""
    launcher = launcher or ("srun" if in_step(env) else "RANK and WORLD_SIZE in the environment")
    return Place(launcher, said.number("RANK", 0), size, said.local_rank, here or -(-size // nodes), nodes, host)


def in_step(env: Mapping[str, str]) -> bool:
    """Whether srun has started this process, or an ancestor of it."""
    return "SLURM_STEP_NUM_TASKS" in env


def launcher(place: Place, env: Mapping[str, str]) -> Iterator[Finding]:
    """Who started this. Tasks of srun that know nothing of each other are refused as training refuses them."""
    half = [name for name in ("RANK", "WORLD_SIZE") if env.get(name)]
    if place.alone and len(half) == 1:
        yield fault("launcher", f"of RANK and WORLD_SIZE only {half[0]} is set: this would train alone", "set both")
    elif place.alone:
        yield ok("launcher", f"none: one process on {place.host}")
    else:
        yield ok("launcher", f"{place.launcher}: ranks {place.size}, nodes {place.nodes}")
