"""A part of the rendezvous' store that belongs to this very start of all ranks.

torchrun keeps its store when it starts the ranks again after a fault, and gloo then reads the addresses of ranks that
are dead. The number of restarts does not tell starts apart: on several nodes each agent counts its own.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from tlx.errors import TlxError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PAUSE_S = 0.02


def of_this_attempt(store: Store, rank: int, size: int, *, timeout: timedelta) -> Store:
    """The store under a prefix that all ranks of this start agree on, and no other start has.

    Every rank says a word of its own; rank 0 says all of them back, under its own word. Who hears the word that it has
    just made up hears a living rank 0, and answers; once all have, everybody has heard everybody.

    Raises:
        TlxError: not all ranks have come in time; on rank 0 with their numbers.
    """
    own, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    token = _lead(store, own, size, end) if rank == 0 else _follow(store, own, rank, end)
    return dist.PrefixStore(f"tlx/{token}", store)  # type: ignore[attr-defined,no-any-return]


def _lead(store: Store, own: str, size: int, end: float) -> str:
    others = [str(rank) for rank in range(1, size)]
    said: dict[str, str] = {}
    while True:
        here = [rank for rank in others if store.check([f"tlx-hello/{rank}"])]
        heard = {rank: store.get(f"tlx-hello/{rank}").decode() for rank in here}
        if heard != said or not others:
            said = heard
            store.set("tlx-attempt", json.dumps({"token": own, "words": said}))
        answered = [rank for rank in others if store.check([f"tlx-{own}/{rank}"])]
        if len(answered) == len(others):
            return own
        if time.monotonic() > end:
            missing = ", ".join(rank for rank in others if rank not in answered)
            raise TlxError(f"rank {missing} of {size} has not come\n  -> look at how it was started, and its output")
        time.sleep(_PAUSE_S)


def _follow(store: Store, own: str, rank: int, end: float) -> str:
    store.set(f"tlx-hello/{rank}", own)
    while True:
        if store.check(["tlx-attempt"]):
            said = json.loads(store.get("tlx-attempt"))
            if said["words"].get(str(rank)) == own:
                token = str(said["token"])
                store.set(f"tlx-{token}/{rank}", "here")
                return token
        if time.monotonic() > end:
            raise TlxError("rank 0 has not come\n  -> look at how it was started, and its output")
        time.sleep(_PAUSE_S)
