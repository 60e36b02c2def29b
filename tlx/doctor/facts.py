"""What only all ranks together tell: the cores and GPUs of each node, the nodes of the job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tlx.base.launcher import environment
from tlx.base.limits import cores, cpu_quota
from tlx.doctor import hardware, slurm
from tlx.doctor.findings import Finding, fault, merged, named, ok, warning
from tlx.doctor.place import Place, in_step


@dataclass(frozen=True)
class Facts:
    """Of one rank, for what only all of them together tell.

    Attributes:
        gpu: which one it computes on, by an identity that all processes of a node agree on.
    """

    host: str
    cores: list[int]
    quota: float | None
    workers: int
    gpu: str | None


def of_rank(place: Place, *, workers: int, on_cpu: bool) -> Facts:
    """Those of this process."""
    import torch

    gpu = None
    with suppress(RuntimeError):  # of a GPU that has failed; the finding on it says so
        if not on_cpu and torch.cuda.is_available():
            about = torch.cuda.get_device_properties(place.local % torch.cuda.device_count())
            gpu = str(getattr(about, "uuid", "")) or None
    return Facts(place.host, cores(), cpu_quota(), workers, gpu)


def joint(all_facts: Sequence[Facts], *, backend: str | None) -> Iterator[Finding]:
    """What only all ranks together tell: cores and GPUs of each node, nodes of the job."""
    hosts: dict[str, list[int]] = {}
    for rank, one in enumerate(all_facts):
        hosts.setdefault(one.host, []).append(rank)
    first = ", ".join(list(hosts)[:4]) + (" ..." if len(hosts) > 4 else "")
    yield ok("ranks", f"all {len(all_facts)} have met, nodes: {len(hosts)} ({first})")
    yield from slurm.judge_nodes(slurm.nodes_of(environment().variables), list(hosts))
    by_node = {}
    for ranks in hosts.values():
        by_node[ranks[0]] = list(_of_node([all_facts[rank] for rank in ranks], ranks, backend=backend))
    yield from merged(by_node, {rank: all_facts[rank].host for rank in by_node})


def _of_node(of_node: Sequence[Facts], ranks: Sequence[int], *, backend: str | None) -> Iterator[Finding]:
    usable = {core for one in of_node for core in one.cores}
    yield from hardware.judge_cores(
        len(usable), of_node[0].quota, ranks=len(of_node), workers=of_node[0].workers,
        in_step=in_step(environment().variables),
    )  # fmt: skip
    gpus: dict[str, list[int]] = {}
    for rank, one in zip(ranks, of_node, strict=True):
        if one.gpu is not None:
            gpus.setdefault(one.gpu, []).append(rank)
    shared = next((who for who in gpus.values() if len(who) > 1), None)
    if shared is not None:
        make = warning if backend == "gloo" else fault  # nccl refuses it
        todo = "start one process per GPU; LOCAL_RANK counts the processes of a node"
        yield make("GPU of each rank", f"{named(shared)} compute on the same GPU", todo)
    elif gpus:
        yield ok("GPU of each rank", "each has its own")
