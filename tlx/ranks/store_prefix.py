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

from tlx.base.errors import TlxError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PAUSE_S, _LONGEST_S, _GROWTH = 0.02, 1.0, 1.5  # between questions: a large world that waits must not drown the store
_LOOK = "look at how it was started, and its output"


def of_this_attempt(store: Store, rank: int, size: int, *, timeout: timedelta) -> Store:
    """The store under a prefix that all ranks of this start agree on, and no other start has.

    Every rank says a word of its own; rank 0 says all of them back, under its own word. Who hears the word that it has
    just made up hears a living rank 0, and answers; once all have, everybody has heard everybody, and rank 0 says so.

    Raises:
        TlxError: not all ranks joined in time; on rank 0 with their numbers.
    """
    own, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    token = _lead(store, own, size, end) if rank == 0 else _follow(store, own, rank, end)
    return dist.PrefixStore(f"tlx/{token}", store)  # type: ignore[attr-defined,no-any-return]


def _lead(store: Store, own: str, size: int, end: float) -> str:
    missing = others = [str(rank) for rank in range(1, size)]
    said: dict[str, str] = {}
    pause = _PAUSE_S
    while missing:
        here = [rank for rank in others if rank in said or store.check([f"tlx-hello/{rank}"])]
        words = store.multi_get([f"tlx-hello/{rank}" for rank in here]) if here else []
        heard = {rank: word.decode() for rank, word in zip(here, words, strict=True)}
        if heard != said:  # a word that a rank of an earlier start left gives way to its successor's
            said, pause = heard, _PAUSE_S
            store.set("tlx-attempt", json.dumps({"token": own, "words": said}))
        before, missing = missing, [r for r in missing if r not in said or not store.check([f"tlx-{own}/{r}"])]
        if missing and time.monotonic() > end:
            raise TlxError(f"rank {', '.join(missing)} of {size} did not join\n  -> {_LOOK}")
        if missing:
            pause = _rest(pause if missing == before else _PAUSE_S, end)
    store.set(f"tlx-{own}/all", "here")
    return own


def _follow(store: Store, own: str, rank: int, end: float) -> str:
    store.set(f"tlx-hello/{rank}", own)
    pause = _PAUSE_S
    while True:
        if store.check(["tlx-attempt"]):
            said = json.loads(store.get("tlx-attempt"))
            if said["words"].get(str(rank)) == own:
                token = str(said["token"])
                break
        if time.monotonic() > end:
            raise TlxError(f"rank 0 did not join\n  -> {_LOOK}")
        pause = _rest(pause, end)
    store.set(f"tlx-{token}/{rank}", "here")
    try:
        store.wait([f"tlx-{token}/all"], timedelta(seconds=max(end - time.monotonic(), 1)))
    except dist.DistError as error:  # rank 0 may have been the first to give up, and its store with it
        raise TlxError("not all ranks joined; rank 0 did, and names those that did not\n  -> see its output") from error
    return token


def _rest(pause: float, end: float) -> float:
    """Waits; how long to wait the next time."""
    time.sleep(max(min(pause, end - time.monotonic()), 0.001))
    return min(pause * _GROWTH, _LONGEST_S)
