"""What ranks tell each other beside the collectives: signs of life, and who is at fault, through the rendezvous' store.

Every rank writes its own sign once a second and reads those of rank 0 and of its successor, so that the traffic of a
large world stays small while each rank is watched by another one; it reads all of them only where something is wrong.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from tlx.base.terminal import flush

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_S = 1.0
_NOBODY = "-"
_AGAIN = 2  # new connections to a store that has cut one

State = Literal["alive", "stuck", "failed", "refused", "stopped", "leaving", "told", "left"]


@dataclass(frozen=True)
class Sign:
    """Of one rank.

    Attributes:
        born: when its process was started, in seconds since the epoch; tells another process under the same number.
        count: signs so far.
        step, stage: what its main thread is at.
        collectives: that it has begun; whoever hangs has begun the fewest.
        state: `stuck`: no beat for too long; `failed`: of itself; `refused`: by the user's mistake, `stopped`: by a
            fault that tlx noticed, mostly on all ranks alike; `leaving`: since another rank failed; `told`: it knows
            which; `left`: it has no more to do.
        why: where in the code it is stuck, or how it failed.
    """

    rank: int
    host: str
    pid: int
    born: float
    count: int = 0
    step: int = 0
    stage: str = "start"
    collectives: int = 0
    state: State = "alive"
    why: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        return f"at step {self.step}, in '{self.stage}'"


@dataclass(frozen=True)
class Verdict:
    """Who is at fault, the same on every rank that reads it.

    Attributes:
        mute: ranks that cannot speak for the run any more.
    """

    kind: Literal["died", "failed", "refused", "hangs", "store", "launcher", "asked"]
    message: str
    mute: Sequence[int] = ()


class Wire:
    """Exchanges signs in a thread of its own, since a store that does not answer would hold up who judges.

    Attributes:
        own: this rank's sign, to be replaced whenever there is news.
        seen: the newest signs of others.
        whole: whether all ranks are read.
        proposal: this rank's verdict; of several ranks' the first one counts.
        gone: why the store cannot be asked any more, over a new connection neither.
        refused: and nobody listens there.
        answered: how often it has answered.
    """

    def __init__(self, store: Store, own: Sign, size: int) -> None:
        self.own, self.size = own, size
        self.seen: dict[int, Sign] = {}
        self.whole = False
        self.proposal: Verdict | None = None
        self.verdict: Verdict | None = None
        self.gone: str | None = None
        self.refused = False
        self.answered = 0
        self._connect(store)  # its own: the main thread may wait in the other one
        self._store.compare_set("verdict", "", _NOBODY)
        self._known = {own.rank}
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="tlx-signs", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """News are told now."""
        self._wake.set()

    def close(self, *, timeout_s: float) -> None:
        """Tells the last sign and ends the thread, unless the store keeps it waiting."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            atexit.register(self._leave)

    def _leave(self) -> None:
        """A thread inside of a store that does not answer would abort the process at the interpreter's end."""
        if self._thread.is_alive():
            flush()
            os._exit(0 if self.own.state == "left" else 1)

    def _serve(self) -> None:
        broken = 0
        while True:
            ended = self._ended.is_set()
            try:
                if broken:
                    self._reconnect()
                self._exchange()
                self.answered += 1
                broken = 0
            except dist.DistStoreError:  # no answer in time: it may be slow
                pass
            except Exception as error:
                broken += 1
                if broken > _AGAIN or ended or self.refused:
                    self.gone = str(error).splitlines()[0] if str(error) else type(error).__name__
                    return
            if ended:
                return
            self._wake.wait(BEAT_S)
            self._wake.clear()

    def _connect(self, store: Store) -> None:
        self._connection = store.clone()
        self._connection.set_timeout(timedelta(seconds=10))
        self._store = dist.PrefixStore("signs", self._connection)  # type: ignore[attr-defined]

    def _reconnect(self) -> None:
        """A connection may be cut while the store lives on."""
        server: Any = self._connection
        while hasattr(server, "underlying_store"):
            server = server.underlying_store
        if hasattr(server, "host"):
            try:  # a new client would try for long, and fill the output with traces
                socket.create_connection((server.host, server.port), timeout=3).close()
            except ConnectionRefusedError:
                self.refused = True
                raise
        self._connect(self._connection)

    def _exchange(self) -> None:
        own = self.own
        self._store.set(_key(own.rank), json.dumps(dataclasses.asdict(own)))
        wanted = range(self.size) if self.whole else {0, (own.rank + 1) % self.size}
        new = [r for r in wanted if r not in self._known]
        if new and not self._store.check([_key(r) for r in new]):  # one question, where all are there
            new = [r for r in new if self._store.check([_key(r)])]
        self._known |= set(new)
        ranks = [r for r in wanted if r in self._known and r != own.rank]
        if ranks:
            for rank, text in zip(ranks, self._store.multi_get([_key(r) for r in ranks]), strict=True):
                self.seen[rank] = Sign(**json.loads(text))
        said = json.dumps(dataclasses.asdict(self.proposal)) if self.proposal else _NOBODY
        agreed = self._store.compare_set("verdict", _NOBODY, said).decode()
        if agreed != _NOBODY and self.verdict is None:
            self.verdict = Verdict(**json.loads(agreed))


def gather_by_store(store: Store, rank: int, size: int, value: Any, *, topic: str, timeout: timedelta) -> list[Any]:
    """Every rank's value, which JSON can say, by rank; before there is a process group.

    Raises:
        torch.distributed.DistError: a rank has not come in time.
    """
    own = dist.PrefixStore(topic, store)  # type: ignore[attr-defined]
    own.set(str(rank), json.dumps(value))
    keys = [str(r) for r in range(size)]
    own.wait(keys, timeout)
    return [json.loads(text) for text in own.multi_get(keys)]


def _key(rank: int) -> str:
    return f"sign/{rank}"
