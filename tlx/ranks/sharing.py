"""Ranks that share work without training: they speak over gloo, nothing is wrapped, accelerate is not there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tlx.base.launcher import environment
from tlx.ranks.collectives import World
from tlx.ranks.environment import refuse_unranked
from tlx.ranks.rendezvous import rendezvous_store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_JOIN = timedelta(minutes=10)
_WORK = timedelta(days=7)  # one rank may be done long before another; one that dies closes its connections at once
_STOP = "tlx-stop"


@dataclass(frozen=True)
class Sharing(World):
    """This rank, and what passes between all."""

    accelerator: Any = None
    store: Store | None = None

    def ask_to_stop(self) -> None:
        if self.store is not None:
            self.store.set(_STOP, "1")

    def stops(self) -> bool:
        """A question over the network."""
        return self.store is not None and bool(self.store.check([_STOP]))


def join_sharing() -> Sharing:
    """Joins the ranks that a launcher has started; of one alone nothing is begun. Each has a GPU, where there are some.

    Raises:
        UserError: srun has started tasks that do not know of each other; ranks are numbered, and nothing says where to
            meet.
        TlxError: not all ranks joined in time.
    """
    here = environment()
    refuse_unranked(here)
    device = torch.device("cpu")
    if torch.cuda.is_available() and not here.on_cpu:
        device = torch.device("cuda", here.local_rank % torch.cuda.device_count())
    if here.size == 1 or not here.meets:
        return Sharing(0, 1, device, here.launched)
    store, rank, size = rendezvous_store(_JOIN)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_WORK)
    return Sharing(rank, size, device, here.launched, store=store)
